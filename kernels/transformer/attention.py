"""short_attention: softmax attention of short sequences, packed rows in, packed rows and packed gradients out.

    out[b, i, h] = sum_j P[b, h, i, j] v[b, j, h],   P[b, h, i, :] = softmax_j(scale * q[b, i, h] . k[b, j, h])

    dv[j] = sum_i P[i, j] g[i]          dS[i, j] = P[i, j] (g[i] . v[j] - sum_l P[i, l] g[i] . v[l])
    dq[i] = scale sum_j dS[i, j] k[j]   dk[j]    = scale sum_i dS[i, j] q[i]

Source: Vaswani et al., NeurIPS 2017, equation 1. A student that sees 25 % of the tokens has 50 of them, too few to fill
the tiles of kernels made for long sequences. Here one tile holds a head's queries and keys up to 64 or 128 of each, and
one program computes all its gradients.

| tensor  | shape         | dtype            | strides                         |
|---------|---------------|------------------|---------------------------------|
| qkv     | [B, N, 3*H*d] | fp32, bf16, fp16 | last one is 1 (else copied once)|
| kv      | [B, N, 2*H*d] | as qkv           | as qkv; with queries            |
| queries | [B, n, H*d]   | as kv            | as qkv                          |
| out     | [B, n, H*d]   | as qkv           | contiguous                      |

Rows are packed as a fused projection writes them: all heads of q, then of k, then of v. Gradients have the shape of the
inputs: one d(qkv), or d(queries) and d(kv).

Sums and the softmax are fp32, and the scores never leave the accumulator. The reference rounds nothing but the result;
``native`` and ``triton`` round P and dS to the inputs' dtype, as operands of the products that follow. Nothing is saved
but the inputs: the backward pass computes the scores anew, and where a head takes more than one tile, ``triton`` keeps
its two statistics of a row in that row of dq until dq itself is written. float64 runs as the reference. Floor:
:func:`attention_cost`.

Determinism: bitwise from run to run. No two programs add to one value, and the order of every sum follows from the
shape and the launch configuration, which holds for an architecture. On the CPU an output row depends on its own query
alone, not on which others there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, count_flops, define, dtype_limit, register
from cohobate.kernels.tokens.rows import FLOAT_DTYPES, rows_dense
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
MOST_KEYS = 256  # of Triton; beyond it kernels for long sequences are ahead
MOST_DIM = 128
LOG2_E = math.log2(math.e)


def short_attention_reference(
    qkv: Tensor, heads: int, *, queries: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Reference of :func:`short_attention`, differentiable: computed in fp32 (float64 stays), rounded once."""
    kind = torch.promote_types(torch.float32, qkv.dtype)
    q, k, v = (x.to(kind).transpose(1, 2) for x in _heads(qkv, queries, heads))
    scores = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    return (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def _heads(packed: Tensor, queries: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, n, H, d], k and v [B, N, H, d], views of qkv or of queries and kv."""
    parts = [packed] if queries is None else [queries, packed]
    views: list[Tensor] = []
    for part, count in zip(parts, (3,) if queries is None else (1, 2), strict=True):
        batch, rows, width = part.shape
        views += part.view(batch, rows, count, heads, width // (count * heads)).unbind(2)
    q, k, v = views
    return q, k, v


def attention_cost(
    batch: int, queries: int, keys: int, heads: int, dim: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """Floor of one direction: q, k, v and out (backward: their gradients too, but not out) moved once.

    The products alone are counted: 2 forward, 5 backward, as a multiplication and an addition each.
    """
    moved = (3 * queries + 4 * keys) if backward else (2 * queries + 2 * keys)
    product = 2 * batch * heads * queries * keys * dim
    return Cost(bytes=batch * moved * heads * dim * itemsize, flops=(5 if backward else 2) * product)


# ---------------------------------------------------------------------------------------------------------- Triton


@jit
def _load_rows(ptr, first, rows, stride, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_R, BLOCK_D] from row ``first`` on, zero beyond the last row and beyond D."""
    r = first + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    return tl.load(ptr + r.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@jit
def _store_rows(  # type: ignore[no-untyped-def]
    ptr, value, first, rows, stride, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The counterpart of _load_rows."""
    r = first + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    tl.store(ptr + r.to(tl.int64)[:, None] * stride + d[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@jit
def _scores(q, k, first, keys, scale_log2, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in units of log2(e), so that exp2 makes them probabilities; -inf beyond the last key."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    return tl.where((first + tl.arange(0, BLOCK_N) < keys)[None, :], s, float("-inf"))


@jit
def _task(blocks, heads):  # type: ignore[no-untyped-def]
    """This program's (block, sample, head); neighbours share a head, so its rows stay in L2."""
    return (
        tl.program_id(0) % blocks,
        (tl.program_id(0) // blocks // heads).to(tl.int64),
        tl.program_id(0) // blocks % heads,
    )


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, queries, keys, heads, scale_log2, stride_q_b, stride_q_n, stride_kv_b, stride_kv_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SINGLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head from all keys, BLOCK_N at a time; SINGLE: they are at most that."""
    block, sample, head = _task(tl.cdiv(queries, BLOCK_M), heads)
    q = _load_rows(q_ptr + sample * stride_q_b + head * D, block * BLOCK_M, queries, stride_q_n, D, BLOCK_M, BLOCK_D)
    k_ptr += sample * stride_kv_b + head * D
    v_ptr += sample * stride_kv_b + head * D
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(0, BLOCK_N if SINGLE else keys, BLOCK_N):
        k = _load_rows(k_ptr, first, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
        v = _load_rows(v_ptr, first, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
        s = _scores(q, k, first, keys, scale_log2, BLOCK_N)
        above = tl.maximum(top, tl.max(s, axis=1))
        decay = tl.exp2(top - above)  # the sums so far are relative to a maximum that may have risen
        e = tl.exp2(s - above[:, None])
        total = total * decay + tl.sum(e, axis=1)
        acc = tl.dot(e.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = above
    out_ptr += (sample * queries * heads + head) * D
    _store_rows(out_ptr, acc / total[:, None], block * BLOCK_M, queries, heads * D, D, BLOCK_M, BLOCK_D)


@jit
def _attention_backward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, queries, keys, heads, scale, scale_log2,
    stride_q_b, stride_q_n, stride_kv_b, stride_kv_n, stride_grad_b, stride_grad_n,
    stride_dq_b, stride_dq_n, stride_dkv_b, stride_dkv_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes all gradients of one head of one sample: at most BLOCK queries and BLOCK keys."""
    _, sample, head = _task(1, heads)
    q = _load_rows(q_ptr + sample * stride_q_b + head * D, 0, queries, stride_q_n, D, BLOCK, BLOCK_D)
    k = _load_rows(k_ptr + sample * stride_kv_b + head * D, 0, keys, stride_kv_n, D, BLOCK, BLOCK_D)
    v = _load_rows(v_ptr + sample * stride_kv_b + head * D, 0, keys, stride_kv_n, D, BLOCK, BLOCK_D)
    g = _load_rows(grad_ptr + sample * stride_grad_b + head * D, 0, queries, stride_grad_n, D, BLOCK, BLOCK_D)
    s = _scores(q, k, 0, keys, scale_log2, BLOCK)
    e = tl.exp2(s - tl.max(s, axis=1)[:, None])
    p = e / tl.sum(e, axis=1)[:, None]
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q.dtype)
    dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
    _store_rows(dv_ptr + sample * stride_dkv_b + head * D, dv, 0, keys, stride_dkv_n, D, BLOCK, BLOCK_D)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
    _store_rows(dk_ptr + sample * stride_dkv_b + head * D, dk, 0, keys, stride_dkv_n, D, BLOCK, BLOCK_D)
    dq = tl.dot(ds, k, input_precision="ieee") * scale
    _store_rows(dq_ptr + sample * stride_dq_b + head * D, dq, 0, queries, stride_dq_n, D, BLOCK, BLOCK_D)


@jit
def _statistics_of(dq_ptr, first, queries, stride, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the two statistics of each query stand: fp32, at the start of its row of dq; and which rows exist."""
    r = first + tl.arange(0, BLOCK_M)
    return (dq_ptr + r.to(tl.int64) * stride).to(tl.pointer_type(tl.float32), bitcast=True), r < queries


@jit
def _attention_statistics_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, queries, keys, heads, scale_log2,
    stride_q_b, stride_q_n, stride_kv_b, stride_kv_n, stride_grad_b, stride_grad_n, stride_dq_b, stride_dq_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of exp2(s), and sum_l P g . v, of BLOCK_M queries of one head, left in their rows of dq."""
    block, sample, head = _task(tl.cdiv(queries, BLOCK_M), heads)
    first_q = block * BLOCK_M
    q = _load_rows(q_ptr + sample * stride_q_b + head * D, first_q, queries, stride_q_n, D, BLOCK_M, BLOCK_D)
    g = _load_rows(grad_ptr + sample * stride_grad_b + head * D, first_q, queries, stride_grad_n, D, BLOCK_M, BLOCK_D)
    k_ptr += sample * stride_kv_b + head * D
    v_ptr += sample * stride_kv_b + head * D
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, keys, BLOCK_N):
        k = _load_rows(k_ptr, first, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
        v = _load_rows(v_ptr, first, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
        s = _scores(q, k, first, keys, scale_log2, BLOCK_N)
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        above = tl.maximum(top, tl.max(s, axis=1))
        decay = tl.exp2(top - above)
        e = tl.exp2(s - above[:, None])
        total = total * decay + tl.sum(e, axis=1)
        weighted = weighted * decay + tl.sum(e * dp, axis=1)
        top = above
    rows, inside = _statistics_of(dq_ptr + sample * stride_dq_b + head * D, first_q, queries, stride_dq_n, BLOCK_M)
    tl.store(rows, top + tl.log2(total), mask=inside)
    tl.store(rows + 1, weighted / total, mask=inside)


@jit
def _attention_backward_keys_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, queries, keys, heads, scale, scale_log2,
    stride_q_b, stride_q_n, stride_kv_b, stride_kv_n, stride_grad_b, stride_grad_n,
    stride_dq_b, stride_dq_n, stride_dkv_b, stride_dkv_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dk and dv of BLOCK_N keys of one head, BLOCK_M queries at a time."""
    block, sample, head = _task(tl.cdiv(keys, BLOCK_N), heads)
    first_k = block * BLOCK_N
    k = _load_rows(k_ptr + sample * stride_kv_b + head * D, first_k, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
    v = _load_rows(v_ptr + sample * stride_kv_b + head * D, first_k, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
    q_ptr += sample * stride_q_b + head * D
    grad_ptr += sample * stride_grad_b + head * D
    dq_ptr += sample * stride_dq_b + head * D
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, queries, BLOCK_M):
        q = _load_rows(q_ptr, first, queries, stride_q_n, D, BLOCK_M, BLOCK_D)
        g = _load_rows(grad_ptr, first, queries, stride_grad_n, D, BLOCK_M, BLOCK_D)
        rows, inside = _statistics_of(dq_ptr, first, queries, stride_dq_n, BLOCK_M)
        log_total = tl.load(rows, mask=inside, other=0.0)
        mean = tl.load(rows + 1, mask=inside, other=0.0)
        p = tl.exp2(_scores(q, k, first_k, keys, scale_log2, BLOCK_N) - log_total[:, None])
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision="ieee")
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    dk_ptr += sample * stride_dkv_b + head * D
    dv_ptr += sample * stride_dkv_b + head * D
    _store_rows(dk_ptr, dk * scale, first_k, keys, stride_dkv_n, D, BLOCK_N, BLOCK_D)
    _store_rows(dv_ptr, dv, first_k, keys, stride_dkv_n, D, BLOCK_N, BLOCK_D)


@jit
def _attention_backward_queries_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, queries, keys, heads, scale, scale_log2,
    stride_q_b, stride_q_n, stride_kv_b, stride_kv_n, stride_grad_b, stride_grad_n, stride_dq_b, stride_dq_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dq of BLOCK_M queries of one head, BLOCK_N keys at a time, over their statistics."""
    block, sample, head = _task(tl.cdiv(queries, BLOCK_M), heads)
    first_q = block * BLOCK_M
    q = _load_rows(q_ptr + sample * stride_q_b + head * D, first_q, queries, stride_q_n, D, BLOCK_M, BLOCK_D)
    g = _load_rows(grad_ptr + sample * stride_grad_b + head * D, first_q, queries, stride_grad_n, D, BLOCK_M, BLOCK_D)
    k_ptr += sample * stride_kv_b + head * D
    v_ptr += sample * stride_kv_b + head * D
    dq_ptr += sample * stride_dq_b + head * D
    rows, inside = _statistics_of(dq_ptr, first_q, queries, stride_dq_n, BLOCK_M)
    log_total = tl.load(rows, mask=inside, other=0.0)
    mean = tl.load(rows + 1, mask=inside, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(0, keys, BLOCK_N):
        k = _load_rows(k_ptr, first, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
        v = _load_rows(v_ptr, first, keys, stride_kv_n, D, BLOCK_N, BLOCK_D)
        p = tl.exp2(_scores(q, k, first, keys, scale_log2, BLOCK_N) - log_total[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")
    tl.debug_barrier()  # every thread has read the statistics
    _store_rows(dq_ptr, dq * scale, first_q, queries, stride_dq_n, D, BLOCK_M, BLOCK_D)


def _attention_triton(packed: Tensor, queries: Tensor | None, heads: int, scale: float) -> Tensor:
    q, k, v = _heads(packed, queries, heads)
    batch, rows, _, dim = q.shape
    keys = k.shape[1]
    out = packed.new_empty(batch, rows, heads * dim)
    if not out.numel() or not keys:
        return out.zero_()
    config = _config("short_attention", q, keys)
    with torch.cuda.device_of(q):
        _attention_kernel[(triton.cdiv(rows, config["BLOCK_M"]) * batch * heads,)](
            q, k, v, out, rows, keys, heads, scale * LOG2_E, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            D=dim, BLOCK_D=_block(dim), SINGLE=keys <= config["BLOCK_N"], **config,
        )  # fmt: skip
    return out


def _attention_backward_triton(
    grad: Tensor, packed: Tensor, queries: Tensor | None, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    dpacked, dqueries = _empty_gradients(packed, queries)
    q, k, v = _heads(packed, queries, heads)
    batch, rows, _, dim = q.shape
    keys = k.shape[1]
    if not grad.numel() or not keys:
        return dpacked.zero_(), dqueries.zero_()
    dq, dk, dv = _heads(dpacked, None if queries is None else dqueries, heads)
    tensors, sizes = (q, k, v, grad, dq), (rows, keys, heads)
    strides = tuple(x.stride(axis) for x in (q, k, grad, dq) for axis in (0, 1))
    factors = (scale, scale * LOG2_E)
    shape = {"D": dim, "BLOCK_D": _block(dim)}
    with torch.cuda.device_of(q):
        config = _config("short_attention_backward", q, keys)
        if max(rows, keys) <= config["BLOCK"]:
            _attention_backward_kernel[(batch * heads,)](
                *tensors, dk, dv, *sizes, *factors, *strides, dk.stride(0), dk.stride(1), **shape, **config
            )
            return dpacked, dqueries
        config = _config("short_attention_backward_statistics", q, keys)
        _attention_statistics_kernel[(triton.cdiv(rows, config["BLOCK_M"]) * batch * heads,)](
            *tensors, *sizes, factors[1], *strides, **shape, **config
        )
        config = _config("short_attention_backward_keys", q, keys)
        _attention_backward_keys_kernel[(triton.cdiv(keys, config["BLOCK_N"]) * batch * heads,)](
            *tensors, dk, dv, *sizes, *factors, *strides, dk.stride(0), dk.stride(1), **shape, **config
        )
        config = _config("short_attention_backward_queries", q, keys)  # the last, as it overwrites the statistics
        _attention_backward_queries_kernel[(triton.cdiv(rows, config["BLOCK_M"]) * batch * heads,)](
            *tensors, *sizes, *factors, *strides, **shape, **config
        )
    return dpacked, dqueries


def _block(dim: int) -> int:
    """Columns of a tile: a power of two, and no fewer than a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


def _config(op: str, q: Tensor, keys: int) -> dict[str, int]:
    return tuning.lookup(op, str(q.dtype), _block(q.shape[3]), max(q.shape[1], keys), architecture(q.device))


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    signature: dict[str, str | tuple[str, ...]] = dict.fromkeys(("queries", "keys", "heads"), "i32")
    signature |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    signature |= {f"stride_{name}_{axis}": "i32:16" for name in ("q", "kv", "grad", "dq", "dkv") for axis in "bn"}
    names = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    kernels = {
        "short_attention": _attention_kernel,
        "short_attention_backward": _attention_backward_kernel,
        "short_attention_backward_statistics": _attention_statistics_kernel,
        "short_attention_backward_keys": _attention_backward_keys_kernel,
        "short_attention_backward_queries": _attention_backward_queries_kernel,
    }
    cases = []
    for dtype, dims in ((torch.bfloat16, (32, 64, 80, 128)), (torch.float32, (64, 128))):
        expects = {"tensor_core", "wgmma"} if dtype != torch.float32 else set()
        pointers = dict.fromkeys(names, pointer(dtype))
        for dim in dims:
            for op, kernel in kernels.items():
                store = set() if kernel is _attention_statistics_kernel else {"store16"}
                for _, block, config in shipped(op, arch, dtypes=(dtype,), widths=(_block(dim),)):
                    variants = [{"SINGLE": True}, {"SINGLE": False}] if kernel is _attention_kernel else [{}]
                    cases += [
                        AotCase(
                            kernel,
                            signature | pointers,
                            {"D": dim, "BLOCK_D": block, **variant},
                            config,
                            frozenset({"load16"} | expects | store),
                            f"{dtype} {dim} {' '.join(f'{value}' for value in (variant | config).values())}",
                        )
                        for variant in variants
                    ]
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _attention_native(packed: Tensor, queries: Tensor | None, heads: int, scale: float) -> Tensor:
    batch, keys, width = packed.shape
    out = recycled((batch, keys, width // 3) if queries is None else queries.shape, packed.dtype)
    if not out.numel() or not keys:
        return out.zero_()
    torch.ops.cohobate_native.attention(packed, queries, heads, scale, out)
    return out


def _attention_backward_native(
    grad: Tensor, packed: Tensor, queries: Tensor | None, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    dpacked = recycled(packed.shape, packed.dtype)
    dqueries = packed.new_empty(0) if queries is None else recycled(queries.shape, packed.dtype)
    if not grad.numel() or not packed.shape[1]:
        return dpacked.zero_(), dqueries.zero_()
    results = dpacked, None if queries is None else dqueries
    torch.ops.cohobate_native.attention_backward(grad, packed, queries, heads, scale, *results)
    return dpacked, dqueries


# ---------------------------------------------------------------------------------------------------- registration


def _dim_reasons(name: str, wide: bool, odd: bool) -> list[str]:
    reasons = [f"{name} computes heads of up to {MOST_DIM} channels, these are wider"] * wide
    return reasons + [f"{name} computes heads of an even number of channels, these have an odd one"] * odd


def _native_limit(*, dtype: torch.dtype, wide: bool, odd: bool, long: bool) -> list[str]:
    return dtype_limit("native", *NATIVE_DTYPES)(dtype=dtype) + _dim_reasons("native", wide, odd)


def _triton_limit(*, dtype: torch.dtype, wide: bool, odd: bool, long: bool) -> list[str]:
    reasons = dtype_limit("triton", *FLOAT_DTYPES)(dtype=dtype) + _dim_reasons("triton", wide, odd)
    return reasons + [f"triton has tiles for up to {MOST_KEYS} keys, there are more"] * long


register(
    Op(
        "short_attention",
        ("reference", "native", "triton"),
        attention_cost,
        {"native": _native_limit, "triton": _triton_limit},
    )
)


def _empty_gradients(packed: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor]:
    """d(packed) and d(queries), contiguous; the latter empty where there are no separate queries."""
    return packed.new_empty(packed.shape), packed.new_empty(0 if queries is None else queries.shape)


_attention_op = define(
    "short_attention(Tensor packed, Tensor? queries, int heads, float scale, str impl) -> Tensor",
    fake=lambda packed, queries, heads, scale: packed.new_empty(
        (*packed.shape[:2], packed.shape[2] // 3) if queries is None else queries.shape
    ),
    native=_attention_native,
    triton=_attention_triton,
)
_backward_op = define(
    "short_attention_backward(Tensor grad, Tensor packed, Tensor? queries, int heads, float scale, str impl)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, packed, queries, heads, scale: _empty_gradients(packed, queries),
    native=_attention_backward_native,
    triton=_attention_backward_triton,
)


def _forward_flops(packed: Any, queries: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 4 * math.prod(out_shape) * int(packed[1])


def _backward_flops(grad: Any, packed: Any, *_: Any, **__: Any) -> int:
    return 10 * math.prod(grad) * int(packed[1])


count_flops(short_attention=_forward_flops, short_attention_backward=_backward_flops)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, queries: Tensor | None, heads: int, scale: float, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed, queries)
        ctx.facts = (heads, scale, impl)
        return _attention_op(packed, queries, heads, scale, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        packed, queries = ctx.saved_tensors
        dpacked, dqueries = _backward_op(rows_dense(grad), packed, queries, *ctx.facts)
        packed_wanted, queries_wanted = ctx.needs_input_grad[:2]
        return dpacked if packed_wanted else None, dqueries if queries_wanted else None, None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def short_attention(
    qkv: Tensor, heads: int, *, queries: Tensor | None = None, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention of H heads of d channels over N keys; made for N up to 256.

    Args:
        qkv: [B, N, 3*H*d], fp32, bf16 or fp16: all heads of q, then of k, then of v, as a fused projection writes them.
            With ``queries`` it is kv, [B, N, 2*H*d].
        heads: H.
        queries: [B, n, H*d] in qkv's dtype: the rows that are wanted, where those are not all N (a teacher's last block
            computes the rows that the loss reads).
        scale: of the scores, positive; None: d ** -0.5.
        backend: auto (None), reference, native (fp32 and bf16; d even, up to 128) or triton (as native, fp16 too; up to
            256 keys). The dtype is qkv's whatever autocast says.

    Returns:
        [B, N, H*d], or [B, n, H*d] with ``queries``, in qkv's dtype. Gradients are deterministic and packed as the
        inputs are; the native and Triton ones cannot be differentiated again.

    Raises:
        TypeError, ValueError: a dtype, shape, device or backend that does not fit; the message names the argument.
    """
    dim = _check(qkv, heads, queries)
    factor = dim**-0.5 if scale is None else float(scale)
    if not 0 < factor < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    wide = odd = long = False  # branches, as what compiled code chooses by must be a constant
    if dim > MOST_DIM:
        wide = True
    if dim % 2:
        odd = True
    if qkv.shape[1] > MOST_KEYS:
        long = True
    impl = choose("short_attention", qkv, backend, dtype=qkv.dtype, wide=wide, odd=odd, long=long)
    if impl == "reference":
        with torch.autocast(qkv.device.type, enabled=False):
            return short_attention_reference(qkv, heads, queries=queries, scale=scale)
    wanted = None if queries is None else rows_dense(queries)
    compute = _Attention.apply if torch.is_grad_enabled() else _attention_op  # a teacher needs no autograd around it
    out: Tensor = compute(rows_dense(qkv), wanted, heads, factor, impl)
    return out


def _check(qkv: Tensor, heads: int, queries: Tensor | None) -> int:
    """Channels of a head.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    check_tensor("qkv", qkv, dtypes=(*FLOAT_DTYPES, torch.float64), shape=(None, None, None))
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads: expected a positive whole number, got {heads!r}")
    if queries is None:
        if qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
            raise ValueError(f"qkv: expected a multiple of 3 * {heads} (heads) channels, got {qkv.shape[2]}")
        return qkv.shape[2] // (3 * heads)
    check_tensor("queries", queries, dtypes=(qkv.dtype,), shape=(qkv.shape[0], None, None), like=qkv)
    width = queries.shape[2]
    if width == 0 or width % heads:
        raise ValueError(f"queries: expected a multiple of {heads} (heads) channels, got {width}")
    if qkv.shape[2] != 2 * width:
        raise ValueError(f"qkv: expected {2 * width} channels, k and v of the {width} of queries, got {qkv.shape[2]}")
    return width // heads
