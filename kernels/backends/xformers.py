"""xformers' memory_efficient_attention.

A wheel for another torch or CUDA imports, has every name and cannot run, so its library's load error is read, then the
``not_supported_reasons`` of each of its operators, then a few elements are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cohobate.kernels.backends import probe
from cohobate.kernels.backends.dense import HALF, split
from cohobate.kernels.backends.probe import Call, cuda_limits, line, load, smoke


def package() -> list[str]:
    """Reasons why xformers cannot be used, whatever the call."""
    _, reasons = load("xformers.ops", "memory_efficient_attention", "fmha")
    if reasons:
        return reasons
    library, reasons = load("xformers._cpp_lib")
    error = getattr(library, "_cpp_library_load_exception", None)
    return reasons if error is None else [f"xformers imports, but its kernels do not load ({type(error).__name__})"]


def why_not(call: Call) -> list[str]:
    """Reasons against a call, xformers' own among them."""
    reasons = cuda_limits(call, (*HALF, torch.float32)) + package()
    return reasons or _operators(call) or smoke("xformers", run, call)


def run(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
    """memory_efficient_attention; xformers chooses among its operators."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(*split(qkv, heads, queries))
    return out.flatten(2)


def _operators(call: Call) -> list[str]:
    """What every one of xformers' operators has against the call; empty if one of each direction has nothing."""
    from xformers.ops import fmha

    x = torch.zeros(1, 8, 1, call.head_dim, device=probe.place(call.device), dtype=call.dtype)
    try:
        inputs = fmha.Inputs(query=x, key=x, value=x)
        forward, backward = _refusals(fmha.ALL_FW_OPS, inputs), _refusals(fmha.ALL_BW_OPS, inputs)
    except Exception as error:  # these are not its public names: they have moved before
        return [f"xformers does not say what it supports ({line(error)})"]
    return forward + (backward if call.grad else [])


def _refusals(operators: Any, inputs: Any) -> list[str]:
    answers = {operator.NAME: list(operator.not_supported_reasons(inputs)) for operator in operators}
    if any(not reasons for reasons in answers.values()):
        return []
    return [f"{name}: {', '.join(reasons)}" for name, reasons in answers.items()] or ["xformers has no operators"]
