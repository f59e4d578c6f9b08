"""add_norm: residual add and LayerNorm in one pass; add_norm_fp8: the same with a quantised result.

    sum    = x + factor[b] * branch                                  rounded to x's dtype; x itself without a branch
    normed = (sum - mean) / sqrt(var + eps) * weight + bias          mean and var of each row of D values, var over D

Statistics are fp32 and those of the *rounded* sum, in every implementation: that is what a LayerNorm of its own would
read, and the backward pass can normalise the stored sum again and find the same values. Source of the fusion: the
residual form of the norm in flash-attention's ``ops``; drop path: Huang et al., "Deep networks with stochastic depth"
(ECCV 2016), where factor is 0 or 1 / keep.

| tensor       | shape     | dtype                            | strides                          |
|--------------|-----------|----------------------------------|----------------------------------|
| x            | [B, N, D] | fp32, bf16, fp16                 | last one is 1 (else copied once) |
| branch       | [B, N, D] | any of them                      | last one is 1 (else copied once) |
| weight, bias | [D]       | any of them, computed in fp32    | any                              |
| factor       | [B]       | fp32                             | any                              |
| sum          | [B, N, D] | as x                             | contiguous; x's own without a branch |
| normed       | [B, N, D] | any of them; float8_e4m3fn (fp8) | contiguous                       |

float64 runs as the reference. Backward, one pass over the rows, with n = d_normed * weight and h = (sum - mean) * rstd:

    dx = d_sum + rstd * (n - mean(n) - h * mean(n * h))      dbranch = factor[b] * dx      (fp32, each rounded once)
    dweight = sum over rows of d_normed * h                  dbias = sum over rows of d_normed

Saved for it: the sum, which the residual stream keeps alive anyway, and mean and rstd (8 bytes a row); the normalised
rows are not. Where branch and x have one dtype and there is no factor, dbranch is dx and is not written twice. The
factor gets no gradient. Floor: :func:`add_norm_cost`.

Determinism: bitwise from run to run. Rows are independent; dweight and dbias add the rows of a chunk, then the chunks
as a tree whose shape follows from B and N alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.tokens.rows import FLOAT_DTYPES, rows_dense
from cohobate.kernels.transformer.fp8 import (
    FP8,
    NATIVE_DTYPES,
    check_dtype,
    check_scale,
    converts_in_hardware,
    dtype_reasons,
    quantise_fp8_reference,
    to_fp8,
)
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

WIDEST = 2048  # channels that one Triton program keeps in registers
CHUNK = 32  # rows whose weight and bias gradients one task of `native` adds; part of the result, so not tuned
CHUNK_TRITON = 16  # the same of one Triton program
SUM_ROWS, SUM_COLUMNS = 64, 64  # tile that one program of the summing kernel adds


def add_norm_reference(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`add_norm`, differentiable."""
    kind = torch.promote_types(x.dtype, torch.float32)
    total = x
    if branch is not None:
        added = branch.to(kind)
        total = (x.to(kind) + (added if factor is None else added * factor.view(-1, 1, 1))).to(x.dtype)
    scale, shift = (None if t is None else t.to(kind) for t in (weight, bias))
    normed = torch.nn.functional.layer_norm(total.to(kind), x.shape[-1:], scale, shift, eps)
    return total, normed.to(dtype or x.dtype)


def add_norm_fp8_reference(
    x: Tensor,
    branch: Tensor | None,
    scale: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`add_norm_fp8`."""
    total, normed = add_norm_reference(
        x, branch, weight=weight, bias=bias, factor=factor, eps=eps, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return total, quantise_fp8_reference(normed, scale)


def add_norm_cost(
    rows: int,
    width: int,
    x_itemsize: int,
    normed_itemsize: int,
    *,
    branch_itemsize: int = 0,
    affine: bool = True,
    backward: bool = False,
) -> Cost:
    """Floor of one direction; ``branch_itemsize`` 0: no branch.

    Forward reads x and branch, writes sum (with a branch) and normed. Backward reads d_sum, sum and d_normed, writes dx
    and dbranch. Statistics and parameters are left out.
    """
    if backward:
        moved = 3 * x_itemsize + normed_itemsize + branch_itemsize
        return Cost(bytes=rows * width * moved, flops=rows * width * (12 + 4 * affine))
    moved = x_itemsize + normed_itemsize + (branch_itemsize + x_itemsize if branch_itemsize else 0)
    return Cost(bytes=rows * width * moved, flops=rows * width * (6 + 2 * affine + (branch_itemsize > 0)))


# ---------------------------------------------------------------------------------------------------------- Triton


@jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, branch_ptr, weight_ptr, bias_ptr, factor_ptr, sum_ptr, normed_ptr, stats_ptr, rows, length, stride_x_b,
    stride_x_n, stride_branch_b, stride_branch_n, eps, inverse, IS_FP8: tl.constexpr, HARDWARE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes one row."""
    row = tl.program_id(0).to(tl.int64)
    sample, j = row // length, row % length
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.load(x_ptr + sample * stride_x_b + j * stride_x_n + columns, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch_row = branch_ptr + sample * stride_branch_b + j * stride_branch_n
        added = tl.load(branch_row + columns, mask=inside, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            added = added * tl.load(factor_ptr + sample)
        rounded = (total + added).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + columns, rounded, mask=inside)
        total = rounded.to(tl.float32)
    mean = tl.sum(total) / D
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / D + eps)
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + rows + row, rstd)
    normed = centred * rstd
    if weight_ptr is not None:
        normed = normed * tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if bias_ptr is not None:
        normed = normed + tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if IS_FP8:
        tl.store(normed_ptr + row * D + columns, to_fp8(normed, inverse, HARDWARE), mask=inside)
    else:
        tl.store(normed_ptr + row * D + columns, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@jit
def _add_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_sum_ptr, grad_normed_ptr, sum_ptr, stats_ptr, weight_ptr, factor_ptr, dx_ptr, dbranch_ptr, partial_ptr, rows,
    length, stride_grad_sum_b, stride_grad_sum_n, stride_grad_normed_b, stride_grad_normed_n, stride_sum_b,
    stride_sum_n, CHUNK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes CHUNK rows, one after the other, and their sums for weight and bias."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0)
    for i in range(CHUNK):
        row = chunk * CHUNK + i
        sample, j = row // length, row % length
        inside = (columns < D) & (row < rows)
        grad_row = grad_normed_ptr + sample * stride_grad_normed_b + j * stride_grad_normed_n
        grad = tl.load(grad_row + columns, mask=inside, other=0.0).to(tl.float32)
        sum_row = sum_ptr + sample * stride_sum_b + j * stride_sum_n
        total = tl.load(sum_row + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(stats_ptr + rows + row, mask=row < rows, other=0.0)
        h = tl.where(inside, (total - mean) * rstd, 0.0)
        n = grad
        if weight_ptr is not None:
            n = grad * weight
        if partial_ptr is not None:
            dweight += grad * h
            dbias += grad
        dx = rstd * (n - tl.sum(n) / D - h * (tl.sum(n * h) / D))
        if grad_sum_ptr is not None:
            incoming = grad_sum_ptr + sample * stride_grad_sum_b + j * stride_grad_sum_n
            dx += tl.load(incoming + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dbranch_ptr is not None:
            if factor_ptr is not None:
                dx = dx * tl.load(factor_ptr + sample, mask=row < rows, other=0.0)
            tl.store(dbranch_ptr + row * D + columns, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + chunk * 2 * D + columns, dweight, mask=columns < D)
        tl.store(partial_ptr + chunk * 2 * D + D + columns, dbias, mask=columns < D)


@jit
def _column_sum_kernel(rows_ptr, out_ptr, rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program adds BLOCK_R rows of BLOCK_D columns."""
    group = tl.program_id(0).to(tl.int64)
    row = group * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    value = tl.load(rows_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + group * D + column, tl.sum(value, axis=0), mask=column < D)


def sum_columns(partial: Tensor, op: str) -> Tensor:
    """fp32 [rows, D] -> [D], as a tree of SUM_ROWS branches; launched as the tuning tables say for ``op``."""
    rows, width = partial.shape
    if rows == 0:
        return partial.new_zeros(width)
    config = tuning.lookup(op, str(partial.dtype), width, rows, architecture(partial.device))
    with torch.cuda.device_of(partial):
        while partial.shape[0] > 1:
            rows = partial.shape[0]
            groups = triton.cdiv(rows, SUM_ROWS)
            out = partial.new_empty(groups, width)
            _column_sum_kernel[(groups, triton.cdiv(width, SUM_COLUMNS))](
                partial, out, rows, D=width, BLOCK_R=SUM_ROWS, BLOCK_D=SUM_COLUMNS, **config
            )
            partial = out
    return partial[0]


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _forward_triton(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    eps: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    total, normed, stats = _outputs(x, branch, dtype)
    batch, length, width = x.shape
    if normed.numel():
        op = "add_norm_fp8" if dtype == FP8 else "add_norm"
        config = tuning.lookup(op, str(x.dtype), width, length, architecture(x.device))
        with torch.cuda.device_of(x):
            _add_norm_kernel[(batch * length,)](
                x, branch, weight, bias, factor, None if branch is None else total,
                normed.view(torch.uint8) if dtype == FP8 else normed, stats, batch * length, length, *_strides(x),
                *_strides(branch), eps, 1 / scale, IS_FP8=dtype == FP8, HARDWARE=converts_in_hardware(x.device),
                D=width, BLOCK_D=triton.next_power_of_2(width), **config,
            )  # fmt: skip
    return total, normed, stats


def _backward_triton(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    wants_branch: bool,
    wants_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dbranch, affine = _gradients(total, dtype, wants_branch, wants_affine)
    batch, length, width = total.shape
    chunk = CHUNK_TRITON if wants_affine else 1
    chunks = triton.cdiv(batch * length, chunk)
    partial = stats.new_empty(chunks, 2 * width) if wants_affine else None
    if dx.numel():
        config = tuning.lookup("add_norm_backward", str(total.dtype), width, length, architecture(total.device))
        with torch.cuda.device_of(total):
            _add_norm_backward_kernel[(chunks,)](
                grad_sum, grad_normed, total, stats, weight, factor, dx, dbranch if wants_branch else None, partial,
                batch * length, length, *_strides(grad_sum), *_strides(grad_normed), *_strides(total), CHUNK=chunk,
                D=width, BLOCK_D=triton.next_power_of_2(width), **config,
            )  # fmt: skip
    if partial is not None:
        affine = sum_columns(partial, "add_norm_sum").view(2, width)
    return dx, dbranch, affine


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    cases = []
    vectors, widths = frozenset({"vector16"}), (384, 768, WIDEST)
    parameters = {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "factor_ptr": "*fp32"}
    numbers = {"stats_ptr": "*fp32", "rows": "i32", "length": "i32"}
    pairs = ((torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
    for x, branch in pairs:
        kinds = {"x_ptr": pointer(x), "branch_ptr": pointer(branch), "sum_ptr": pointer(x)}
        strides = dict.fromkeys(("stride_x_b", "stride_x_n", "stride_branch_b", "stride_branch_n"), "i32:16")
        forward = kinds | parameters | numbers | strides | {"eps": "fp32", "inverse": "fp32"}
        for op, out in (("add_norm", pointer(branch)), ("add_norm_fp8", "*u8")):
            for _, width, config in shipped(op, architecture, dtypes=(x,), widths=widths):
                constants: dict[str, Any] = {
                    "IS_FP8": op == "add_norm_fp8",
                    "HARDWARE": architecture != "sm80",
                    "D": width,
                }
                constants["BLOCK_D"] = triton.next_power_of_2(width)
                # A row's slice for one thread is 16 values: 16 bytes of e4m3 too.
                for absent in ((), ("factor_ptr",), ("branch_ptr", "sum_ptr", "factor_ptr", "weight_ptr", "bias_ptr")):
                    if absent and width != 768:
                        continue
                    signature = {
                        name: kind for name, kind in (forward | {"normed_ptr": out}).items() if name not in absent
                    }
                    name = f"{op} {x} {branch} {width} without {len(absent)}"
                    cases.append(
                        AotCase(_add_norm_kernel, signature, constants | dict.fromkeys(absent), config, vectors, name)
                    )
        names = [f"stride_{name}_{axis}" for name in ("grad_sum", "grad_normed", "sum") for axis in "bn"]
        backward = {"grad_sum_ptr": pointer(x), "grad_normed_ptr": pointer(branch), "sum_ptr": pointer(x)}
        backward |= {"dx_ptr": pointer(x), "dbranch_ptr": pointer(branch), "partial_ptr": "*fp32"}
        backward |= {"weight_ptr": "*fp32", "factor_ptr": "*fp32"} | numbers | dict.fromkeys(names, "i32:16")
        for _, width, config in shipped("add_norm_backward", architecture, dtypes=(x,), widths=widths):
            constants = {"CHUNK": CHUNK_TRITON, "D": width, "BLOCK_D": triton.next_power_of_2(width)}
            for absent in ((), ("grad_sum_ptr", "dbranch_ptr", "factor_ptr", "weight_ptr", "partial_ptr")):
                if absent and width != 768:
                    continue
                signature = {name: kind for name, kind in backward.items() if name not in absent}
                constants = constants | dict.fromkeys(absent) | ({"CHUNK": 1} if absent else {})
                name = f"{x} {branch} {width} without {len(absent)}"
                cases.append(AotCase(_add_norm_backward_kernel, signature, constants, config, vectors, name))
    tile = {"BLOCK_R": SUM_ROWS, "BLOCK_D": SUM_COLUMNS}
    for _, width, config in shipped("add_norm_sum", architecture, dtypes=(torch.float32,), widths=(1536,)):
        signature = {"rows_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32"}
        cases.append(
            AotCase(_column_sum_kernel, signature, {"D": width, **tile}, config, frozenset({"load16"}), f"{width}")
        )
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _forward_native(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    eps: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if branch is None else recycled(x.shape, x.dtype)
    normed = recycled(x.shape, torch.uint8 if dtype == FP8 else dtype)
    stats = x.new_empty(2, x.shape[0], x.shape[1], dtype=torch.float32)
    torch.ops.cohobate_native.add_norm.default(
        x, branch, weight, bias, factor, eps, 1 / scale, None if branch is None else total, normed, stats
    )
    return total, normed.view(dtype), stats


def _backward_native(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    wants_branch: bool,
    wants_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = recycled(total.shape, total.dtype)
    dbranch = recycled(total.shape if wants_branch else (0,), dtype)
    affine = stats.new_empty((2, total.shape[2]) if wants_affine else 0)
    torch.ops.cohobate_native.add_norm_backward.default(
        grad_sum, grad_normed, total, stats, weight, factor, CHUNK, dx, dbranch if wants_branch else None,
        affine if wants_affine else None,
    )  # fmt: skip
    return dx, dbranch, affine


# ---------------------------------------------------------------------------------------------------- registration


def _outputs(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised sum (empty without a branch), normed, and fp32 [2, B, N] means and reciprocal deviations."""
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(2, x.shape[0], x.shape[1], dtype=torch.float32)


def _gradients(
    total: Tensor, dtype: torch.dtype, wants_branch: bool, wants_affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dx, dbranch in ``dtype``, and fp32 [2, D] for weight and bias; empty where it is not wanted."""
    dbranch = total.new_empty(total.shape if wants_branch else (0,), dtype=dtype)
    affine = total.new_empty((2, total.shape[2]) if wants_affine else (0,), dtype=torch.float32)
    return total.new_empty(total.shape), dbranch, affine


@functools.cache  # it is asked at every call
def _native_limit(*, dtypes: Sequence[torch.dtype], wide: bool) -> list[str]:
    return dtype_reasons("native", (*NATIVE_DTYPES, FP8), dtypes)


@functools.cache
def _triton_limit(*, dtypes: Sequence[torch.dtype], wide: bool) -> list[str]:
    reasons = dtype_reasons("triton", (*FLOAT_DTYPES, FP8), dtypes)
    return reasons + [f"triton keeps rows of up to {WIDEST} channels in registers, x is wider"] * wide


for _name in ("add_norm", "add_norm_fp8"):
    register(
        Op(
            _name,
            ("reference", "native", "triton"),
            add_norm_cost,
            {"native": _native_limit, "triton": _triton_limit},
        )
    )

_forward_op = define(
    "add_norm(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, Tensor? factor, float eps, float scale, "
    "ScalarType dtype, str impl) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, branch, weight, bias, factor, eps, scale, dtype: _outputs(x, branch, dtype),
    native=_forward_native,
    triton=_forward_triton,
)
_backward_op = define(
    "add_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor sum, Tensor stats, Tensor? weight, "
    "Tensor? factor, ScalarType dtype, bool wants_branch, bool wants_affine, str impl) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad_sum, grad_normed, total, stats, weight, factor, dtype, wants_branch, wants_affine: _gradients(
        total, dtype, wants_branch, wants_affine
    ),
    native=_backward_native,
    triton=_backward_triton,
)


class _AddNorm(torch.autograd.Function):
    """Without a branch the sum is x itself, and still an output, so that its gradient enters the one pass over rows."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        factor: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        total, normed, stats = _forward_op(x, branch, weight, bias, factor, eps, 1.0, dtype, impl)
        total = x if branch is None else total
        ctx.save_for_backward(total, stats, weight, factor)
        ctx.set_materialize_grads(False)
        ctx.branch_dtype, ctx.impl = x.dtype if branch is None else branch.dtype, impl
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor | None, grad_normed: Tensor | None):  # type: ignore[no-untyped-def]
        total, stats, weight, factor = ctx.saved_tensors
        needs_x, needs_branch, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if grad_normed is None:
            if grad_sum is None:
                return (None,) * 8
            grad_normed = torch.zeros_like(total)
        same = needs_branch and ctx.branch_dtype == total.dtype and factor is None
        dx, dbranch, affine = _backward_op(
            None if grad_sum is None else rows_dense(grad_sum), rows_dense(grad_normed), total, stats, weight, factor,
            ctx.branch_dtype, needs_branch and not same, needs_weight or needs_bias, ctx.impl,
        )  # fmt: skip
        dweight, dbias = affine.unbind(0) if needs_weight or needs_bias else (None, None)
        return (
            dx if needs_x else None, (dx if same else dbranch) if needs_branch else None,
            dweight if needs_weight else None, dbias if needs_bias else None, None, None, None, None,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- public


def add_norm(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the result; formulas at the top of the module.

    Args:
        x: [B, N, D] residual stream; fp32, bf16 or fp16 (fp64: reference).
        branch: [B, N, D], any of these dtypes; None: nothing is added.
        weight, bias: [D], any of these dtypes; None for 1 and 0.
        factor: [B] fp32, the branch's drop-path factor a sample (0 or 1 / keep); None for 1. It gets no gradient.
        eps: added to the variance.
        dtype: of normed; None for x's.
        backend: auto (None), reference, native or triton.

    Returns:
        (sum, normed), [B, N, D] each: sum in x's dtype (x's own memory without a branch), normed in ``dtype``.
        Gradients for x, branch, weight and bias (once differentiable).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what was expected and what came.
    """
    _check(x, branch, weight, bias, factor, eps)
    out = x.dtype if dtype is None else dtype
    check_dtype(out)
    impl = choose("add_norm", x, backend, **_facts(x, branch, weight, bias, out))
    if impl == "reference":
        return add_norm_reference(x, branch, weight=weight, bias=bias, factor=_constant(factor), eps=eps, dtype=out)
    prepared = _prepared(x, branch, weight, bias, factor)
    if torch.is_grad_enabled():
        total, normed = _AddNorm.apply(*prepared, float(eps), out, impl)
        return total, normed
    total, normed, _ = _forward_op(*prepared, float(eps), 1.0, out, impl)
    return (x if branch is None else total), normed


def add_norm_fp8(
    x: Tensor,
    branch: Tensor | None,
    scale: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`add_norm` whose second result is ``e4m3(normed / scale)``, as :func:`.quantise_fp8` rounds; no gradient.

    Args:
        scale: what one unit of the float8 result stands for, calibrated before; a number above 0.
        x, branch, weight, bias, factor, eps, backend: as in :func:`add_norm`.

    Returns:
        (sum, normed), [B, N, D] each: sum in x's dtype (x itself without a branch), normed float8_e4m3fn.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what was expected and what came.
    """
    _check(x, branch, weight, bias, factor, eps)
    check_scale(scale)
    x = x.detach()
    branch, weight, bias = (t if t is None else t.detach() for t in (branch, weight, bias))
    impl = choose("add_norm_fp8", x, backend, **_facts(x, branch, weight, bias, FP8))
    if impl == "reference":
        return add_norm_fp8_reference(x, branch, scale, weight=weight, bias=bias, factor=_constant(factor), eps=eps)
    total, normed, _ = _forward_op(*_prepared(x, branch, weight, bias, factor), float(eps), float(scale), FP8, impl)
    return (x if branch is None else total), normed


def _facts(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: torch.dtype
) -> dict[str, Any]:
    """What the limits of an implementation look at. Weight and bias are cast, so they matter as float64 alone."""
    dtypes = [x.dtype, x.dtype if branch is None else branch.dtype, out]
    dtypes += [t.dtype for t in (weight, bias) if t is not None and t.dtype == torch.float64]
    return {"dtypes": tuple(dict.fromkeys(dtypes)), "wide": x.shape[2] > WIDEST}


def _prepared(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, factor: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The tensors as the kernels read them: dense rows, fp32 parameters; copies only where they are not."""
    scale, shift = (None if t is None else t.float().contiguous() for t in (weight, bias))
    branch = None if branch is None else rows_dense(branch)
    return rows_dense(x), branch, scale, shift, None if factor is None else _constant(factor).contiguous()


def _constant(factor: Tensor | None) -> Any:
    return None if factor is None else factor.detach()


def _check(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, factor: Tensor | None, eps: float
) -> None:
    kinds = (*FLOAT_DTYPES, torch.float64)
    check_tensor("x", x, dtypes=kinds, shape=(None, None, None))
    batch, length, width = x.shape
    if branch is not None:
        check_tensor("branch", branch, dtypes=kinds, shape=(batch, length, width), like=x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(name, parameter, dtypes=kinds, shape=(width,), like=x)
    if factor is not None:
        if branch is None:
            raise ValueError("factor: expected None without a branch, got a tensor")
        check_tensor("factor", factor, dtypes=(torch.float32,), shape=(batch,), like=x)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
