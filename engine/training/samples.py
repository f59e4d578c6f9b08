"""Pictures of a stage, as arrays: what was shown, what was asked for and answered, where the student looks.

Everything here is computed anew for a few images; training never runs any of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cohobate.evaluation import ImageSource
from cohobate.evaluation.extractor import Extractor
from cohobate.masking import MaskPlan
from cohobate.methods import AMD, DBOT, MAE
from cohobate.teacher.sources import own
from cohobate.tokens import TokenGrid
from cohobate.training.stages import Stage
from cohobate.training.views import (
    Colours,
    in_raster_order,
    looked_at,
    neighbours,
    on_grid,
    predicted_pixels,
    reconstruct,
    rgb,
    timeless,
)

QUERIES, MEMORY = 6, 2000  # of the picture of nearest images or clips: how many ask, and how many are searched


@dataclass(frozen=True)
class _Images:
    pixels: Tensor


@torch.no_grad()
def write_samples(path: Path, stage: Stage, images: Tensor, ids: Tensor) -> None:
    """Write what :class:`cohobate.report.Samples` holds of a stage; an image's arrays have no time axis.

    Args:
        path: an ``.npz`` file.
        images: [n,T,H,W,C] uint8 on the stage's device. ids: [n] int64, what the masks are drawn for.
    """
    method, plan = stage.method, stage.plan(ids, 0, masks=1)
    training = method.training
    method.eval()
    arrays = draw(method, images, plan)
    method.train(training)
    known = {name: array.cpu().numpy() for name, array in arrays.items()}
    target = "features" if isinstance(method, (DBOT, AMD)) else "pixels"
    np.savez(path, stage=f"{stage.index + 1} {stage.name}", target=target, **known)  # type: ignore[arg-type]


@torch.no_grad()
def draw(method: DBOT | MAE, images: Tensor, plan: MaskPlan) -> dict[str, Tensor]:
    """The arrays of :class:`cohobate.report.Samples` for a method in eval mode."""
    arrays = seen(images, plan, method.student.grid)
    if isinstance(method, MAE):
        arrays |= _pixels(method, images, plan)
    if isinstance(method, AMD):
        arrays |= _aligned_features(method, images, plan)
    if isinstance(method, DBOT):
        rows = plan.masked + method.student.prefix
        arrays |= _colours(method, method.targets(_Images(images)), method.predict(images, plan, rows, None), plan)
    if method.student.depth:
        arrays |= looked_at(own.read(method.student, "student"), images)
    return arrays


def seen(images: Tensor, plan: MaskPlan, grid: TokenGrid) -> dict[str, Tensor]:
    """``images``, ``visible`` and, where the teacher sees less than everything, ``teacher_visible``."""
    student, teacher = (~hidden for hidden in plan.to_boolean())
    arrays = {"images": timeless(rgb(images)), "visible": on_grid(student, grid)}
    return arrays if plan.teacher == plan.tokens else arrays | {"teacher_visible": on_grid(teacher, grid)}


def _colours(method: DBOT | MAE, targets: Tensor, predicted: Tensor, plan: MaskPlan) -> dict[str, Tensor]:
    """Targets [n,N,D] and predictions [n,N-a,D] at ``plan.masked`` on the same axes."""
    colours, grid = Colours(targets), method.student.grid
    return {
        "target_pca": on_grid(colours(targets), grid),
        "prediction_pca": on_grid(in_raster_order(colours(predicted), plan.masked, plan.tokens), grid),
    }


def _pixels(method: MAE, images: Tensor, plan: MaskPlan) -> dict[str, Tensor]:
    predicted = predicted_pixels(method.student, method.decoder, images, plan)
    options = method.options
    whole = reconstruct(
        predicted, images, plan, method.student, convention=options.convention, normalised=options.norm_pix
    )
    return _colours(method, method.targets(_Images(images)), predicted, plan) | {"reconstruction": timeless(rgb(whole))}


def _aligned_features(method: AMD, images: Tensor, plan: MaskPlan) -> dict[str, Tensor]:
    """The teacher's last target layer at the tokens that it sees, and what the student has for it."""
    student, teacher, options = method.student, method.teacher, method.options
    layer, grid = teacher.layers[-1], student.grid
    target = teacher(images, plan.teacher_rows)[-1][:, teacher.prefix :].float()
    streams = student.intermediates(images, options.student_layers, plan.visible)
    direct, generated = method.alignment(dict(zip(options.student_layers, streams)), plan)
    parts = [(plan.visible, p[:, student.prefix :]) for p, (_, t) in zip(direct, options.direct) if t == layer][-1:]
    parts += [(plan.diff, p) for p, (_, t) in zip(generated, options.generation) if t == layer][-1:]
    places = torch.cat([rows for rows, _ in parts], dim=1)
    predicted = torch.cat([values.float() for _, values in parts], dim=1)
    colours = Colours(target)
    has_one = in_raster_order(torch.ones_like(predicted[..., :1]), places, plan.tokens)[..., 0] > 0
    return {
        "target_pca": on_grid(in_raster_order(colours(target), plan.teacher_rows, plan.tokens), grid),
        "prediction_pca": on_grid(in_raster_order(colours(predicted), places, plan.tokens), grid),
        "predicted": on_grid(has_one, grid),
    }


def write_retrieval(
    path: Path, stage: Stage, memory: ImageSource, queries: ImageSource | None, *, device: torch.device
) -> None:
    """Write what :class:`cohobate.report.Retrieval` holds: the nearest of 2000 images or clips to 6 others, evenly
    spread.

    Args:
        path: an ``.npz`` file.
        memory: what is searched. queries: what for; None: some of the memory, each left out of its own neighbours.

    Raises:
        UserError: weights that are not finite, or a single image or clip.
    """
    memory = replace(memory, limit=MEMORY, _cache=[])
    queries = replace(memory if queries is None else queries, limit=QUERIES, _cache=[])
    found = neighbours(Extractor(stage.method.student), memory, queries, device=device)
    np.savez(path, stage=f"{stage.index + 1} {stage.name}", **found)
