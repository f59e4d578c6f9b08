"""Loading clips: the same batches whatever stores and decodes them, how often one starts, and what is broken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate import data
from cohobate.data import Batch, ClipPlan, Loader
from cohobate.data import loader as module
from cohobate.data.video.encode import encode_clip
from cohobate.data.video.manifest import VideoManifest, build_video_manifest
from cohobate.errors import UserError

needs_dali = pytest.mark.skipif(bool(module.why_not("dali-cpu", torch.device("cpu"))), reason="DALI is not installed")
EXECUTORS = ["torch", pytest.param("dali-cpu", marks=needs_dali)]
STORED = ["vp9", "mjpeg", "shard", "frames"]


@pytest.fixture(scope="module")
def manifests(small_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, VideoManifest]:
    """The same clips in every form that both executors read; ``h264`` for one of them."""
    found = {codec: build_video_manifest(small_videos / codec, split="train") for codec in ("vp9", "mjpeg", "h264")}
    root = tmp_path_factory.mktemp("stills")
    data.make_shards(found["vp9"], root / "shards", processes=1, videos_per_shard=20)
    found["shard"] = build_video_manifest(root / "shards")
    from cohobate.data.video.shards import open_shard

    for video in range(24):
        shard, folder = open_shard(str(root / "shards" / f"0000{video // 20}.frames")), root / "frames" / f"{video:02}"
        folder.mkdir(parents=True)
        for frame in range(32):
            (folder / f"f{frame}.jpg").write_bytes(shard.jpeg(video % 20, frame))
    found["frames"] = build_video_manifest(root / "frames")
    return found


def plan_of(manifest: VideoManifest, **changes: Any) -> ClipPlan:
    return ClipPlan(**({"count": len(manifest), "seed": 3, "image_size": 48, "frames": 8, "stride": 2} | changes))


def open_(manifest: VideoManifest, plan: ClipPlan | None = None, **options: Any) -> Loader:
    options = {"batch_size": 4, "workers": 0, "loader": "torch"} | options
    options["workers"] = max(options["workers"], 0 if options["loader"] == "torch" else 1)
    return data.open_loader(manifest, plan or plan_of(manifest), **options)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader, count))


def same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.valid, b.valid)
        assert torch.equal(a.pixels, b.pixels)


# -- what a batch is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_contract(manifests: dict[str, VideoManifest], executor: str) -> None:
    manifest = manifests["vp9"]
    with open_(manifest, plan_of(manifest, repeats=2), loader=executor) as loader:
        assert loader.name == executor and loader.steps_per_epoch == 12
        batch = next(loader)
        assert loader.counters["samples"] == 4 and "videos" in loader.report()
    assert batch.pixels.shape == (4, 8, 48, 48, 3) and batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous() and bool(batch.valid.all()) and batch.views == 2
    assert batch.sample_ids.tolist() == [place * 2 + view for place in batch.places.tolist()[::2] for view in (0, 1)]
    assert manifest.labels is not None and batch.labels is not None
    assert torch.equal(batch.labels, torch.from_numpy(manifest.labels)[batch.places])
    assert batch.to("cpu").views == 2


def test_views_of_a_video_share_frames_and_have_masks_of_their_own(manifests: dict[str, VideoManifest]) -> None:
    from cohobate.masking import random_plan
    from cohobate.tokens import TokenGrid

    manifest = manifests["shard"]
    whole = plan_of(manifest, crop="random_resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), repeats=4)
    batch = take(open_(manifest, whole, batch_size=8), 1)[0]
    assert all(torch.equal(batch.pixels[4 * v], batch.pixels[4 * v + k]) for v in (0, 1) for k in (1, 2, 3))
    cut = take(open_(manifest, plan_of(manifest, repeats=4), batch_size=8), 1)[0]
    assert not any(torch.equal(cut.pixels[a], cut.pixels[b]) for a, b in itertools.combinations(range(4), 2))
    grid = TokenGrid(8, 48, 48, (2, 16, 16))
    masks = random_plan(grid, cut.sample_ids, seed=0, stage=0, epoch=0, ratio=0.5, tube=True)
    assert len(np.unique(masks.order[:4].numpy(), axis=0)) == 4


def test_pixels_are_the_plans_frames_and_boxes(manifests: dict[str, VideoManifest]) -> None:
    """Frame folders against Pillow alone."""
    manifest = manifests["frames"]
    plan = plan_of(manifest, flip=0.5, repeats=2)
    batch = take(open_(manifest, plan, batch_size=8), 1)[0]
    places = batch.places.numpy()
    size = np.full(8, 64, dtype=np.int32)
    boxes, flips = plan.crops(0, batch.sample_ids.numpy(), size, size)
    frames = plan.clip_frames(0, places, np.full(8, 32))[:, 0]
    assert 0 < flips.sum() < 8
    for row in range(8):
        top, left, height, width = boxes[row].tolist()
        for t in (0, 3, 7):
            path = Path(manifest.paths[places[row]]) / f"f{frames[row, t]}.jpg"
            image = Image.open(path).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
            expected = expected[:, ::-1] if flips[row] else expected
            difference = np.abs(batch.pixels[row, t].numpy() - expected)
            assert difference.mean() < 0.3 and difference.max() <= 3


# -- the same batches, however they are made ---------------------------------------------------------------------------

PLANS: list[dict[str, Any]] = [
    {"repeats": 2, "flip": 0.5},
    {"sampling": "linspace"},
    {"train": False, "test_views": (2, 2)},
]


@needs_dali
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("changes", PLANS, ids=["repeats", "linspace", "test views"])
def test_executors_agree(manifests: dict[str, VideoManifest], stored: str, changes: dict[str, Any]) -> None:
    manifest = manifests[stored]
    plan = plan_of(manifest, **changes)
    one = take(open_(manifest, plan), 4)
    other = take(open_(manifest, plan, loader="dali-cpu"), 4)
    for a, b in zip(one, other):
        assert torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.valid, b.valid)
        assert (a.pixels.int() - b.pixels.int()).abs().float().mean() < 0.5


def test_all_forms_of_a_clip_are_one_clip(manifests: dict[str, VideoManifest]) -> None:
    """The same frames and boxes from files, shards and folders; JPEG compression and chroma are what differs."""
    batches = {name: take(open_(manifests[name]), 2) for name in STORED}
    same(batches["shard"], batches["frames"])
    weights = torch.tensor([0.299, 0.587, 0.114])
    for name in ("vp9", "mjpeg"):
        for a, b in zip(batches["shard"], batches[name]):
            assert torch.equal(a.sample_ids, b.sample_ids)
            assert ((a.pixels.float() - b.pixels.float()) @ weights).abs().mean() < 4


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("stored", ["vp9", "shard"])
def test_resume_ranks_and_workers_change_nothing(
    manifests: dict[str, VideoManifest], stored: str, executor: str
) -> None:
    manifest = manifests[stored]
    plan = plan_of(manifest, repeats=2)
    whole = take(open_(manifest, plan, loader=executor), 14)  # beyond the first epoch of 12
    for start in (1, 5, 11, 12):
        same(take(open_(manifest, plan, loader=executor, start=start), 2), whole[start : start + 2])
    same(take(open_(manifest, plan, loader=executor, workers=2), 5), whole[:5])
    parts = [take(open_(manifest, plan, loader=executor, batch_size=2, rank=r, world_size=2), 5) for r in (0, 1)]
    for step in range(5):
        for name in ("pixels", "sample_ids", "valid", "labels"):
            assert torch.equal(torch.cat([getattr(p[step], name) for p in parts]), getattr(whole[step], name))


def test_test_views_are_every_clip_once(manifests: dict[str, VideoManifest]) -> None:
    manifest = manifests["shard"].subset(range(5))
    plan = plan_of(manifest, train=False, test_views=(3, 2))
    with open_(manifest, plan, batch_size=12) as loader:
        batches = list(loader)
    assert [int(batch.valid.sum()) for batch in batches] == [12, 12, 6]
    assert torch.cat([batch.sample_ids[batch.valid] for batch in batches]).tolist() == list(range(30))
    everything = data.load_all(manifest, plan, workers=0)
    assert everything.pixels.shape == (30, 8, 48, 48, 3) and everything.views == 6
    assert everything.places.tolist() == [place for place in range(5) for _ in range(6)]
    assert torch.equal(everything.pixels[:12], batches[0].pixels)


# -- bad files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_videos_that_go_bad_later_are_replaced_and_counted(
    clip: np.ndarray, write: Callable[..., Path], no_videos: dict[str, tuple[bytes, str]], executor: str
) -> None:
    folder = write({f"{index:02}.webm": encode_clip(np.roll(clip, index, 1), "vp9") for index in range(20)})
    manifest = build_video_manifest(folder)
    expected: dict[str, str] = {}
    for index, (body, reason) in enumerate(no_videos.values()):
        (folder / f"{index:02}.webm").write_bytes(body)
        expected[f"{index:02}.webm"] = reason
    (folder / "10.webm").unlink()
    (folder / "11.webm").write_bytes(encode_clip(clip[:20], "vp9"))
    (folder / "12.webm").write_bytes(encode_clip(clip[:, :48], "vp9"))
    expected |= {"10.webm": "missing", "11.webm": "changed", "12.webm": "changed"}
    broken = {int(name[:2]) for name in expected}
    loader = open_(manifest, plan_of(manifest, repeats=2), loader=executor, batch_size=10, max_bad=1.0)
    batches = take(loader, 4)
    planned = np.repeat(plan_of(manifest).order(0, np.arange(20)), 2)
    places = torch.cat([batch.places for batch in batches]).tolist()
    valid = torch.cat([batch.valid for batch in batches]).tolist()
    for row, place in enumerate(places):
        assert place not in broken and valid[row] == (planned[row] not in broken)
        assert not valid[row] or place == planned[row]
    assert {Path(path).name: reason for path, reason in loader.bad_files()} == expected
    assert all(float(pixels.float().std()) > 5 for batch in batches for pixels in batch.pixels)


def test_one_unreadable_file_among_thousands_costs_nothing(tmp_path: Path, clip: np.ndarray) -> None:
    for index in range(8):
        (tmp_path / f"{index}.avi").write_bytes(encode_clip(clip[index : index + 2], "mjpeg"))
    lines = [f"{index % 8}.avi {index}" for index in range(2000)]
    (tmp_path / "bad.avi").write_bytes(encode_clip(clip, "mjpeg")[:60])
    (tmp_path / "list.txt").write_text("\n".join([*lines[:999], "bad.avi 7", *lines[999:]]))
    manifest = build_video_manifest(tmp_path / "list.txt")
    assert len(manifest) == 2000 and [Path(path).name for path, _ in manifest.quarantine] == ["bad.avi"]
    assert manifest.labels is not None and manifest.labels[:, 0].tolist() == list(range(2000))
    with open_(manifest) as loader:
        assert bool(next(loader).valid.all()) and loader.report()["left_out"] == {manifest.quarantine[0][1]: 1}


# -- what cannot be opened ---------------------------------------------------------------------------------------------


@needs_dali
def test_dali_on_a_cpu_names_the_codec(manifests: dict[str, VideoManifest]) -> None:
    with pytest.raises(UserError, match=r"DALI decodes no h264 on a CPU, only vp8, vp9, mjpeg; use torch, or JPEG"):
        open_(manifests["h264"], loader="dali-cpu")
    with pytest.raises(UserError, match="in colour only"):
        open_(manifests["vp9"], loader="dali-cpu", channels=1)
    assert take(open_(manifests["shard"], loader="dali-cpu", channels=1), 1)[0].pixels.shape == (4, 8, 48, 48, 1)
    assert take(open_(manifests["h264"], loader="auto", channels=1), 1)[0].pixels.shape == (4, 8, 48, 48, 1)


@needs_dali
def test_the_probe_can_decode_video() -> None:
    from cohobate.data.dali_executor import self_test

    self_test(None, video=True)


def test_arguments(manifests: dict[str, VideoManifest], small_set: Path) -> None:
    manifest = manifests["vp9"]
    with pytest.raises(UserError, match="batch_size: expected a multiple of the plan's 3 views of a video, got 4"):
        open_(manifest, plan_of(manifest, repeats=3))
    with pytest.raises(UserError, match="at most 24 videos x 2 views a step, as many as there are, got 50"):
        open_(manifest, plan_of(manifest, repeats=2), batch_size=50)
    with pytest.raises(UserError, match="plan: expected a ClipPlan, for the manifest is of videos, got a SamplePlan"):
        data.open_loader(manifest, data.SamplePlan(24, 0, 32), batch_size=4)
    images = data.build_manifest(small_set, split="test")
    with pytest.raises(UserError, match="plan: expected a SamplePlan, for images, got a ClipPlan"):
        data.open_loader(images, ClipPlan(40, 0, 32), batch_size=4)
