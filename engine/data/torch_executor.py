"""The plan carried out by processes that decode with simplejpeg (or Pillow) and resize with torch."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cohobate.data.reading import Reader, Rows

log = logging.getLogger(__name__)

_SHARED = "/dev/shm"
_AHEAD_BYTES = 64 << 20  # small batches are fetched further ahead than large ones


class _Steps(Dataset[Rows]):
    """``dataset[step]`` is a whole batch, so a worker's message is one tensor, and order is the plan's."""

    def __init__(self, reader: Reader, shared: bool) -> None:
        self.reader, self.shared = reader, shared

    def __getitem__(self, step: int) -> Rows:
        rows = self.reader.rows(step)
        if not self.shared:
            rows.pixels = np.asarray(rows.pixels)  # arrays travel through the pipe, tensors through shared memory
        return rows


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group must not take the workers away from a parent that still wants to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        self._steps: Any = itertools.count(start) if stop is None else range(start, stop)
        size = math.prod(reader.shape)
        if workers == 0:
            self._rows: Iterator[Rows] = (reader.rows(step) for step in self._steps)
            return
        ahead = max(2, min(8, _AHEAD_BYTES // (size * workers)))
        shared = _room(size * (workers * ahead + 2))
        if not shared:
            log.warning("%s is too small for %d batches ahead: they are copied through pipes", _SHARED, workers * ahead)
        self._loader = DataLoader(
            _Steps(reader, shared),
            batch_size=None,
            sampler=self._steps,
            num_workers=workers,
            prefetch_factor=ahead,
            collate_fn=_same,
            generator=torch.Generator(),  # otherwise it draws from the global one, and a resumed run would differ
            pin_memory=pin,
            worker_init_fn=_leave_signals_to_the_parent,
        )
        self._rows = iter(self._loader)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        rows = next(self._rows)
        rows.pixels = torch.as_tensor(rows.pixels)
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
