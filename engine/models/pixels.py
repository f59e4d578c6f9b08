"""Pixels as they come: bytes, the fast path, or images that somebody else's loader has normalised already.

Wherever the engine takes ``pixels`` uint8 [B, T, H, W, C], a floating tensor of that shape may stand, and means pixels
in [0, 1] normalised by the mean and std of the model that it is given to: ``(x - mean) / std``. Float pixels go through
plain torch. A method is given its student's: it calls :func:`renormalise` before it shows them to a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.tokens import TokenGrid


class Statistics(Protocol):
    """What pixels in [0, 1] are normalised by, one number a channel: every model and teacher has them."""

    @property
    def mean(self) -> Sequence[float]:
        """Subtracted."""

    @property
    def std(self) -> Sequence[float]:
        """Divided by, behind it."""


def check_pixels(pixels: Tensor, grid: TokenGrid) -> None:
    """Raise a UserError unless these are bytes or floats of the grid's size."""
    known = pixels.dtype == torch.uint8 or pixels.is_floating_point()
    if pixels.dim() != 5 or tuple(pixels.shape[1:]) != grid.pixel_shape or not known:
        expected = ", ".join(map(str, grid.pixel_shape))
        raise UserError(f"pixels: expected uint8 or floating [B, {expected}], got {pixels.dtype} {list(pixels.shape)}")


def denormalise(pixels: Tensor, by: Statistics) -> Tensor:
    """Floating [B, T, H, W, C] back to [0, 1], at least in fp32."""
    mean, std = _affine(pixels, by)
    return pixels * std + mean


def normalise(pixels: Tensor, by: Statistics) -> Tensor:
    """[B, T, H, W, C], bytes or floats in [0, 1], to what a model takes; at least in fp32."""
    mean, std = _affine(pixels, by)
    return ((pixels if pixels.is_floating_point() else pixels / 255) - mean) / std


def renormalise(pixels: Tensor, by: Statistics, to: Statistics) -> Tensor:
    """Floating pixels from one model's statistics to another's; bytes, and pixels that are right already, stay."""
    if not pixels.is_floating_point() or (tuple(by.mean), tuple(by.std)) == (tuple(to.mean), tuple(to.std)):
        return pixels
    return normalise(denormalise(pixels, by), to)


def project(pixels: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, grid: TokenGrid) -> Tensor:
    """Patch embedding of float pixels, without positions.

    Args:
        pixels: [B, T, H, W, C] floating, normalised. rows: [B, n] int32, the patches that are seen; None for all N.
        weight: [D, row_length], in the dtype of the product. bias: [D] or None.

    Returns:
        [B, n, D] in weight's dtype.
    """
    patches = patch_rows(pixels, rows, grid).to(weight.dtype)
    with torch.autocast(pixels.device.type, enabled=False):
        return F.linear(patches, weight, None if bias is None else bias.to(weight.dtype))


def patch_rows(pixels: Tensor, rows: Tensor | None, grid: TokenGrid) -> Tensor:
    """Patches as rows ordered (frame, row, column, channel): [B, T, H, W, C] -> [B, n, row_length], raster order."""
    (frames, high, wide), (pt, ph, pw) = grid.shape, grid.patch
    x = pixels.reshape(-1, frames, pt, high, ph, wide, pw, grid.channels)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, grid.size, grid.row_length)
    return x if rows is None else x.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, grid.row_length))


def _affine(pixels: Tensor, by: Statistics) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(pixels.dtype, torch.float32) if pixels.is_floating_point() else torch.float32
    mean, std = (torch.tensor(values, dtype=kind, device=pixels.device) for values in (by.mean, by.std))
    return mean, std
