"""recycled: uninitialised CPU tensors whose memory is kept for the next one of the same size.

malloc hands blocks above 32 MiB back to the system at once, so the next one costs a page fault every 4 KiB: for the
gradient of a loss that takes several times as long as the kernel that fills it. A step asks for the same sizes again
and again, so a block goes to a free list when the last tensor on it is gone, wherever that tensor went meanwhile.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 17  # bytes; malloc recycles smaller blocks itself
# Bytes that may wait on the free list: between two steps all gradients and activations do.
MOST_IDLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8 if hasattr(os, "sysconf") else 1 << 30
ALIGNMENT = 64

_idle: dict[int, list[np.ndarray]] = {}


def recycled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised contiguous CPU tensor, aligned to 64 bytes; like ``torch.empty`` for the one who uses it."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    try:
        block = _idle[size].pop()
    except (KeyError, IndexError):
        fresh = np.empty(size + ALIGNMENT, dtype=np.uint8)
        start = -fresh.ctypes.data % ALIGNMENT
        block = fresh[start : start + size]
    lease = block.view(_Lease)
    lease.block = block
    return torch.frombuffer(lease, dtype=dtype).view(shape)  # its storage holds the lease


class _Lease(np.ndarray):
    """A block in use."""

    block: np.ndarray

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            _give_back(self.block)


def idle_bytes() -> int:
    """Bytes that wait on the free list."""
    return sum(size * len(blocks) for size, blocks in list(_idle.items()))


def release() -> None:
    """Hand the waiting blocks back to the system."""
    _idle.clear()


def _give_back(block: np.ndarray) -> None:
    """Runs when a lease is gone, in whichever thread that happens; each step is atomic under the interpreter's lock."""
    size = block.nbytes
    if idle_bytes() + size > MOST_IDLE:
        _idle.clear()
    if size <= MOST_IDLE:
        _idle.setdefault(size, []).append(block)
