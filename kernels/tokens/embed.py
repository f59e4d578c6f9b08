"""embed_patches: gather_patches fused with the projection, its bias and the position rows.

    out[b, j] = W p + bias + positions[r],    r = rows[b, j],    p = (u / 255 - mean) / std of patch r (gather_patches)
    dW = sum g p^T,    dbias = sum g,    dpositions[r] = sum of g over the rows that read r    (g: gradient of out)

| tensor    | shape              | dtype            | strides                                       |
|-----------|--------------------|------------------|-----------------------------------------------|
| pixels    | [B, T, H, W, C]    | uint8            | W and C packed; any others (else copied once) |
| rows      | [B, n]             | int32            | last one is 1 (else copied once); None: all   |
| weight    | [D, pt*ph*pw*C]    | any float        | any (columns ordered frame, row, column, C)   |
| bias      | [D]                | any float        | any                                           |
| positions | [N, D]             | any float        | any                                           |
| out       | [B, n, D]          | fp32, bf16, fp16 | contiguous                                    |

Saved for the backward pass: pixels and rows, never patches; they are gathered again. Pixels have no gradient.

``native`` gathers in the result's dtype, multiplies through torch and adds bias and positions in one pass over the
output.

``triton`` is one matrix product whose left tile is gathered from the bytes. It multiplies u - 128, which is exact in
every dtype, by W * 128 / (255 std), rounded once, and adds W ((128/255 - mean) / std) to the bias in fp32; the factor
128 keeps fp16 weights out of the subnormal range and is divided out, exactly, in the epilogue. So its rounding error is
below that of rounding the patches themselves.

Determinism: bitwise from run to run. Sums over tokens are fixed trees whose size depends on the shape alone (in
``native`` the product is the matrix library's: its order may depend on the thread count). No atomics. Floor:
:func:`embed_patches_cost`; compute-bound on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, count_flops, define, register
from cohobate.kernels.tokens.gather import (
    AOT_DTYPES,
    AOT_PATCHES,
    FLOAT_DTYPES,
    PIXEL_SIGNATURE,
    Patch,
    byte_offset,
    channel_affine,
    check_patches,
    chosen_patch,
    gather_native,
    gather_patches_reference,
    native_limit,
    patch_offset,
    pixels_packed,
    rows_packed,
    token_count,
    triton_limit,
)
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase


def embed_patches_reference(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Reference of :func:`embed_patches`, differentiable in weight, bias and positions."""
    patches = gather_patches_reference(pixels, rows, patch=patch, mean=mean, std=std, dtype=dtype)
    out = torch.nn.functional.linear(patches, weight.to(dtype), None if bias is None else bias.to(dtype))
    if positions is not None:
        out = out + (positions if rows is None else positions[rows.long()])
    return out.to(dtype)


def embed_patches_cost(batch: int, count: int, width: int, depth: int, itemsize: int) -> Cost:
    """Floor of the forward for ``count`` rows of ``width`` bytes a sample and ``depth`` = D outputs.

    Bytes, int32 indices, one weight and one fp32 position row a token in; the result out.
    """
    rows = batch * count
    moved = rows * (width + 4 + depth * itemsize) + width * depth * itemsize + count * depth * 4
    return Cost(bytes=moved, flops=2 * rows * width * depth)


def embed_patches_backward_cost(batch: int, count: int, width: int, depth: int, itemsize: int) -> Cost:
    """Floor of the backward: bytes, indices and the output's gradient in; three fp32 gradients out."""
    rows = batch * count
    moved = rows * (width + 4 + depth * itemsize) + (width + 1 + count) * depth * 4
    return Cost(bytes=moved, flops=2 * rows * width * depth)


# ---------------------------------------------------------------------------------------------------------- Triton

WARPS = {"num_warps": 4}  # of the kernels that move little: fold, unfold and the sums
SUM_ROWS = 256  # rows that one partial sum of a column covers
SPLIT_ROWS, SPLITS = 2048, 16  # tokens that one partial weight gradient covers, and how many partials at most


@jit
def centred(byte, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """byte - 128, exact. The byte becomes low mantissa bits of 2^23, which is cheaper than an integer conversion."""
    bits = byte.to(tl.int32) | 0x4B000000
    return (bits.to(tl.float32, bitcast=True) - 8388736.0).to(dtype)


@jit
def _fold_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, bias_ptr, affine_ptr, folded_ptr, offset_ptr, K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program folds one row of W: scale into the weight, offset into the bias."""
    d = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    scale = 128.0 * tl.load(affine_ptr + k % C)
    offset = scale + tl.load(affine_ptr + C + k % C)
    weight = tl.load(weight_ptr + d * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(folded_ptr + d * K + k, (weight * scale).to(folded_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(weight * offset)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d).to(tl.float32)
    tl.store(offset_ptr + d, total)


@jit
def _embed_kernel(  # type: ignore[no-untyped-def]
    pixels_ptr, rows_ptr, folded_ptr, offset_ptr, positions_ptr, out_ptr,
    count, total, stride_b, stride_t, stride_h, stride_rows_b, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M tokens x BLOCK_N outputs; neighbours share tokens, so the bytes stay in L2."""
    K: tl.constexpr = PT * PH * PW * C
    dtype: tl.constexpr = folded_ptr.dtype.element_ty
    tiles_n = tl.cdiv(D, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(m, total - 1)
    sample = row // count
    patch = chosen_patch(rows_ptr, sample, row % count, stride_rows_b)
    start = patch_offset(patch, sample, stride_b, stride_t, stride_h, grid_h, grid_w, PT, PH, PW, C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        byte = byte_offset(k, stride_t, stride_h, PH, PW, C)
        if K % BLOCK_K == 0:
            u = tl.load(pixels_ptr + start[:, None] + byte[None, :])
        else:
            u = tl.load(pixels_ptr + start[:, None] + byte[None, :], mask=(k < K)[None, :], other=128)
        if K % BLOCK_K == 0 and D % BLOCK_N == 0:
            w = tl.load(folded_ptr + n[None, :] * K + k[:, None])
        else:
            w = tl.load(folded_ptr + n[None, :] * K + k[:, None], mask=(k < K)[:, None] & (n < D)[None, :], other=0.0)
        acc = tl.dot(centred(u, dtype), w, acc, input_precision="ieee")
    acc = acc * 0.0078125 + tl.load(offset_ptr + n, mask=n < D, other=0.0)[None, :]
    mask = (m < total)[:, None] & (n < D)[None, :]
    if positions_ptr is not None:
        acc += tl.load(positions_ptr + patch.to(tl.int64)[:, None] * D + n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + m.to(tl.int64)[:, None] * D + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, pixels_ptr, rows_ptr, partial_ptr, count, total, split_rows, stride_grad_b, stride_grad_n,
    stride_b, stride_t, stride_h, stride_rows_b, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program sums g (u - 128)^T over split_rows tokens for BLOCK_N outputs x BLOCK_K bytes."""
    K: tl.constexpr = PT * PH * PW * C
    tiles_k = tl.cdiv(K, BLOCK_K)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    byte = byte_offset(k, stride_t, stride_h, PH, PW, C)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(0, split_rows, BLOCK_M):
        m = tl.program_id(1) * split_rows + first + tl.arange(0, BLOCK_M)
        row = tl.minimum(m, total - 1)
        sample = row // count
        j = row % count
        patch = chosen_patch(rows_ptr, sample, j, stride_rows_b)
        start = patch_offset(patch, sample, stride_b, stride_t, stride_h, grid_h, grid_w, PT, PH, PW, C)
        u = tl.load(pixels_ptr + start[:, None] + byte[None, :], mask=(k < K)[None, :], other=128)
        from_ = sample.to(tl.int64) * stride_grad_b + j.to(tl.int64) * stride_grad_n
        g = tl.load(grad_ptr + from_[:, None] + n[None, :], mask=(m < total)[:, None] & (n < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), centred(u, g.dtype), acc, input_precision="ieee")
    to = (tl.program_id(1).to(tl.int64) * D + n)[:, None] * K + k[None, :]
    tl.store(partial_ptr + to, acc, mask=(n < D)[:, None] & (k < K)[None, :])


@jit
def _unfold_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    sum_ptr,
    affine_ptr,
    out_ptr,
    splits,
    D: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program adds the partial gradients of one row of W in order and undoes the fold."""
    d = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + (split * D + d) * K + k, mask=inside, other=0.0)
    scale = tl.load(affine_ptr + k % C)
    offset = 128.0 * scale + tl.load(affine_ptr + C + k % C)
    tl.store(out_ptr + d * K + k, acc * scale + offset * tl.load(sum_ptr + d), mask=inside)


@jit
def _column_sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, count, total, stride_b, stride_n, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program sums ROWS rows of BLOCK_D columns; row i of x is (i // count, i % count)."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((16, BLOCK_D), dtype=tl.float32)
    for first in range(0, ROWS, 16):
        row = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, 16)
        from_ = row // count * stride_b + row % count * stride_n
        mask = (row < total)[:, None] & (d < D)[None, :]
        acc += tl.load(x_ptr + from_[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(acc, axis=0), mask=d < D)


@jit
def _positions_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, where_ptr, out_ptr, batch, length, stride_b, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program sums BLOCK_D columns of one position's gradient over the samples, 16 at a time."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((16, BLOCK_D), dtype=tl.float32)
    for first in range(0, batch, 16):
        b = first + tl.arange(0, 16).to(tl.int64)
        if where_ptr is None:
            j = b * 0 + r
        else:
            j = tl.load(where_ptr + b * length + r, mask=b < batch, other=-1).to(tl.int64)
        mask = ((b < batch) & (j >= 0))[:, None] & (d < D)[None, :]
        acc += tl.load(grad_ptr + (b * stride_b + j * stride_n)[:, None] + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + r * D + d, tl.sum(acc, axis=0), mask=d < D)


def _embed_triton(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    out = pixels.new_empty(_shape(pixels, rows, weight, patch), dtype=dtype)
    batch, count, depth = out.shape
    if not out.numel():
        return out
    (pt, ph, pw), channels, width = patch, pixels.shape[4], weight.shape[1]
    folded, offset = weight.new_empty(depth, width, dtype=dtype), weight.new_empty(depth, dtype=torch.float32)
    affine = channel_affine(tuple(mean), tuple(std), pixels.device)
    config = tuning.lookup("embed_patches", str(dtype), depth, count, architecture(pixels.device))
    tiles = triton.cdiv(batch * count, config["BLOCK_M"]) * triton.cdiv(depth, config["BLOCK_N"])
    with torch.cuda.device_of(pixels):
        _fold_kernel[(depth,)](
            weight.contiguous(), None if bias is None else bias.contiguous(), affine, folded, offset,
            K=width, C=channels, BLOCK_K=triton.next_power_of_2(width), **WARPS,
        )  # fmt: skip
        _embed_kernel[(tiles,)](
            pixels, rows, folded, offset, None if positions is None else positions.contiguous(), out,
            count, batch * count, pixels.stride(0), pixels.stride(1), pixels.stride(2),
            0 if rows is None else rows.stride(0), pixels.shape[2] // ph, pixels.shape[3] // pw,
            PT=pt, PH=ph, PW=pw, C=channels, D=depth, **config,
        )  # fmt: skip
    return out


def _column_sum(x: Tensor) -> Tensor:
    """fp32 [D], the sum of x [.., n, D] over its rows: partial sums of SUM_ROWS rows, then of those, and so on."""
    depth = x.shape[-1]
    while True:
        x = x if x.dim() == 3 else x.unsqueeze(0)
        total = x.shape[0] * x.shape[1]
        parts = triton.cdiv(total, SUM_ROWS)
        out = x.new_empty(parts, depth, dtype=torch.float32)
        _column_sum_kernel[(parts, triton.cdiv(depth, 128))](
            x, out, x.shape[1], total, x.stride(0), x.stride(1), D=depth, ROWS=SUM_ROWS, BLOCK_D=128, **WARPS
        )
        if parts == 1:
            return out[0]
        x = out


def _positions_sum(grad: Tensor, rows: Tensor | None, length: int) -> Tensor:
    """fp32 [length, D]: each position's gradient."""
    batch, count, depth = grad.shape
    where = None
    if rows is not None:  # where[b, r]: which output row of sample b reads position r, or -1
        where = rows.new_full((batch, length), -1)
        where.scatter_(1, rows.long(), torch.arange(count, dtype=torch.int32, device=rows.device).expand(batch, count))
    out = grad.new_empty(length, depth, dtype=torch.float32)
    _positions_kernel[(length, triton.cdiv(depth, 128))](
        grad, where, out, batch, length, grad.stride(0), grad.stride(1), D=depth, BLOCK_D=128, **WARPS
    )
    return out


def _backward_triton(
    grad: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    length: int,
    weight_wanted: bool,
    bias_wanted: bool,
    positions_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_grad, bias_grad, positions_grad = _empty_grads(
        grad, pixels, patch, length, weight_wanted, bias_wanted, positions_wanted
    )
    if not grad.numel():
        return weight_grad.zero_(), bias_grad.zero_(), positions_grad.zero_()
    batch, count, depth = grad.shape
    with torch.cuda.device_of(grad):
        if positions_wanted:
            positions_grad = _positions_sum(grad, rows, length)
        if bias_wanted or weight_wanted:
            total = _column_sum(positions_grad if positions_wanted else grad)
            bias_grad = total if bias_wanted else bias_grad
        if weight_wanted:
            (pt, ph, pw), channels, width = patch, pixels.shape[4], weight_grad.shape[1]
            affine = channel_affine(tuple(mean), tuple(std), pixels.device)
            config = tuning.lookup("embed_patches_backward", str(grad.dtype), depth, count, architecture(grad.device))
            split_rows = max(SPLIT_ROWS, triton.cdiv(batch * count, SPLITS * 128) * 128)
            splits = triton.cdiv(batch * count, split_rows)
            partial = grad.new_empty(splits, depth, width, dtype=torch.float32)
            _weight_kernel[(triton.cdiv(depth, config["BLOCK_N"]) * triton.cdiv(width, config["BLOCK_K"]), splits)](
                grad, pixels, rows, partial, count, batch * count, split_rows, grad.stride(0), grad.stride(1),
                pixels.stride(0), pixels.stride(1), pixels.stride(2), 0 if rows is None else rows.stride(0),
                pixels.shape[2] // ph, pixels.shape[3] // pw, PT=pt, PH=ph, PW=pw, C=channels, D=depth, **config,
            )  # fmt: skip
            _unfold_kernel[(depth,)](
                partial, total, affine, weight_grad, splits,
                D=depth, K=width, C=channels, BLOCK_K=triton.next_power_of_2(width), **WARPS,
            )  # fmt: skip
    return weight_grad, bias_grad, positions_grad


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    cases = []
    for pt, ph, pw in AOT_PATCHES:
        widths = (384, 768, 1024)
        width = pt * ph * pw * 3
        patch = {"PT": pt, "PH": ph, "PW": pw, "C": 3}
        block = {"K": width, "C": 3, "BLOCK_K": triton.next_power_of_2(width)}
        for dtype, depth, config in shipped("embed_patches", arch, dtypes=AOT_DTYPES, widths=widths):
            kind, name = pointer(dtype), f"{dtype} {width} to {depth}"
            product = frozenset({"store16"}) | ({"tensor_core", "wgmma"} if dtype != torch.float32 else set())
            pointers = {"folded_ptr": kind, "offset_ptr": "*fp32", "positions_ptr": "*fp32", "out_ptr": kind}
            sizes = patch | {"D": depth}
            cases.append(
                AotCase(_embed_kernel, {**PIXEL_SIGNATURE, **pointers}, sizes, config, product, f"embed {name}")
            )
            fold = {
                "weight_ptr": "*fp32",
                "bias_ptr": "*fp32",
                "affine_ptr": "*fp32",
                "folded_ptr": kind,
                "offset_ptr": "*fp32",
            }
            cases.append(AotCase(_fold_kernel, fold, block, WARPS, frozenset({"vector16"}), f"fold {name}"))
        for dtype, depth, config in shipped("embed_patches_backward", arch, dtypes=AOT_DTYPES, widths=widths):
            kind, name = pointer(dtype), f"{dtype} {width} to {depth}"
            product = frozenset({"store16"}) | ({"tensor_core", "wgmma"} if dtype != torch.float32 else set())
            strides = {"stride_grad_b": "i32:16", "stride_grad_n": "i32:16"}
            weight = {**PIXEL_SIGNATURE, **strides, "grad_ptr": kind, "partial_ptr": "*fp32", "split_rows": "i32:16"}
            cases.append(
                AotCase(_weight_kernel, weight, patch | {"D": depth}, config, product, f"weight gradient {name}")
            )
            unfold = {
                "partial_ptr": "*fp32",
                "sum_ptr": "*fp32",
                "affine_ptr": "*fp32",
                "out_ptr": "*fp32",
                "splits": "i32",
            }
            cases.append(
                AotCase(_unfold_kernel, unfold, {**block, "D": depth}, WARPS, frozenset({"vector16"}), f"unfold {name}")
            )
            columns = {"D": depth, "BLOCK_D": 128}
            shape = {
                "batch": "i32",
                "length": "i32",
                "count": "i32",
                "total": "i32",
                "stride_b": "i32:16",
                "stride_n": "i32:16",
            }
            pointers = {"x_ptr": kind, "grad_ptr": kind, "where_ptr": "*i32", "out_ptr": "*fp32"}
            sums = columns | {"ROWS": SUM_ROWS}
            expects = frozenset({"load16"})
            cases.append(AotCase(_column_sum_kernel, shape | pointers, sums, WARPS, expects, f"column sum {name}"))
            cases.append(
                AotCase(_positions_kernel, shape | pointers, columns, WARPS, expects, f"positions gradient {name}")
            )
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _embed_native(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    out = recycled(_shape(pixels, rows, weight, patch), dtype)
    patches = gather_native(pixels, rows, patch, mean, std, dtype)
    if out.numel():
        # Written with out=, which autocast leaves alone.
        torch.mm(patches.flatten(0, 1), weight.to(dtype).t(), out=out.flatten(0, 1))
        torch.ops.cohobate_native.embed_epilogue(out, rows, _dense_fp32(bias), _dense_fp32(positions))
    return out


def _dense_fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _backward_native(
    grad: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    length: int,
    weight_wanted: bool,
    bias_wanted: bool,
    positions_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_grad, bias_grad, positions_grad = _empty_grads(
        grad, pixels, patch, length, weight_wanted, bias_wanted, positions_wanted
    )
    if not grad.numel():
        return weight_grad.zero_(), bias_grad.zero_(), positions_grad.zero_()
    if bias_wanted or positions_wanted:
        torch.ops.cohobate_native.embed_sums(
            grad, rows, length, bias_grad if bias_wanted else None, positions_grad if positions_wanted else None
        )
    if weight_wanted:
        patches = gather_native(pixels, rows, patch, mean, std, grad.dtype).flatten(0, 1)
        product = (
            weight_grad if grad.dtype == torch.float32 else weight_grad.new_empty(weight_grad.shape, dtype=grad.dtype)
        )
        torch.mm(grad.reshape(-1, grad.shape[-1]).t(), patches, out=product)
        weight_grad = product.float()
    return weight_grad, bias_grad, positions_grad


# ---------------------------------------------------------------------------------------------------- registration


def _shape(pixels: Tensor, rows: Tensor | None, weight: Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    """[B, n, D] of the result."""
    return pixels.shape[0], token_count(pixels, patch) if rows is None else rows.shape[1], weight.shape[0]


def _empty_grads(
    grad: Tensor, pixels: Tensor, patch: Sequence[int], length: int, weight: bool, bias: bool, positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in fp32, each empty where it is not wanted."""
    depth, width = grad.shape[2], math.prod(patch) * pixels.shape[4]
    shapes = ((depth, width) if weight else (0,), (depth,) if bias else (0,), (length, depth) if positions else (0,))
    first, second, third = (grad.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return first, second, third


_LIMITS = {"native": native_limit, "triton": triton_limit}
register(Op("embed_patches", ("reference", "native", "triton"), embed_patches_cost, _LIMITS))
register(Op("embed_patches_backward", ("reference", "native", "triton"), embed_patches_backward_cost, _LIMITS))

_embed_op = define(
    "embed_patches(Tensor pixels, Tensor? rows, Tensor weight, Tensor? bias, Tensor? positions, int[] patch, "
    "float[] mean, float[] std, ScalarType dtype, str impl) -> Tensor",
    fake=lambda pixels, rows, weight, bias, positions, patch, mean, std, dtype: pixels.new_empty(
        _shape(pixels, rows, weight, patch), dtype=dtype
    ),
    native=_embed_native,
    triton=_embed_triton,
)
_backward_op = define(
    "embed_patches_backward(Tensor grad, Tensor pixels, Tensor? rows, int[] patch, float[] mean, float[] std, "
    "int length, bool weight, bool bias, bool positions, str impl) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, pixels, rows, patch, mean, std, length, *wanted: _empty_grads(
        grad, pixels, patch, length, *wanted
    ),
    native=_backward_native,
    triton=_backward_triton,
)


def _forward_flops(pixels: Any, rows: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * math.prod(out_shape) * int(weight[1])


def _backward_flops(grad: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    weight = out_shape[0]
    return 2 * math.prod(grad[:2]) * math.prod(weight) if len(weight) == 2 else 0


count_flops(embed_patches=_forward_flops, embed_patches_backward=_backward_flops)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, pixels, rows, weight, bias, positions, patch, mean, std, tokens: int, dtype: torch.dtype, impl: str
    ) -> Tensor:
        ctx.save_for_backward(pixels, rows)
        ctx.facts = (patch, mean, std, tokens, impl)
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias, positions)]
        return _embed_op(pixels, rows, weight, bias, positions, patch, mean, std, dtype, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        pixels, rows = ctx.saved_tensors
        patch, mean, std, tokens, impl = ctx.facts
        wanted = ctx.needs_input_grad[2:5]
        dense = grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
        grads = _backward_op(dense, pixels, rows, patch, mean, std, tokens, *wanted, impl)
        made = [g.to(dtype) if want else None for g, want, dtype in zip(grads, wanted, ctx.dtypes)]
        return None, None, *made, None, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def embed_patches(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Patch embedding of the chosen patches, straight from uint8: normalise, project, add bias and position rows.

    Args:
        pixels: [B, T, H, W, C] uint8; an image has T = 1.
        rows: [B, n] int32, patches in raster order (t, y, x), distinct within a sample, each in [0, N); None takes all
            N. On the CPU the range is checked; on CUDA that would stop the device.
        weight: [D, pt*ph*pw*C], columns ordered (frame, row, column, channel).
        bias: [D] or None.
        positions: [N, D] or None.
        patch: (pt, ph, pw), sizes that divide (T, H, W).
        mean, std: one value a channel, in units of [0, 1] pixels.
        dtype: of the product and the result, whatever dtype the parameters have (autocast is not consulted).
        backend: auto (None), reference, native (fp32, bf16) or triton.

    Returns:
        [B, n, D] in ``dtype``. Gradients flow to weight, bias and positions, each in its own dtype; pixels have none.

    Raises:
        TypeError, ValueError: a dtype, shape, size, device or backend that does not fit; the message names the
            argument.
    """
    patch, mean, std, tokens = check_patches(pixels, rows, patch, mean, std)
    floats = (*FLOAT_DTYPES, torch.float64)
    width = math.prod(patch) * pixels.shape[-1]
    check_tensor("weight", weight, dtypes=floats, shape=(None, width), like=pixels)
    depth = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, dtypes=floats, shape=(depth,), like=pixels)
    if positions is not None:
        check_tensor("positions", positions, dtypes=floats, shape=(tokens, depth), like=pixels)
    if dtype not in floats:
        raise TypeError(f"dtype: expected a floating-point type, got {str(dtype).removeprefix('torch.')}")
    impl = choose("embed_patches", pixels, backend, dtype=str(dtype))
    if impl == "reference":
        with torch.autocast(pixels.device.type, enabled=False):
            return embed_patches_reference(
                pixels, rows, weight, bias, positions, patch=patch, mean=mean, std=std, dtype=dtype
            )
    out: Tensor = _Embed.apply(
        pixels_packed(pixels), rows_packed(rows), weight, bias, positions, patch, mean, std, tokens, dtype, impl
    )
    return out
