"""Softmax attention: its implementations, and the measured table that chooses between them.

    out[b, i, h] = sum_j softmax_j(q[b, i, h] . k[b, j, h] / sqrt(d)) v[b, j, h]

Which one is fast depends on the device, the dtype and the sizes, so the choice is data: the first match in
:data:`TABLE` wins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax. Scores are scaled in the product's accumulator, before they are rounded."""
    batch, queries, heads, dim = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, dim) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), v)
    return out.view(batch, heads, queries, dim).transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"explicit": explicit, "sdpa": sdpa}


@dataclass(frozen=True)
class Rule:
    """Where one implementation is the fastest measured; None matches anything."""

    implementation: str
    device: str
    dtype: torch.dtype | None = None
    most_keys: int | None = None
    head_dims: tuple[int, ...] | None = None
    grad: bool | None = None

    def fits(self, device: str, dtype: torch.dtype, keys: int, head_dim: int, grad: bool) -> bool:
        """Does the rule speak of this call?"""
        return (
            device == self.device
            and self.dtype in (None, dtype)
            and (self.most_keys is None or keys <= self.most_keys)
            and (self.head_dims is None or head_dim in self.head_dims)
            and self.grad in (None, grad)
        )


# On the CPU, in bf16, SDPA takes 3-4 times as long as the products forward and backward, 2-3 times forward alone.
TABLE: tuple[Rule, ...] = (
    Rule("explicit", "cpu", torch.bfloat16, most_keys=1024),
    Rule("explicit", "cpu", torch.float64),
    Rule("sdpa", "cpu"),
)

_override: list[str] = []


@contextlib.contextmanager
def use_attention(implementation: str) -> Iterator[None]:
    """Run every attention inside the block with this implementation.

    Raises:
        UserError: an unknown name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    _override.append(implementation)
    try:
        yield
    finally:
        _override.pop()


def choose(device: str, dtype: torch.dtype, keys: int, head_dim: int, grad: bool) -> str:
    """Name of the implementation for a call; SDPA wherever nothing was measured."""
    if _override:
        return _override[-1]
    for rule in TABLE:
        if rule.fits(device, dtype, keys, head_dim, grad):
            return rule.implementation
    return "sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``q`` [B, n, H, d] over ``k`` and ``v`` [B, N, H, d] (any strides): [B, n, H * d] in their dtype."""
    name = choose(q.device.type, q.dtype, k.shape[1], q.shape[-1], torch.is_grad_enabled() and q.requires_grad)
    return IMPLEMENTATIONS[name](q, k, v)
