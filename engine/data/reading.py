"""Carrying out a plan on the CPU: one sample, its substitute if it is bad, a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cohobate.data.decode import Pixels, decode, read_file, render
from cohobate.data.headers import BadImage
from cohobate.data.manifest import Manifest
from cohobate.data.plan import SamplePlan

Box = tuple[int, int, int, int]
Read = TypeVar("Read")
_ATTEMPTS = 16


@dataclass
class Rows:
    """One rank's samples of a step before they are a :class:`Batch`.

    ``pixels``: uint8 [B, H, W, C]; a tensor, on a GPU perhaps, or an array on its way between processes.
    ``faults``: (sample id, reason) of every image that could not be read on the way.
    """

    pixels: Tensor | Pixels
    ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    faults: list[tuple[int, str]]

    def pin_memory(self) -> Rows:
        """Called by torch's DataLoader where the batch goes to a GPU."""
        return Rows(torch.as_tensor(self.pixels).pin_memory(), self.ids, self.valid, self.faults)


@dataclass(frozen=True)
class Task:
    """What the plan asks for at one step, int/bool arrays of one length."""

    epoch: int
    places: NDArray[np.int64]
    ids: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Reader:
    """A manifest, a plan, and one rank's share of it; picklable, without state."""

    manifest: Manifest
    plan: SamplePlan
    batch_size: int
    rank: int
    world_size: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, W, C] of a batch."""
        return (self.batch_size, *self.plan.size, self.channels)

    def task(self, step: int) -> Task:
        """Which samples and crops a step has."""
        epoch, places, valid = self.plan.places(step, self.batch_size, self.rank, self.world_size)
        ids = self.plan.order(epoch, places)
        boxes, flips = self.crops(epoch, ids)
        return Task(epoch, places, ids, boxes, flips, valid)

    def crops(self, epoch: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes and flips of samples, see :meth:`SamplePlan.crops`."""
        return self.plan.crops(epoch, ids, self.manifest.heights[ids], self.manifest.widths[ids])

    def decode(self, sample: int, data: bytes | None = None) -> Pixels:
        """The whole upright image, uint8 [H, W, C].

        Raises:
            BadImage: it cannot be read, or is not the image it was.
        """
        if data is None:
            data = read_file(self.manifest.paths[sample])
        image = decode(data, self.channels, int(self.manifest.orientations[sample]))
        if image.shape[:2] != (self.manifest.heights[sample], self.manifest.widths[sample]):
            raise BadImage("changed")
        return image

    def render(self, sample: int, box: Box, flip: bool, data: bytes | None = None) -> Tensor:
        """One finished sample, uint8 [height, width, C].

        Raises:
            BadImage: as :meth:`decode`.
        """
        return render(self.decode(sample, data), box, flip, self.plan.size, self.plan.interpolation)

    def healthy(
        self, task: Task, row: int, read: Callable[[int, Box, bool], Read], faults: list[tuple[int, str]]
    ) -> tuple[int, Read | None]:
        """The planned sample of a row, or the first that can be read of a fixed sequence of others.

        The sequence is the epoch's order from the sample's place on, in strides far from its neighbours, so that a
        folder of bad files is left at once. It depends on nothing but the plan and the files.

        Args:
            read: gets (sample, box, flip) and raises :class:`BadImage` if it cannot. faults: grows.

        Returns:
            The sample, and what ``read`` gave; None with the planned sample if none of 16 could be read.
        """
        planned = int(task.ids[row])
        try:
            return planned, read(planned, _box(task.boxes[row]), bool(task.flips[row]))
        except BadImage as error:
            faults.append((planned, error.reason))
        count = self.plan.count
        stride = max(1, int(count * 0.381966)) | 1  # the golden section spreads the attempts over the epoch
        for attempt in range(1, min(_ATTEMPTS, count)):
            place = np.array([(int(task.places[row]) + attempt * stride) % count])
            ids = self.plan.order(task.epoch, place)
            boxes, flips = self.crops(task.epoch, ids)
            try:
                return int(ids[0]), read(int(ids[0]), _box(boxes[0]), bool(flips[0]))
            except BadImage as error:
                faults.append((int(ids[0]), error.reason))
        return planned, None

    def rows(self, step: int, into: Tensor | None = None) -> Rows:
        """A whole step, decoded here and now, into a uint8 tensor of ``shape`` if one is given."""
        task = self.task(step)
        pixels = torch.empty(self.shape, dtype=torch.uint8) if into is None else into
        ids, valid = task.ids.copy(), task.valid.copy()
        faults: list[tuple[int, str]] = []
        for row in range(self.batch_size):
            sample, image = self.healthy(task, row, self.render, faults)
            if image is None:
                pixels[row].zero_()
            else:
                pixels[row].copy_(image)
            valid[row] &= sample == ids[row] and image is not None
            ids[row] = sample
        return Rows(pixels, ids, valid, faults)


def _box(values: NDArray[np.int32]) -> Box:
    top, left, height, width = values.tolist()
    return top, left, height, width
