"""take and put: gather rows of a token sequence, and scatter them back.

    take:  out[b, j] = x[b, rows[b, j]]            put:  out[b, rows[b, j]] = x[b, j], zero elsewhere

| tensor | shape       | dtype             | strides         |
|--------|-------------|-------------------|-----------------|
| x      | [B, N, D]   | fp32, bf16, fp16  | last one is 1   |
| rows   | [B, n]      | int32             | any             |
| out    | [B, n|N, D] | as x              | contiguous      |

Each is the other's gradient, so a sample's rows must be distinct: nothing is ever added, and the result repeats bit for
bit. Bytes: read and write n*D values a sample (put also writes the N-n zero rows). No FLOPs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def take_reference(x: Tensor, rows: Tensor) -> Tensor:
    """Reference of :func:`take`, differentiable."""
    return x.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put_reference(x: Tensor, rows: Tensor, length: int) -> Tensor:
    """Reference of :func:`put`, differentiable."""
    out = x.new_zeros(x.shape[0], length, x.shape[-1])
    return out.scatter(1, rows.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]), x)


def rows_cost(batch: int, count: int, width: int, itemsize: int, length: int | None = None) -> Cost:
    """Floor of take (``length`` None) or put: rows read once, output written once, int32 indices read once."""
    written = count if length is None else length
    return Cost(bytes=batch * ((count + written) * width * itemsize + count * 4), flops=0)


# ---------------------------------------------------------------------------------------------------------- Triton

TILE = 2048  # values a program moves at a time: 128 threads, 16 each


def column_block(width: int) -> int:
    """Columns of a tile: a power of two that divides the width, so that no lane idles, where there is one of use."""
    divisor = width & -width
    block = divisor if divisor >= 64 else 1 << max(width - 1, 0).bit_length()
    return min(block, 1024)


@jit
def _take_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    rows_ptr,
    out_ptr,
    n,
    stride_x_b,
    stride_x_n,
    stride_rows_b,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program copies BLOCK_R output rows of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted = target < n
    source = tl.load(rows_ptr + sample * stride_rows_b + target, mask=wanted, other=0).to(tl.int64)
    x_row = x_ptr + sample * stride_x_b + source * stride_x_n
    out_row = out_ptr + (sample * n + target) * D
    for start in tl.static_range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = wanted[:, None] & (column < D)[None, :]
        value = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0)
        tl.store(out_row[:, None] + column[None, :], value, mask=inside)


@jit
def _put_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    rows_ptr,
    out_ptr,
    n,
    length,
    stride_x_b,
    stride_x_n,
    stride_rows_b,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_R output rows of one sample: it looks them up in the index; the absent ones are zero."""
    sample = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = tl.full([BLOCK_R], -1, tl.int32)
    for start in range(0, n, 64):
        candidate = start + tl.arange(0, 64)
        row = tl.load(rows_ptr + sample * stride_rows_b + candidate, mask=candidate < n, other=-1)
        hit = tl.where(row[None, :] == target[:, None], candidate[None, :], -1)
        source = tl.maximum(source, tl.max(hit, axis=1))
    x_row = x_ptr + sample * stride_x_b + source.to(tl.int64) * stride_x_n
    out_row = out_ptr + (sample * length + target) * D
    for start in tl.static_range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (column < D)[None, :]
        value = tl.load(x_row[:, None] + column[None, :], mask=inside & (source >= 0)[:, None], other=0.0)
        tl.store(out_row[:, None] + column[None, :], value, mask=inside & (target < length)[:, None])


def _take_triton(x: Tensor, rows: Tensor) -> Tensor:
    batch, n = rows.shape
    width = x.shape[-1]
    out = x.new_empty(batch, n, width)
    if out.numel():
        block = column_block(width)
        config = tuning.lookup("take", str(x.dtype), width, n, architecture(x.device))
        grid = (batch, triton.cdiv(n, TILE // block))
        strides = (x.stride(0), x.stride(1), rows.stride(0))
        with torch.cuda.device_of(x):
            _take_kernel[grid](x, rows, out, n, *strides, D=width, BLOCK_R=TILE // block, BLOCK_D=block, **config)
    return out


def _put_triton(x: Tensor, rows: Tensor, length: int) -> Tensor:
    batch, n = rows.shape
    width = x.shape[-1]
    out = x.new_empty(batch, length, width)
    if out.numel():
        block = column_block(width)
        config = tuning.lookup("put", str(x.dtype), width, length, architecture(x.device))
        grid = (batch, triton.cdiv(length, TILE // block))
        strides = (x.stride(0), x.stride(1), rows.stride(0))
        with torch.cuda.device_of(x):
            _put_kernel[grid](
                x, rows, out, n, length, *strides, D=width, BLOCK_R=TILE // block, BLOCK_D=block, **config
            )
    return out


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    sizes = {"n": "i32", "length": "i32", "stride_x_b": "i32:16", "stride_x_n": "i32:16", "stride_rows_b": "i32"}
    return [
        AotCase(
            kernel=kernel,
            signature={"x_ptr": pointer(dtype), "rows_ptr": "*i32", "out_ptr": pointer(dtype), **sizes},
            constexprs={"D": width, "BLOCK_R": TILE // column_block(width), "BLOCK_D": column_block(width)},
            config=config,
            expects=frozenset({"vector16"}),
            name=f"{dtype} {width}",
        )
        for op, kernel in (("take", _take_kernel), ("put", _put_kernel))
        for dtype, width, config in shipped(op, architecture, dtypes=FLOAT_DTYPES, widths=(384, 768, 1024))
    ]


# ---------------------------------------------------------------------------------------------------------- native


def _take_native(x: Tensor, rows: Tensor) -> Tensor:
    out = recycled((rows.shape[0], rows.shape[1], x.shape[-1]), x.dtype)
    torch.ops.cohobate_native.take(x, rows, out)
    return out


def _put_native(x: Tensor, rows: Tensor, length: int) -> Tensor:
    out = recycled((x.shape[0], length, x.shape[-1]), x.dtype)
    torch.ops.cohobate_native.put(x, rows, out)
    return out


# ---------------------------------------------------------------------------------------------------- registration

register(Op("take", ("reference", "native", "triton"), rows_cost))
register(Op("put", ("reference", "native", "triton"), rows_cost))

_take_op = define(
    "take(Tensor x, Tensor rows, str impl) -> Tensor",
    fake=lambda x, rows: x.new_empty(rows.shape[0], rows.shape[1], x.shape[-1]),
    native=_take_native,
    triton=_take_triton,
)
_put_op = define(
    "put(Tensor x, Tensor rows, SymInt length, str impl) -> Tensor",
    fake=lambda x, rows, length: x.new_empty(x.shape[0], length, x.shape[-1]),
    native=_put_native,
    triton=_put_triton,
)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        ctx.length, ctx.impl = x.shape[1], impl
        return _take_op(x, rows, impl)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        return _Put.apply(rows_dense(grad), rows, ctx.length, ctx.impl), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, length: int, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        ctx.impl = impl
        return _put_op(x, rows, length, impl)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        return _Take.apply(rows_dense(grad), rows, ctx.impl), None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def take(x: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """Gather rows of each sample: ``out[b, j] = x[b, rows[b, j]]``.

    Args:
        x: [B, N, D], fp32, bf16 or fp16.
        rows: [B, n] int32, distinct within a sample, each in [0, N). They are not checked: that would read the device.
        backend: auto (None), reference, native or triton.

    Returns:
        [B, n, D] in x's dtype. The gradient is :func:`put`, deterministic.

    Raises:
        TypeError, ValueError: a dtype, shape, device or backend that does not fit; the message names the argument.
    """
    _check(x, rows)
    impl = choose("take", x, backend)
    if impl == "reference":
        return take_reference(x, rows)
    out: Tensor = _Take.apply(rows_dense(x), indices_dense(rows), impl)
    return out


def put(x: Tensor, rows: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    """Scatter rows into a zero sequence: ``out[b, rows[b, j]] = x[b, j]``.

    Args:
        x: [B, n, D], fp32, bf16 or fp16.
        rows: [B, n] int32, distinct within a sample, each in [0, length). Not checked, as in :func:`take`.
        length: N, rows of the output.
        backend: auto (None), reference, native or triton.

    Returns:
        [B, length, D] in x's dtype. The gradient is :func:`take`, deterministic.

    Raises:
        TypeError, ValueError: a dtype, shape, device or backend that does not fit; the message names the argument.
    """
    _check(x, rows)
    if x.shape[1] != rows.shape[1]:
        raise ValueError(f"rows: expected shape [{x.shape[0]}, {x.shape[1]}], got {list(rows.shape)}")
    if length < rows.shape[1]:
        raise ValueError(f"length: expected at least {rows.shape[1]} (the rows to place), got {length}")
    impl = choose("put", x, backend)
    if impl == "reference":
        return put_reference(x, rows, length)
    out: Tensor = _Put.apply(rows_dense(x), indices_dense(rows), length, impl)
    return out


def _check(x: Tensor, rows: Tensor) -> None:
    check_tensor("x", x, dtypes=(*FLOAT_DTYPES, torch.float64), shape=(None, None, None))
    check_tensor("rows", rows, dtypes=(torch.int32,), shape=(x.shape[0], None), like=x)


def rows_dense(x: Tensor) -> Tensor:
    """x with rows whose values are adjacent, as the kernels read them; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def indices_dense(rows: Tensor) -> Tensor:
    """rows with a sample's indices adjacent; a copy only where they are not."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
