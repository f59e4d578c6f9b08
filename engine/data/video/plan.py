"""What is read of a video: frames, crop boxes and flips as pure functions of (seed, epoch, sample)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cohobate.data.plan import CLIP, CROP, Ints, SamplePlan, uniforms
from cohobate.errors import UserError

SAMPLINGS = ("contiguous", "linspace", "segments")
CROPS = ("multi_scale", "random_resized")
# Multi-scale cropping (Wang et al., Temporal Segment Networks, ECCV 2016): sides from these shares of the short side,
# at most one step apart, at one of 13 places, in quarters of what is left over.
_SCALES = np.array([1.0, 0.875, 0.75, 0.66])
_PAIRS = np.array([(high, wide) for high in range(4) for wide in range(4) if abs(high - wide) <= 1])
_PLACES = np.array([(y, x) for y in range(5) for x in range(5) if (y % 2 == x % 2 == 0) or (y % 2 == x % 2 == 1)])


@dataclass(frozen=True)
class ClipPlan(SamplePlan):
    """Order, frames, crops and flips of a data set of ``count`` videos.

    A video is decoded once for all of its ``views``: ``repeats`` crops of one clip in training (repeated sampling:
    Hoffer et al., CVPR 2020; AMD uses 4), ``test_views`` = (clips, crops) otherwise. View ``v`` of video ``i`` is
    sample ``i * views + v``, so every view has masks of its own. The views of a video are neighbours in a batch.

    Args:
        count: videos. frames: T, of a clip. stride: distance of two neighbouring frames.
        sampling: how T of n frames are chosen:

            - "contiguous" (Kinetics): each ``stride``-th frame of a window of T * stride; where the video is shorter,
              the last of them that it has is repeated;
            - "linspace" (Something-Something): T places evenly from the window's begin to its end, both included,
              rounded down: the distance is T * stride / (T - 1); beyond the video, its last frame;
            - "segments" (Temporal Segment Networks): one frame of each of T equal parts of the video, however long.

            Windows begin anywhere in training. Otherwise the windows of ``test_views`` are spread evenly from the
            video's begin to its end; a single one is in the middle.
        crop: of training: "multi_scale" (sides of 1, 7/8, 3/4 or 0.66 of the short side, 13 places), or
            "random_resized" with ``scale`` and ``ratio``. All frames of a view share the box and the flip.
        test_views: (clips, crops). One crop is central; more are spread along the longer side.

    Raises:
        UserError: an argument out of its range.
    """

    flip: float = 0.0
    interpolation: str = "bilinear"
    centre: float = 1.0
    frames: int = 16
    stride: int = 4
    sampling: str = "contiguous"
    crop: str = "multi_scale"
    repeats: int = 1
    test_views: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "test_views", tuple(self.test_views))
        checks = {
            "frames": (self.frames >= 1, "at least 1"),
            "stride": (self.stride >= 1, "at least 1"),
            "sampling": (self.sampling in SAMPLINGS, f"one of {', '.join(SAMPLINGS)}"),
            "crop": (self.crop in CROPS, f"one of {', '.join(CROPS)}"),
            "repeats": (self.repeats >= 1, "at least 1"),
            "test_views": (len(self.test_views) == 2 and min(self.test_views) >= 1, "(clips, crops), each from 1"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise UserError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def clips(self) -> int:
        """Clips of a video that are decoded."""
        return 1 if self.train else self.test_views[0]

    @property
    def crops_per_clip(self) -> int:
        """Crops of each clip."""
        return self.repeats if self.train else self.test_views[1]

    def clip_frames(self, epoch: int, videos: Ints, lengths: Ints) -> Ints:
        """Frames int64 [n, clips, T], ascending, of videos int64 [n] that have ``lengths`` [n] frames."""
        n = lengths.astype(np.int64)[:, None, None]
        steps = np.arange(self.frames, dtype=np.int64)
        if self.train:
            draws = uniforms(self.key(CLIP, epoch), videos, self.frames if self.sampling == "segments" else 1)
            share = draws[:, None, :]
        else:
            # In segments every clip takes another place inside each; windows go from one end to the other.
            places = np.arange(self.clips, dtype=np.float64)[:, None]
            even = places / (self.clips - 1) if self.clips > 1 else places + 0.5
            share = ((places + 0.5) / self.clips if self.sampling == "segments" else even)[None]
        if self.sampling == "segments":
            return np.minimum(np.floor((steps + share) * n / self.frames).astype(np.int64), n - 1)
        span = self.frames * self.stride
        free = np.maximum(n - span, 0)
        begin = np.minimum(np.floor(share * (free + 1)), free).astype(np.int64)
        if self.sampling == "contiguous":
            return begin + self.stride * np.minimum(steps, (n - 1 - begin) // self.stride)
        return np.minimum(begin + steps * span // max(self.frames - 1, 1), n - 1)

    def crops(
        self, epoch: int, ids: Ints, heights: NDArray[np.int32], widths: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 [n, 4] and flips bool [n] of samples (video * views + view), see :meth:`SamplePlan.crops`."""
        if not self.train:
            return self._spread(ids, heights, widths), np.zeros(len(ids), dtype=bool)
        if self.crop == "random_resized":
            return super().crops(epoch, ids, heights, widths)
        height, width = self.size
        draws = uniforms(self.key(CROP, epoch), ids, 3)
        pairs = _PAIRS[(draws[:, 0] * len(_PAIRS)).astype(np.int64)]
        places = _PLACES[(draws[:, 1] * len(_PLACES)).astype(np.int64)]
        unit = np.minimum(heights / height, widths / width)
        box_h = np.maximum(np.floor(unit * height * _SCALES[pairs[:, 0]]), 1).astype(np.int64)
        box_w = np.maximum(np.floor(unit * width * _SCALES[pairs[:, 1]]), 1).astype(np.int64)
        top, left = (heights - box_h) // 4 * places[:, 0], (widths - box_w) // 4 * places[:, 1]
        return np.stack([top, left, box_h, box_w], axis=1).astype(np.int32), draws[:, 2] < self.flip

    def _spread(self, ids: Ints, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> NDArray[np.int32]:
        boxes = self._central(heights.astype(np.float64), widths.astype(np.float64))
        count = self.test_views[1]
        if count == 1:
            return boxes
        share = (ids % self.views % count) / (count - 1)
        free = np.stack([heights - boxes[:, 2], widths - boxes[:, 3]], axis=1)
        along = free.argmax(axis=1)[:, None]
        places = np.rint(np.take_along_axis(free, along, 1) * share[:, None]).astype(np.int32)
        np.put_along_axis(boxes, along, places, 1)
        return boxes
