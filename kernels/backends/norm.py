"""LayerNorm by torch, or by apex where it is asked for by name; no measurement has put apex ahead."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.kernels.backends import apex

BACKENDS = ("torch", "apex")


def why_not(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Reasons why ``name`` (torch, apex) cannot compute a LayerNorm on ``device`` ("cpu", "cuda"); empty if it can."""
    return apex.why_not_norm(device, dtype) if name == "apex" else []


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; Ba et al., 2016.

    Args:
        x: [..., D] floating point. weight, bias: [D] in the dtype of ``x``.
        eps: added to the variance.
        backend: torch or apex; None asks COHOBATE_NORM, then takes torch.

    Returns:
        [..., D] in the dtype of ``x``.

    Raises:
        ValueError: an unknown backend, or one that cannot run (every reason is listed).
    """
    if _resolve(x.device.type, x.dtype, backend) == "apex":
        return apex.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _resolve(device: str, dtype: torch.dtype, backend: str | None) -> str:
    source, wanted = ("backend", backend) if backend is not None else ("COHOBATE_NORM", _environment)
    if wanted not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {wanted!r}")
    reasons = why_not(wanted, device, dtype)
    if reasons:
        raise ValueError(f"{source}: {wanted!r} cannot run LayerNorm: {'; '.join(reasons)}")
    return wanted


_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
_environment = os.environ.get("COHOBATE_NORM") or "torch"
