"""recycled: memory comes back when the last tensor on it is gone, and never before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cohobate.kernels import memory
from cohobate.kernels.memory import idle_bytes, recycled

SHAPE = (3, 1 << 18)  # 3 MiB of float32


@pytest.fixture(autouse=True)
def empty_list(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "_idle", {})
    yield


def test_it_is_an_ordinary_tensor() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        tensor = recycled((2, 5, 1 << 18), dtype)
        assert tensor.shape == (2, 5, 1 << 18) and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 and tensor.storage_offset() == 0
        assert torch.equal(tensor.fill_(3) + 1, torch.full_like(tensor, 4))


def test_memory_returns_after_the_last_view() -> None:
    first = recycled(SHAPE, torch.float32)
    address, view = first.data_ptr(), first[1].view(-1)[:7]
    del first
    other = recycled(SHAPE, torch.float32)
    assert idle_bytes() == 0 and other.data_ptr() != address
    del view
    assert idle_bytes() == 3 << 20  # the address alone says little: malloc may hand out the same again
    again = recycled((1 << 18, 3), torch.float32)
    assert again.data_ptr() == address and idle_bytes() == 0


def test_the_activations_of_a_small_batch_are_kept_too() -> None:
    recycled((400, 768), torch.bfloat16)
    assert idle_bytes() == 400 * 768 * 2


def test_autograd_keeps_what_it_needs() -> None:
    held = recycled(SHAPE, torch.float32).fill_(2)
    leaf = torch.ones(SHAPE, requires_grad=True)
    loss = (leaf * held).sum()
    del held
    other = recycled(SHAPE, torch.float32).fill_(5)
    loss.backward()
    assert leaf.grad is not None and leaf.grad.eq(2).all() and other.eq(5).all()


def test_small_tensors_stay_with_torch() -> None:
    recycled((10,), torch.float32)
    assert idle_bytes() == 0


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_IDLE", 8 << 20)
    for rows in range(1, 8):
        recycled((rows, 1 << 18), torch.float32)
        assert idle_bytes() <= 8 << 20
    recycled((9, 1 << 18), torch.float32)  # more than may ever wait
    assert idle_bytes() <= 8 << 20
