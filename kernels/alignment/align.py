"""align_loss: multi-layer feature alignment in one call, gradient computed in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Standardise(NamedTuple):
    """Per-token standardisation of the target: divide by sqrt(var + eps) or by sqrt(var) + eps."""

    ddof: int = 1
    eps: float = 1e-6
    eps_inside: bool = True


class AlignLoss(NamedTuple):
    """Result of :func:`align_loss`: ``total`` 0-d fp32 with gradient, ``per_layer`` [L] fp32 without."""

    total: Tensor
    per_layer: Tensor


def standardise_reference(target: Tensor, standardise: Standardise) -> Tensor:
    """(t - mean) / sqrt(var + eps) per row, in fp32 (fp64 stays fp64)."""
    mean = target.mean(-1, keepdim=True)
    var = target.var(-1, keepdim=True, correction=standardise.ddof)
    scale = (var + standardise.eps).sqrt() if standardise.eps_inside else var.sqrt() + standardise.eps
    return (target - mean) / scale


def align_loss_reference(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    prediction_rows: Tensor | None = None,
    target_rows: Tensor | None = None,
    loss: str = "smooth_l1",
    beta: float = 2.0,
    standardise: Standardise | None = None,
    weights: Sequence[float] | None = None,
) -> AlignLoss:
    """Reference of :func:`align_loss`: the literal chain of eager operations, layer by layer."""
    values = []
    for prediction, target in zip(predictions, targets, strict=True):
        if prediction_rows is not None:
            prediction = prediction.gather(1, prediction_rows.long().unsqueeze(-1).expand(-1, -1, prediction.shape[-1]))
        if target_rows is not None:
            target = target.gather(1, target_rows.long().unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        kind = torch.promote_types(torch.float32, prediction.dtype)
        prediction, target = prediction.to(kind), target.detach().to(kind)
        if standardise is not None:
            target = standardise_reference(target, standardise)
        if loss == "smooth_l1":
            values.append(torch.nn.functional.smooth_l1_loss(prediction, target, beta=beta))
        elif loss == "mse":
            values.append(torch.nn.functional.mse_loss(prediction, target))
        elif loss == "l1":
            values.append(torch.nn.functional.l1_loss(prediction, target))
        else:
            values.append((1 - torch.nn.functional.cosine_similarity(prediction, target, dim=-1)).mean())
    per_layer = torch.stack(values)
    scale = per_layer.new_tensor(weights if weights is not None else [1 / len(values)] * len(values))
    return AlignLoss((per_layer * scale).sum(), per_layer.detach())


def align_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    prediction_rows: Tensor | None = None,
    target_rows: Tensor | None = None,
    loss: str = "smooth_l1",
    beta: float = 2.0,
    standardise: Standardise | None = None,
    weights: Sequence[float] | None = None,
    backend: str | None = None,
) -> AlignLoss:
    """L layers of [B,R,D] against L targets."""
    if isinstance(predictions, Tensor):
        predictions = [predictions]
    if isinstance(targets, Tensor):
        targets = [targets]
    return align_loss_reference(
        predictions, targets, prediction_rows=prediction_rows, target_rows=target_rows, loss=loss, beta=beta, standardise=standardise, weights=weights
    )
