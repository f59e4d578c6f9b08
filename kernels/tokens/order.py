"""random_order: counter-based (Philox4x32-10) permutations, one a sample."""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox_reference(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        h0, l0 = _multiply(c0, _M0)
        h1, l1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a 32x32-bit product, without overflowing int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return (middle >> 16) & _MASK, ((middle << 16) | (low & 0xFFFF)) & _MASK


def random_order_reference(sample_ids: Tensor, length: int, *, seed: int, stream: int = 0) -> Tensor:
    """Reference of :func:`random_order`: stable argsort of Philox words; word i of a sample is word i%4 of counter i//4."""
    ids = sample_ids.view(-1, 1)
    block = torch.arange((length + 3) // 4, device=ids.device).view(1, -1)
    zero = torch.zeros_like(ids + block)
    words = philox_reference(
        (block + zero, (ids & _MASK) + zero, ((ids >> 32) & _MASK) + zero, (stream & _MASK) + zero), (seed & _MASK, (seed >> 32) & _MASK)
    )
    keys = torch.stack(words, dim=-1).flatten(1)[:, :length]
    return keys.argsort(dim=1, stable=True).to(torch.int32)


def random_order(sample_ids: Tensor, length: int, *, seed: int, stream: int = 0, backend: str | None = None) -> Tensor:
    """[B] int64 -> [B,length] int32."""
    return random_order_reference(sample_ids, length, seed=seed, stream=stream)
