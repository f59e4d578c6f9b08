"""A generated, labelled set of video files: a texture that moves.

Two labels a clip: the texture family (easy) and its motion (hard: it needs time to be learnt, so there is headroom).
As in the generated images nothing else tells them: colours, phase, frequency, tilt and speed are random, textures cover
the same distribution of areas, every motion is half way in the middle of the clip. Mean colours say nothing; one frame
says nothing about the direction.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cohobate.data.generated import FIELDS, SPLITS, Array, between, colours, grid, uniforms, write_set
from cohobate.data.video.encode import CODECS, encode_clip
from cohobate.errors import UserError

TEXTURES = ("dots", "rings", "zigzag", "blobs")  # every motion of them can be seen
MOTIONS = ("right", "left", "down", "up", "zoom in", "zoom out", "turn left", "turn right")
LABEL_NAMES = ("texture", "motion")

_VERSION = 1  # part of the fingerprint: raise it when a change below changes a clip
_KIND = 64  # apart from the variants of generated images, whose keys are 0, 1, ...
SIZE, FRAMES = 64, 32


def make_videos(
    folder: str | os.PathLike[str],
    *,
    train: int = 2048,
    test: int = 512,
    codec: str = "h264",
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Write the set into ``folder`` unless it is there already; return the folder.

    Clips of 64 x 64 pixels, 32 frames, 30 frames/s, about 10 KB. Files as in :func:`cohobate.data.make_images`:
    ``train/000000.mp4``, ``train.txt``, ...

    Args:
        folder: new or empty, or an earlier result of the same parameters (then nothing is done).
        train, test: number of clips of each split.
        codec: "h264" (.mp4), "vp9" (.webm) or "mjpeg" (.avi), the last two for DALI on a CPU.
        seed: 0 or more; another seed gives another set with the same distribution.
        processes: how many draw the clips; the CPU cores of this process if not given. They change nothing else.

    Raises:
        UserError: a bad argument, PyAV is not installed, or ``folder`` holds something else.
    """
    counts = {"train": train, "test": test}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}: expected at least 1 clip, got {count}")
    if codec not in CODECS:
        raise UserError(f"codec: expected one of {', '.join(CODECS)}, got {codec!r}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: expected 0 to 2^63 - 1, got {seed}")
    return write_set(
        Path(folder),
        {"generator": _VERSION, "kind": "video", "codec": codec, "seed": seed, **counts},
        counts,
        label_names=LABEL_NAMES,
        labels=labels_of,
        suffix=f".{CODECS[codec][0]}",
        encode=functools.partial(_encode, codec, seed),
        processes=processes,
    )


def labels_of(index: int) -> tuple[int, int]:
    """(texture, motion) of a clip, positions in ``TEXTURES`` and ``MOTIONS``."""
    return index % len(TEXTURES), index // len(TEXTURES) % len(MOTIONS)


def draw_clip(split: str, index: int, seed: int = 0) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """One clip before it is compressed, and its labels.

    Returns:
        uint8 [32, 64, 64, 3], and (texture, motion).
    """
    labels = labels_of(index)
    raw = np.random.Philox(
        key=np.array([seed, _KIND], dtype=np.uint64),
        counter=np.array([0, SPLITS.index(split), index, 0], dtype=np.uint64),
    )
    draws = uniforms(raw)
    ground, figure, _ = colours(draws)
    x, y = _moved(MOTIONS[labels[1]], between(draws, 0.7, 1.3))
    tilt = between(draws, -0.21, 0.21)
    periods = math.exp(between(draws, math.log(2.5), math.log(4.0)))
    phase, phase2 = between(draws, 0, 2 * math.pi), between(draws, 0, 2 * math.pi)
    share = between(draws, 0.3, 0.42)
    height = FIELDS[TEXTURES[labels[0]]](x, y, tilt, 2 * math.pi * periods, phase, phase2, draws)
    cut = int((1 - share) * height.size)
    level = np.partition(height.ravel(), cut)[cut]
    edge = 1.4 * float(height.std()) * 2 * math.pi * periods / SIZE  # about a pixel wide
    mask = np.clip((height - level) / edge + 0.5, 0, 1)
    clip = (ground + mask[..., None] * (figure - ground)) * 255
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8), labels


def _encode(codec: str, seed: int, split: str, index: int) -> bytes:
    return encode_clip(draw_clip(split, index, seed)[0], codec)


def _moved(motion: str, speed: float) -> tuple[Array, Array]:
    """Where in the texture each pixel looks, x and y float32 [32, 64, 64]; a frame in the middle looks straight.

    ``speed`` 1 is 0.016 of the width a frame, a factor of 1.025, or 2.4 degrees: four frames on, it still is less than
    half a period of the texture.
    """
    rows, columns = (axis[None] for axis in grid(SIZE))
    time = ((np.arange(FRAMES, dtype=np.float32) - (FRAMES - 1) / 2) * np.float32(speed))[:, None, None]
    x, y = np.broadcast_arrays(columns, rows)
    if motion in ("right", "left", "down", "up"):
        # The picture goes right when every pixel looks further left.
        shift = time * np.float32(-0.016 if motion in ("right", "down") else 0.016)
        x, y = (x + shift, y + 0 * shift) if motion in ("right", "left") else (x + 0 * shift, y + shift)
    elif motion.startswith("zoom"):
        scale = np.exp(time * np.float32(-0.025 if motion == "zoom in" else 0.025))
        x, y = x * scale, y * scale
    else:
        angle = time * np.float32(0.042 if motion == "turn left" else -0.042)
        x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    return x.astype(np.float32), y.astype(np.float32)
