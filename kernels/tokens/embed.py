"""embed_patches: gather_patches fused with the projection, its bias and the position rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cohobate.kernels.tokens.gather import gather_patches_reference


def embed_patches_reference(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    *,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Reference of :func:`embed_patches`, differentiable in weight, bias and positions."""
    patches = gather_patches_reference(pixels, rows, patch=patch, mean=mean, std=std, dtype=dtype)
    out = torch.nn.functional.linear(patches, weight.to(dtype), None if bias is None else bias.to(dtype))
    if positions is not None:
        out = out + (positions if rows is None else positions[rows.long()])
    return out.to(dtype)


def embed_patches(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    *,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """[B,T,H,W,C] uint8 -> [B,n,D]."""
    return embed_patches_reference(pixels, rows, weight, bias, positions, patch=patch, mean=mean, std=std, dtype=dtype)
