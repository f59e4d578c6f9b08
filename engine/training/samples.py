"""A few images for the report: what the student saw, and target and prediction as colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cohobate.masking import random_plan
from cohobate.training.stages import Stage


@dataclass(frozen=True)
class _Images:
    pixels: Tensor


@torch.no_grad()
def write_samples(path: Path, stage: Stage, images: Tensor, ids: Tensor) -> None:
    """Write ``images`` uint8 [n,H,W,3], ``visible`` bool [n,h,w], ``target_pca`` and ``prediction_pca`` [n,h,w,3].

    The three colours are the first principal components of the targets over all these images, scaled to 0..1; the
    prediction is drawn on the same axes.

    Args:
        images: [n,1,H,W,C] uint8 on the stage's device. ids: [n] int64, what the masks are drawn for.
    """
    method, config = stage.method, stage.config
    grid = method.student.grid
    plan = random_plan(
        grid,
        ids,
        seed=config.seed,
        stage=stage.index,
        epoch=0,
        ratio=config.mask.ratio,
        rounding=config.mask.rounding,
    )
    training = method.training
    method.eval()
    targets = method.targets(_Images(images)).float()
    tokens = method.student(images, plan.visible)
    prediction = method.decoder(tokens, plan)[:, method.student.prefix :].float()
    method.train(training)
    project = _colours(targets)
    shape = (len(images), *grid.shape[1:])
    hidden, _ = plan.to_boolean()
    shown = images[:, 0, :, :, :3]
    if shown.shape[-1] != 3:
        shown = shown[..., :1].expand(-1, -1, -1, 3)
    np.savez(
        path,
        images=shown.cpu().numpy(),
        visible=(~hidden).view(shape).cpu().numpy(),
        target_pca=project(targets).view(*shape, 3).cpu().numpy(),
        prediction_pca=project(prediction).view(*shape, 3).cpu().numpy(),
        stage=f"{stage.index + 1} {stage.name}",
    )


class _colours:
    """The map from features [n,N,D] to three colours in 0..1 that was fitted to the targets."""

    def __init__(self, targets: Tensor) -> None:
        rows = targets.flatten(0, 1)
        self.mean = rows.mean(dim=0)
        _, _, axes = torch.linalg.svd(rows - self.mean, full_matrices=False)
        self.axes = axes[:3].T
        values = (rows - self.mean) @ self.axes
        # Percentiles, so that one odd token does not grey out the rest.
        self.low, self.high = values.quantile(torch.tensor([0.02, 0.98], device=rows.device), dim=0)

    def __call__(self, features: Tensor) -> Tensor:
        values = (features - self.mean) @ self.axes
        return ((values - self.low) / (self.high - self.low).clamp_min(1e-6)).clamp(0, 1)
