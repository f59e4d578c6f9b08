"""What a loader yields."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Samples of one rank at one step.

    Attributes:
        pixels: uint8 [B, T, H, W, C], contiguous; T is 1 for images.
        sample_ids: int64 [B]: place in the manifest * ``views`` + view. Masks are drawn by it.
        valid: bool [B]; False where the planned file could not be read and another took its place (its pixels, id and
            label are its own), and where an evaluation's last batch was filled up.
        labels: int64 [B, K], or None.
        views: samples made of one file (crops, clips), which are neighbours in the batch; 1 for images.
    """

    pixels: Tensor
    sample_ids: Tensor
    valid: Tensor
    labels: Tensor | None = None
    views: int = 1

    @property
    def places(self) -> Tensor:
        """int64 [B], places in the manifest."""
        return self.sample_ids if self.views == 1 else self.sample_ids // self.views

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """This batch on another device."""
        return Batch(
            self.pixels.to(device, non_blocking=non_blocking),
            self.sample_ids.to(device, non_blocking=non_blocking),
            self.valid.to(device, non_blocking=non_blocking),
            None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
            self.views,
        )
