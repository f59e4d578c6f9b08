"""``cohobate data shard``: make shards of JPEG frames from videos or frame folders."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cohobate.data.decode import Pixels, encode_jpeg, render
from cohobate.data.generated import available_cores, mark_folder
from cohobate.data.video.decode import read_frames
from cohobate.data.video.manifest import VideoManifest
from cohobate.data.video.shards import SUFFIX, ShardWriter, open_shard
from cohobate.errors import UserError


@dataclass(frozen=True)
class _Part:
    """One shard's share of the work, sent to a process."""

    manifest: VideoManifest
    path: Path
    short_side: int | None
    quality: int


def make_shards(
    manifest: VideoManifest,
    folder: str | os.PathLike[str],
    *,
    short_side: int | None = None,
    quality: int = 90,
    videos_per_shard: int = 200,
    processes: int | None = None,
) -> Counter[str]:
    """Write the videos of a manifest as ``folder/00000.frames``, ...; the same files from any number of processes.

    Every frame is decoded as a clip of the video would be (frames of an uneven rate at an even pace) and encoded as a
    4:2:0 JPEG. Shards that are there already are kept, so an interrupted call goes on where it was.

    Args:
        short_side: pixels; larger frames are shrunk to it (bilinear, antialiased). None: as they are.
        quality: of the JPEGs, 1 to 100.
        videos_per_shard: 200 clips of ten seconds at 340 x 256 are about a gigabyte.

    Returns:
        ``videos``, and a count a reason for those left out, which the shards list too.

    Raises:
        UserError: an argument out of its range.
    """
    checks = {
        "short_side": (short_side is None or short_side >= 8, "at least 8 pixels", short_side),
        "quality": (1 <= quality <= 100, "1 to 100", quality),
        "videos_per_shard": (videos_per_shard >= 1, "at least 1", videos_per_shard),
    }
    for name, (right, expected, got) in checks.items():
        if not right:
            raise UserError(f"{name}: expected {expected}, got {got}")
    root = Path(folder)
    mark_folder(
        root,
        {
            "format": 1,
            "manifest": manifest.hash,
            "short_side": short_side,
            "quality": quality,
            "videos_per_shard": videos_per_shard,
        },
    )
    parts = []
    for number, begin in enumerate(range(0, len(manifest), videos_per_shard)):
        places = np.arange(begin, min(begin + videos_per_shard, len(manifest)))
        path = root / f"{number:05d}{SUFFIX}"
        parts.append(_Part(manifest.subset(places), path, short_side, quality))
    counts: Counter[str] = Counter()
    processes = min(processes or available_cores(), len(parts))
    if processes > 1 and "fork" in multiprocessing.get_all_start_methods():
        # Forked, because a spawned process would import the caller's main module again.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            for result in pool.map(_write, parts):
                counts.update(result)
    else:
        for part in parts:
            counts.update(_write(part))
    if not counts["videos"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise UserError(f"source: not one of {len(manifest)} videos could be decoded ({reasons})")
    return counts


def _write(part: _Part) -> Counter[str]:
    """One shard, unless it is there; what is in it."""
    manifest = part.manifest
    if part.path.exists():
        there = open_shard(str(part.path))
        return Counter(videos=len(there)) + Counter(reason for _, reason in there.meta["left_out"])
    torch.set_num_threads(1)  # the processes share the cores
    writer = ShardWriter(part.path, manifest.label_names, manifest.class_names)
    try:
        for video in range(len(manifest)):
            height, width = int(manifest.heights[video]), int(manifest.widths[video])
            size = _shrunk(height, width, part.short_side)
            labels = [] if manifest.labels is None else manifest.labels[video].tolist()
            writer.add(
                manifest.paths.relative(video),
                _encoded(manifest, video, size, part.quality),
                size=size,
                rate=float(manifest.rates[video]),
                labels=labels,
            )
        return Counter(videos=writer.close()) + Counter(reason for _, reason in writer.left_out)
    finally:
        writer.discard()


def _encoded(manifest: VideoManifest, video: int, size: tuple[int, int], quality: int) -> Iterator[bytes]:
    for frame in read_frames(manifest, video, range(int(manifest.frames[video]))):
        small: Pixels = render(frame, (0, 0, *frame.shape[:2]), False, size, "bilinear").numpy()
        yield encode_jpeg(small, quality)


def _shrunk(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    if short_side is None or min(height, width) <= short_side:
        return height, width
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale)), max(short_side, round(width * scale))
