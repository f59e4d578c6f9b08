"""The video case of ``bench data``: ten-second H.264 files, and clips of 16 frames from them as one writes it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cohobate import data
from cohobate.data.video.decode import read_frames
from cohobate.data.video.encode import encode_clip

FRAMES, STRIDE = 16, 4
TOLERANCE = 0.03  # mean difference of pixels over their mean: JPEG of quality 90 is among what is compared
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


class PyavClips(Dataset[Tensor]):
    """A map-style data set: seek, decode, convert, crop and resize frame by frame with Pillow."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return 1 << 20  # the same few files again and again

    def __getitem__(self, index: int) -> Tensor:
        import av

        side, frames = random.choice((256, 224, 192, 168)), []
        top, left = random.randint(0, 256 - side), random.randint(0, 340 - side)
        with av.open(self.paths[index % len(self.paths)]) as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1
            begin = random.randint(0, stream.frames - FRAMES * STRIDE)
            tick = float(stream.average_rate * stream.time_base)
            file.seek(int(begin / tick), stream=stream)
            for frame in file.decode(stream):
                place = round(frame.pts * tick) - begin
                if place >= 0 and place % STRIDE == 0:
                    image = frame.to_image().crop((left, top, left + side, top + side))
                    frames.append(np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR)))
                if len(frames) == FRAMES:
                    break
        return torch.from_numpy(np.stack(frames))


def batches(name: str, folder: Path, batch_size: int, size: int, workers: int) -> Iterator[object]:
    """Endless batches of a loader."""
    found = manifest(folder, name)
    if name != "pyav":
        return iter(
            data.open_loader(found, plan(len(found), size), batch_size=batch_size, loader="torch", workers=workers)
        )
    clips = PyavClips(list(found.paths), size)
    return iter(DataLoader(clips, batch_size=batch_size, shuffle=True, num_workers=workers))


def difference(folder: Path, name: str, size: int) -> float:
    """Mean difference over the mean to the video files' frames and Pillow, of two clips with the plan's boxes."""
    found, videos = manifest(folder, name), manifest(folder, "torch")
    made = plan(len(found), size)
    with data.open_loader(found, made, batch_size=2, loader="torch", workers=0) as loader:
        batch = next(loader)
    ids = batch.sample_ids.numpy()
    boxes, _ = made.crops(0, ids, found.heights[ids], found.widths[ids])
    total = error = 0.0
    for row, video in enumerate(ids.tolist()):
        top, left, height, width = boxes[row].tolist()
        wanted = made.clip_frames(0, ids[row : row + 1], found.frames[ids[row : row + 1]])[0, 0]
        for place, frame in enumerate(read_frames(videos, video, wanted.tolist())):
            image = Image.fromarray(frame).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            error += float(np.abs(batch.pixels[row, place].numpy() - expected).mean())
            total += float(expected.mean())
    return error / total
