"""``cohobate viz``: which pictures it writes, what is in them, and how it says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cohobate import cli, data
from cohobate.cli import viz
from cohobate.models import Decoder, PixelDecoder, VisionTransformer
from cohobate.report import pictures
from cohobate.tokens import TokenGrid
from cohobate.training import export

PNG = b"\x89PNG\r\n\x1a\n"
GRID = TokenGrid.image(16, 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_images(tmp_path_factory.mktemp("viz") / "set", train=12, test=4, processes=1)


def exported(folder: Path, decoder: Decoder | None, method: str = "mae", grid: TokenGrid = GRID) -> Path:
    encoder = VisionTransformer(grid, 24, 2, 3)
    return export(folder, encoder, decoder, {"method": method})


def pixel_decoder(grid: TokenGrid = GRID, out: int | None = None) -> Decoder:
    return Decoder(grid, 24, grid.row_length if out is None else out, 24, 1, 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("weights") / "mae", pixel_decoder())


def run(*words: object) -> int:
    return cli.main(["viz", *map(str, words)])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[pictures.Row]]:
    """The rows of every sheet that is drawn."""
    found: list[list[pictures.Row]] = []
    drawn = pictures.sheet

    def sheet(rows: Any, *args: Any, **options: Any) -> Any:
        found.append(list(rows))
        return drawn(rows, *args, **options)

    monkeypatch.setattr(pictures, "sheet", sheet)
    return found


def hidden(clips: NDArray[Any]) -> NDArray[np.bool_]:
    """The tokens of 4 x 4 pixels that are grey all over, [n, 4, 4]."""
    grey: NDArray[np.bool_] = (clips == 225).all(-1).reshape(-1, 4, 4, 4, 4).all(axis=(2, 4))
    return grey


def test_everything_that_an_autoencoder_can_show(
    weights: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert run(weights, images / "train.txt", "--out", out, "--count", 3) == 0
    lines = capfd.readouterr().out.splitlines()
    kinds = ["masks", "pca", "attention", "reconstruction", "retrieval"]
    assert lines[:5] == [str(out / f"{kind}.png") for kind in kinds]
    assert all((out / f"{kind}.png").read_bytes().startswith(PNG) for kind in kinds)
    assert lines[5:] == [f"{kind}: not drawn: {weights} is no run folder" for kind in ("loss", "knn")]


def test_masks_and_reconstruction_are_of_the_ratio_and_kind(
    weights: Path, images: Path, tmp_path: Path, shown: list[list[pictures.Row]]
) -> None:
    words = (weights, images / "train.txt", "--out", tmp_path, "--mask-ratio", "0.5", "--mask-kind", "block")
    assert run(*words, "--kind", "masks,reconstruction") == 0
    (whole, seen), again = shown
    assert whole.clips.shape == (8, 1, 16, 16, 3)
    assert (hidden(seen.clips).sum(axis=(1, 2)) == 8).all()
    assert [row.name for row in again] == ["image", "student sees", "reconstruction"]
    np.testing.assert_array_equal(again[1].clips, seen.clips)  # the same plan
    kept = ~hidden(seen.clips).repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(again[2].clips[:, 0][kept], whole.clips[:, 0][kept])
    assert (again[2].clips[:, 0][~kept] != whole.clips[:, 0][~kept]).mean() > 0.5
    shown.clear()
    for changed in (("--seed", 1), ("--mask-kind", "random")):
        assert run(*words, "--kind", "masks", *changed) == 0
        assert not np.array_equal(hidden(shown.pop()[1].clips), hidden(seen.clips))


def test_images_by_name_come_in_their_order(
    weights: Path, images: Path, tmp_path: Path, shown: list[list[pictures.Row]]
) -> None:
    files = [images / "train" / "000005.jpg", images / "train" / "000002.jpg"]
    assert run(weights, *files, "--out", tmp_path, "--kind", "masks") == 0
    assert run(weights, files[1], "--out", tmp_path, "--kind", "masks") == 0
    both, one = (rows[0].clips for rows in shown)
    assert len(both) == 2 and len(one) == 1
    np.testing.assert_array_equal(both[1], one[0])


def test_a_run_gives_its_masks_and_its_curves(
    images: Path, tmp_path: Path, shown: list[list[pictures.Row]], capfd: pytest.CaptureFixture[str]
) -> None:
    from cohobate import config

    folder = tmp_path / "run"
    exported(folder / "exports" / "1-mae", pixel_decoder())
    settings = config.load("demo", ["data.image_size=16", "mask.ratio=0.9", "mae.normalise=false"])
    (folder / "config.yaml").write_text(config.dump(settings))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "stage": 1, "loss/total": 0.5}) + "\n")
    assert run(folder, images / "train.txt", "--out", tmp_path, "--kind", "masks,loss", "--count", 2) == 0
    assert (hidden(shown[0][1].clips).sum(axis=(1, 2)) == 15).all()  # floor(16 x 0.1) = 1 is kept
    assert capfd.readouterr().out.splitlines()[1] == str(tmp_path / "loss.png")
    assert run(folder, "--out", tmp_path, "--kind", "loss") == 0  # needs no images


def test_clips_are_made_of_frames_in_order(
    images: Path, tmp_path: Path, shown: list[list[pictures.Row]], capfd: pytest.CaptureFixture[str]
) -> None:
    grid = TokenGrid(4, 16, 16, (2, 4, 4))
    decoder = PixelDecoder(grid, 24, grid.row_length, 24, 1, 3)
    video = exported(tmp_path / "video", decoder, "videomae", grid)
    assert run(video, images / "train.txt", "--out", tmp_path) == 0
    masks, components, attention, reconstruction = shown
    assert masks[0].clips.shape == (3, 4, 16, 16, 3)
    tubes = np.stack([hidden(masks[1].clips[:, frame]) for frame in range(4)], axis=1)
    assert (tubes.sum(axis=(2, 3)) == 14).all() and (tubes == tubes[:, :1]).all()  # floor(0.9 x 16) in every frame
    assert "retrieval: not drawn: it is made of images, not of clips" in capfd.readouterr().out
    assert [row.name for row in reconstruction] == ["clip", "student sees", "reconstruction"]
    assert components[1].clips.shape == attention[1].clips.shape == (3, 4, 16, 16, 3)
    complaint(capfd, video, images / "train" / "000002.jpg", "--out", tmp_path, has="expected at least 4 images")


class Own(nn.Module):
    """A model of its own kind, which cannot be rebuilt."""

    grid, width, depth, prefix, mean, std = GRID, 12, 1, 0, (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(48, 12)

    def hidden_states(self, pixels: Tensor, layers: Any) -> list[Tensor]:
        x = pixels.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return [self.mix(x) for _ in layers]


def test_what_cannot_be_rebuilt_shows_features_and_says_why_no_attention(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from cohobate.teacher import sources

    found = sources.load_source(Own())
    monkeypatch.setattr(sources, "load_source", lambda spec: found)
    assert run("timm:own", images / "train.txt", "--out", tmp_path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert str(tmp_path / "pca.png") in lines and str(tmp_path / "retrieval.png") in lines
    (reason,) = [line for line in lines if line.startswith("attention: ")]
    assert reason.startswith("attention: not drawn: Own runs as it is: ")
    assert "reconstruction: not drawn: timm:own has no decoder" in lines


def complaint(capfd: pytest.CaptureFixture[str], *words: object, has: str) -> None:
    capfd.readouterr()
    assert run(*words) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("cohobate: ") and has in line, line


def test_mistakes_are_one_line(weights: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listed, out = images / "train.txt", ("--out", tmp_path / "out")
    features = exported(tmp_path / "dbot", pixel_decoder(out=24), "dbot")
    bare = exported(tmp_path / "bare", None)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    asked = (*out, "--kind", "reconstruction")
    complaint(capfd, weights, has="viz: the following arguments are required: --out")
    complaint(capfd, weights, *out, has="images: expected image files, a folder or a list, got none")
    complaint(capfd, weights, *out, "--kind", "pca", has="images: expected image files, a folder or a list, got none")
    complaint(capfd, weights, listed, *out, "--kind", "pcs", has="got 'pcs'; did you mean 'pca'?")
    complaint(capfd, weights, listed, *out, "--count", 0, has="count: expected at least 1 image, got 0")
    complaint(capfd, weights, listed, *out, "--mask-ratio", 1.5, has="ratio: expected a mask ratio in [0, 1), got 1.5")
    complaint(capfd, weights, listed, *out, "--mask-kind", "cube", has="invalid choice: 'cube'")
    complaint(capfd, "/nowhere", listed, *out, has="weights: expected a run folder or an export")
    complaint(capfd, weights, "/nowhere", *out, has="source: expected a folder of images")
    complaint(capfd, weights, images / "train" / "000001.jpg", broken, *out, has="broken.jpg (")
    complaint(capfd, weights, broken, *out, has=f"images: expected images that can be read, got {broken}")
    complaint(capfd, weights, listed, "--out", broken, has="out: expected a folder, got the file")
    complaint(capfd, weights, listed, *out, "--device", "tpu", has="device: expected auto, cpu or cuda, got 'tpu'")
    complaint(capfd, features, listed, *asked, has="got 'reconstruction': the decoder in")
    complaint(capfd, bare, listed, *asked, has="got 'reconstruction': there is no decoder beside the weights")
    complaint(capfd, weights, images / "train" / "000001.jpg", *out, "--kind", "retrieval", has="at least two images")
    assert not (tmp_path / "out").exists()


def test_help_names_the_kinds(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capfd.readouterr().out
    assert all(kind in text for kind in viz.KINDS) and "usage: cohobate viz" in text
