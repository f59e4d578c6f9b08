"""gather_patches: uint8 pixels to normalised patch rows, of the chosen patches only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_patches_reference(
    pixels: Tensor, rows: Tensor | None, *, patch: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Reference of :func:`gather_patches`: every patch is normalised in fp32, then the chosen rows are taken."""
    batch, frames, height, width, channels = pixels.shape
    pt, ph, pw = patch
    scaled = pixels.float() / 255
    normal = (scaled - torch.tensor(mean, device=pixels.device)) / torch.tensor(std, device=pixels.device)
    grid = normal.view(batch, frames // pt, pt, height // ph, ph, width // pw, pw, channels)
    patches = grid.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, pt * ph * pw * channels)
    if rows is not None:
        patches = patches.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return patches.to(dtype)


def gather_patches(
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """[B,T,H,W,C] uint8 -> [B,n,pt*ph*pw*C]."""
    return gather_patches_reference(pixels, rows, patch=patch, mean=mean, std=std, dtype=dtype)
