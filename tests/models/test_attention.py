"""Attention: every implementation against the formula in float64, and the table that chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models import attention


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


def inputs(dtype: torch.dtype, queries: int = 5, keys: int = 9, heads: int = 3, dim: int = 8) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads, dim, generator=g)
    kv = torch.randn(2, keys, 2, heads, dim, generator=g)  # packed: k and v are strided views
    return q.to(dtype), *kv.to(dtype).unbind(2)


@pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_implementations_and_their_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Relative Frobenius error; 1e-2 is bf16's 2^-8 times a few roundings in a row."""
    tensors = [x.detach().requires_grad_() for x in inputs(dtype)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = formula(*exact)
    with attention.use_attention(name):
        out = attention.attend(*tensors)
    assert out.dtype == dtype
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = (out, *torch.autograd.grad(out, tensors, grad))
    want = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for a, b in zip(got, want, strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < tolerance


def test_large_scores_do_not_overflow() -> None:
    q, k, v = inputs(torch.bfloat16)
    with attention.use_attention("explicit"):
        assert bool(attention.attend(q * 100, k * 100, v).isfinite().all())


def test_the_table_is_read_in_order_and_can_be_overridden() -> None:
    assert attention.choose("cpu", torch.bfloat16, 197, 64, True) != "sdpa"
    assert attention.choose("cuda", torch.bfloat16, 197, 64, True) == "sdpa"
    with attention.use_attention("sdpa"):
        assert attention.choose("cpu", torch.bfloat16, 197, 64, True) == "sdpa"
    assert attention.choose("cpu", torch.bfloat16, 197, 64, True) != "sdpa"


def test_every_rule_names_an_implementation() -> None:
    assert {rule.implementation for rule in attention.TABLE} <= set(attention.IMPLEMENTATIONS)


def test_an_unknown_implementation() -> None:
    with pytest.raises(UserError, match="implementation: expected one of"), attention.use_attention("flash9"):
        pass
