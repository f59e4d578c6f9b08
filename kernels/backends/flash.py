"""flash-attn 2, 3 and 4: three packages, two of which share the import name ``flash_attn``.

flash-attn 2 is ``flash_attn`` with a file of its own; flash-attn 3 is ``flash_attn_interface``; flash-attn 4 is
``flash_attn.cute``, and where it is installed alone ``flash_attn`` is a namespace that imports and holds nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cohobate.kernels.backends.dense import HALF, split
from cohobate.kernels.backends.probe import Call, cuda_limits, deterministic, installed, load, smoke


def package_2() -> list[str]:
    """Reasons why flash-attn 2 cannot be used, whatever the call."""
    if not installed("flash-attn"):
        return ["flash-attn is not installed"]
    module, reasons = load("flash_attn")
    if reasons:
        return reasons
    if getattr(module, "__file__", None) is None:
        return ["flash_attn is only a namespace here, as flash-attn-4 leaves it"]
    return load("flash_attn", "flash_attn_func", "flash_attn_qkvpacked_func")[1]


def package_3(grad: bool) -> list[str]:
    """Reasons why flash-attn 3 cannot be used; a build may lack the backward kernels."""
    _, reasons = load("flash_attn_interface", "flash_attn_func")
    if reasons:
        return reasons
    ops = getattr(torch.ops, "flash_attn_3", None)
    return [
        f"flash_attn_interface registered no torch.ops.flash_attn_3.{name}"
        for name in (("fwd", "bwd") if grad else ("fwd",))
        if not hasattr(ops, name)
    ]


def package_4() -> list[str]:
    """Reasons why flash-attn 4 cannot be used. Its ``__version__`` is always 0.0.0, so the distribution is asked."""
    if not installed("flash-attn-4"):
        return ["flash-attn-4 is not installed"]
    return load("flash_attn.cute", "flash_attn_func")[1]


def why_not_2(call: Call) -> list[str]:
    """Reasons against a call by flash-attn 2."""
    return (cuda_limits(call, HALF, most_dim=256, oldest=8) + package_2()) or smoke("flash-attn-2", run_2, call)


def why_not_3(call: Call) -> list[str]:
    """Reasons against a call by flash-attn 3."""
    return (cuda_limits(call, HALF, most_dim=256, oldest=9, newest=9) + package_3(call.grad)) or smoke(
        "flash-attn-3", run_3, call
    )


def why_not_4(call: Call) -> list[str]:
    """Reasons against a call by flash-attn 4."""
    return (cuda_limits(call, HALF, most_dim=256, oldest=9) + package_4()) or smoke("flash-attn-4", run_4, call)


def run_2(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
    """flash-attn 2; the packed entry where everything is asked for, which saves its backward a concatenation."""
    if queries is None:
        return _rows(_function("flash_attn", "flash_attn_qkvpacked_func")(qkv.unflatten(2, (3, heads, -1))))
    return _rows(_function("flash_attn", "flash_attn_func")(*split(qkv, heads, queries)))


def run_3(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
    """flash-attn 3."""
    return _rows(_function("flash_attn_interface", "flash_attn_func")(*split(qkv, heads, queries)))


def run_4(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
    """flash-attn 4, which compiles at the first call of a kind."""
    return _rows(_function("flash_attn.cute", "flash_attn_func")(*split(qkv, heads, queries)))


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    loaded, reasons = load(module, name)
    if reasons:
        raise ImportError("; ".join(reasons))
    return deterministic(getattr(loaded, name))


def _rows(out: Any) -> Tensor:
    """[B, n, H, d] -> [B, n, D]; some releases return (out, log-sum-exp)."""
    rows: Tensor = out[0] if isinstance(out, tuple) else out
    return rows.flatten(2)
