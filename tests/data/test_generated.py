"""The generated set: determined by its parameters, labelled in balance, and mute in its mean colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cohobate import data
from cohobate.data import generated
from cohobate.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_image_depends_on_nothing_but_its_number(tmp_path: Path) -> None:
    """Not on how many there are, nor on how many processes drew them."""
    few = contents(data.make_images(tmp_path / "few", train=10, test=3, processes=1))
    many = contents(data.make_images(tmp_path / "many", train=300, test=3, processes=2))
    assert len(many) == 300 + 3 + 3
    for name in (f"train/{index:06d}.jpg" for index in range(10)):
        assert few[name] == many[name]
    assert len({many[f"train/{index:06d}.jpg"] for index in range(300)}) == 300


def test_seed_split_and_variant_change_every_image() -> None:
    base, _ = generated.draw("small", "train", 5, seed=0)
    for other in (("small", "test", 5, 0), ("small", "train", 5, 1), ("small", "train", 69, 0)):
        image, labels = generated.draw(*other)
        assert labels == (5, 0)  # 69 = 5 + 64 has the same labels
        assert np.abs(image.astype(int) - base).mean() > 10
    large, _ = generated.draw("large", "train", 5)
    assert base.shape == (40, 40, 3) and large.shape == (96, 96, 3)


def test_files_labels_and_list(small_set: Path) -> None:
    manifest = data.build_manifest(small_set, split="train")
    assert manifest.label_names == ("texture", "shape")
    assert manifest.labels is not None
    index = np.arange(96)
    np.testing.assert_array_equal(manifest.labels, np.stack([index % 8, index // 8 % 8], axis=1))
    with Image.open(manifest.paths[7]) as image:
        assert image.format == "JPEG" and image.size == (40, 40)
        stored = np.asarray(image).astype(int)
    drawn, _ = generated.draw("small", "train", 7)
    assert np.abs(stored - drawn).mean() < 16  # quality 90 with halved colours, on grainy stripes


def test_the_same_set_is_not_made_twice(tmp_path: Path) -> None:
    folder = data.make_images(tmp_path / "set", train=8, test=8)
    marked = folder / "train" / "000000.jpg"
    marked.write_bytes(b"mine")
    assert data.make_images(folder, train=8, test=8) == folder
    assert marked.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # nothing left aside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 9, "test": 8}, "holds another generated set"),
        ({"train": 8, "test": 8, "seed": 1}, "holds another generated set"),
        ({"train": 0}, "train: expected at least 1"),
        ({"variant": "huge"}, "variant: expected one of small, large, got 'huge'"),
        ({"seed": -1}, "seed: expected 0"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: dict, message: str) -> None:
    folder = data.make_images(tmp_path / "set", train=8, test=8, processes=1)
    with pytest.raises(UserError, match=message):
        data.make_images(folder, **arguments)


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="with other files"):
        data.make_images(tmp_path, train=8, test=8)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(UserError, match="no fingerprint"):
        data.make_images(tmp_path, train=8, test=8)
    with pytest.raises(UserError, match="got the file"):
        data.make_images(tmp_path / "fingerprint.json", train=8, test=8)


def test_the_fingerprint_names_the_parameters(small_set: Path) -> None:
    found = json.loads((small_set / "fingerprint.json").read_text())
    assert found["train"] == 96 and found["test"] == 40 and found["variant"] == "small" and found["seed"] == 0


def test_mean_colour_tells_nothing() -> None:
    """A vote of 20 neighbours in mean colour is right as often as chance: 1/8, give or take.

    2048 guesses at 1/8 have a standard deviation of 0.0073, so 0.16 is almost five of them.
    """
    train, test = 4096, 2048
    drawn = [generated.draw("small", "train", index) for index in range(train + test)]
    means = np.array([image.reshape(-1, 3).mean(0) for image, _ in drawn], dtype=np.float32)
    labels = np.array([pair for _, pair in drawn])
    queries, memory = means[train:], means[:train]
    squares = (queries**2).sum(1)[:, None] - 2 * queries @ memory.T + (memory**2).sum(1)
    nearest = np.argpartition(squares, 20, axis=1)[:, :20]
    for kind in range(2):
        votes = np.apply_along_axis(np.bincount, 1, labels[:train, kind][nearest], minlength=8)
        accuracy = float((votes.argmax(1) == labels[train:, kind]).mean())
        assert accuracy < 0.16, f"{generated.LABEL_NAMES[kind]}: {accuracy:.3f}"


def test_every_shape_and_texture_covers_the_same_area() -> None:
    """What makes mean colours mute: equal shares, by construction."""
    for kind in generated.SHAPES:
        axis = np.linspace(-2, 2, 801, dtype=np.float32)
        scale = generated._unit(kind)
        inside = generated.OUTLINES[kind](axis[None, :] / scale, axis[:, None] / scale) > 0
        assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.02), kind
        assert not inside[0].any() and not inside[:, 0].any(), f"{kind} does not fit"
    for family in generated.TEXTURES:
        shares = []
        for seed in range(40):
            draws = iter(np.random.default_rng(seed).random(64).tolist())
            shares.append(generated._texture(family, generated.VARIANTS["small"], draws).mean())
        # Drawn evenly from 0.30 to 0.42; edges are soft, which moves a share by a hundredth or two.
        assert np.mean(shares) == pytest.approx(0.36, abs=0.03), family
