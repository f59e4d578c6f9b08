"""The plan carried out by processes that decode with simplejpeg (or Pillow) and resize with torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cohobate.data.reading import Reader, Rows

log = logging.getLogger(__name__)

_SHARED = "/dev/shm"
_AHEAD_BYTES = 64 << 20  # small batches are fetched further ahead than large ones


class _Steps(Dataset[Rows]):
    """``dataset[step]`` is a whole batch, so a worker's message is one tensor, and order is the plan's.

    ``slots``: uint8 [workers, n, B, H, W, C] in shared memory. A worker fills its own in turns: fresh shared memory for
    every batch would cost more than resizing does, for the kernel clears it page by page.
    """

    def __init__(self, reader: Reader, slots: Tensor | None) -> None:
        self.reader, self.slots, self.made = reader, slots, 0

    def __getitem__(self, step: int) -> Rows:
        if self.slots is None:
            rows = self.reader.rows(step)
            rows.pixels = np.asarray(rows.pixels)  # an array travels through the pipe
            return rows
        info = get_worker_info()
        mine = self.slots[0 if info is None else info.id]
        self.made += 1
        return self.reader.rows(step, into=mine[self.made % len(mine)])


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started here never get SIGTERM or SIGINT: a signal to the whole process group must not take the
    workers away from a parent that still wants to save. They end when the parent does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _same(rows: Any) -> Any:
    """The collate function: a step is a batch already."""
    return rows


class TorchExecutor:
    """Steps in order, each decoded whole by one of ``workers`` processes; in this process if there are none.

    Args:
        start: first step. stop: step after the last, or None for no end. pin: page-locked memory, for a GPU.
    """

    device = torch.device("cpu")

    def __init__(self, reader: Reader, *, start: int, stop: int | None, workers: int, pin: bool) -> None:
        self._loader: DataLoader[Rows] | None = None
        steps: Any = itertools.count(start) if stop is None else range(start, stop)
        if workers == 0:
            self._rows: Iterator[Rows] = (reader.rows(step) for step in steps)
            return
        size = math.prod(reader.shape)
        ahead = max(2, min(8, _AHEAD_BYTES // (size * workers)))
        # At most `ahead` batches of a worker are on their way or waiting; one more is being copied out of its slot when
        # the DataLoader asks for the next.
        count = ahead + 2
        slots = None
        if _room(size * workers * count):
            slots = torch.empty((workers, count, *reader.shape), dtype=torch.uint8).share_memory_()
        else:
            log.warning("%s is too small for %d batches: they are copied through pipes", _SHARED, workers * count)
        self._slots, self._copied = slots, pin
        self._loader = DataLoader(
            _Steps(reader, slots),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=ahead,
            collate_fn=_same,
            pin_memory=pin,
            generator=torch.Generator(),  # otherwise it draws from the global one, and a resumed run would differ
        )
        with _signals_held_back():
            self._rows = iter(self._loader)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        rows = next(self._rows)
        rows.pixels = torch.as_tensor(rows.pixels)
        if self._loader is not None and self._slots is not None and not self._copied:
            rows.pixels = rows.pixels.clone()  # out of its slot, which will be filled again
        return rows

    def close(self) -> None:
        """Stop the workers."""
        self._rows = iter(())
        self._loader = None


def _room(needed: int) -> bool:
    """Whether shared memory has room for so many bytes; in a container it often is 64 MB."""
    try:
        found = os.statvfs(_SHARED)
    except OSError:
        return True
    return found.f_bavail * found.f_frsize > needed
