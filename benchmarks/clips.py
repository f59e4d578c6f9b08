"""The video case of ``bench data``: ten-second H.264 files, shards of their frames, and clips of 16 frames of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cohobate import data
from cohobate.benchmarks.reference import loader
from cohobate.benchmarks.reference.loader import FRAMES, STRIDE
from cohobate.data.video.encode import encode_clip

BASELINES = ("literal", "pyav")
# Mean difference of pixels over their mean: JPEG of quality 90 is among what is compared, and two ways to RGB.
TOLERANCE = 0.03
_SHARDS = "shards"


def make(folder: Path, count: int, seed: int) -> Path:
    """Files of 340 x 256, 300 frames, key frames as x264 sets them: a drifting picture with grain; and their shards."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        total: NDArray[np.float32] = np.zeros((556, 640, 3), dtype=np.float32)
        for cells, share in ((8, 0.45), (32, 0.3), (128, 0.25)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(coarse.resize((640, 556), Image.Resampling.BICUBIC), dtype=np.float32) * share
        frames = np.stack([total[t : t + 256, t : t + 340] for t in range(300)])
        frames += rng.normal(0, 4, (300, 256, 340, 1)).astype(np.float32)
        body = encode_clip(np.clip(frames, 0, 255).astype(np.uint8), g="250", crf="23", preset="veryfast")
        (videos / f"{index:05d}.mp4").write_bytes(body)
    data.make_shards(data.build_video_manifest(videos), folder / _SHARDS, videos_per_shard=max(1, count // 4))
    return folder


def manifest(folder: Path, name: str) -> data.VideoManifest:
    """What a loader reads."""
    return data.build_video_manifest(folder / (_SHARDS if name == "torch-shards" else "videos"))


def plan(count: int, size: int) -> data.ClipPlan:
    """The Kinetics rule, multi-scale crops."""
    return data.ClipPlan(count, seed=0, image_size=size, frames=FRAMES, stride=STRIDE)


def batches(name: str, folder: Path, batch_size: int, size: int, workers: int) -> Iterator[object]:
    """Endless batches of a loader."""
    found = manifest(folder, name)
    if name in BASELINES:
        return loader.batches(loader.Clips(list(found.paths), size, floats=name == "literal"), batch_size, workers)
    return iter(data.open_loader(found, plan(len(found), size), batch_size=batch_size, loader="torch", workers=workers))


def difference(folder: Path, name: str, size: int) -> float:
    """Mean difference over the mean to the literal clips of the files, of two with the plan's frames and boxes."""
    found, videos = manifest(folder, name), manifest(folder, "torch")
    made = plan(len(found), size)
    with data.open_loader(found, made, batch_size=2, loader="torch", workers=0) as batches:
        batch = next(batches)
    ids = batch.sample_ids.numpy()
    boxes, _ = made.crops(0, ids, found.heights[ids], found.widths[ids])
    total = error = 0.0
    for row, video in enumerate(ids.tolist()):
        top, left, height, width = boxes[row].tolist()
        wanted = made.clip_frames(0, ids[row : row + 1], found.frames[ids[row : row + 1]])[0, 0]
        expected = loader.clip(videos.paths[video], wanted.tolist(), (top, left, height, width), size).astype(int)
        error += float(np.abs(batch.pixels[row].numpy() - expected).mean())
        total += float(expected.mean())
    return error / total
