"""Carrying out a plan on the CPU: one file, its substitute if it is bad, a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cohobate.data.decode import Pixels, decode, read_file, render
from cohobate.data.headers import BadImage, is_plain_jpeg
from cohobate.data.manifest import Manifest
from cohobate.data.plan import SamplePlan

Box = tuple[int, int, int, int]
Read = TypeVar("Read")
_ATTEMPTS = 16


@dataclass
class Rows:
    """One rank's samples of a step before they are a :class:`Batch`.

    ``pixels``: uint8 [B, H, W, C], of clips [B, T, H, W, C]; a tensor, on a GPU perhaps, or an array on its way between
    processes. ``faults``: (place in the manifest, reason) of every file that could not be read on the way.
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
    """What the plan asks for at one step: n files, each made into ``views`` samples.

    ``places`` int64 [n] in the epoch's order; ``files`` int64 [n] in the manifest; ``valid`` bool [n]; ``boxes`` int32
    [n, views, 4]; ``flips`` bool [n, views]; ``frames`` int64 [n, clips, T], None for images.
    """

    epoch: int
    places: NDArray[np.int64]
    files: NDArray[np.int64]
    valid: NDArray[np.bool_]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    frames: NDArray[np.int64] | None = None

    def box(self, row: int, view: int) -> Box:
        """Top, left, height, width."""
        top, left, height, width = self.boxes[row, view].tolist()
        return top, left, height, width


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
    def shape(self) -> tuple[int, ...]:
        """[B, H, W, C] of a batch."""
        return (self.batch_size, *self.plan.size, self.channels)

    def task(self, step: int) -> Task:
        """Which files and crops a step has."""
        return self.task_at(*self.plan.places(step, self.batch_size, self.rank, self.world_size))

    def task_at(self, epoch: int, places: NDArray[np.int64], valid: NDArray[np.bool_]) -> Task:
        """The files at these places of an epoch, and their crops."""
        files, views = self.plan.order(epoch, places), self.plan.views
        heights, widths = (np.repeat(sizes[files], views) for sizes in (self.manifest.heights, self.manifest.widths))
        boxes, flips = self.plan.crops(epoch, self.sample_ids(files), heights, widths)
        return Task(epoch, places, files, valid, boxes.reshape(-1, views, 4), flips.reshape(-1, views))

    def sample_ids(self, files: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids int64 [n * views] of all samples of these files, see :class:`Batch`."""
        views = self.plan.views
        return (files[:, None] * views + np.arange(views)).reshape(-1)

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

    def render(self, task: Task, row: int, data: bytes | None = None) -> Tensor:
        """A file's finished samples, uint8 [views, height, width, C].

        Raises:
            BadImage: as :meth:`decode`.
        """
        image = self.decode(int(task.files[row]), data)
        flip = bool(task.flips[row, 0])
        return render(image, task.box(row, 0), flip, self.plan.size, self.plan.interpolation).unsqueeze(0)

    # What DALI is given of a file: ``items`` encoded pieces, images, or whole videos where ``dali_video``.
    @property
    def items(self) -> int:
        """Pieces of a file."""
        return 1

    @property
    def dali_video(self) -> bool:
        """Whether a piece is a video."""
        return False

    def why_not_dali(self, gpu: bool) -> list[str]:
        """Reasons why DALI cannot decode these files."""
        return []

    def encoded(self, task: Task, row: int) -> list[bytes] | Tensor:
        """A file's pieces, or its finished samples where DALI is not asked.

        Raises:
            BadImage: it cannot be read.
        """
        manifest, file = self.manifest, int(task.files[row])
        data = read_file(manifest.paths[file])
        size = (manifest.heights[file], manifest.widths[file])
        if manifest.plain_jpeg[file] and is_plain_jpeg(data, size):
            return [data]
        return self.render(task, row, data)

    def healthy(
        self, task: Task, row: int, read: Callable[[Task, int], Read], faults: list[tuple[int, str]]
    ) -> tuple[int, Read | None]:
        """The planned file of a row, or the first that can be read of a fixed sequence of others.

        The sequence is the epoch's order from the file's place on, in strides far from its neighbours, so that a
        folder of bad files is left at once. It depends on nothing but the plan and the files.

        Args:
            read: gets a task and a row of it, and raises :class:`BadImage` if it cannot. faults: grows.

        Returns:
            The file, and what ``read`` gave; None with the planned file if none of 16 could be read.
        """
        planned = int(task.files[row])
        try:
            return planned, read(task, row)
        except BadImage as error:
            faults.append((planned, error.reason))
        count = self.plan.count
        stride = max(1, int(count * 0.381966)) | 1  # the golden section spreads the attempts over the epoch
        for attempt in range(1, min(_ATTEMPTS, count)):
            place = np.array([(int(task.places[row]) + attempt * stride) % count])
            other = self.task_at(task.epoch, place, np.ones(1, dtype=bool))
            try:
                return int(other.files[0]), read(other, 0)
            except BadImage as error:
                faults.append((int(other.files[0]), error.reason))
        return planned, None

    def rows(self, step: int, into: Tensor | None = None) -> Rows:
        """A whole step, decoded here and now, into a uint8 tensor of ``shape`` if one is given."""
        task = self.task(step)
        pixels = torch.empty(self.shape, dtype=torch.uint8) if into is None else into
        files, valid = task.files.copy(), task.valid.copy()
        faults: list[tuple[int, str]] = []
        for row, samples in enumerate(pixels.unflatten(0, (len(files), self.plan.views))):
            file, made = self.healthy(task, row, self.render, faults)
            if made is None:
                samples.zero_()
            else:
                samples.copy_(made)
            valid[row] &= file == files[row] and made is not None
            files[row] = file
        return Rows(pixels, self.sample_ids(files), np.repeat(valid, self.plan.views), faults)
