"""Ops of masked distillation: they know tensors, never models. See :mod:`cohobate.kernels.registry` for how one is built."""

from cohobate.kernels import alignment, tokens
from cohobate.kernels.registry import OPS, Cost, choose, use_backend, why_not

__all__ = ["OPS", "Cost", "alignment", "choose", "tokens", "use_backend", "why_not"]
