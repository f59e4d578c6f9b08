"""quantise_fp8 and dequantise_fp8: every rounding case is torch's own cast, in every implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.transformer.fp8 import FP8, dequantise_fp8, quantise_cost, quantise_fp8

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]
HALF = {"native": (torch.bfloat16,), "triton": (torch.float16, torch.bfloat16), "reference": (torch.bfloat16,)}


def every_rounding_case() -> Tensor:
    """fp32 [., 768]: each upper half of the bits with lower halves at, beside and between the ties; inf and nan too."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = (upper[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32).view(-1, 768)


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    """Equal as they are stored, all NaN alike."""
    nan = expected.float().isnan()
    same = (found.view(torch.uint8) == expected.view(torch.uint8)) | (nan & found.float().isnan())
    return found.dtype == expected.dtype == FP8 and bool(same.all())


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rounds_as_torch_does(backend: str) -> None:
    x = every_rounding_case()
    assert same_bytes(quantise_fp8(x, 1.0, backend=backend), x.clamp(-448, 448).to(FP8))
    for dtype in HALF[backend]:
        y = x[:, ::6].to(dtype)
        assert same_bytes(quantise_fp8(y, 1.0, backend=backend), y.float().clamp(-448, 448).to(FP8))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_saturates_and_keeps_nan(backend: str) -> None:
    x = torch.tensor([448.0, 449.0, 465.0, 1e9, float("inf"), -1e9, float("-inf"), float("nan"), 2.0**-10, 2.0**-9])
    found = quantise_fp8(x, 1.0, backend=backend).float()
    expected = torch.tensor([448.0, 448, 448, 448, 448, -448, -448, float("nan"), 0, 2.0**-9])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_reads_every_byte(backend: str) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(FP8).view(4, 64)
    for dtype in (torch.float32, *HALF[backend]):
        found = dequantise_fp8(x, 0.5, dtype=dtype, backend=backend)
        assert found.dtype == dtype
        torch.testing.assert_close(found, (x.float() * 0.5).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    width=st.sampled_from([1, 3, 16, 33, 1030]),
    kind=st.sampled_from(["packed", "sliced", "transposed", "expanded"]),
    scale=st.floats(1e-4, 1e4),
    seed=st.integers(0, 99),
)
def test_scales_any_shape_and_strides(
    backend: str, shape: list[int], width: int, kind: str, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*shape, width + 3) * scale * 100
    x = x[..., 1:-2] if kind == "sliced" else x[..., :width].contiguous()
    if kind == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1)
    if kind == "expanded":
        x = x[None].expand(3, *x.shape)
    found = quantise_fp8(x, scale, backend=backend)
    assert found.shape == x.shape and found.is_contiguous()
    # The product with the reciprocal of the scale: the definition, not a division.
    assert same_bytes(found, (x * torch.tensor(1 / scale)).clamp(-448, 448).to(FP8))
    back = dequantise_fp8(found, scale, backend=backend)
    # e4m3 has 3 bits after the leading one, and steps of 2^-9 below 2^-6.
    inside = x.abs() <= 448 * scale
    assert ((back - x).abs() <= x.abs() * (2**-4 + 1e-6) + 2**-10 * scale)[inside].all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    found = quantise_fp8(torch.zeros(shape), 1.0, backend=backend)
    assert found.shape == shape and found.dtype == FP8
    assert dequantise_fp8(found, 1.0, backend=backend).shape == shape


def test_fp64_runs_as_the_reference() -> None:
    x = torch.linspace(-500, 500, 99, dtype=torch.float64)
    assert same_bytes(quantise_fp8(x, 2.0), quantise_fp8(x.float(), 2.0, backend="reference"))
    assert dequantise_fp8(quantise_fp8(x, 2.0), 2.0, dtype=torch.float64).amax() == 512  # 250 is nearest to 256


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck() -> None:
    ops, x = torch.ops.cohobate, torch.randn(6, 8)
    torch.library.opcheck(ops.quantise_fp8.default, (x, 0.1, "native"))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # the schema's multiplies x
    torch.library.opcheck(ops.dequantise_fp8.default, (x.to(FP8), 0.1, torch.bfloat16, "native"), test_utils=checks)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_gives_the_same(backend: str) -> None:
    def call(x: Tensor) -> Tensor:
        return dequantise_fp8(quantise_fp8(x * 2, 0.25, backend=backend), 0.25, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 7):  # sizes that change become symbolic
        x = torch.randn(rows, 12)
        assert torch.equal(compiled(x), call(x))


def test_cost_counts_both_sides_once() -> None:
    assert quantise_cost(100, 2).bytes == 300


X = torch.zeros(2, 3)
BAD = [
    (lambda: quantise_fp8(X.int(), 1.0), TypeError, "x: expected dtype .*, got int32"),
    (lambda: quantise_fp8([1.0], 1.0), TypeError, "x: expected a tensor, got list"),  # type: ignore[arg-type]
    (lambda: quantise_fp8(X, -1.0), ValueError, "scale: expected a finite number above 0, got -1.0"),
    (lambda: quantise_fp8(X, float("nan")), ValueError, "scale: expected a finite number above 0, got nan"),
    (lambda: quantise_fp8(X, X), TypeError, "scale: expected a number .*, got Tensor"),  # type: ignore[arg-type]
    (lambda: dequantise_fp8(X, 1.0), TypeError, "x: expected dtype float8_e4m3fn, got float32"),
    (lambda: dequantise_fp8(X.to(FP8), 1.0, dtype=FP8), TypeError, "dtype: expected float32, .*, got .*e4m3fn"),
    (lambda: quantise_fp8(X.half(), 1.0, backend="native"), ValueError, "backend: 'native' cannot run .*, not float16"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[row[2][:30] for row in BAD])
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        call()  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(dtype: torch.dtype) -> None:
    x = every_rounding_case().to(dtype).cuda()
    found = quantise_fp8(x, 1.0, backend="triton")
    assert same_bytes(found, x.float().clamp(-448, 448).to(FP8))
    again = dequantise_fp8(found, 3.0, dtype=dtype, backend="triton")
    torch.testing.assert_close(again, (found.float() * 3.0).to(dtype), rtol=0, atol=0, equal_nan=True)
