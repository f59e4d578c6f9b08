"""Attention by torch alone: explicit products, and scaled_dot_product_attention with torch's choice or ours.

    out[b, i, h] = sum_j softmax_j(q[b, i, h] . k[b, j, h] / sqrt(d) + bias[b, h, i, j]) v[b, j, h]

Every ``run(qkv, heads, queries)`` of this package takes the same things: packed ``qkv`` [B, N, 3 * D] and no queries,
or packed ``kv`` [B, N, 2 * D] and ``queries`` [B, n, D]; it returns [B, N or n, D]. D = heads * d, heads contiguous.
The two plain ones here also take a ``bias`` [H, N or n, N] or [B, H, N or n, N] in qkv's dtype, with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from cohobate.kernels.backends.probe import Call, Run, cuda_limits, load, smoke

HALF = (torch.bfloat16, torch.float16)
EXTERNAL = {"FA3": ("flash_attn_interface", 9), "FA4": ("flash_attn.cute.interface", 10)}  # and the newest card


def split(qkv: Tensor, heads: int, queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, n, H, d], k and v [B, N, H, d] as views of the packed tensors."""
    if queries is None:
        q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
        return q, k, v
    k, v = qkv.unflatten(2, (2, heads, -1)).unbind(2)
    return queries.unflatten(2, (heads, -1)), k, v


def explicit(qkv: Tensor, heads: int, queries: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Two matrix products and a softmax. Scores are scaled in the product's accumulator, before they are rounded."""
    parts = split(qkv, heads, queries)
    batch, count, _, dim = parts[0].shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, x.shape[1], dim) for x in parts)
    if bias is None:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    else:
        start = bias.expand(batch, heads, count, -1).reshape(batch * heads, count, -1)
        scores = torch.baddbmm(start, q, k.transpose(1, 2), alpha=dim**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), v)
    return out.view(batch, heads, count, dim).transpose(1, 2).flatten(2)


def sdpa(qkv: Tensor, heads: int, queries: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention, by the kernel that torch chooses."""
    q, k, v = (x.transpose(1, 2) for x in split(qkv, heads, queries))
    if bias is not None and bias.dim() == 3:
        bias = bias.unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def anywhere(call: Call) -> list[str]:
    """No reason against any call."""
    return []


def restricted(name: str, backend: SDPBackend) -> tuple[Run, Callable[[Call], list[str]]]:
    """(run, why_not) of SDPA that may use one of torch's kernels only."""

    def run(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(qkv, heads, queries)

    def why_not(call: Call) -> list[str]:
        # torch has a flash kernel for the CPU too; the limits of the others are in its own checks, which a run asks.
        if call.device != "cpu" or backend != SDPBackend.FLASH_ATTENTION:
            reasons = cuda_limits(call, (*HALF, torch.float32))
            if reasons:
                return reasons
        return smoke(name, run, call)

    return run, why_not


def external(name: str, impl: str) -> tuple[Run, Callable[[Call], list[str]]]:
    """(run, why_not) of SDPA's flash kernel replaced by ``impl`` (FA3, FA4), where this torch can do that.

    The replacement is torch's and holds for the whole process: once used, plain SDPA may run it as well.
    """
    module, newest = EXTERNAL[impl]

    def run(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
        _activate(impl)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(qkv, heads, queries)

    def why_not(call: Call) -> list[str]:
        reasons = cuda_limits(call, HALF, most_dim=256, oldest=9, newest=newest)
        if not hasattr(torch_attention, "activate_flash_attention_impl"):
            reasons.append("this torch has no activate_flash_attention_impl")
        elif impl not in torch_attention.list_flash_attention_impls():
            reasons.append(f"this torch knows no flash attention named {impl}")
        reasons += load(module)[1]
        if reasons:
            return reasons
        before = torch_attention.current_flash_attention_impl()
        try:
            return smoke(name, run, call)
        finally:  # a question leaves the process as it was
            if torch_attention.current_flash_attention_impl() != before:
                if before is None:
                    torch_attention.restore_flash_attention_impl()
                else:
                    torch_attention.activate_flash_attention_impl(before)

    return run, why_not


def _activate(impl: str) -> bool:
    if torch_attention.current_flash_attention_impl() != impl:
        torch_attention.activate_flash_attention_impl(impl)
    return True


# A trace runs it and keeps the answer, which never changes (registry.py says why it is marked this way).
_activate._dynamo_marked_constant = True  # type: ignore[attr-defined]
