"""attend with an additive bias of the scores: values and gradients against the formula, and who may serve it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from cohobate.kernels.backends import attend, attention
from cohobate.kernels.backends.attention import BACKENDS, choose

HEADS, DIM, KEYS, BATCH = 3, 16, 9, 2
# Relative Frobenius error, as in test_attention.py: 1e-2 is bf16's 2^-8 times a few roundings in a row.
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}
TAKE = [name for name in BACKENDS if not attention.why_not(name, "cpu", torch.float32, KEYS, DIM, True, bias=True)]


def formula(packed: Tensor, queries: Tensor | None, bias: Tensor) -> Tensor:
    if queries is None:
        queries, packed = packed.split((packed.shape[2] // 3, packed.shape[2] // 3 * 2), dim=2)
    q = queries.unflatten(2, (HEADS, -1))
    k, v = packed.unflatten(2, (2, HEADS, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


def inputs(dtype: torch.dtype, queries: int | None, batched: bool) -> list[Tensor]:
    """Packed rows, the queries if any, and the bias in fp32 whatever the dtype: a parameter is."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(BATCH, KEYS, (3 if queries is None else 2) * HEADS * DIM, generator=g)]
    if queries is not None:
        tensors.append(torch.randn(BATCH, queries, HEADS * DIM, generator=g))
    shape = (HEADS, KEYS if queries is None else queries, KEYS)
    bias = 2 * torch.randn((BATCH, *shape) if batched else shape, generator=g)
    kind = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype).requires_grad_() for x in tensors] + [bias.to(kind).requires_grad_()]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["explicit", "sdpa", None])
def test_values_and_gradients(name: str | None, dtype: torch.dtype, queries: int | None, batched: bool) -> None:
    tensors = inputs(dtype, queries, batched)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = formula(exact[0], exact[1] if queries else None, exact[-1])
    out = attend(tensors[0], HEADS, tensors[1] if queries else None, bias=tensors[-1], backend=name)
    assert out.dtype == dtype and out.shape == expected.shape
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = (out, *torch.autograd.grad(out, tensors, grad))
    want = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    assert got[-1].dtype == tensors[-1].dtype
    for a, b in zip(got, want, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= DTYPES[dtype] * float(b.detach().norm())


def test_the_others_say_that_they_take_none() -> None:
    assert TAKE == ["explicit", "sdpa"]
    qkv, bias = torch.zeros(1, 4, 3 * 8), torch.zeros(2, 4, 4)
    for name in set(BACKENDS) - set(TAKE):
        reasons = attention.why_not(name, "cpu", torch.float32, 4, 4, False, bias=True)
        assert reasons == ["it takes no additive bias of the scores"]
        with pytest.raises(ValueError, match=f"'{name}' cannot run attention .* with a bias.: it takes no additive"):
            attend(qkv, 2, bias=bias, backend=name)
    for dtype in DTYPES:
        assert choose("cpu", dtype, 197, 64, True, bias=True) in TAKE


def test_the_fallback_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rules = (attention.Rule("sdpa-flash", "a"), attention.Rule("explicit", "b"))
    monkeypatch.setattr(attention, "rules", lambda: rules)
    monkeypatch.setattr(attention, "_environment", "auto")
    monkeypatch.setattr(attention, "_answers", {})
    monkeypatch.setattr(attention, "_logged", set())
    qkv, bias = torch.zeros(1, 4, 3 * 8), torch.zeros(2, 4, 4)
    with caplog.at_level(logging.WARNING, logger="cohobate.kernels"):
        for _ in range(2):
            attend(qkv, 2, bias=bias)
    assert caplog.messages == [
        "attention (float32, 4 keys, head dim 4, on cpu, without gradient, with a bias) runs as explicit, not "
        "sdpa-flash: it takes no additive bias of the scores"
    ]


def test_a_bias_that_alone_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a fact of the call, which the table may ask for."""
    rules = (attention.Rule("explicit", "a", grad=True), attention.Rule("sdpa", "b"))
    monkeypatch.setattr(attention, "rules", lambda: rules)
    monkeypatch.setattr(attention, "_environment", "auto")
    monkeypatch.setattr(attention, "_answers", {})
    qkv, bias = (x.detach() for x in inputs(torch.float32, None, False))
    attend(qkv, HEADS, bias=bias)
    attend(qkv, HEADS, bias=bias.requires_grad_()).sum().backward()
    assert bias.grad is not None and list(attention._answers.values()) == ["sdpa", "explicit"]


@pytest.mark.parametrize("name", ["explicit", "sdpa"])
def test_compiled_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()

    def call(qkv: Tensor, bias: Tensor) -> Tensor:
        return attend(qkv, HEADS, bias=bias, backend=name)

    tensors = inputs(torch.float32, None, False)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), call(*tensors))  # fp32: its own default


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(2, 3, 4), ValueError, r"bias: expected shape \[2, 4, 4\], got \[2, 3, 4\]"),
        (torch.zeros(2, 2, 4, 4), ValueError, r"bias: expected shape \[1, 2, 4, 4\], got \[2, 2, 4, 4\]"),
        (torch.zeros(2, 4, 4).int(), TypeError, "bias: expected a floating-point type, got int32"),
    ],
)
def test_bad_biases(bias: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(torch.zeros(1, 4, 3 * 8), 2, bias=bias)
