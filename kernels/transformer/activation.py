"""bias_gelu: gelu(x + bias) in one pass; bias_gelu_fp8: the same with a quantised result.

    none   gelu(v) = v * (1 + erf(v / sqrt(2))) / 2
    tanh   gelu(v) = v * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 v^3))) / 2          v = x + bias

Source: Hendrycks and Gimpel, "Gaussian error linear units" (arXiv 1606.08415); the exact one is what ViT uses.

| tensor | shape    | dtype                                | strides                      |
|--------|----------|--------------------------------------|------------------------------|
| x      | [..., D] | fp32, bf16, fp16                     | rows alike, else copied once |
| bias   | [D]      | any of them, computed in fp32        | any                          |
| out    | [..., D] | as x; float8_e4m3fn (bias_gelu_fp8)  | contiguous                   |

Values are fp32, rounded once; float64 runs as the reference. For the exact GELU of bf16, `native` evaluates polynomials
where there is AVX-512 (csrc/gelu.h), within 4e-6 of it and of its slope. Backward computes v again from x and bias, so
nothing is saved but the inputs: dx = d_out * gelu'(v), dbias = sum over rows of dx before it is rounded. Floor:
:func:`bias_gelu_cost`.

Determinism: bitwise from run to run. Elementwise; dbias adds the rows of a chunk, then the chunks as a tree whose shape
follows from the number of rows alone.
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
from cohobate.kernels.tokens.rows import FLOAT_DTYPES, column_block
from cohobate.kernels.transformer.add_norm import sum_columns
from cohobate.kernels.transformer.fp8 import (
    FP8,
    NATIVE_DTYPES,
    as_rows,
    check_scale,
    converts_in_hardware,
    dtype_reasons,
    quantise_fp8_reference,
    to_fp8,
)
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

APPROXIMATIONS = ("none", "tanh")
CHUNK = 32  # rows whose bias gradient one task adds; part of the result, so not tuned


def bias_gelu_reference(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Reference of :func:`bias_gelu`, differentiable."""
    return _wide_gelu(x, bias, approximate).to(x.dtype)


def bias_gelu_fp8_reference(x: Tensor, bias: Tensor | None, scale: float, *, approximate: str = "none") -> Tensor:
    """Reference of :func:`bias_gelu_fp8`."""
    return quantise_fp8_reference(_wide_gelu(x, bias, approximate), scale)


def _wide_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    value = x.to(kind) if bias is None else x.to(kind) + bias.to(kind)
    return torch.nn.functional.gelu(value, approximate=approximate)


def bias_gelu_cost(rows: int, width: int, itemsize: int, *, out_itemsize: int = 0, backward: bool = False) -> Cost:
    """Floor of one direction: x read and out written, or x and d_out read and dx written; ``out_itemsize`` 0: as x.

    An erf or exp is counted as one operation.
    """
    moved = 3 * itemsize if backward else itemsize + (out_itemsize or itemsize)
    return Cost(bytes=rows * width * moved, flops=rows * width * (12 if backward else 6))


# ---------------------------------------------------------------------------------------------------------- Triton


@jit
def _twice(v):  # type: ignore[no-untyped-def]
    """2 u: (1 + tanh(u)) / 2 is its logistic function, which cannot overflow to nan."""
    return 1.5957691216057308 * v * (1.0 + 0.044715 * v * v)


@jit
def _bias_gelu_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, out_ptr, inverse, stride_x, TANH: tl.constexpr, IS_FP8: tl.constexpr, HARDWARE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    v = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if TANH:
        out = v * tl.sigmoid(_twice(v))
    else:
        out = v * 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
    if IS_FP8:
        tl.store(out_ptr + row * D + columns, to_fp8(out, inverse, HARDWARE), mask=inside)
    else:
        tl.store(out_ptr + row * D + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _bias_gelu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows, stride_grad, stride_x, TANH: tl.constexpr,
    CHUNK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_D columns of CHUNK rows, one after the other, and their sum for the bias."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0)
    for i in range(CHUNK):
        row = chunk * CHUNK + i
        inside = (columns < D) & (row < rows)
        v = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * stride_grad + columns, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            v += bias
        if TANH:
            share, rest = tl.sigmoid(_twice(v)), tl.sigmoid(-_twice(v))  # 1 - share would lose rest's digits
            slope = share + v * share * rest * 1.5957691216057308 * (1.0 + 0.134145 * v * v)
        else:
            share = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
            slope = share + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
        dx = grad * slope
        total += dx
        tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + chunk * D + columns, total, mask=columns < D)


def _forward_triton(x: Tensor, bias: Tensor | None, tanh: bool, scale: float, dtype: torch.dtype) -> Tensor:
    out = _empty(x, dtype)
    rows, width = x.shape
    if out.numel():
        op, block = "bias_gelu_fp8" if dtype == FP8 else "bias_gelu", column_block(width)
        config = tuning.lookup(op, str(x.dtype), width, rows, architecture(x.device))
        with torch.cuda.device_of(x):
            _bias_gelu_kernel[(rows, triton.cdiv(width, block))](
                x, bias, out.view(torch.uint8) if dtype == FP8 else out, 1 / scale, x.stride(0), TANH=tanh,
                IS_FP8=dtype == FP8, HARDWARE=converts_in_hardware(x.device), D=width, BLOCK_D=block, **config,
            )  # fmt: skip
    return out


def _backward_triton(
    grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    dx = _empty(x, x.dtype)
    rows, width = x.shape
    chunk = CHUNK if wants_bias else 1
    chunks, block = triton.cdiv(rows, chunk), column_block(width)
    partial = x.new_empty(chunks, width, dtype=torch.float32) if wants_bias else None
    if dx.numel():
        config = tuning.lookup("bias_gelu_backward", str(x.dtype), width, rows, architecture(x.device))
        with torch.cuda.device_of(x):
            _bias_gelu_backward_kernel[(chunks, triton.cdiv(width, block))](
                grad, x, bias, dx, partial, rows, grad.stride(0), x.stride(0), TANH=tanh, CHUNK=chunk, D=width,
                BLOCK_D=block, **config,
            )  # fmt: skip
    return dx, x.new_empty(0, dtype=torch.float32) if partial is None else sum_columns(partial, "bias_gelu_sum")


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    cases = []
    for op in ("bias_gelu", "bias_gelu_fp8"):
        for dtype, width, config in shipped(op, architecture, dtypes=FLOAT_DTYPES[:2], widths=(3072,)):
            kind, is_fp8 = pointer(dtype), op == "bias_gelu_fp8"
            signature = {"x_ptr": kind, "bias_ptr": "*fp32", "out_ptr": "*u8" if is_fp8 else kind}
            signature |= {"inverse": "fp32", "stride_x": "i32:16"}
            expects = frozenset({"load16" if is_fp8 else "vector16"})  # 8 values a thread may be 8 bytes of e4m3
            for tanh in (False, True):
                constants: dict[str, Any] = {"TANH": tanh, "IS_FP8": is_fp8, "HARDWARE": architecture != "sm80"}
                constants |= {"D": width, "BLOCK_D": column_block(width)}
                name = f"{op} {dtype} {width} {APPROXIMATIONS[tanh]}"
                cases.append(AotCase(_bias_gelu_kernel, signature, constants, config, expects, name))
    for dtype, width, config in shipped("bias_gelu_backward", architecture, dtypes=FLOAT_DTYPES[:2], widths=(3072,)):
        kinds = dict.fromkeys(("grad_ptr", "x_ptr", "dx_ptr"), pointer(dtype))
        numbers = {"rows": "i32", "stride_grad": "i32:16", "stride_x": "i32:16"}
        for tanh in (False, True):
            sizes: dict[str, Any] = {"TANH": tanh, "CHUNK": CHUNK, "D": width, "BLOCK_D": column_block(width)}
            signature = kinds | numbers | {"bias_ptr": "*fp32", "partial_ptr": "*fp32"}
            name = f"{dtype} {width} {APPROXIMATIONS[tanh]}"
            vectors = frozenset({"vector16"})
            cases.append(AotCase(_bias_gelu_backward_kernel, signature, sizes, config, vectors, name))
            constants = sizes | {"CHUNK": 1, "bias_ptr": None, "partial_ptr": None}
            name += " without bias"
            cases.append(AotCase(_bias_gelu_backward_kernel, kinds | numbers, constants, config, vectors, name))
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _forward_native(x: Tensor, bias: Tensor | None, tanh: bool, scale: float, dtype: torch.dtype) -> Tensor:
    out = recycled(x.shape, torch.uint8 if dtype == FP8 else dtype)
    torch.ops.cohobate_native.bias_gelu.default(x, bias, tanh, 1 / scale, out)
    return out.view(dtype)


def _backward_native(
    grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    dx = recycled(x.shape, x.dtype)
    dbias = x.new_empty(x.shape[1] if wants_bias else 0, dtype=torch.float32)
    torch.ops.cohobate_native.bias_gelu_backward.default(grad, x, bias, tanh, CHUNK, dx, dbias if wants_bias else None)
    return dx, dbias


# ---------------------------------------------------------------------------------------------------- registration


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@functools.cache  # it is asked at every call
def _native_limit(*, dtypes: Sequence[torch.dtype]) -> list[str]:
    return dtype_reasons("native", NATIVE_DTYPES, dtypes)


@functools.cache
def _triton_limit(*, dtypes: Sequence[torch.dtype]) -> list[str]:
    return dtype_reasons("triton", FLOAT_DTYPES, dtypes)


for _name in ("bias_gelu", "bias_gelu_fp8"):
    register(
        Op(
            _name,
            ("reference", "native", "triton"),
            bias_gelu_cost,
            {"native": _native_limit, "triton": _triton_limit},
        )
    )

_forward_op = define(
    "bias_gelu(Tensor x, Tensor? bias, bool tanh, float scale, ScalarType dtype, str impl) -> Tensor",
    fake=lambda x, bias, tanh, scale, dtype: _empty(x, dtype),
    native=_forward_native,
    triton=_forward_triton,
)
_backward_op = define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool tanh, bool wants_bias, str impl) -> (Tensor, Tensor)",
    fake=lambda grad, x, bias, tanh, wants_bias: (
        _empty(x, x.dtype),
        x.new_empty(x.shape[1] if wants_bias else 0, dtype=torch.float32),
    ),
    native=_backward_native,
    triton=_backward_triton,
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, tanh: bool, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.impl = tanh, impl
        return _forward_op(x, bias, tanh, 1.0, x.dtype, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, bias = ctx.saved_tensors
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        dx, dbias = _backward_op(as_rows(grad), x, bias, ctx.tanh, needs_bias, ctx.impl)
        return dx if needs_x else None, dbias if needs_bias else None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """``gelu(x + bias)``, computed in fp32; formulas at the top of the module.

    Args:
        x: [..., D], fp32, bf16 or fp16 (fp64: reference).
        bias: [D], any of these dtypes; None for 0.
        approximate: "none" (erf) or "tanh".
        backend: auto (None), reference, native or triton.

    Returns:
        [..., D] in x's dtype, contiguous, with gradients for x and bias (once differentiable).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what was expected and what came.
    """
    _check(x, bias, approximate)
    impl = choose("bias_gelu", x, backend, dtypes=_dtypes(x, bias))
    if impl == "reference":
        return bias_gelu_reference(x, bias, approximate=approximate)
    rows, shift, tanh = as_rows(x), _prepared(bias), approximate == "tanh"
    out: Tensor
    if torch.is_grad_enabled():
        out = _BiasGelu.apply(rows, shift, tanh, impl)
    else:
        out = _forward_op(rows, shift, tanh, 1.0, x.dtype, impl)
    return out.view(x.shape)


def bias_gelu_fp8(
    x: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """``e4m3(gelu(x + bias) / scale)``, rounded as :func:`.quantise_fp8` does; no gradient.

    Args:
        scale: what one unit of the result stands for, calibrated before; a number above 0.
        x, bias, approximate, backend: as in :func:`bias_gelu`.

    Returns:
        [..., D] float8_e4m3fn, contiguous.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what was expected and what came.
    """
    _check(x, bias, approximate)
    check_scale(scale)
    x, bias = x.detach(), None if bias is None else bias.detach()
    impl = choose("bias_gelu_fp8", x, backend, dtypes=_dtypes(x, bias))
    if impl == "reference":
        return bias_gelu_fp8_reference(x, bias, scale, approximate=approximate)
    out: Tensor = _forward_op(as_rows(x), _prepared(bias), approximate == "tanh", float(scale), FP8, impl)
    return out.view(x.shape)


def _dtypes(x: Tensor, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    """What the limits look at. The bias is cast, so it matters as float64 alone."""
    return (x.dtype, torch.float64) if bias is not None and bias.dtype == torch.float64 else (x.dtype,)


def _prepared(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _check(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    kinds = (*FLOAT_DTYPES, torch.float64)
    check_tensor("x", x, dtypes=kinds)
    if x.dim() == 0:
        raise ValueError("x: expected shape [..., D], got []")
    if bias is not None:
        check_tensor("bias", bias, dtypes=kinds, shape=(x.shape[-1],), like=x)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate: expected none or tanh, got {approximate!r}")
