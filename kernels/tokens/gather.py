"""gather_patches: uint8 pixels to normalised patch rows, of the chosen patches only.

    out[b, j, k] = (u / 255 - mean[c]) / std[c] = u scale[c] + offset[c],  scale = 1 / (255 std),   offset = -mean / std

where u is byte k of patch rows[b, j] and c = k mod C its channel. Patches are numbered in raster order (t, y, x); the
bytes of a patch are ordered (frame, row, column, channel), as MAE (He et al., CVPR 2022) flattens an image's patches.

| tensor | shape              | dtype            | strides                                                |
|--------|--------------------|------------------|--------------------------------------------------------|
| pixels | [B, T, H, W, C]    | uint8            | W and C packed; any others (else copied once)          |
| rows   | [B, n]             | int32            | last one is 1 (else copied once); None: all, in order  |
| out    | [B, n, pt*ph*pw*C] | fp32, bf16, fp16 | contiguous                                             |

Bytes: each chosen byte is read once and its value written once (:func:`gather_patches_cost`); 2 FLOPs a value. Rows are
computed independently, so the result repeats bit for bit. Against the formula above in fp32 the fused multiply-add of
the fast implementations differs in the last bit. There is no gradient: pixels are data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
Patch = tuple[int, int, int]
Channels = tuple[float, ...]


def gather_patches_reference(
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Reference of :func:`gather_patches`: every patch is normalised in fp32, then the chosen rows are taken."""
    batch, frames, height, width, channels = pixels.shape
    pt, ph, pw = patch
    scaled = pixels.float() / 255
    normal = (scaled - _filled(mean, pixels.device)) / _filled(std, pixels.device)
    tokens = (frames // pt) * (height // ph) * (width // pw)
    grid = normal.reshape(batch, frames // pt, pt, height // ph, ph, width // pw, pw, channels)
    patches = grid.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, tokens, pt * ph * pw * channels)
    if rows is not None:
        patches = patches.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return patches.to(dtype)


def _filled(values: Sequence[float], device: torch.device) -> Tensor:
    """fp32 [C], made on the device: a copy from the host would wait for it, and no CUDA graph could hold one."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def gather_patches_cost(batch: int, count: int, width: int, itemsize: int) -> Cost:
    """Floor for ``count`` rows of ``width`` = pt*ph*pw*C values a sample: bytes and int32 indices in, values out."""
    values = batch * count * width
    return Cost(bytes=values * (1 + itemsize) + batch * count * 4, flops=2 * values)


# ------------------------------------------------------------------------------------- shared with embed and pixel


def check_patches(
    pixels: Tensor, rows: Tensor | None, patch: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Patch, Channels, Channels, int]:
    """Check the arguments that every op on pixels takes; return patch, mean and std as tuples, and the token count N.

    Raises:
        TypeError, ValueError: what :func:`gather_patches` documents.
    """
    check_tensor("pixels", pixels, dtypes=(torch.uint8,), shape=(None, None, None, None, None))
    if len(patch) != 3 or any(int(p) < 1 for p in patch):
        raise ValueError(f"patch: expected three positive sizes (frames, rows, columns), got {tuple(patch)}")
    pt, ph, pw = (int(p) for p in patch)
    batch, frames, height, width, channels = pixels.shape
    if 0 in (frames, height, width, channels):
        raise ValueError(f"pixels: expected frames, height, width and channels above 0, got {list(pixels.shape)}")
    if frames % pt or height % ph or width % pw:
        raise ValueError(f"patch: expected sizes that divide {frames}x{height}x{width} pixels, got {pt}x{ph}x{pw}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} values, one a channel of pixels, got {len(values)}")
    scales = tuple(float(value) for value in std)
    if any(not math.isfinite(value) or value <= 0 for value in scales):
        raise ValueError(f"std: expected positive values, got {scales}")
    if rows is not None:
        check_tensor("rows", rows, dtypes=(torch.int32,), shape=(batch, None), like=pixels)
    tokens = (frames // pt) * (height // ph) * (width // pw)
    return (pt, ph, pw), tuple(float(value) for value in mean), scales, tokens


def pixels_packed(pixels: Tensor) -> Tensor:
    """The pixels with width and channels packed, which is how the kernels read them: copied only where they are not."""
    channels = pixels.shape[-1]
    packed = (pixels.stride(-1) == 1 or channels == 1) and (pixels.stride(-2) == channels or pixels.shape[-2] == 1)
    return pixels if packed else pixels.contiguous()


def rows_packed(rows: Tensor | None) -> Tensor | None:
    """The row indices with a last stride of 1, copied only where it is not."""
    return rows if rows is None or rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def check_rows(rows: Tensor | None, tokens: int) -> None:
    """Refuse rows outside [0, tokens) on the CPU, where reading them costs nothing.

    Raises:
        ValueError: a row that does not exist.
    """
    if rows is None or not rows.numel():
        return
    sample = torch.ops.cohobate_native.row_outside(rows, tokens)
    if sample >= 0:
        low, high = (int(bound) for bound in rows[sample].aminmax())
        raise ValueError(f"rows: expected values in [0, {tokens}), got {low} to {high} in sample {sample}")


def native_limit(dtype: str) -> list[str]:
    """Why the C++ kernels cannot compute in ``dtype``."""
    return (
        [] if dtype in ("torch.float32", "torch.bfloat16") else [f"native computes float32 and bfloat16, not {dtype}"]
    )


def triton_limit(dtype: str) -> list[str]:
    """Why the Triton kernels cannot compute in ``dtype``."""
    return [] if dtype in map(str, FLOAT_DTYPES) else [f"triton computes float32, bfloat16 and float16, not {dtype}"]


@functools.lru_cache(maxsize=64)
def channel_affine(mean: Channels, std: Channels, device: torch.device) -> Tensor:
    """fp32 [2, C] on ``device``: scale over offset. Kept, so that a step copies nothing from the host."""
    table = [[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]]
    return torch.tensor(table, dtype=torch.float64).to(torch.float32).to(device)


@jit
def chosen_patch(rows_ptr, sample, j, stride_rows_b):  # type: ignore[no-untyped-def]
    """int32 number of the patch that output row (sample, j) reads; scalars or blocks."""
    if rows_ptr is None:
        patch = j.to(tl.int32)
    else:
        patch = tl.load(rows_ptr + sample.to(tl.int64) * stride_rows_b + j)
    return patch


@jit
def patch_offset(  # type: ignore[no-untyped-def]
    patch, sample, stride_b, stride_t, stride_h, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """int64 offset of the first byte of a patch."""
    x = (patch % grid_w).to(tl.int64)
    y = (patch // grid_w % grid_h).to(tl.int64)
    t = (patch // grid_w // grid_h).to(tl.int64)
    return sample.to(tl.int64) * stride_b + t * PT * stride_t + y * PH * stride_h + x * (PW * C)


@jit
def byte_offset(k, stride_t, stride_h, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offset of byte k of a patch from its first byte."""
    strip = (k // (PW * C)).to(tl.int64)
    return strip // PH * stride_t + strip % PH * stride_h + k % (PW * C)


# ---------------------------------------------------------------------------------------------------------- Triton


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    pixels_ptr, rows_ptr, affine_ptr, out_ptr, count, total,
    stride_b, stride_t, stride_h, stride_rows_b, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program writes ROWS output rows with the same scales and offsets in its registers."""
    K: tl.constexpr = PT * PH * PW * C
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    scale = tl.load(affine_ptr + k % C)
    offset = tl.load(affine_ptr + C + k % C)
    byte = byte_offset(k, stride_t, stride_h, PH, PW, C)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in tl.static_range(ROWS):
        row = first + i
        mask = inside & (row < total)
        sample = tl.minimum(row, total - 1) // count
        patch = chosen_patch(rows_ptr, sample, tl.minimum(row, total - 1) % count, stride_rows_b)
        start = patch_offset(patch, sample, stride_b, stride_t, stride_h, grid_h, grid_w, PT, PH, PW, C)
        value = tl.load(pixels_ptr + start + byte, mask=mask, other=0).to(tl.float32) * scale + offset
        tl.store(out_ptr + row * K + k, value, mask=mask)


def _gather_triton(
    pixels: Tensor,
    rows: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    out, (pt, ph, pw) = pixels.new_empty(_shape(pixels, rows, patch), dtype=dtype), patch
    batch, count, width = out.shape
    if out.numel():
        affine = channel_affine(tuple(mean), tuple(std), pixels.device)
        config = tuning.lookup("gather_patches", str(dtype), width, count, architecture(pixels.device))
        with torch.cuda.device_of(pixels):
            _gather_kernel[(triton.cdiv(batch * count, config["ROWS"]),)](
                pixels, rows, affine, out, count, batch * count, pixels.stride(0), pixels.stride(1), pixels.stride(2),
                0 if rows is None else rows.stride(0), pixels.shape[2] // ph, pixels.shape[3] // pw,
                PT=pt, PH=ph, PW=pw, C=pixels.shape[4], BLOCK_K=triton.next_power_of_2(width), **config,
            )  # fmt: skip
    return out


PIXEL_SIGNATURE = {
    "pixels_ptr": "*u8", "rows_ptr": "*i32", "affine_ptr": "*fp32", "count": "i32", "total": "i32",
    "stride_b": "i32:16", "stride_t": "i32:16", "stride_h": "i32:16",
    "stride_rows_b": "i32", "grid_h": "i32", "grid_w": "i32",
}  # fmt: skip
AOT_PATCHES = ((1, 16, 16), (2, 16, 16))  # an image's patch, a clip's tubelet
AOT_DTYPES = (torch.float32, torch.bfloat16)


def aot_cases(arch: str) -> list[AotCase]:
    """The kernel as the launcher above calls it, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    cases = []
    for pt, ph, pw in AOT_PATCHES:
        width = pt * ph * pw * 3
        for dtype, _, config in shipped("gather_patches", arch, dtypes=AOT_DTYPES, widths=(width,)):
            sizes = {"PT": pt, "PH": ph, "PW": pw, "C": 3, "BLOCK_K": triton.next_power_of_2(width)}
            signature = {**PIXEL_SIGNATURE, "out_ptr": pointer(dtype)}
            name = f"gather_patches {dtype} {width}"
            cases.append(AotCase(_gather_kernel, signature, sizes, config, frozenset({"store16"}), name))
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def gather_native(
    pixels: Tensor,
    rows: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    out, (pt, ph, pw) = recycled(_shape(pixels, rows, patch), dtype), patch
    check_rows(rows, token_count(pixels, patch))
    if out.numel():
        affine = channel_affine(tuple(mean), tuple(std), pixels.device)
        torch.ops.cohobate_native.gather_patches(pixels, rows, pt, ph, pw, affine, out)
    return out


# ---------------------------------------------------------------------------------------------------- registration


def token_count(pixels: Tensor, patch: Sequence[int]) -> int:
    """N, the patches of a sample."""
    return (pixels.shape[1] // patch[0]) * (pixels.shape[2] // patch[1]) * (pixels.shape[3] // patch[2])


def _shape(pixels: Tensor, rows: Tensor | None, patch: Sequence[int]) -> tuple[int, int, int]:
    """[B, n, pt*ph*pw*C] of the result."""
    count = token_count(pixels, patch) if rows is None else rows.shape[1]
    return pixels.shape[0], count, math.prod(patch) * pixels.shape[4]


register(
    Op(
        "gather_patches",
        ("reference", "native", "triton"),
        gather_patches_cost,
        {"native": native_limit, "triton": triton_limit},
    )
)

_gather_op = define(
    "gather_patches(Tensor pixels, Tensor? rows, int[] patch, float[] mean, float[] std, ScalarType dtype, str impl) "
    "-> Tensor",
    fake=lambda pixels, rows, patch, mean, std, dtype: pixels.new_empty(_shape(pixels, rows, patch), dtype=dtype),
    native=gather_native,
    triton=_gather_triton,
)


# ---------------------------------------------------------------------------------------------------------- public


def gather_patches(
    pixels: Tensor,
    rows: Tensor | None,
    *,
    patch: Patch,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Normalise and flatten the chosen patches of uint8 pixels: ``(u / 255 - mean) / std``.

    Args:
        pixels: [B, T, H, W, C] uint8; an image has T = 1.
        rows: [B, n] int32, patches in raster order (t, y, x), each in [0, N); None takes all N. On the CPU they are
            checked; on CUDA that would stop the device.
        patch: (pt, ph, pw), sizes that divide (T, H, W).
        mean, std: one value a channel, in units of [0, 1] pixels.
        dtype: of the result; the arithmetic is fp32.
        backend: auto (None), reference, native (fp32, bf16) or triton.

    Returns:
        [B, n, pt*ph*pw*C] in ``dtype``, each row ordered (frame, row, column, channel). It carries no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, size, device or backend that does not fit; the message names the
            argument.
    """
    patch, mean, std, _ = check_patches(pixels, rows, patch, mean, std)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point type, got {str(dtype).removeprefix('torch.')}")
    impl = choose("gather_patches", pixels, backend, dtype=str(dtype))
    if impl == "reference":
        return gather_patches_reference(pixels, rows, patch=patch, mean=mean, std=std, dtype=dtype)
    out: Tensor = _gather_op(pixels_packed(pixels), rows_packed(rows), patch, mean, std, dtype, impl)
    return out
