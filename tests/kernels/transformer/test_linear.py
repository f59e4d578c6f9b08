"""linear: the product of a bf16 input and fp32 parameters, forward and backward, and the product packed once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import why_not
from cohobate.kernels.transformer import linear
from cohobate.kernels.transformer.linear import PackedLinear, is_fast, linear_cost, reads_shadow

FACTS = {"x": torch.bfloat16, "weight": torch.float32, "even": True}
REASONS = why_not("linear", "native", "cpu", **FACTS)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS)))
fast_only = pytest.mark.skipif(not is_fast(), reason="; ".join(REASONS) or "not the fastest here")
# One rounding to bf16 is at most 2^-8 of a value; the reference rounds once more where it adds the bias in bf16.
ROUNDED = 2**-8


def inputs(rows: int, width: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and grad in bf16, weight and bias in fp32."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, width), (outputs, width), (outputs,), (rows, outputs))
    )
    return x.bfloat16(), weight, bias, grad.bfloat16()


def error(got: Tensor, right: Tensor) -> float:
    assert got.shape == right.shape and bool(got.isfinite().all())
    return float((got.double() - right).norm() / right.norm().clamp_min(1e-300))


def results(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, backend: str | None) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in (x, weight, bias) if value is not None]
    out = linear(leaves[0], leaves[1], leaves[2] if bias is not None else None, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.integers(1, 70), width=st.integers(1, 120), outputs=st.integers(1, 120), has_bias=st.booleans())
def test_against_float64(backend: str, rows: int, width: int, outputs: int, has_bias: bool) -> None:
    """Every size that leaves part of a tile, a panel or a pair over; sizes of the weight are even."""
    x, weight, bias, grad = inputs(rows, 2 * width, 2 * outputs)
    shift = bias if has_bias else None
    got = results(x, weight, shift, grad, backend)
    rounded = weight.bfloat16().double()
    added = bias.double() if backend == "native" else bias.bfloat16().double()
    right = [x.double() @ rounded.T + (added if has_bias else 0), grad.double() @ rounded, grad.double().T @ x.double()]
    right += [grad.double().sum(0)] if has_bias else []
    # The native gradients of weight and bias leave the accumulators as they are: fp32 sums of a hundred products.
    limits = [ROUNDED, ROUNDED, *([1e-6, 1e-6] if backend == "native" else [ROUNDED, ROUNDED])]
    for value, answer, limit in zip(got, right, limits, strict=False):
        assert error(value, answer) <= limit


@fast_only
def test_large_products_cross_every_block() -> None:
    """More rows than a task takes, more columns than a panel, more depth than is packed together."""
    x, weight, bias, grad = inputs(611, 770, 402)
    got = results(x, weight, bias, grad, "native")
    rounded = weight.bfloat16().double()
    right = [x.double() @ rounded.T + bias.double(), grad.double() @ rounded, grad.double().T @ x.double()]
    assert all(error(a, b) <= limit for a, b, limit in zip(got, right, (ROUNDED, ROUNDED, 1e-6), strict=False))
    assert error(got[3], grad.double().sum(0)) <= 1e-6


@fast_only
def test_a_row_depends_on_its_own_input_alone() -> None:
    x, weight, bias, _ = inputs(200, 64, 96)
    whole = linear(x, weight, bias, backend="native")
    assert torch.equal(linear(x[37:53], weight, bias, backend="native"), whole[37:53])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x, weight, bias, backend="native"), whole)
    finally:
        torch.set_num_threads(threads)


@fast_only
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_once(activation: str | None, has_bias: bool) -> None:
    """The activation sees the fp32 sum: at most the error of one rounding."""
    x, weight, bias, _ = inputs(75, 66, 130)
    weight, shift = (weight * 0.3).bfloat16(), bias.bfloat16() if has_bias else None
    function = {None: lambda v: v, "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}[activation]
    right = function(F.linear(x.double(), weight.double(), None if shift is None else shift.double()))
    got = PackedLinear(weight, shift, activation)(x.view(5, 15, 66))
    assert got.shape == (5, 15, 130) and error(got.view(75, 130), right) <= ROUNDED
    # e^-8 of the largest values is where a tail without relative accuracy would show.
    assert float((got.view(75, 130).double() - right).abs().max()) <= 2**-8 * float(right.abs().max())


@fast_only
def test_gelu_over_its_whole_range() -> None:
    """Through an identity: half a unit of bf16's last place, and the 1.2e-5 that its polynomial is fitted to."""
    values = torch.cat([torch.linspace(-6, 6, 4094), torch.tensor([-300.0, 300.0])]).bfloat16().view(-1, 2)
    got = PackedLinear(torch.eye(2).bfloat16(), None, "gelu")(values).double()
    right = F.gelu(values.double())
    assert float(((got - right).abs() - 2**-8 * right.abs()).max()) <= 1.2e-5


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_shapes_strides_and_what_needs_no_gradient(backend: str) -> None:
    x, weight, bias, _ = inputs(24, 16, 8)
    right = linear(x, weight, bias, backend=backend)
    strided = x.T.contiguous().T.view(24, 16)
    assert torch.equal(linear(strided, weight, bias, backend=backend), right)
    assert torch.equal(linear(x.view(2, 3, 4, 16), weight, bias, backend=backend), right.view(2, 3, 4, 8))
    assert torch.equal(linear(x, weight.T.contiguous().T, bias, backend=backend), right)
    assert linear(x[:0], weight, bias, backend=backend).shape == (0, 8)
    nothing = results(x[:0], weight, bias, torch.zeros(0, 8).bfloat16(), backend)
    assert [tuple(value.shape) for value in nothing] == [(0, 8), (0, 16), (8, 16), (8,)]
    assert not nothing[2].any() and not nothing[3].any()
    only_bias = bias.clone().requires_grad_()
    linear(x, weight, only_bias, backend=backend).sum().backward()  # an expanded gradient, and no other one
    assert only_bias.grad is not None and torch.allclose(only_bias.grad, torch.full((8,), 24.0))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_shadow_changes_no_bit(has_bias: bool) -> None:
    """Neither of the output nor of the gradients, in torch's product; the weight's gradient is fp32."""
    x, weight, bias, grad = inputs(24, 16, 8)
    found = []
    for shadow in (None, weight.bfloat16()):
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
        out = linear(leaves[0], leaves[1], leaves[2] if has_bias else None, shadow=shadow, backend="reference")
        found.append([out, *torch.autograd.grad(out, leaves if has_bias else leaves[:2], grad)])
    assert found[0][2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # It is the shadow that is read.
    other = linear(x, weight, bias, shadow=2 * weight.bfloat16(), backend="reference")
    assert torch.equal(other, linear(x, 2 * weight, bias, backend="reference"))
    if not REASONS:
        assert torch.equal(linear(x, weight, shadow=weight.bfloat16()), linear(x, weight))
    assert reads_shadow(weight) == bool(REASONS) and reads_shadow(weight[:7])


def test_gradcheck() -> None:
    x, weight, bias = (value.double().requires_grad_() for value in inputs(3, 4, 5)[:3])
    torch.autograd.gradcheck(linear, (x, weight, bias))


@fast_only
def test_opcheck_and_compiled() -> None:
    x, weight, bias, grad = inputs(6, 8, 10)
    torch.library.opcheck(torch.ops.cohobate.linear.default, (x, weight, bias, "native"))
    backward = torch.ops.cohobate.linear_backward.default
    torch.library.opcheck(backward, (grad, x, weight, True, True, True, "native"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: linear(*values), fullgraph=True, backend="aot_eager")
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    out = compiled(*leaves)
    got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert all(torch.equal(a, b) for a, b in zip(got, results(x, weight, bias, grad, "native"), strict=True))


def test_where_native_cannot_run_auto_takes_torch() -> None:
    x, weight, bias, _ = inputs(4, 6, 8)
    assert torch.equal(linear(x.float(), weight, bias), F.linear(x.float(), weight, bias))
    assert torch.equal(
        linear(x[:, :5], weight[:, :5], bias), F.linear(x[:, :5], weight[:, :5].bfloat16(), bias.bfloat16())
    )
    assert "both sizes of the weight must be even" in why_not("linear", "native", "cpu", **(FACTS | {"even": False}))[0]


X, W, B = torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: linear(X.int(), W), TypeError, "x: expected dtype float32 .*, got int32"),
        (lambda: linear(X, W[:, :3]), ValueError, r"weight: expected shape \[any, 4\], got \[6, 3\]"),
        (lambda: linear(X, W, B[:5]), ValueError, r"bias: expected shape \[6\], got \[5\]"),
        (lambda: linear(X, W, shadow=W.bfloat16()), TypeError, "shadow: expected dtype float32, got bfloat16"),
        (lambda: linear(X, W, shadow=W[:5]), ValueError, r"shadow: expected shape \[6, 4\], got \[5, 4\]"),
        (lambda: linear(X, W.to("meta")), ValueError, "weight: expected device cpu, got meta"),
        (lambda: linear(X.sum(), W), ValueError, "x: expected at least one dimension, got none"),
        (lambda: linear(X, W, backend="triton"), ValueError, "'triton' cannot run linear: linear has no triton"),
    ],
)
def test_bad_input_is_named(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()  # type: ignore[operator]


def test_cost() -> None:
    forward, backward = linear_cost(10, 4, 6, 2), linear_cost(10, 4, 6, 2, backward=True)
    assert forward.flops == 480 and backward.flops == 960
    assert forward.bytes == 10 * 10 * 2 + 4 * 24
    assert backward.bytes == forward.bytes + 10 * 4 * 2 + 4 * 5 * 6
