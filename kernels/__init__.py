"""Ops of masked distillation: they know tensors, never models. ``registry`` says how an op is made."""

from cohobate.kernels import alignment, optimizer, tokens, transformer
from cohobate.kernels.registry import OPS, Cost, choose, use_backend, why_not

__all__ = ["OPS", "Cost", "alignment", "choose", "optimizer", "tokens", "transformer", "use_backend", "why_not"]
