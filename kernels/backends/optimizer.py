"""AdamW by torch's fused kernel, or by apex's where it is asked for by name; they move the same bytes."""

from __future__ import annotations

import os
from typing import Any

import torch

from cohobate.kernels.backends import apex

BACKENDS = ("torch", "apex")


def why_not(name: str, device: str) -> list[str]:
    """Reasons why ``name`` (torch, apex) cannot update parameters on ``device`` ("cpu", "cuda"); empty if it can."""
    return apex.why_not_adamw(device) if name == "apex" else []


def adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, backend: str | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019) over parameter groups, with a rate of 0 until one is set.

    Whichever it is, ``step`` divides the gradients by the attribute ``grad_scale`` and skips the update where the
    attribute ``found_inf`` is 1 (0-d fp32 tensors, set before it), without waiting for the device.

    Args:
        groups: ``{"params": [...], "weight_decay": float}`` each; the first parameter's device counts.
        betas, eps: of Adam.
        backend: torch or apex; None asks COHOBATE_OPTIMIZER, then takes torch.

    Raises:
        ValueError: an unknown backend, or one that cannot run (every reason is listed).
    """
    source, wanted = ("backend", backend) if backend is not None else ("COHOBATE_OPTIMIZER", _environment)
    if wanted not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {wanted!r}")
    reasons = why_not(wanted, next(p for group in groups for p in group["params"]).device.type)
    if reasons:
        raise ValueError(f"{source}: {wanted!r} cannot run AdamW: {'; '.join(reasons)}")
    if wanted == "apex":
        return apex.adamw(groups, betas, eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


_environment = os.environ.get("COHOBATE_OPTIMIZER") or "torch"
