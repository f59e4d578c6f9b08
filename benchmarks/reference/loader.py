"""How published codes bring images and clips to a model: map-style data sets, a sample at a time, through Pillow.

Images as in MAE and dBOT: random resized crop (bicubic), flip. Clips as in VideoMAE and AMD: the file is opened anew,
a window of 64 frames decoded from the key frame before it, every fourth kept, one multi-scale crop (bilinear) of all.
Both end as fp32, normalised, channels first. ``floats=False`` leaves the last step out and gives the uint8 pixels that
the engine's loaders give: [H, W, C], or [T, H, W, C].
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

Box = tuple[int, int, int, int]  # top, left, height, width
Pixels = NDArray[np.uint8]

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
FRAMES, STRIDE = 16, 4
SCALES = (1, 0.875, 0.75, 0.66)  # of the short side
# In quarters of what a crop leaves over: corners, middles of the sides, centre, and halfway from it to the corners.
PLACES = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]


class Images(Dataset[Tensor]):
    """Files, cropped and flipped at random."""

    def __init__(self, paths: Sequence[str], size: int, floats: bool = True) -> None:
        self.paths, self.size, self.floats = paths, size, floats

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as file:
            width, height = file.size
        pixels = torch.from_numpy(image(self.paths[index], random_box(height, width), random.random() < 0.5, self.size))
        return normalised(pixels) if self.floats else pixels


def image(path: str, box: Box, flip: bool, size: int) -> Pixels:
    """Decode, crop, resize, mirror: [size, size, 3]."""
    with Image.open(path) as file:
        picture = _cropped(file.convert("RGB"), box)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(picture)


def random_box(height: int, width: int) -> Box:
    """A random resized crop: area 0.2 to 1, aspect 3/4 to 4/3, even in logarithm; with the cheapest random numbers."""
    for _ in range(10):
        area = height * width * random.uniform(0.2, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width


class Clips(Dataset[Tensor]):
    """Videos of a steady rate, a random window and crop of each."""

    def __init__(self, paths: Sequence[str], size: int, floats: bool = True) -> None:
        self.paths, self.size, self.floats = paths, size, floats

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(clip(self.paths[index], None, None, self.size))
        return normalised(pixels) if self.floats else pixels


def clip(path: str, wanted: Sequence[int] | None, box: Box | None, size: int) -> Pixels:
    """Seek, decode, crop and resize frame by frame: [T, size, size, 3]. ``wanted``, ``box``: None draws them."""
    import av

    frames: list[Pixels] = []
    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        if wanted is None:
            begin = random.randint(0, max(stream.frames - FRAMES * STRIDE, 0))
            wanted = [min(begin + STRIDE * step, stream.frames - 1) for step in range(FRAMES)]
        if box is None:
            box = multi_scale_box(stream.codec_context.height, stream.codec_context.width)
        assert stream.average_rate is not None and stream.time_base is not None
        tick = float(stream.average_rate * stream.time_base)  # frames
        file.seek(int(wanted[0] / tick), stream=stream)
        for frame in file.decode(stream):
            place = round((frame.pts or 0) * tick)
            if place in wanted:
                picture = _cropped(frame.to_image(), box).resize((size, size), Image.Resampling.BILINEAR)
                frames += [np.asarray(picture)] * wanted.count(place)
            if len(frames) == len(wanted):
                break
    return np.stack(frames)


def multi_scale_box(height: int, width: int) -> Box:
    """Sides from SCALES of the short one, at most one step apart, at one of 13 places."""
    pairs = [(a, b) for a in range(4) for b in range(4) if abs(a - b) <= 1]
    high, wide = random.choice(pairs)
    h, w = int(min(height, width) * SCALES[high]), int(min(height, width) * SCALES[wide])
    y, x = random.choice(PLACES)
    return (height - h) // 4 * y, (width - w) // 4 * x, h, w


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W, C] -> fp32, by ImageNet's mean and deviation, channels first."""
    return ((pixels.float() / 255 - MEAN) / STD).movedim(-1, 0).contiguous()


def _cropped(picture: Image.Image, box: Box) -> Image.Image:
    top, left, height, width = box
    return picture.crop((left, top, left + width, top + height))


def batches(samples: Images | Clips, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Random batches, for ever. Published epochs are long; a benchmark's few files must not cost the start of many."""
    order = RandomSampler(samples, replacement=True, num_samples=1 << 40)
    yield from DataLoader(samples, batch_size=batch_size, sampler=order, num_workers=workers)
