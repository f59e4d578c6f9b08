"""pixel_loss: mean squared error against normalised pixels that are read straight from uint8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cohobate.kernels.tokens.gather import gather_patches_reference


def pixel_target_reference(
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    convention: str = "mae",
    normalise: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Targets [B,n,pt*ph*pw*C] fp32: "mae" standardises a patch jointly, "videomae" each colour channel of [0,1] pixels."""
    channels = pixels.shape[-1]
    if convention == "mae":
        target = gather_patches_reference(pixels, rows, patch=patch, mean=mean, std=std)
        if normalise:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, correction=1) + eps).sqrt()
        return target
    target = gather_patches_reference(pixels, rows, patch=patch, mean=[0.0] * channels, std=[1.0] * channels)
    if normalise:
        split = target.unflatten(-1, (-1, channels))
        split = (split - split.mean(-2, keepdim=True)) / (split.var(-2, keepdim=True, correction=1).sqrt() + eps)
        target = split.flatten(-2)
    return target


def pixel_loss(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    convention: str = "mae",
    normalise: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """0-d fp32."""
    target = pixel_target_reference(pixels, rows, patch=patch, mean=mean, std=std, convention=convention, normalise=normalise, eps=eps)
    return torch.nn.functional.mse_loss(prediction.float(), target)
