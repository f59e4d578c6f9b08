"""Clips: several views of a video averaged, augmentation that frames share, and the command line on videos."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cohobate import cli, data
from cohobate.errors import UserError
from cohobate.evaluation import RECIPES, Classifier, ClipSource, Extractor, ImageSource, augment, extract, finetune
from cohobate.evaluation.finetune import accuracy, augmented
from cohobate.evaluation.probe import _accuracies, _batches, _features, _tokens
from cohobate.models import Precision, VisionTransformer, build
from cohobate.models.exports import export

CPU = torch.device("cpu")
QUICK = dataclasses.replace(RECIPES["quick_video"], epochs=2, warmup=1, batch=8, blr=8e-3)


def encoder(frames: int = 4) -> VisionTransformer:
    torch.manual_seed(0)
    precision = Precision(torch.float32, torch.float32)
    return build(
        image_size=16, patch=4, frames=frames, tubelet=2 if frames > 1 else 1, width=24, depth=2, heads=2,
        cls_token=False, precision=precision,
    )  # fmt: skip


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Folders of frames, 16 x 24 pixels, so that nothing is resized; one is shorter than a clip. With their pixels."""
    root, draw = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    known = {}
    for index, length in enumerate((12, 9, 30, 5)):
        pixels = draw.integers(0, 256, (length, 16, 24, 3), dtype=np.uint8)
        folder = root / "train" / ("odd" if index % 2 else "even") / f"{index}"
        folder.mkdir(parents=True)
        for frame, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{frame}.png")
        known[str(folder)] = torch.from_numpy(pixels)
    return root, known


def source(root: Path, **options: Any) -> ClipSource:
    manifest = data.build_video_manifest(root, split="train")
    return ClipSource(manifest, (16, 16), frames=4, stride=2, workers=0, **options)


def literal_views(video: Tensor, clips: int, crops: int) -> Tensor:
    """Windows of 8 frames and squares of 16 pixels, evenly from end to end; a single one in the middle."""
    free = max(0, len(video) - 8)
    found = []
    for clip in range(clips):
        # floor(share * (free + 1)): of a single one the middle, else from 0 to free
        begin = (free + 1) // 2 if clips == 1 else min(free, math.floor(clip / (clips - 1) * (free + 1)))
        last = (len(video) - 1 - begin) // 2 * 2 + begin  # of a short video, the last frame that it has
        frames = [min(begin + 2 * step, last) for step in range(4)]
        for crop in range(crops):
            left = 4 if crops == 1 else round(8 * crop / (crops - 1))
            found.append(video[frames][:, :, left : left + 16])
    return torch.stack(found)


@pytest.mark.parametrize(("views", "batch_size"), [((1, 1), 3), ((2, 3), 1), ((2, 3), 13), ((3, 1), 256)])
def test_features_are_the_mean_over_views(
    noise: tuple[Path, dict[str, Tensor]], views: tuple[int, int], batch_size: int
) -> None:
    """Against slices of the pixels, each view through the encoder by itself; and again from the cache."""
    model, (root, known) = encoder().eval(), noise
    reader = source(root, test_views=views, batch_size=batch_size)
    with torch.no_grad():
        wanted = torch.stack(
            [model.features(literal_views(known[path], *views)).mean.double().mean(0) for path in reader.manifest.paths]
        ).float()
    for _ in range(2):
        found = extract(model, reader, CPU)
        assert set(found.features) == {"mean"} and found.labels is not None and found.labels.shape == (4, 1)
        # The encoder takes the views in other batches: rounding only.
        torch.testing.assert_close(found.features["mean"], wanted, rtol=1e-4, atol=1e-5)


def test_more_views_than_a_batch_pass_in_several(
    noise: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six views of a video, at most four samples a pass: no metric gives the network more."""
    most: list[int] = []

    def counted(run: Any) -> Any:
        def call(self: Any, pixels: Tensor, *rest: Any, **words: Any) -> Any:
            most.append(len(pixels))
            return run(self, pixels, *rest, **words)

        return call

    monkeypatch.setattr(Extractor, "tokens", counted(Extractor.tokens))
    monkeypatch.setattr(Classifier, "forward", counted(Classifier.forward))
    reader, model = source(noise[0], test_views=(2, 3), batch_size=4), Extractor(encoder())
    extract(model, reader, CPU)
    for read in (_features, _tokens):
        pixels, places = next(reader.batches(CPU))
        assert all(len(value) in (1, 6) for value in read(model, pixels, len(places), reader.batch_size).values())
    accuracy(Classifier(encoder(), 2, 0.0), reader, 0)
    assert len(pixels) == 6 and set(most) == {4, 2} and len(most) == 4 * 2 + 2 * 2 + 4 * 2


def test_one_view_is_the_plain_path(noise: tuple[Path, dict[str, Tensor]]) -> None:
    """To the last bit what an image's path computes: the middle clip through the encoder, without any averaging."""
    model, reader = encoder().eval(), source(noise[0])
    everything = data.load_all(reader.manifest, reader.plan(), workers=0)
    with torch.no_grad():
        assert torch.equal(extract(model, reader, CPU).features["mean"], model.features(everything.pixels).mean)


class Seen(nn.Module):
    """Logits that are written into the first pixel of a clip."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0, 0, 0, :2].float()


def views_of(logits: list[list[list[int]]], labels: list[int]) -> Any:
    pixels = torch.tensor(logits, dtype=torch.uint8).flatten(0, 1)[:, None, None, None]
    manifest = SimpleNamespace(labels=np.array(labels)[:, None])
    batches = iter([(pixels, torch.arange(len(labels)))])
    return SimpleNamespace(manifest=manifest, batch_size=2, batches=lambda device: batches)


def test_probabilities_are_averaged_not_logits() -> None:
    """Three views; by hand: softmax gives class 0 (1 + .119 + .119) / 3 = .413, though its logits are larger in sum."""
    several = views_of([[[10, 0], [0, 2], [0, 2]], [[1, 0], [1, 0], [0, 1]]], [1, 0])
    assert accuracy(Seen(), several, 0) == 1.0  # type: ignore[arg-type]
    single = views_of([[[10, 0]], [[0, 1]]], [0, 0])
    assert accuracy(Seen(), single, 0) == 0.5  # type: ignore[arg-type]


def test_a_probe_counts_videos_not_views() -> None:
    def read(_: Extractor, pixels: Tensor, files: int, most: int) -> dict[str, Tensor]:
        return {"x": pixels[:, 0, 0, 0, :2].float()}

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [torch.stack([x, x.flip(1)], dim=1)]  # two rates, the second always of the other opinion

    several = views_of([[[10, 0], [0, 2], [0, 2]], [[1, 0], [1, 0], [0, 1]], [[9, 0]] * 3], [1, 0, 1])
    batches = _batches(SimpleNamespace(device=CPU), several, read)  # type: ignore[arg-type]
    (found,) = _accuracies(batches, {"x": Probe()})["x"]
    assert found.tolist() == pytest.approx([2 / 3, 1 / 3])


def test_a_linear_probe_reads_mean_features(noise: tuple[Path, dict[str, Tensor]]) -> None:
    model, reader = Extractor(encoder()), source(noise[0], test_views=(2, 3))
    pixels, places = next(reader.batches(CPU))
    found = _features(model, pixels, len(places), 5)["mean"]
    torch.testing.assert_close(found[1], model(pixels[6:12]).mean.mean(0), rtol=1e-4, atol=1e-5)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def test_the_recipes_are_the_published() -> None:
    """Rate for 256 videos, videos an update, epochs, clips x crops; then layer decay, drop path, dropout, repeats."""
    k400, ssv2, usual = (5, 3), (2, 3), (0.75, 0.1, 0.0, 2)
    table: dict[str, tuple[float, int, int, tuple[int, int], tuple[float, ...]]] = {
        "amd_small_k400": (1e-3, 512, 150, k400, usual),
        "amd_base_k400": (7e-4, 512, 90, k400, usual),
        "amd_small_ssv2": (1e-3, 256, 40, ssv2, usual),
        "amd_base_ssv2": (5e-4, 256, 30, ssv2, usual),
        "videomae_small_k400": (5e-4, 384, 150, k400, usual),
        "videomae_small_ssv2": (1e-3, 384, 40, ssv2, (0.7, 0.1, 0.0, 2)),
        "videomae_base_k400": (5e-4, 384, 75, k400, usual),
        "videomae_base_k400_800": (1e-3, 512, 100, k400, (0.75, 0.1, 0.0, 1)),
        "videomae_base_ssv2": (5e-4, 384, 30, ssv2, usual),
        "videomae_base_ssv2_800": (5e-4, 512, 50, ssv2, usual),
        "videomae_large_k400": (2e-3, 128, 35, k400, usual),
        "videomae_huge_k400": (1e-3, 512, 50, k400, (0.75, 0.2, 0.5, 2)),
        "videomae_base_ucf101": (5e-4, 128, 100, k400, (0.7, 0.2, 0.5, 2)),
    }
    assert {name for name in RECIPES if name.startswith(("amd_", "videomae_"))} == set(table)
    for name, (blr, batch, epochs, views, others) in table.items():
        r = RECIPES[name]
        assert (r.blr, r.batch, r.epochs, r.views, r.warmup, r.weight_decay) == (blr, batch, epochs, views, 5, 0.05)
        assert (r.layer_decay, r.drop_path, r.head_drop, r.repeats) == others, name
        assert (r.magnitude, r.operations, r.mixup, r.cutmix, r.erase, r.smoothing) == (7, 4, 0.8, 1, 0.25, 0.1)
        assert r.head_std == pytest.approx(0.02 * 0.001) and r.ema is None and r.clip is None
        of_ssv2 = name.endswith(("ssv2", "ssv2_800"))
        assert (r.flip, r.sampling) == ((0.0, "segments") if of_ssv2 else (0.5, "contiguous"))


def still(count: int = 6, frames: int = 3) -> Tensor:
    """Clips in which nothing moves."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 20, 24, 3), generator=draw).to(torch.uint8)
    return images.expand(-1, frames, -1, -1, -1).contiguous()


def test_frames_share_what_is_drawn() -> None:
    """Of a still clip, RandAugment and mixing give still clips: in every frame what an image becomes."""
    clips, targets = still(), torch.eye(6)
    for seed in range(4):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = augment.rand_augment(clips, one, (0.5, 0.4, 0.3), magnitude=7, count=4)
        wanted = augment.rand_augment(clips[:, 0], other, (0.5, 0.4, 0.3), magnitude=7, count=4)
        assert torch.equal(found, wanted[:, None].expand_as(found)) and not torch.equal(found, clips)
        mixed, soft = augment.mix(clips, targets, one, 0.8, 1.0)
        wanted, wanted_soft = augment.mix(clips[:, 0], targets, other, 0.8, 1.0)
        assert torch.equal(mixed, wanted[:, None].expand_as(mixed)) and torch.equal(soft, wanted_soft)


def test_a_clip_is_erased_at_one_place() -> None:
    clips = still()
    erased = augment.random_erase(clips, torch.Generator().manual_seed(0), 1.0, (0.5,) * 3, (0.2,) * 3)
    for clip, before in zip(erased, clips):
        changed = (clip != before).any(-1)
        rows, columns = (changed.any(0).any(other).nonzero() for other in (1, 0))
        inside = changed[:, int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]
        # A box in each frame, but for the odd pixel of noise that hits the old value.
        assert inside.float().mean() > 0.99 and inside[0].numel() < changed[0].numel()
        assert not torch.equal(clip[0], clip[1])  # other noise in every frame


def test_a_training_batch_of_clips_keeps_its_shape() -> None:
    labels, recipe = torch.arange(6), RECIPES["amd_base_k400"]
    draw = torch.Generator().manual_seed(0)
    pixels, targets = augmented(still(), labels, 6, recipe, encoder(), draw)
    assert pixels.shape == still().shape and pixels.dtype == torch.uint8
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_positions_of_clips_stay_and_dropout_is_for_training() -> None:
    model = Classifier(encoder(), 5, drop_path=0.0, head_std=0.5, head_drop=0.5)
    assert not any("pos_embed" in name for name, p in model.named_parameters() if p.requires_grad)
    pixels = torch.randint(0, 256, (1, 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator()
    with torch.no_grad():
        whole = model.eval()(pixels, draw.manual_seed(0))
        model.train()
        runs, again = (model(pixels.expand(500, -1, -1, -1, -1), draw.manual_seed(0)) for _ in range(2))
    assert torch.equal(runs, again) and not torch.equal(runs[0], runs[1])
    # Right in the mean: within five standard errors of 500 draws.
    assert bool(((runs.mean(0) - whole[0]).abs() < 5 * runs.std(0) / 500**0.5).all())


def test_repeats_share_a_clip_but_not_a_crop(noise: tuple[Path, dict[str, Tensor]]) -> None:
    reader = source(noise[0])
    with reader.crops(CPU, batch_size=4, seed=0, repeats=2, flip=0.0) as loader:
        batch = next(loader)
    assert loader.steps_per_epoch == 2 and batch.labels is not None
    assert batch.places[0] == batch.places[1] != batch.places[2] and torch.equal(batch.labels[0], batch.labels[1])
    assert not torch.equal(batch.pixels[0], batch.pixels[1])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    return data.make_videos(tmp_path_factory.mktemp("clips") / "set", train=32, test=8, processes=1)


def both(root: Path, **options: Any) -> tuple[ClipSource, ClipSource]:
    train, test = (
        ClipSource(data.build_video_manifest(root, split=part), (16, 16), frames=4, workers=0, **options)
        for part in ("train", "test")
    )
    return train, test


def test_a_batch_counts_videos(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two crops of 8 videos an update are 16 clips, in one pass or in four, at the rate of 8."""
    recipe = dataclasses.replace(QUICK, repeats=2, drop_path=0.0)
    lines: list[str] = []
    passes: list[int] = []

    def spy(pixels: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        passes.append(len(pixels))
        return augmented(pixels, *others)

    monkeypatch.setattr(sys.modules[finetune.__module__], "augmented", spy)
    for size in (16, 4):
        train, test = both(videos, batch_size=size)
        _, row = finetune(encoder(), train, test, recipe, label="texture", say=lines.append)
        assert row["batch"] == 8 and row["skipped"] == 0 and math.isfinite(row["loss"])
    assert passes == [16] * 2 * 4 + [4] * 2 * 4 * 4  # two epochs of four updates
    losses = [float(line.split()[3]) for line in lines]
    assert losses[:2] == pytest.approx(losses[2:], abs=2e-4)  # printed to four places
    # Updates of epoch 2 are at 1, 1.25, 1.5 and 1.75; at the last the cosine has fallen to 0.146, from 8e-3 x 8 / 256.
    assert float(lines[-1].split()[-1]) == pytest.approx(
        1e-6 + 2.49e-4 * 0.5 * (1 + math.cos(0.75 * math.pi)), rel=0.01
    )


def test_it_learns_which_way_things_move(tmp_path: Path) -> None:
    """Bars that move right or left: only time tells, and a flip would spoil it."""
    for part, count in (("train", 48), ("test", 16)):
        for index in range(count):
            phase = np.random.default_rng([index, len(part)]).integers(16)
            folder = tmp_path / part / ("left", "right")[index % 2] / str(index)
            folder.mkdir(parents=True)
            for frame in range(4):
                column = (np.arange(16) + phase + (frame if index % 2 == 0 else -frame)) % 16 < 8
                Image.fromarray(np.tile(column * np.uint8(255), (16, 1))).convert("RGB").save(folder / f"{frame}.png")
    train, test = both(tmp_path, stride=1, batch_size=16, test_views=(1, 2))
    recipe = dataclasses.replace(QUICK, epochs=12, warmup=1, batch=16, blr=0.05)
    _, row = finetune(encoder(), train, test, recipe)
    assert row["value"] > 0.9


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run that sampled segments."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("base: demo-video\ndata: {sampling: segments, stride: 3}\n")
    return export(run / "exports" / "1-teacher", encoder(), None, {}, "bilinear")


def call(*words: object) -> int:
    return cli.main(["eval", *map(str, words), "--workers", "0", "--device", "cpu"])


COMMANDS = {
    "knn": (["--k", "5"], "mean"),
    "linear": ([], "mean"),
    "linear --recipe lars_quick": (["--epochs", "2", "--augment"], "mean"),
    "attentive": (["--epochs", "2", "--rates", "1e-3", "1e-2"], "tokens"),
    "finetune": (["--epochs", "2", "--label", "motion"], "finetuned"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_metric_from_the_command_line(command: str, videos: Path, weights: Path, tmp_path: Path) -> None:
    words, features = COMMANDS[command]
    metric, *more = command.split()
    file = tmp_path / "rows.jsonl"
    assert call(metric, weights, videos, *more, *words, "--clips", 2, "--crops", 2, "--json", file) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    labels = {"motion"} if metric == "finetune" else {"texture", "motion"}
    assert {(row["features"], row["label"], row["clips"], row["crops"]) for row in rows} == {
        (features, label, 2, 2) for label in labels
    }
    assert all(row["metric"] == metric and 0 <= row["value"] <= 1 for row in rows)


def sources_of(monkeypatch: pytest.MonkeyPatch, *words: object) -> list[ClipSource]:
    """The sources that a command makes, of which no pixel is read."""
    made: list[ClipSource] = []

    def stop(self: ImageSource, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self, ClipSource)
        made.append(self)
        raise UserError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "batches", stop)
        patch.setattr(ImageSource, "crops", lambda self, device, **_: stop(self, device))
        assert call(*words) == 2
    return made


def test_clips_are_taken_as_in_pretraining_unless_asked_otherwise(
    videos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = sources_of(monkeypatch, "knn", weights, videos)
    assert (found.sampling, found.stride, found.test_views, found.batch_size) == ("segments", 3, (1, 1), 64)
    assert (found.interpolation, found.centre, found.frames) == ("bilinear", 1.0, 4)
    (found,) = sources_of(monkeypatch, "finetune", weights, videos)
    assert (found.sampling, found.stride) == ("segments", 3)
    (found,) = sources_of(monkeypatch, "finetune", weights, videos, "--recipe", "amd_base_k400")
    assert (found.sampling, found.stride, found.test_views) == ("contiguous", 4, (5, 3))
    more = ["--recipe", "amd_base_k400", "--stride", 2, "--sampling", "linspace", "--crops", 1]
    (found,) = sources_of(monkeypatch, "finetune", weights, videos, *more)
    assert (found.sampling, found.stride, found.test_views) == ("linspace", 2, (5, 1))


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured
    return captured.err


def test_bad_labels_and_options(
    videos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {"none": "", "one": " 3", "two": " 0"}
    for name, label in lists.items():
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            lines = [f"{videos}/train/{i:06d}.mp4{label if i or name != 'two' else ' 1'}\n" for i in range(4)]
            (tmp_path / name / f"{part}.txt").write_text("".join(lines))
    images = export(tmp_path / "images", encoder(frames=1), None, {})
    cases: list[tuple[list[object], str]] = [
        (["knn", weights, tmp_path / "none"], "labels: expected labelled videos in the train part"),
        (["linear", weights, tmp_path / "one"], "in the train part, got only class 3 for 4 videos"),
        (["knn", weights, videos, "--clips", 0], "--clips: expected at least 1, got 0"),
        (["knn", weights, videos, "--sampling", "all"], "sampling: expected one of contiguous, linspace, segments"),
        (["knn", images, videos, "--crops", 3], "--crops: expected with an encoder of clips, got with"),
        (["knn", images, videos], "no usable image"),
        (["finetune", weights, videos, "--recipe", "amd_k400"], "--recipe: expected one of quick, quick_video"),
    ]
    for words, message in cases:
        assert message in complaint(capsys, *words)
    assert call("knn", weights, tmp_path / "two", "--k", 2) == 0  # a list with a label a line
    with pytest.raises(UserError, match="repeats: expected 1 with images, got 2: repeated samples are of videos"):
        ImageSource(source(videos).manifest, (16, 16)).crops(CPU, batch_size=2, seed=0, repeats=2)


def test_videos_shorter_than_a_clip_are_counted(
    noise: tuple[Path, dict[str, Tensor]], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 frames of stride 2 reach over 7, of segments over 4; one has 5, and all are evaluated."""
    root = noise[0]
    assert source(root).short == 1 and dataclasses.replace(source(root), sampling="segments").short == 0
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        (tmp_path / "set" / part).symlink_to(root / "train")
    words = ["--k", 2, "--stride", 2, "--sampling", "contiguous"]
    assert call("knn", weights, tmp_path / "set", *words) == 0
    out = capsys.readouterr().out
    assert "test: 1 of 4 videos are shorter than a clip; frames are repeated" in out and "knn mean" in out
