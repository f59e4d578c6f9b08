"""What is read when: order, crop boxes and flips as pure functions of (seed, epoch, sample).

Nothing here has a state, so a run resumes from a step number alone, and any number of ranks, workers or executors gives
the same batches. Random numbers are hashed from their coordinates by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cohobate.errors import UserError

Ints = NDArray[np.int64]
Bits = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_TRIES = 10  # boxes tried before the central one, as in torchvision's RandomResizedCrop
_ROUNDS = 8
ORDER, CROP, CLIP = 1, 2, 3  # streams of random numbers


def _mix(bits: Bits) -> Bits:
    """SplitMix64's finaliser; the argument is overwritten."""
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def _key(*words: int) -> int:
    """One 64-bit key of several integers, whose order matters."""
    key = 0
    for word in words:
        key = int(_mix(np.array([(key + (word + 1) * _GOLDEN) & _MASK], dtype=np.uint64))[0])
    return key


def _hash(key: int, values: Bits) -> Bits:
    return _mix(values * np.uint64(_GOLDEN) + np.uint64(key))


def uniforms(key: int, ids: Ints, count: int) -> NDArray[np.float64]:
    """[n, count] numbers in [0, 1), a function of (key, id, column)."""
    rows = _hash(key, ids.astype(np.uint64))
    columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(rows[:, None] + columns) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(places: Ints, count: int, key: int) -> Ints:
    """Images of ``places`` under a permutation of [0, count) given by ``key``; needs no memory of size ``count``.

    A Feistel network on a rectangle a x b just larger than ``count``, walked until it is back inside (Black and
    Rogaway, CT-RSA 2002).
    """
    a = math.isqrt(max(count - 1, 0)) + 1
    b = -(-count // a)
    keys = [_key(key, turn) for turn in range(_ROUNDS)]
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = np.divmod(result[outside], np.uint64(b))
        for turn in range(0, _ROUNDS, 2):
            left = (left + _hash(keys[turn], right) % np.uint64(a)) % np.uint64(a)
            right = (right + _hash(keys[turn + 1], left) % np.uint64(b)) % np.uint64(b)
        result[outside] = left * np.uint64(b) + right
        outside = outside[result[outside] >= np.uint64(count)]
    return result.astype(np.int64)


@dataclass(frozen=True)
class SamplePlan:
    """Order, crops and flips of a data set of ``count`` images.

    Args:
        count: images. seed: any integer from 0.
        image_size: height and width of a sample; one number means a square.
        scale: area of a random crop as a share of the image's; ratio: its width over height, drawn evenly in logarithm.
        flip: chance of a horizontal flip (True means 0.5).
        interpolation: "bicubic" or "bilinear", both antialiased.
        train: random order, crops and flips, the last incomplete batch of an epoch dropped. Otherwise every image once,
            in order: the central ``centre`` of the largest box with the sample's shape, resized.
        stage: part of the seed; another stage, other randomness.
        centre: share of the box's sides when not training: 224/256, as is usual.

    Raises:
        UserError: an argument out of its range.
    """

    count: int
    seed: int
    image_size: int | tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"
    train: bool = True
    stage: int = 0
    centre: float = 0.875

    def __post_init__(self) -> None:
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)
        object.__setattr__(self, "image_size", size)
        object.__setattr__(self, "flip", 0.5 if self.flip is True else float(self.flip))
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "ratio", tuple(self.ratio))
        checks = {
            "count": (self.count >= 1, "at least 1 image"),
            "seed": (0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            "image_size": (len(size) == 2 and min(size) >= 1, "one or two numbers from 1"),
            "scale": (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1, "0 < low <= high <= 1"),
            "ratio": (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1], "0 < low <= high"),
            "flip": (0 <= self.flip <= 1, "0 to 1"),
            "interpolation": (self.interpolation in ("bicubic", "bilinear"), "bicubic or bilinear"),
            "stage": (self.stage >= 0, "0 or more"),
            "centre": (0 < self.centre <= 1, "more than 0, at most 1"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise UserError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a sample."""
        assert isinstance(self.image_size, tuple)
        return self.image_size

    @property
    def hash(self) -> str:
        """Of everything that decides what a step reads."""
        return hashlib.blake2b(json.dumps(dataclasses.asdict(self)).encode(), digest_size=16).hexdigest()

    @property
    def clips(self) -> int:
        """Parts of a file that are decoded; an image has one."""
        return 1

    @property
    def crops_per_clip(self) -> int:
        """Crops of each part."""
        return 1

    @property
    def views(self) -> int:
        """Samples made of one file, neighbours in a batch: clip 0 with all its crops, then clip 1, ..."""
        return self.clips * self.crops_per_clip

    def key(self, stream: int, epoch: int) -> int:
        """Of the random numbers of a stream in an epoch, for :func:`uniforms`."""
        return _key(self.seed, self.stage, stream, epoch)

    def steps_per_epoch(self, global_batch: int) -> int:
        """Batches of an epoch: the incomplete one at the end is dropped in training, and padded otherwise."""
        files = global_batch // self.views
        return self.count // files if self.train else -(-self.count // files)

    def places(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> tuple[int, Ints, NDArray[np.bool_]]:
        """What a rank reads at a step: (epoch, places in the epoch's order int64 [batch_size / views], valid bool).

        Ranks take contiguous slices of the global batch. Places that are not valid repeat the last one.
        """
        steps = self.steps_per_epoch(batch_size * world_size)
        epoch, inside = divmod(step, steps)
        files = batch_size // self.views
        begin = (inside * world_size + rank) * files
        places = np.arange(begin, begin + files, dtype=np.int64)
        valid = places < self.count
        return epoch, np.minimum(places, self.count - 1), valid

    def order(self, epoch: int, places: Ints) -> Ints:
        """Samples at these places of an epoch, int64 [n]."""
        if not self.train:
            return places.astype(np.int64)
        return permute(places, self.count, self.key(ORDER, epoch))

    def crops(
        self, epoch: int, ids: Ints, heights: NDArray[np.int32], widths: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 [n, 4] (top, left, height, width; pixels of the upright image), and flips bool [n].

        In training this is torchvision's ``RandomResizedCrop``: ten tries of area and ratio, the first that fits, else
        the largest central box within ``ratio``.

        Args:
            ids: int64 [n] samples. heights, widths: [n], sizes of those samples' images.
        """
        h, w = heights.astype(np.float64), widths.astype(np.float64)
        if not self.train:
            return self._central(h, w), np.zeros(len(ids), dtype=bool)
        draws = uniforms(self.key(CROP, epoch), ids, 2 * _TRIES + 3)
        area = (h * w)[:, None] * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, :_TRIES])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = np.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
        box_w, box_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (box_w > 0) & (box_w <= w[:, None]) & (box_h > 0) & (box_h <= h[:, None])
        first = fits.argmax(axis=1)[:, None]
        found = fits.any(axis=1)
        fallback_w = np.maximum(np.where(w / h > self.ratio[1], np.rint(h * self.ratio[1]), w), 1)
        fallback_h = np.maximum(np.where(w / h < self.ratio[0], np.rint(w / self.ratio[0]), h), 1)
        box_w = np.where(found, np.take_along_axis(box_w, first, 1)[:, 0], fallback_w)
        box_h = np.where(found, np.take_along_axis(box_h, first, 1)[:, 0], fallback_h)
        top = np.where(found, np.floor(draws[:, -3] * (h - box_h + 1)), np.floor((h - box_h) / 2))
        left = np.where(found, np.floor(draws[:, -2] * (w - box_w + 1)), np.floor((w - box_w) / 2))
        boxes = np.stack([top, left, box_h, box_w], axis=1).astype(np.int32)
        return boxes, draws[:, -1] < self.flip

    def _central(self, h: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.int32]:
        height, width = self.size
        unit = np.minimum(h / height, w / width) * self.centre
        box_h = np.clip(np.rint(unit * height), 1, h)
        box_w = np.clip(np.rint(unit * width), 1, w)
        return np.stack([(h - box_h) // 2, (w - box_w) // 2, box_h, box_w], axis=1).astype(np.int32)
