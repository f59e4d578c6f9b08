"""pixel_loss: mean squared error against normalised pixels that are read straight from uint8.

    loss = mean over (b, j, k) of (prediction - target)^2,     d loss / d prediction = 2 (prediction - target) / (B n K)

With x = (u / 255 - mean) / std, u the bytes of patch rows[b, j] and K = pt*ph*pw*C their number, the target is

    "mae"        (x - m) / sqrt(v + eps)      m, v: mean and unbiased variance of the whole patch
                                              (MAE, He et al., CVPR 2022, section 3, "reconstruction target")
    "videomae"   (u/255 - m_c) / (sqrt(v_c) + eps)    m_c, v_c: of each channel of the patch, in [0, 1] pixels
                                              (VideoMAE, Tong et al., NeurIPS 2022; also AMD, Zhao et al., CVPR 2024)

and x, or u/255, itself where ``normalise`` is false.

| tensor     | shape              | dtype            | strides                                                |
|------------|--------------------|------------------|--------------------------------------------------------|
| prediction | [B, n, pt*ph*pw*C] | fp32, bf16, fp16 | last one is 1 (else copied once)                       |
| pixels     | [B, T, H, W, C]    | uint8            | W and C packed; any others (else copied once)          |
| rows       | [B, n]             | int32            | last one is 1 (else copied once); None: all, in order  |
| loss       | 0-d                | fp32             |                                                        |

The forward pass stores prediction - target in the prediction's dtype, unnormalised so that fp16 does not underflow, and
the backward pass multiplies it by 2 / (B n K) times the incoming gradient, on the device. Without a gradient nothing is
stored. Floor: :func:`pixel_loss_cost`.

Flat patches. A patch without contrast has v = 0 and the formula divides rounding errors by eps: with "videomae" and
eps = 1e-6 the fp32 formula gives targets of up to 0.4 where the exact answer is 0. ``native`` and ``triton`` subtract
the channel's mean in units of bytes, an exact integer sum divided by its count, so a flat channel gives exactly 0. With
"mae" sqrt(eps) = 1e-3 bounds the amplification; both are exact there too where the channels' levels agree exactly.

Determinism: bitwise from run to run. ``native`` sums 16 rows at a time by position inside a row of pixels and adds
those sums in order, whatever the thread count; ``triton`` sums 8 rows a program, then the programs in one fixed tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.tokens.gather import (
    AOT_DTYPES,
    AOT_PATCHES,
    FLOAT_DTYPES,
    PIXEL_SIGNATURE,
    Patch,
    byte_offset,
    channel_affine,
    check_patches,
    check_rows,
    chosen_patch,
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

CONVENTIONS = ("mae", "videomae")
VALUES, PER_PATCH, PER_CHANNEL = 0, 1, 2  # what the target is; the C++ enum PixelTarget


def pixel_target_reference(
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    convention: str = "mae",
    normalise: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Targets [B,n,pt*ph*pw*C] fp32: "mae" standardises a patch jointly, "videomae" each channel of [0,1] pixels."""
    channels = pixels.shape[-1]
    if convention == "mae":
        target = gather_patches_reference(pixels, rows, patch=patch, mean=mean, std=std)
        if normalise:
            variance = target.var(-1, keepdim=True, correction=1)
            target = (target - target.mean(-1, keepdim=True)) / (variance + eps).sqrt()
        return target
    target = gather_patches_reference(pixels, rows, patch=patch, mean=[0.0] * channels, std=[1.0] * channels)
    if normalise:
        split = target.unflatten(-1, (-1, channels))
        split = (split - split.mean(-2, keepdim=True)) / (split.var(-2, keepdim=True, correction=1).sqrt() + eps)
        target = split.flatten(-2)
    return target


def pixel_loss_reference(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    convention: str = "mae",
    normalise: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Reference of :func:`pixel_loss`, differentiable in the prediction."""
    target = pixel_target_reference(
        pixels, rows, patch=patch, mean=mean, std=std, convention=convention, normalise=normalise, eps=eps
    )
    return torch.nn.functional.mse_loss(prediction.float(), target)


def pixel_loss_cost(batch: int, count: int, width: int, itemsize: int) -> Cost:
    """Floor of forward and backward: bytes and prediction in, error out; error in, gradient out. 8 FLOPs a value."""
    values = batch * count * width
    return Cost(bytes=values * (1 + 4 * itemsize) + batch * count * 4, flops=8 * values)


# ---------------------------------------------------------------------------------------------------------- Triton

ROWS = 8  # rows a program sums
SCALE_BLOCK = 2048  # values that one program of the backward pass scales


@jit
def _pixel_loss_kernel(  # type: ignore[no-untyped-def]
    prediction_ptr, pixels_ptr, rows_ptr, affine_ptr, error_ptr, partial_ptr, count, total, stride_prediction_b,
    stride_prediction_n, stride_b, stride_t, stride_h, stride_rows_b, grid_h, grid_w, eps, TARGET: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS rows: statistics of the patch in registers, error out, one partial loss.

    TARGET: 0 is the normalised values, 1 standardises them over the patch, 2 standardises each channel's bytes.
    """
    K: tl.constexpr = PT * PH * PW * C
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    channel = k % C
    byte = byte_offset(k, stride_t, stride_h, PH, PW, C)
    scale = tl.load(affine_ptr + channel)
    offset = tl.load(affine_ptr + C + channel)
    acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        mask = inside & (row < total)
        sample = tl.minimum(row, total - 1) // count
        j = tl.minimum(row, total - 1) % count
        patch = chosen_patch(rows_ptr, sample, j, stride_rows_b)
        start = patch_offset(patch, sample, stride_b, stride_t, stride_h, grid_h, grid_w, PT, PH, PW, C)
        u = tl.load(pixels_ptr + start + byte, mask=mask, other=0).to(tl.float32)
        target = u * scale + offset
        if TARGET > 0:
            # A channel's mean is an exact sum over its count, so what is left of a flat channel is exactly zero.
            centre = tl.zeros((BLOCK_K,), dtype=tl.float32)
            level = tl.zeros((BLOCK_K,), dtype=tl.float32)
            levels = 0.0
            for c in tl.static_range(C):
                mine = channel == c
                mean = tl.div_rn(tl.sum(tl.where(mine, u, 0.0)), 1.0 * (K // C))
                centre = tl.where(mine, mean, centre)
                mean = mean * tl.load(affine_ptr + c) + tl.load(affine_ptr + C + c)
                level = tl.where(mine, mean, level)
                levels += mean
            deviation = tl.where(inside, u - centre, 0.0)
            if TARGET == 1:
                deviation = tl.where(inside, deviation * scale + (level - levels / C), 0.0)
                variance = tl.div_rn(tl.sum(deviation * deviation), 1.0 * (K - 1))
                target = deviation * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
            else:
                for c in tl.static_range(C):
                    mine = channel == c
                    variance = tl.div_rn(tl.sum(tl.where(mine, deviation * deviation, 0.0)), 1.0 * (K // C - 1))
                    target = tl.where(mine, deviation * tl.div_rn(1.0, tl.sqrt_rn(variance) + 255.0 * eps), target)
        at = sample * stride_prediction_b + j * stride_prediction_n
        prediction = tl.load(prediction_ptr + at + k, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(mask, prediction - target, 0.0)
        acc += error * error
        if error_ptr is not None:
            tl.store(error_ptr + row * K + k, error.to(error_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(acc))


@jit
def _pixel_sum_kernel(partial_ptr, loss_ptr, parts, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program adds every partial loss: BLOCK sums in order, then their tree."""
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + i, mask=i < parts, other=0.0)
    tl.store(loss_ptr, tl.sum(acc) * factor)


@jit
def _pixel_scale_kernel(error_ptr, grad_ptr, out_ptr, factor, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = error * (grad * factor); grad is a scalar on the device."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grad_ptr) * factor
    error = tl.load(error_ptr + i, mask=i < length, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (error * scale).to(out_ptr.dtype.element_ty), mask=i < length)


def _loss_triton(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    target: int,
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss, error = _empty(prediction, gradient)
    batch, count, width = prediction.shape
    if not prediction.numel():
        return loss.fill_(math.nan), error
    (pt, ph, pw), total = patch, batch * count
    parts = triton.cdiv(total, ROWS)
    partial = loss.new_empty(parts)
    affine = channel_affine(tuple(mean), tuple(std), pixels.device)
    config = tuning.lookup("pixel_loss", str(prediction.dtype), width, count, architecture(pixels.device))
    with torch.cuda.device_of(pixels):
        _pixel_loss_kernel[(parts,)](
            prediction, pixels, rows, affine, error if gradient else None, partial, count, total,
            prediction.stride(0), prediction.stride(1), pixels.stride(0), pixels.stride(1), pixels.stride(2),
            0 if rows is None else rows.stride(0), pixels.shape[2] // ph, pixels.shape[3] // pw, eps, TARGET=target,
            PT=pt, PH=ph, PW=pw, C=pixels.shape[4], BLOCK_K=triton.next_power_of_2(width), ROWS=ROWS, **config,
        )  # fmt: skip
        _pixel_sum_kernel[(1,)](partial, loss, parts, 1 / (total * width), BLOCK=1024, num_warps=4)
    return loss, error


def _scale_triton(error: Tensor, grad: Tensor, factor: float) -> Tensor:
    out = torch.empty_like(error)
    if out.numel():
        with torch.cuda.device_of(error):
            _pixel_scale_kernel[(triton.cdiv(error.numel(), SCALE_BLOCK),)](
                error, grad, out, factor, error.numel(), BLOCK=SCALE_BLOCK, num_warps=4
            )
    return out


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    cases = []
    vectors = frozenset({"vector16"})
    for pt, ph, pw in AOT_PATCHES:
        width = pt * ph * pw * 3
        for dtype, _, config in shipped("pixel_loss", arch, dtypes=AOT_DTYPES, widths=(width,)):
            kind = pointer(dtype)
            pointers = {"prediction_ptr": kind, "error_ptr": kind, "partial_ptr": "*fp32"}
            strides = {"stride_prediction_b": "i32:16", "stride_prediction_n": "i32:16", "eps": "fp32"}
            sizes = {"PT": pt, "PH": ph, "PW": pw, "C": 3, "BLOCK_K": triton.next_power_of_2(width), "ROWS": ROWS}
            for target in (VALUES, PER_PATCH, PER_CHANNEL):
                signature, constants = {**PIXEL_SIGNATURE, **pointers, **strides}, sizes | {"TARGET": target}
                name = f"pixel_loss {dtype} {width} target {target}"
                cases.append(AotCase(_pixel_loss_kernel, signature, constants, config, vectors, name))
    warps = {"num_warps": 4}
    for dtype in AOT_DTYPES:
        pointers = {"error_ptr": pointer(dtype), "grad_ptr": "*fp32", "out_ptr": pointer(dtype)}
        scale = pointers | {"factor": "fp32", "length": "i32:16"}
        name = f"pixel_loss backward {dtype}"
        cases.append(AotCase(_pixel_scale_kernel, scale, {"BLOCK": SCALE_BLOCK}, warps, vectors, name))
    total = {"partial_ptr": "*fp32", "loss_ptr": "*fp32", "parts": "i32", "factor": "fp32"}
    cases.append(AotCase(_pixel_sum_kernel, total, {"BLOCK": 1024}, warps, frozenset(), "pixel_loss sum"))
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _loss_native(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    target: int,
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty((), dtype=torch.float32)
    error = recycled(prediction.shape if gradient else (0,), prediction.dtype)
    if not prediction.numel():
        return loss.fill_(math.nan), error
    check_rows(rows, token_count(pixels, patch))
    moments = torch.tensor([mean, std], dtype=torch.float64)
    torch.ops.cohobate_native.pixel_loss(
        prediction, pixels, rows, *patch, moments, target, eps, loss, error if gradient else None
    )
    return loss, error


def _scale_native(error: Tensor, grad: Tensor, factor: float) -> Tensor:
    out = recycled(error.shape, error.dtype)
    torch.ops.cohobate_native.pixel_scale(error, grad, factor, out)
    return out


# ---------------------------------------------------------------------------------------------------- registration


def _empty(prediction: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The loss and, where a gradient is wanted, the error."""
    return prediction.new_empty((), dtype=torch.float32), prediction.new_empty(prediction.shape if gradient else (0,))


register(
    Op(
        "pixel_loss",
        ("reference", "native", "triton"),
        pixel_loss_cost,
        {"native": native_limit, "triton": triton_limit},
    )
)

_loss_op = define(
    "pixel_loss(Tensor prediction, Tensor pixels, Tensor? rows, int[] patch, float[] mean, float[] std, int target, "
    "float eps, bool gradient, str impl) -> (Tensor, Tensor)",
    fake=lambda prediction, pixels, rows, patch, mean, std, target, eps, gradient: _empty(prediction, gradient),
    native=_loss_native,
    triton=_loss_triton,
)
_scale_op = define(
    "pixel_loss_backward(Tensor error, Tensor grad, float factor, str impl) -> Tensor",
    fake=lambda error, grad, factor: torch.empty_like(error),
    native=_scale_native,
    triton=_scale_triton,
)


class _PixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, prediction, pixels, rows, patch, mean, std, target: int, eps: float, impl: str
    ) -> Tensor:
        loss, error = _loss_op(prediction, pixels, rows, patch, mean, std, target, eps, True, impl)
        ctx.save_for_backward(error)
        ctx.impl = impl
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (error,) = ctx.saved_tensors
        scaled = _scale_op(error, grad, 2 / max(error.numel(), 1), ctx.impl)
        return scaled, None, None, None, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def pixel_loss(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    convention: str = "mae",
    normalise: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of predicted patches against the pixels themselves.

    Args:
        prediction: [B, n, pt*ph*pw*C], fp32, bf16 or fp16, each row ordered (frame, row, column, channel).
        pixels: [B, T, H, W, C] uint8; an image has T = 1.
        rows: [B, n] int32, the patches predicted, in raster order (t, y, x), each in [0, N); None means all N. On the
            CPU they are checked; on CUDA that would stop the device.
        patch: (pt, ph, pw), sizes that divide (T, H, W).
        mean, std: one value a channel, in units of [0, 1] pixels; "videomae" does not use them.
        convention: "mae" standardises a patch of normalised pixels as a whole, with eps inside the root; "videomae"
            standardises each channel of [0, 1] pixels, with eps added to the root.
        normalise: false compares with the pixels themselves.
        eps: added to the variance ("mae") or the standard deviation ("videomae").
        backend: auto (None), reference, native (fp32, bf16) or triton.

    Returns:
        0-d fp32, the mean over every value (NaN of an empty batch, whose gradient is empty). Its gradient flows to the
        prediction alone.

    Raises:
        TypeError, ValueError: a dtype, shape, size, device or backend that does not fit; the message names the
            argument.
    """
    patch, mean, std, tokens = check_patches(pixels, rows, patch, mean, std)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}; got {convention!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: expected a finite value of at least 0, got {eps}")
    count = tokens if rows is None else rows.shape[1]
    shape = (pixels.shape[0], count, math.prod(patch) * pixels.shape[-1])
    check_tensor("prediction", prediction, dtypes=(*FLOAT_DTYPES, torch.float64), shape=shape, like=pixels)
    impl = choose("pixel_loss", pixels, backend, dtype=str(prediction.dtype))
    if impl == "reference":
        return pixel_loss_reference(
            prediction,
            pixels,
            rows,
            patch=patch,
            mean=mean,
            std=std,
            convention=convention,
            normalise=normalise,
            eps=eps,
        )
    if convention == "videomae":
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    target = VALUES if not normalise else PER_PATCH if convention == "mae" else PER_CHANNEL
    dense = prediction if prediction.stride(-1) == 1 or prediction.shape[-1] == 1 else prediction.contiguous()
    pixels, rows = pixels_packed(pixels), rows_packed(rows)
    if prediction.requires_grad and torch.is_grad_enabled():
        loss: Tensor = _PixelLoss.apply(dense, pixels, rows, patch, mean, std, target, eps, impl)
        return loss
    without: Tensor = _loss_op(dense, pixels, rows, patch, mean, std, target, eps, False, impl)[0]
    return without
