"""assemble: visible rows + mask token + positions -> the input of a decoder or generator.

    raster         out[b, P+i] = (x[b, P+rows[b,i]] if rows[b,i] < a else mask_token) + positions[P+i]
    visible_first  out[b, P+j] = (x[b, P+j]         if j < a         else mask_token) + positions[P+rows[b,j]]
    prefix, both   out[b, p]   = x[b, p] + positions[p]                                          for p < P

Raster restores the order of the token grid (MAE, He et al., CVPR 2022; dBOT, Liu et al., ICLR 2024), where rows is the
inverse permutation. Visible-first keeps the visible tokens in front (VideoMAE, Tong et al., NeurIPS 2022; AMD, Zhao et
al., CVPR 2024), where rows is the permutation itself, or its first m entries.

| tensor     | shape      | dtype            | strides       |
|------------|------------|------------------|---------------|
| x          | [B, P+a, D]| fp32, bf16, fp16 | last one is 1 |
| mask_token | [D]        | any of them      | any           |
| positions  | [P+N, D]   | any of them      | any           |
| rows       | [B, m]     | int32            | last one is 1 |
| out        | [B, P+m, D]| as x             | contiguous    |

Sums are fp32, rounded once. A sample's rows are distinct, so the gradient of x is a gather. The gradient of the mask
token sums a sample's masked rows in chunks of 256, then the chunks; that of positions sums over the batch. Both orders
follow from the shape alone, so results repeat bit for bit. Bytes and FLOPs: :func:`assemble_cost`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import tuning
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, dtype_limit, register
from cohobate.kernels.tokens.rows import FLOAT_DTYPES, TILE, column_block, indices_dense, rows_dense
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

LAYOUTS = ("raster", "visible_first")
CHUNK = 256  # rows whose mask-token gradient is summed by one task; part of the result, so not tuned


def assemble_reference(
    x: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    rows: Tensor,
    *,
    layout: str = "raster",
    prefix: int = 0,
) -> Tensor:
    """Reference of :func:`assemble`, differentiable in x, mask_token and positions."""
    batch, seen, width = x.shape
    count, index = rows.shape[1], rows.long()
    kind = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), torch.float32)
    filler = mask_token.to(kind).expand(batch, 1, width)
    source = index if layout == "raster" else torch.arange(count, device=x.device).expand(batch, count)
    source = source.clamp(max=seen - prefix).unsqueeze(-1).expand(-1, -1, width)
    out = torch.cat(
        [x[:, :prefix].to(kind), torch.cat([x[:, prefix:].to(kind), filler], dim=1).gather(1, source)], dim=1
    )
    if positions is not None:
        positions = positions.to(torch.promote_types(kind, positions.dtype))
        grid = positions[prefix:].expand(batch, -1, -1) if layout == "raster" else positions[prefix:][index]
        out = out + torch.cat([positions[:prefix].expand(batch, -1, -1), grid], dim=1)
    return out.to(x.dtype)


def assemble_cost(
    batch: int, visible: int, count: int, width: int, itemsize: int, *, prefix: int = 0, positions_itemsize: int = 0
) -> Cost:
    """Floor of one direction: x and out (or their gradients), positions (0 bytes a value: none) and indices, each once.

    The additions of positions (forward) and of masked rows (backward) are counted as one a value.
    """
    moved = batch * (2 * prefix + visible + count) * width * itemsize
    table = (prefix + count) * width * positions_itemsize
    return Cost(bytes=moved + table + batch * count * 4, flops=batch * (prefix + count) * width)


# ---------------------------------------------------------------------------------------------------------- Triton


@jit
def _assemble_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    mask_ptr,
    positions_ptr,
    rows_ptr,
    out_ptr,
    visible,
    count,
    stride_x_b,
    stride_x_n,
    stride_rows_b,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    RASTER: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_R output rows of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted = row < PREFIX + count
    in_body = wanted & (row >= PREFIX)
    index = tl.load(rows_ptr + sample * stride_rows_b + row - PREFIX, mask=in_body, other=0)
    if RASTER:
        place, position = index, row
    else:
        place, position = row - PREFIX, tl.where(in_body, PREFIX + index, row)
    seen = wanted & ((row < PREFIX) | (place < visible))
    source = tl.where(row < PREFIX, row, PREFIX + place).to(tl.int64)
    x_row = x_ptr + sample * stride_x_b + source * stride_x_n
    out_row = out_ptr + (sample * (PREFIX + count) + row) * D
    for start in tl.static_range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (column < D)[None, :]
        token = tl.load(mask_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        value = tl.load(x_row[:, None] + column[None, :], mask=inside & seen[:, None], other=0.0).to(tl.float32)
        value = tl.where(seen[:, None], value, token[None, :])
        if HAS_POSITIONS:
            table = positions_ptr + position.to(tl.int64) * D
            value += tl.load(table[:, None] + column[None, :], mask=inside & wanted[:, None], other=0.0).to(tl.float32)
        tl.store(out_row[:, None] + column[None, :], value.to(out_ptr.dtype.element_ty), mask=inside & wanted[:, None])


@jit
def _assemble_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    rows_ptr,
    dx_ptr,
    partial_ptr,
    visible,
    count,
    stride_grad_b,
    stride_grad_n,
    stride_rows_b,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    RASTER: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program reads BLOCK_D columns of CHUNK rows once: visible rows go to dx, masked ones are added up."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, min(first + CHUNK, PREFIX + count), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        wanted = row < PREFIX + count  # BLOCK_R divides CHUNK
        place = row - PREFIX
        if RASTER:
            place = tl.load(rows_ptr + sample * stride_rows_b + place, mask=wanted & (row >= PREFIX), other=0)
        seen = (row < PREFIX) | (place < visible)
        target = tl.where(row < PREFIX, row, PREFIX + place).to(tl.int64)
        grad_row = grad_ptr + sample * stride_grad_b + row.to(tl.int64) * stride_grad_n
        value = tl.load(grad_row[:, None] + column[None, :], mask=inside & wanted[:, None], other=0.0)
        dx_row = dx_ptr + (sample * (PREFIX + visible) + target) * D
        tl.store(dx_row[:, None] + column[None, :], value, mask=inside & (wanted & seen)[:, None])
        total += tl.where(seen[:, None], 0.0, value.to(tl.float32))
    chunk = sample * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + chunk * D + column, tl.sum(total, axis=0), mask=column < D)


@jit
def _sum_rows_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    index_ptr,
    out_ptr,
    samples,
    stride_source_b,
    stride_source_n,
    stride_index_b,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[r] = sum over b of source[b, r], or of source[b, P+index[b, r-P]] where that index is not negative."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, samples, BLOCK_B):
        sample = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        wanted = sample < samples
        if HAS_INDEX:
            in_body = wanted & (row >= PREFIX)
            index = tl.load(index_ptr + sample * stride_index_b + row - PREFIX, mask=in_body, other=-1)
            wanted = wanted & ((row < PREFIX) | (index >= 0))
            source = tl.where(row < PREFIX, row, PREFIX + index).to(tl.int64)
        else:
            source = tl.full([BLOCK_B], 0, tl.int64) + row
        source_row = source_ptr + sample * stride_source_b + source * stride_source_n
        value = tl.load(source_row[:, None] + column[None, :], mask=inside & wanted[:, None], other=0.0)
        total += value.to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * D + column, tl.sum(total, axis=0), mask=column < D)


def _assemble_triton(
    x: Tensor, mask_token: Tensor, positions: Tensor | None, rows: Tensor, raster: bool, prefix: int
) -> Tensor:
    batch, count = rows.shape
    width = x.shape[-1]
    out = x.new_empty(batch, prefix + count, width)
    if out.numel():
        block = column_block(width)
        config = tuning.lookup("assemble", str(x.dtype), width, prefix + count, architecture(x.device))
        with torch.cuda.device_of(x):
            _assemble_kernel[(batch, triton.cdiv(prefix + count, TILE // block))](
                x,
                mask_token,
                positions,
                rows,
                out,
                x.shape[1] - prefix,
                count,
                x.stride(0),
                x.stride(1),
                rows.stride(0),
                PREFIX=prefix,
                D=width,
                RASTER=raster,
                HAS_POSITIONS=positions is not None,
                BLOCK_R=TILE // block,
                BLOCK_D=block,
                **config,
            )
    return out


def _assemble_backward_triton(
    grad: Tensor,
    rows: Tensor,
    visible: int,
    table: int,
    raster: bool,
    prefix: int,
    want_mask: bool,
    want_positions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = rows.shape
    width = grad.shape[-1]
    dx = grad.new_empty(batch, prefix + visible, width)
    chunks = triton.cdiv(prefix + count, CHUNK)
    partial = grad.new_empty(batch * chunks, width, dtype=torch.float32)
    if grad.numel():
        block = min(column_block(width), 256)
        config = tuning.lookup("assemble_backward", str(grad.dtype), width, prefix + count, architecture(grad.device))
        with torch.cuda.device_of(grad):
            _assemble_backward_kernel[(batch, chunks, triton.cdiv(width, block))](
                grad,
                rows,
                dx,
                partial,
                visible,
                count,
                grad.stride(0),
                grad.stride(1),
                rows.stride(0),
                PREFIX=prefix,
                D=width,
                RASTER=raster,
                CHUNK=CHUNK,
                BLOCK_R=min(TILE // block, CHUNK),
                BLOCK_D=block,
                **config,
            )
    dmask = _sum_rows_triton(partial.unsqueeze(1), None, 1, 0) if want_mask else partial.new_empty(0)
    dpositions = partial.new_empty(0)
    if want_positions:
        inverse = None if raster else _inverse(rows, table - prefix)
        dpositions = _sum_rows_triton(grad, inverse, table, prefix)
    return dx, dmask.view(-1), dpositions


def _sum_rows_triton(source: Tensor, index: Tensor | None, length: int, prefix: int) -> Tensor:
    samples, width = source.shape[0], source.shape[-1]
    out = source.new_empty(length, width, dtype=torch.float32)
    if out.numel():
        block = min(column_block(width), 64)
        config = tuning.lookup("assemble_sum", str(source.dtype), width, samples, architecture(source.device))
        with torch.cuda.device_of(source):
            _sum_rows_kernel[(length, triton.cdiv(width, block))](
                source,
                index,
                out,
                samples,
                source.stride(0),
                source.stride(1),
                0 if index is None else index.stride(0),
                PREFIX=prefix,
                D=width,
                HAS_INDEX=index is not None,
                BLOCK_B=64,
                BLOCK_D=block,
                **config,
            )
    return out


def _inverse(rows: Tensor, length: int) -> Tensor:
    """[B, length] int32: which j has rows[b, j] = k, or -1."""
    place = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).expand(rows.shape)
    return rows.new_full((rows.shape[0], length), -1).scatter_(1, rows.long(), place)


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    cases = []
    sizes = {"visible": "i32", "count": "i32", "stride_rows_b": "i32"}
    # Decoders of MAE and dBOT (512, raster) and of VideoMAE (half the encoder), AMD's generators (as the teacher).
    widths = (192, 384, 512, 1024)
    for dtype, width, config in shipped("assemble", architecture, dtypes=FLOAT_DTYPES, widths=widths):
        tables = {"mask_ptr": "*fp32", "positions_ptr": "*fp32", "rows_ptr": "*i32"}
        strides = {"stride_x_b": "i32:16", "stride_x_n": "i32:16"}
        block = column_block(width)
        constants: dict[str, Any] = {"D": width, "HAS_POSITIONS": True}
        cases += [
            AotCase(
                kernel=_assemble_kernel,
                signature={"x_ptr": pointer(dtype), "out_ptr": pointer(dtype), **tables, **sizes, **strides},
                constexprs={
                    **constants,
                    "PREFIX": int(raster),
                    "RASTER": raster,
                    "BLOCK_R": TILE // block,
                    "BLOCK_D": block,
                },
                config=config,
                expects=frozenset({"vector16"}),
                name=f"{dtype} {width} {'raster' if raster else 'visible_first'}",
            )
            for raster in (True, False)
        ]
    for dtype, width, config in shipped("assemble_backward", architecture, dtypes=FLOAT_DTYPES, widths=widths):
        pointers = {"grad_ptr": pointer(dtype), "dx_ptr": pointer(dtype), "partial_ptr": "*fp32", "rows_ptr": "*i32"}
        strides = {"stride_grad_b": "i32:16", "stride_grad_n": "i32:16"}
        block = min(column_block(width), 256)
        constants = {"D": width, "CHUNK": CHUNK, "BLOCK_R": min(TILE // block, CHUNK), "BLOCK_D": block}
        cases += [
            AotCase(
                kernel=_assemble_backward_kernel,
                signature={**pointers, **sizes, **strides},
                constexprs={**constants, "PREFIX": int(raster), "RASTER": raster},
                config=config,
                expects=frozenset({"vector16"}),
                name=f"{dtype} {width} {'raster' if raster else 'visible_first'}",
            )
            for raster in (True, False)
        ]
    for dtype, width, config in shipped("assemble_sum", architecture, dtypes=FLOAT_DTYPES, widths=(512,)):
        pointers = {"source_ptr": pointer(dtype), "index_ptr": "*i32", "out_ptr": "*fp32"}
        strides = {"stride_source_b": "i32:16", "stride_source_n": "i32:16", "stride_index_b": "i32"}
        cases.append(
            AotCase(
                kernel=_sum_rows_kernel,
                signature={**pointers, "samples": "i32", **strides},
                constexprs={"PREFIX": 1, "D": width, "HAS_INDEX": True, "BLOCK_B": 64, "BLOCK_D": 64},
                config=config,
                expects=frozenset({"load16"}),
                name=f"{dtype} {width}",
            )
        )
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _assemble_native(
    x: Tensor, mask_token: Tensor, positions: Tensor | None, rows: Tensor, raster: bool, prefix: int
) -> Tensor:
    out = x.new_empty(x.shape[0], prefix + rows.shape[1], x.shape[-1])
    table = None if positions is None else positions.float()
    torch.ops.cohobate_native.assemble(x, mask_token.float(), table, rows, raster, prefix, out)
    return out


def _assemble_backward_native(
    grad: Tensor,
    rows: Tensor,
    visible: int,
    table: int,
    raster: bool,
    prefix: int,
    want_mask: bool,
    want_positions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad.shape[-1]
    dx = grad.new_empty(grad.shape[0], prefix + visible, width)
    dmask = grad.new_empty(width if want_mask else 0, dtype=torch.float32)
    torch.ops.cohobate_native.assemble_backward(grad, rows, visible, raster, prefix, CHUNK, dx, dmask)
    dpositions = grad.new_empty((table, width) if want_positions else 0, dtype=torch.float32)
    if want_positions:
        inverse = None if raster else _inverse(rows, table - prefix)
        torch.ops.cohobate_native.sum_rows(grad, inverse, prefix, dpositions)
    return dx, dmask, dpositions


# ---------------------------------------------------------------------------------------------------- registration

register(
    Op(
        "assemble",
        ("reference", "native", "triton"),
        assemble_cost,
        limits={
            "native": dtype_limit("native", torch.float32, torch.bfloat16),
            "triton": dtype_limit("triton", *FLOAT_DTYPES),
        },
    )
)

_assemble_op = define(
    "assemble(Tensor x, Tensor mask_token, Tensor? positions, Tensor rows, bool raster, SymInt prefix, str impl)"
    " -> Tensor",
    fake=lambda x, mask_token, positions, rows, raster, prefix: x.new_empty(
        x.shape[0], prefix + rows.shape[1], x.shape[-1]
    ),
    native=_assemble_native,
    triton=_assemble_triton,
)


def _assemble_backward_fake(
    grad: Tensor,
    rows: Tensor,
    visible: int,
    table: int,
    raster: bool,
    prefix: int,
    want_mask: bool,
    want_positions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad.shape[-1]
    dx = grad.new_empty(grad.shape[0], prefix + visible, width)
    dmask = grad.new_empty(width if want_mask else 0, dtype=torch.float32)
    return dx, dmask, grad.new_empty((table, width) if want_positions else 0, dtype=torch.float32)


_assemble_backward_op = define(
    "assemble_backward(Tensor grad, Tensor rows, SymInt visible, SymInt table, bool raster, SymInt prefix, "
    "bool want_mask, bool want_positions, str impl) -> (Tensor, Tensor, Tensor)",
    fake=_assemble_backward_fake,
    native=_assemble_backward_native,
    triton=_assemble_backward_triton,
)


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        mask_token: Tensor,
        positions: Tensor | None,
        rows: Tensor,
        raster: bool,
        prefix: int,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.visible, ctx.mask_dtype = x.shape[1] - prefix, mask_token.dtype
        ctx.table, ctx.table_dtype = (0, None) if positions is None else (positions.shape[0], positions.dtype)
        ctx.raster, ctx.prefix, ctx.impl = raster, prefix, impl
        return _assemble_op(x, mask_token, positions, rows, raster, prefix, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        _, want_mask, want_positions, *_ = ctx.needs_input_grad
        dx, dmask, dpositions = _assemble_backward_op(
            rows_dense(grad), rows, ctx.visible, ctx.table, ctx.raster, ctx.prefix, want_mask, want_positions, ctx.impl
        )
        dmask = dmask.to(ctx.mask_dtype) if want_mask else None
        dpositions = dpositions.to(ctx.table_dtype) if want_positions else None
        return dx, dmask, dpositions, None, None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def assemble(
    x: Tensor,
    mask_token: Tensor,
    positions: Tensor | None,
    rows: Tensor,
    *,
    layout: str = "raster",
    prefix: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Lay visible rows and mask tokens out as a full sequence and add positions; formulas at the top of the module.

    Args:
        x: [B, P+a, D] prefix and visible rows; fp32, bf16 or fp16.
        mask_token: [D], any of these dtypes (fp32 parameters beside bf16 rows are usual).
        positions: [P+N, D], any of these dtypes, or None. Raster needs N = m.
        rows: [B, m] int32, m >= a, values not checked (that would read the device). Raster: where token i of the grid
            is in the visible-first order, a permutation of 0..m-1. Visible first: grid index of the j-th token,
            distinct, below N.
        layout: "raster" or "visible_first".
        prefix: P, rows in front (class token) that are kept in front.
        backend: auto (None), reference, native or triton.

    Returns:
        [B, P+m, D] in x's dtype, with gradients for x, mask_token and positions (once differentiable).

    Raises:
        TypeError, ValueError: a dtype, shape, device, layout or backend that does not fit; the message names it.
    """
    kinds = (*FLOAT_DTYPES, torch.float64)
    check_tensor("x", x, dtypes=kinds, shape=(None, None, None))
    batch, seen, width = x.shape
    check_tensor("mask_token", mask_token, dtypes=kinds, shape=(width,), like=x)
    check_tensor("rows", rows, dtypes=(torch.int32,), shape=(batch, None), like=x)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected raster or visible_first, got {layout!r}")
    if not 0 <= prefix <= seen:
        raise ValueError(f"prefix: expected a count between 0 and the {seen} rows of x, got {prefix}")
    total = prefix + rows.shape[1]
    if seen > total:
        raise ValueError(
            f"rows: expected at least {seen - prefix} a sample (the visible rows of x), got {rows.shape[1]}"
        )
    if positions is not None:
        check_tensor("positions", positions, dtypes=kinds, shape=(total if layout == "raster" else None, width), like=x)
        if positions.shape[0] < total:
            raise ValueError(f"positions: expected at least {total} rows, got {positions.shape[0]}")
    widest = torch.promote_types(x.dtype, mask_token.dtype)
    widest = widest if positions is None else torch.promote_types(widest, positions.dtype)
    impl = choose("assemble", x, backend, dtype=torch.float64 if widest == torch.float64 else x.dtype)
    if impl == "reference":
        return assemble_reference(x, mask_token, positions, rows, layout=layout, prefix=prefix)
    table = None if positions is None else positions.contiguous()
    out: Tensor = _Assemble.apply(
        rows_dense(x), mask_token.contiguous(), table, indices_dense(rows), layout == "raster", prefix, impl
    )
    return out
