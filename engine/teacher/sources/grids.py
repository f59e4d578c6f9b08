"""A teacher's grid against the student's: what may be resized is said, never guessed.

Targets are compared token by token, so the teacher must cut its input into as many tokens as the student does, in the
same order. Where it does not:

- ``resize="positions"``: the pixels stay as they are. The teacher cuts the student's pixels with its own patch size,
  and its table of positions is interpolated to the token grid that results, which must be the student's.
- ``resize="pixels"``: the teacher gets its own pixels: the same crop, resized to (student's token grid) x (teacher's
  patch), as dBOT feeds 196 px to its ViT-H/14 to have 14 x 14 tokens. Its table is interpolated if it was made for
  another token grid.

Time is never resized.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models.pixels import Statistics, denormalise, normalise
from cohobate.teacher.sources.source import Source
from cohobate.tokens import TokenGrid

RESIZE = (None, "positions", "pixels")


class Match(NamedTuple):
    """What a teacher's input must be: its grid, with the student's tokens, and the pixels' (height, width)."""

    grid: TokenGrid
    pixel_size: tuple[int, int]
    resize_pixels: bool
    resize_positions: bool


def match_grid(source_grid: TokenGrid, student_grid: TokenGrid, resize: str | None = None) -> Match:
    """The teacher's grid on which its tokens are the student's.

    Args:
        source_grid: what the teacher was made for.
        student_grid: what the student sees.
        resize: None, "positions" or "pixels", as above.

    Raises:
        UserError: grids that do not match, with ``resize`` None; or that ``resize`` cannot match.
    """
    if resize not in RESIZE:
        raise UserError(f"resize: expected None, 'positions' or 'pixels', got {resize!r}")
    teacher, student = _told(source_grid), _told(student_grid)
    if source_grid.channels != student_grid.channels:
        raise UserError(
            f"source: expected {student_grid.channels} channels as the student's, got {source_grid.channels}"
        )
    if (source_grid.frames, source_grid.shape[0]) != (student_grid.frames, student_grid.shape[0]):
        raise UserError(f"source: time is not resized: the teacher takes {teacher}, the student {student}")
    _, rows, columns = student_grid.shape
    frames, (pt, ph, pw) = source_grid.frames, source_grid.patch
    size = (rows * ph, columns * pw)
    pixels = size != (student_grid.height, student_grid.width)
    positions = student_grid.shape != source_grid.shape
    if resize is None and (pixels or positions):
        raise UserError(
            f"resize: the teacher takes {teacher}, the student {student}; say resize='pixels' to feed the teacher "
            f"{size[0]} x {size[1]} px"
            + ("" if pixels else " (what the student sees)")
            + (", or resize='positions' to keep the pixels and interpolate its positions alone" if not pixels else "")
            + (", its positions interpolated" if pixels and positions else "")
            + ("; resize='positions' would have to cut other tokens" if pixels else "")
        )
    if resize == "positions" and pixels:
        raise UserError(
            f"resize: 'positions' keeps the pixels, and patches of {ph} x {pw} do not cut the student's {student} into "
            f"its tokens; 'pixels' feeds the teacher {size[0]} x {size[1]} px"
        )
    return Match(TokenGrid(frames, *size, (pt, ph, pw), source_grid.channels), size, pixels, positions)


def fit(source: Source, student_grid: TokenGrid, resize: str | None = None) -> tuple[Source, Match]:
    """A source on the student's tokens, by :func:`match_grid`.

    Returns:
        The source, whose ``original`` is None if the module itself takes no input of that size; and what its input
        must be.

    Raises:
        UserError: as :func:`match_grid`; or a source that runs as it is and takes one size only.
    """
    match = match_grid(source.grid, student_grid, resize)
    if not match.resize_positions:
        return source, match
    original = source.original.at(match.grid) if source.original is not None and source.original.any_size else None
    if source.anatomy is None:
        if original is None:
            raise UserError(
                f"source: {source.name} runs as it is ({'; '.join(source.reasons)}) and takes {_told(source.grid)}, "
                f"not {_told(match.grid)}"
            )
        return replace(source, original=original), match
    return replace(source, anatomy=source.anatomy.resized(match.grid), original=original), match


def resize_pixels(pixels: Tensor, size: tuple[int, int], by: Statistics | None = None) -> Tensor:
    """Pixels [B, T, H, W, C] uint8 -> [B, T, *size, C] uint8: bicubic, antialiased, rounded and clamped to bytes.

    Computed in fp32, the same on every device. The result is bytes, as from any image decoder's resize, so that the
    teacher's patch embedding reads it like any other input; rounding moves a value by at most 1/2 of 255. Floating
    pixels, normalised by the statistics ``by``, stay so: clamped to what was [0, 1], but not rounded.
    """
    if tuple(pixels.shape[2:4]) == tuple(size):
        return pixels
    if pixels.is_floating_point() and by is not None:
        return normalise(_resized(denormalise(pixels, by), size).clamp(0, 1), by)
    return _resized(pixels.float(), size).round().clamp(0, 255).to(torch.uint8)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    batch, frames, height, width, channels = pixels.shape
    x = pixels.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1).reshape(batch, frames, *size, channels).contiguous()


def _told(grid: TokenGrid) -> str:
    """``224 x 224 px in patches of 16 x 16: 14 x 14 tokens``."""
    clip = f"{grid.frames} frames of " if grid.frames > 1 or grid.patch[0] > 1 else ""
    _, ph, pw = grid.patch
    slots = f"{grid.shape[0]} x " if clip else ""
    return (
        f"{clip}{grid.height} x {grid.width} px in patches of {ph} x {pw} "
        f"({slots}{grid.shape[1]} x {grid.shape[2]} tokens)"
    )
