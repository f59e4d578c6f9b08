"""quantise_fp8 and dequantise_fp8: a tensor as float8 e4m3 with a static scale, and back.

    quantise     out = e4m3(clamp(x * (1 / scale), -448, 448))        dequantise   out = x * scale

The product is fp32, the reciprocal is taken once (in fp64, then rounded to fp32), so that every implementation rounds
the same number; e4m3 rounds to nearest even, keeps NaN and has no infinity. Source: Micikevicius et al., "FP8 formats
for deep learning" (arXiv 2209.05433), e4m3. The scale is a Python number because a frozen model's scales are calibrated
once: nothing reads the device.

| tensor     | shape    | dtype                             | strides                      |
|------------|----------|-----------------------------------|------------------------------|
| x, wide    | [..., D] | fp32, bf16, fp16 (fp64: reference)| rows alike, else copied once |
| x, as fp8  | [..., D] | float8_e4m3fn                     | rows alike, else copied once |

No gradient. Elementwise, so results repeat bit for bit. Floor: :func:`quantise_cost`. Triton converts in
hardware from compute capability 8.9 on, and with integers before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.tokens.rows import FLOAT_DTYPES
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def quantise_fp8_reference(x: Tensor, scale: float) -> Tensor:
    """Reference of :func:`quantise_fp8`."""
    return (x.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(FP8)


def dequantise_fp8_reference(x: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reference of :func:`dequantise_fp8`."""
    return (x.float() * scale).to(dtype)


def quantise_cost(values: int, itemsize: int) -> Cost:
    """Floor of either direction: ``values`` numbers of ``itemsize`` bytes on one side, of one byte on the other."""
    return Cost(bytes=values * (itemsize + 1), flops=values)


# ---------------------------------------------------------------------------------------------------------- Triton

BLOCK = 1024  # columns of a tile


@jit
def to_fp8(value, inverse, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 values times ``inverse`` as the bytes of e4m3, saturating; NaN stays NaN."""
    value = value * inverse
    value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    if HARDWARE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = value.to(tl.uint32, bitcast=True)
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    # Adding 2^14 leaves multiples of 2^-9 in the lowest bits, which is how numbers below 2^-6 are stored.
    small = (tl.abs(value) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    found = tl.where(size > 0x7F800000, 0x7F, tl.where(size < 0x3C800000, small, normal))
    return (found | (sign >> 24)).to(tl.uint8)


@jit
def from_fp8(byte, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes of e4m3 as fp32."""
    if HARDWARE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    bits = byte.to(tl.uint32)
    sign, size = (bits & 0x80) << 24, bits & 0x7F
    small = (size.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)
    found = tl.where(size == 0x7F, 0x7FC00000, tl.where(size < 8, small, (size << 20) + 0x3C000000))
    return (found | sign).to(tl.float32, bitcast=True)


def converts_in_hardware(device: torch.device) -> bool:
    """Whether the card of ``device`` has e4m3 conversions; elsewhere, and interpreted, integers do the same."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@jit
def _quantise_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, inverse, stride_x, HARDWARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program converts one row."""
    row = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        value = tl.load(x_ptr + row * stride_x + columns, mask=columns < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + columns, to_fp8(value, inverse, HARDWARE), mask=columns < D)


@jit
def _dequantise_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, scale, stride_x, HARDWARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program converts one row."""
    row = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        byte = tl.load(x_ptr + row * stride_x + columns, mask=columns < D, other=0)
        value = from_fp8(byte, HARDWARE) * scale
        tl.store(out_ptr + row * D + columns, value.to(out_ptr.dtype.element_ty), mask=columns < D)


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), BLOCK)


def _quantise_triton(x: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format)
    rows, width = x.shape
    if out.numel():
        config = tuning.lookup("quantise_fp8", str(x.dtype), width, rows, architecture(x.device))
        with torch.cuda.device_of(x):
            _quantise_kernel[(rows,)](
                x, out.view(torch.uint8), 1 / scale, x.stride(0), HARDWARE=converts_in_hardware(x.device), D=width,
                BLOCK_D=_block(width), **config,
            )  # fmt: skip
    return out


def _dequantise_triton(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rows, width = x.shape
    if out.numel():
        config = tuning.lookup("dequantise_fp8", str(dtype), width, rows, architecture(x.device))
        with torch.cuda.device_of(x):
            _dequantise_kernel[(rows,)](
                x.view(torch.uint8), out, scale, x.stride(0), HARDWARE=converts_in_hardware(x.device), D=width,
                BLOCK_D=_block(width), **config,
            )  # fmt: skip
    return out


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    return [
        AotCase(
            kernel=kernel,
            signature={
                "x_ptr": pointer(dtype) if op == "quantise_fp8" else "*u8",
                "out_ptr": "*u8" if op == "quantise_fp8" else pointer(dtype),
                "inverse" if op == "quantise_fp8" else "scale": "fp32",
                "stride_x": "i32:16",
            },
            constexprs={"HARDWARE": architecture != "sm80", "D": width, "BLOCK_D": _block(width)},
            config=config,
            expects=frozenset({"load16" if op == "quantise_fp8" else "store16"}),
            name=f"{dtype} {width}",
        )
        for op, kernel in (("quantise_fp8", _quantise_kernel), ("dequantise_fp8", _dequantise_kernel))
        for dtype, width, config in shipped(op, architecture, dtypes=FLOAT_DTYPES, widths=(768,))
    ]


# ---------------------------------------------------------------------------------------------------------- native


def _quantise_native(x: Tensor, scale: float) -> Tensor:
    out = recycled(x.shape, torch.uint8)
    torch.ops.cohobate_native.quantise_fp8(x, 1 / scale, out)
    return out.view(FP8)


def _dequantise_native(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    out = recycled(x.shape, dtype)
    torch.ops.cohobate_native.dequantise_fp8(x.view(torch.uint8), scale, out)
    return out


# ---------------------------------------------------------------------------------------------------- registration


def dtype_reasons(implementation: str, known: Sequence[torch.dtype], dtypes: Sequence[torch.dtype]) -> list[str]:
    """One reason for each of ``dtypes`` that the implementation does not know; for the limits of an op."""
    names = ", ".join(str(dtype) for dtype in known).replace("torch.", "")
    return [
        f"{implementation} computes in {names}, not {str(dtype).removeprefix('torch.')}"
        for dtype in dict.fromkeys(dtypes)
        if dtype not in known
    ]


def _native_limit(*, dtypes: Sequence[torch.dtype]) -> list[str]:
    return dtype_reasons("native", NATIVE_DTYPES, dtypes)


def _triton_limit(*, dtypes: Sequence[torch.dtype]) -> list[str]:
    return dtype_reasons("triton", FLOAT_DTYPES, dtypes)


LIMITS: dict[str, Callable[..., list[str]]] = {"native": _native_limit, "triton": _triton_limit}

register(Op("quantise_fp8", ("reference", "native", "triton"), quantise_cost, LIMITS))
register(Op("dequantise_fp8", ("reference", "native", "triton"), quantise_cost, LIMITS))

_quantise_op = define(
    "quantise_fp8(Tensor x, float scale, str impl) -> Tensor",
    fake=lambda x, scale: torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format),
    native=_quantise_native,
    triton=_quantise_triton,
)
_dequantise_op = define(
    "dequantise_fp8(Tensor x, float scale, ScalarType dtype, str impl) -> Tensor",
    fake=lambda x, scale, dtype: torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
    native=_dequantise_native,
    triton=_dequantise_triton,
)


# ---------------------------------------------------------------------------------------------------------- public


def quantise_fp8(x: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """Quantise with a static scale: ``e4m3(x / scale)``, saturating at 448, to nearest even.

    Args:
        x: [..., D], fp32, bf16 or fp16 (fp64: reference).
        scale: what one unit of the result stands for; a number above 0.
        backend: auto (None), reference, native or triton.

    Returns:
        float8_e4m3fn in x's shape, contiguous, without gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, scale or backend that does not fit; the message names the argument.
    """
    check_tensor("x", x, dtypes=(*FLOAT_DTYPES, torch.float64))
    check_scale(scale)
    impl = choose("quantise_fp8", x, backend, dtypes=(x.dtype,))
    if impl == "reference":
        return quantise_fp8_reference(x.detach(), scale)
    out: Tensor = _quantise_op(as_rows(x.detach()), float(scale), impl)
    return out.view(x.shape)


def dequantise_fp8(
    x: Tensor, scale: float, *, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> Tensor:
    """Undo :func:`quantise_fp8` up to its rounding: ``x * scale``.

    Args:
        x: [..., D] float8_e4m3fn.
        scale: as it was given to :func:`quantise_fp8`.
        dtype: of the result: float32, bfloat16 or float16 (float64: reference).
        backend: auto (None), reference, native or triton.

    Returns:
        ``dtype`` in x's shape, contiguous.

    Raises:
        TypeError, ValueError: a dtype, shape, scale or backend that does not fit; the message names the argument.
    """
    check_tensor("x", x, dtypes=(FP8,))
    check_scale(scale)
    check_dtype(dtype)
    impl = choose("dequantise_fp8", x, backend, dtypes=(dtype,))
    if impl == "reference":
        return dequantise_fp8_reference(x, scale, dtype)
    out: Tensor = _dequantise_op(as_rows(x), float(scale), dtype, impl)
    return out.view(x.shape)


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] with adjacent values in a row; a copy only where no view can do it."""
    width = x.shape[-1] if x.dim() else 1
    rows = x.reshape(math.prod(x.shape[:-1]), width)
    return rows if rows.stride(1) == 1 or width <= 1 else rows.contiguous()


def check_scale(scale: float) -> None:
    """Raise unless ``scale`` is a finite number above 0."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(
            f"scale: expected a number (a static scale is not read from a device), got {type(scale).__name__}"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")


def check_dtype(dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` is one that a result may have."""
    if dtype not in (*FLOAT_DTYPES, torch.float64):
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
