"""Masks as one permutation of the tokens and its cuts.

``order`` [B, N] lists the tokens of a sample: the first ``student`` of them are visible to the student, the first
``teacher`` >= ``student`` to the teacher, the rest to neither. So "what the student sees, the teacher sees" holds by
construction, counts are Python ints, indices are tensors: shapes are static and nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.kernels.tokens import random_order
from cohobate.tokens import TokenGrid

ROUNDINGS = ("keep", "mask")
# The stream word of the random numbers: 10 bits of stage, 22 bits of epoch.
_STAGE_BITS, _EPOCH_BITS = 10, 22
# From one view's seed to the next: odd, so that no two of 2**64 views share one.
_NEXT_VIEW = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class MaskPlan:
    """What each side sees of a batch.

    Args:
        order: [B, N] int32, a permutation of the tokens a sample, ascending inside each of its three segments.
        student: a, how many tokens the student sees (at least 1).
        teacher: b, how many tokens the teacher sees, a <= b <= N.

    Raises:
        UserError: counts that do not nest, or an order of another shape or dtype. The values are not read.
    """

    order: Tensor
    student: int
    teacher: int

    def __post_init__(self) -> None:
        if self.order.dim() != 2 or self.order.dtype != torch.int32:
            raise UserError(f"order: expected int32 [B, N], got {self.order.dtype} {list(self.order.shape)}")
        if not 0 < self.student <= self.teacher <= self.tokens:
            raise UserError(
                f"student, teacher: expected 0 < student <= teacher <= {self.tokens} tokens, "
                f"got {self.student}, {self.teacher}"
            )

    @property
    def tokens(self) -> int:
        """N."""
        return self.order.shape[1]

    @property
    def visible(self) -> Tensor:
        """[B, a] int32: tokens the student sees."""
        return self.order[:, : self.student]

    @property
    def masked(self) -> Tensor:
        """[B, N - a] int32: tokens the student does not see. Ascending inside the segments [a, b) and [b, N)."""
        return self.order[:, self.student :]

    @property
    def teacher_rows(self) -> Tensor:
        """[B, b] int32: tokens the teacher sees, the student's first."""
        return self.order[:, : self.teacher]

    @property
    def diff(self) -> Tensor:
        """[B, b - a] int32: tokens the teacher sees and the student does not."""
        return self.order[:, self.student : self.teacher]

    @cached_property
    def where(self) -> Tensor:
        """[B, N] int32, the inverse of ``order``: the place of token n in it. Computed once."""
        places = torch.arange(self.tokens, dtype=torch.int32, device=self.order.device).expand_as(self.order)
        return torch.empty_like(self.order).scatter_(1, self.order.long(), places)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskPlan:
        """The same plan on another device."""
        return MaskPlan(self.order.to(device, non_blocking=non_blocking), self.student, self.teacher)

    def to_boolean(self) -> tuple[Tensor, Tensor]:
        """Masks of student and teacher, bool [B, N], True where a token is hidden (the sense of MAE and VideoMAE)."""
        return self.where >= self.student, self.where >= self.teacher

    @classmethod
    def from_boolean(
        cls, student: Tensor, teacher: Tensor | None = None, *, counts: tuple[int, int] | None = None
    ) -> MaskPlan:
        """A plan from boolean masks [B, N], True where a token is hidden; without ``teacher`` it sees everything.

        ``counts`` = (student, teacher) tokens visible a sample. Given, nothing is read back from the device and the
        masks are trusted; otherwise they are read once and checked.

        Raises:
            UserError: shapes that differ, a count that differs between samples, or a token that only the student sees.
        """
        if teacher is None:
            teacher = torch.zeros_like(student)
        if student.dim() != 2 or student.shape != teacher.shape:
            shapes = f"the student's shape {list(student.shape)} [B, N], got {list(teacher.shape)}"
            raise UserError(f"teacher: expected {shapes}")
        student, teacher = student.bool(), teacher.bool()
        if counts is None:
            if bool((teacher & ~student).any()):
                raise UserError("teacher: expected every token the student sees to be visible to the teacher")
            counts = _even_count("student", student), _even_count("teacher", teacher)
        segment = student.to(torch.int8) + teacher.to(torch.int8)
        order = segment.argsort(dim=1, stable=True).to(torch.int32)
        return cls(order, *counts)


def _even_count(name: str, hidden: Tensor) -> int:
    counts = (~hidden).sum(1).tolist()
    if len(set(counts)) != 1:
        found = f"from {min(counts, default=0)} to {max(counts, default=0)}"
        raise UserError(f"{name}: expected as many visible tokens in every sample, got {found}")
    return int(counts[0])


def kept(tokens: int, ratio: float, rounding: str = "keep") -> int:
    """Tokens left visible of ``tokens`` at mask ratio ``ratio``.

    "keep" keeps floor(N (1 - r)) (MAE, dBOT); "mask" masks floor(r N) (VideoMAE, AMD). At N = 196, r = 0.9: 19 and 20.

    Raises:
        UserError: a ratio outside [0, 1), an unknown rounding, or no token left.
    """
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding: expected one of {', '.join(ROUNDINGS)}; got {rounding!r}")
    if not 0 <= ratio < 1:
        raise UserError(f"ratio: expected a mask ratio in [0, 1), got {ratio}")
    count = math.floor(tokens * (1 - ratio)) if rounding == "keep" else tokens - math.floor(ratio * tokens)
    if count < 1:
        raise UserError(f"ratio: expected one that leaves at least 1 of {tokens} tokens visible, got {ratio}")
    return count


def random_plan(
    grid: TokenGrid,
    sample_ids: Tensor,
    *,
    seed: int,
    stage: int,
    epoch: int,
    ratio: float,
    teacher_ratio: float | None = None,
    rounding: str = "keep",
    tube: bool = False,
    masks: int = 1,
) -> MaskPlan:
    """Random masks, a pure function of (seed, stage, epoch, sample id, view): batch, worker and rank do not matter.

    Args:
        grid: the token grid.
        sample_ids: [B] int64; the plan lives on their device.
        seed: up to 64 bits.
        stage, epoch: below 2**10 and 2**22.
        ratio: share of tokens hidden from the student.
        teacher_ratio: share hidden from the teacher, at most ``ratio``; None or 0 shows it everything.
        rounding: "keep" or "mask", see :func:`kept`.
        tube: the same spatial mask in every frame (VideoMAE, Tong et al., NeurIPS 2022); counts round per frame.
        masks: M, independent masks of each sample. Whatever M is, view 0 is what a single mask would be.

    Returns:
        A plan of [M * B, N] whose segments ascend (raster order): all samples of view 0, then all of view 1, ...

    Raises:
        UserError: a ratio that leaves the student nothing, a teacher that would see less than the student, a stage or
            epoch out of range, or no mask at all.
    """
    if masks < 1:
        raise UserError(f"masks: expected at least 1, got {masks}")
    for name, value, bits in (("stage", stage, _STAGE_BITS), ("epoch", epoch, _EPOCH_BITS)):
        if not 0 <= value < 1 << bits:
            raise UserError(f"{name}: expected a number in [0, 2**{bits}), got {value}")
    if teacher_ratio is not None and teacher_ratio > ratio:
        raise UserError(f"teacher_ratio: expected at most the student's ratio {ratio}, got {teacher_ratio}")
    frames = grid.shape[0] if tube else 1
    places = grid.size // frames
    student = kept(places, ratio, rounding)
    teacher = places if teacher_ratio is None else kept(places, teacher_ratio, rounding)
    stream = stage << _EPOCH_BITS | epoch
    seeds = [seed, *((seed + view * _NEXT_VIEW) % (1 << 64) for view in range(1, masks))]
    orders = [random_order(sample_ids, places, seed=view, stream=stream) for view in seeds]
    order = orders[0] if masks == 1 else torch.cat(orders)
    segments = [part.sort(dim=1).values for part in order.tensor_split([student, teacher], dim=1)]
    if tube:
        offsets = torch.arange(frames, dtype=torch.int32, device=order.device).view(1, -1, 1) * places
        segments = [(part.unsqueeze(1) + offsets).flatten(1) for part in segments]
    return MaskPlan(torch.cat(segments, dim=1), student * frames, teacher * frames)
