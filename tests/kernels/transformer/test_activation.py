"""bias_gelu against its formula in float64, forward and backward, in every implementation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.transformer.activation import bias_gelu, bias_gelu_cost, bias_gelu_fp8
from cohobate.kernels.transformer.fp8 import FP8, quantise_fp8

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]
HALF = {"native": torch.bfloat16, "triton": torch.float16, "reference": torch.bfloat16}  # interpreted bf16 truncates
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}  # half the smallest number above 0


def literal(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    v = x if bias is None else x + bias
    if approximate == "none":
        return v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))
    return v * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    bias: bool
    approximate: str
    kind: str
    half: bool
    seed: int


cases = st.builds(
    Case,
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=2).flatmap(
        lambda rows: st.sampled_from([1, 3, 16, 33, 1030]).map(lambda width: (*rows, width))
    ),
    bias=st.booleans(),
    approximate=st.sampled_from(["none", "tanh"]),
    kind=st.sampled_from(["packed", "sliced", "expanded", "columns"]),
    half=st.booleans(),
    seed=st.integers(0, 999),
)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(case.seed)
    if case.kind == "sliced":
        x = (torch.randn(*case.shape[:-1], case.shape[-1] + 3) * 3).to(dtype)[..., 1:-2]
    elif case.kind == "expanded":
        x = (torch.randn(case.shape) * 3).to(dtype)[None].expand(2, *case.shape)
    elif case.kind == "columns":
        x = (torch.randn(case.shape[-1], *case.shape[:-1]) * 3).to(dtype).movedim(0, -1)
    else:
        x = (torch.randn(case.shape) * 3).to(dtype)
    return x, torch.randn(case.shape[-1]) if case.bias else None


def check(case: Case, backend: str) -> None:
    dtype = HALF[backend] if case.half else torch.float32
    x, bias = inputs(case, dtype)
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out = bias_gelu(leaves[0], leaves[1] if case.bias else None, approximate=case.approximate, backend=backend)
    truth = literal(exact[0], exact[1] if case.bias else None, case.approximate)
    assert out.dtype == dtype and out.shape == x.shape
    assert out.is_contiguous() or backend == "reference"
    sizes = x.detach().double().abs() + 4  # of x and the bias
    # v is rounded once, its share (at most 1) errs by a few roundings of fp32, the result is rounded once.
    bound = 12 * ROUNDOFF[torch.float32] * sizes + TINY[dtype]
    assert ((out - truth).abs() <= bound + ROUNDOFF[dtype] * truth.abs()).all()

    grad = torch.randn(x.shape).to(dtype)
    found, expected = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(truth, exact, grad.double())
    assert [t.dtype for t in found] == [t.dtype for t in leaves]
    bound = 12 * ROUNDOFF[torch.float32] * sizes * grad.double().abs() + TINY[dtype]
    assert ((found[0] - expected[0]).abs() <= bound + ROUNDOFF[dtype] * expected[0].abs()).all()
    if case.bias:
        rows = x.numel() // x.shape[-1]
        terms = rows * ROUNDOFF[torch.float32] * grad.double().abs().reshape(rows, -1).sum(0) * 1.2
        assert ((found[1] - expected[1]).abs() <= bound.reshape(rows, -1).sum(0) + terms).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases)
def test_computes_the_formula(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_more_rows_than_one_chunk(backend: str, approximate: str) -> None:
    check(Case((2, 70, 40), True, approximate, "sliced", True, 1), backend)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(approximate: str) -> None:
    torch.manual_seed(2)
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,)))
    torch.autograd.gradcheck(lambda x, b: bias_gelu(x, b, approximate=approximate), (x, bias))
    torch.testing.assert_close(
        bias_gelu(x, bias, approximate=approximate), literal(x, bias, approximate), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_whole_range(backend: str, approximate: str) -> None:
    x = torch.cat([torch.linspace(-15, 15, 30001), torch.tensor([0.0, -0.0, 3e2, -3e2, 1e18, -1e18])])
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, truth = bias_gelu(leaf, approximate=approximate, backend=backend), literal(exact, None, approximate)
    # A share errs by 4 roundings; the literal formula in fp32 errs by 6 on the same points.
    assert ((out - truth).abs() <= 4 * 2**-24 * x.abs()).all()
    (slope,), (expected,) = torch.autograd.grad(out.sum(), leaf), torch.autograd.grad(truth.sum(), exact)
    assert (slope - expected).abs().max() <= 12 * 2**-24
    special = torch.tensor([float("inf"), float("nan")])
    found = bias_gelu(special, approximate=approximate, backend=backend)
    assert found[0] == float("inf") and found[1].isnan()


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_keeps_the_digits_of_the_tail() -> None:
    x = torch.linspace(-8, -1, 7001)
    v = x.double()
    truth = v * 0.5 * torch.special.erfc(-v / math.sqrt(2))
    # exp(-v^2 / 2) at v = -8 turns the rounding of its argument, 32, into 32 roundings.
    assert ((bias_gelu(x, backend="native") - truth).abs() / truth.abs()).max() < 40 * 2**-24


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_bf16_at_every_number() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()].requires_grad_()
    v = x.detach().double()
    share = torch.special.erfc(-v / math.sqrt(2)) / 2
    slope = share + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    out = bias_gelu(x, backend="native")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    # What kernels/csrc/gelu.h states, and rounding; below -5 the result is that at -5.
    assert ((out - v * share).abs() <= 4e-6 + (2**-8 + 8e-7) * (v * share).abs()).all()
    assert ((grad - slope).abs() <= 4e-6 + 2**-8 * slope.abs()).all()
    found = bias_gelu(torch.tensor([float("inf"), float("nan")]).bfloat16(), backend="native")
    assert found[0] == float("inf") and found[1].isnan()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    out = bias_gelu(x, bias, backend=backend)
    out.sum().backward()
    assert x.grad is not None and out.shape == x.grad.shape == shape
    assert bias.grad is not None and torch.equal(bias.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("backend", FAST)
def test_gradients_that_nobody_wants_are_not_made(backend: str) -> None:
    x, bias = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    bias_gelu(x.detach(), bias, backend=backend).sum().backward()
    assert x.grad is None and bias.grad is not None
    bias.grad = None
    bias_gelu(x, bias.detach(), backend=backend).sum().backward()  # the gradient of a sum is one expanded number
    assert x.grad is not None and bias.grad is None
    with torch.no_grad():
        assert not bias_gelu(x, bias, backend=backend).requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_repeats_bit_for_bit_whatever_the_threads(backend: str) -> None:
    torch.manual_seed(3)
    x, bias = torch.randn(130, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            out = bias_gelu(x, bias, backend=backend)
            results.append((out, *torch.autograd.grad(out.sin().sum(), (x, bias))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_fp8_is_the_quantised_result(backend: str, approximate: str) -> None:
    torch.manual_seed(4)
    x, bias = torch.randn(4, 9, 48) * 4, torch.randn(48)
    for scale in (0.02, 0.5):
        found = bias_gelu_fp8(x, bias, scale, approximate=approximate, backend=backend)
        wide = bias_gelu(x, bias, approximate=approximate, backend=backend)
        expected = quantise_fp8(wide, scale, backend="reference")
        assert found.dtype == FP8 and found.shape == x.shape
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck() -> None:
    ops, x, bias = torch.ops.cohobate, torch.randn(6, 8), torch.randn(8)
    torch.library.opcheck(ops.bias_gelu.default, (x, bias, False, 1.0, torch.float32, "native"))
    torch.library.opcheck(ops.bias_gelu.default, (x.bfloat16(), None, True, 0.1, FP8, "native"))
    for wants_bias in (True, False):
        torch.library.opcheck(ops.bias_gelu_backward.default, (x, x, bias, False, wants_bias, "native"))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_gives_the_same(backend: str, compiler: str) -> None:
    def call(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x * 2, bias, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for batch, length in ((2, 12), (3, 15), (4, 18)) if compiler == "aot_eager" else ((2, 12),):
        results = []
        for function in (call, compiled):
            torch.manual_seed(5)
            leaves = [torch.randn(batch, length, 8, requires_grad=True), torch.randn(8, requires_grad=True)]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, other in zip(*results):  # inductor may fuse a multiply and an add, and has an erf of its own
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-5)


def test_cost_counts_each_tensor_once() -> None:
    assert bias_gelu_cost(10, 8, 2).bytes == 320
    assert bias_gelu_cost(10, 8, 2, out_itemsize=1).bytes == 240
    assert bias_gelu_cost(10, 8, 2, backward=True).bytes == 480


X, D = torch.zeros(2, 3, 4), torch.zeros(4)
BAD = [
    ((X.int(),), {}, TypeError, "x: expected dtype .*, got int32"),
    ((torch.tensor(1.0),), {}, ValueError, r"x: expected shape \[..., D\], got \[\]"),
    ((X, D[:3]), {}, ValueError, r"bias: expected shape \[4\], got \[3\]"),
    ((X, D.to("meta")), {}, ValueError, "bias: expected device cpu, got meta"),
    ((X,), {"approximate": "fast"}, ValueError, "approximate: expected none or tanh, got 'fast'"),
    ((X, D.double()), {"backend": "native"}, ValueError, "backend: 'native' cannot run .*, not float64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[row[3][:28] for row in BAD])
def test_bad_input_is_named(
    arguments: tuple[Tensor, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        bias_gelu(*arguments, **options)  # type: ignore[arg-type]


def test_bad_scale_is_named() -> None:
    with pytest.raises(ValueError, match=r"^scale: expected a finite number above 0, got inf$"):
        bias_gelu_fp8(X, D, float("inf"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gpu(dtype: torch.dtype, approximate: str) -> None:
    for shape in ((8, 197, 3072), (3, 9, 33), (5000, 64)):
        torch.manual_seed(6)
        x, bias, grad = (torch.randn(s).cuda() for s in (shape, shape[-1:], shape))
        results = []
        for backend in ("triton", "triton", "reference"):
            leaves = [x.to(dtype).requires_grad_(), bias.clone().requires_grad_()]
            out = bias_gelu(*leaves, approximate=approximate, backend=backend)
            grads = torch.autograd.grad(out, leaves, grad.to(dtype))
            results.append(
                (out, *grads, bias_gelu_fp8(*leaves, 0.01, approximate=approximate, backend=backend).float())
            )
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))  # repeats bit for bit
        for found, expected in zip(results[0], results[2]):
            relative = (found.double() - expected.double()).norm() / expected.double().norm()
            assert relative < (1e-2 if dtype != torch.float32 else 2e-3)  # 2e-3: a value in e4m3 that rounds otherwise
