"""Masks as one permutation of the tokens and its cuts.

``order`` [B, N] lists the tokens of a sample: the first ``student`` of them are visible to the student, the first
``teacher`` >= ``student`` to the teacher, the rest to neither. So "what the student sees, the teacher sees" holds by
construction, counts are Python ints, indices are tensors: shapes are static and nothing waits for the device.

Four kinds are drawn here (:func:`mask_plan`): random, tube, block and inverse block. All of them are integer functions
of (seed, stage, epoch, sample id, view), so batch, worker, rank and device do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.kernels.tokens import random_order
from cohobate.kernels.tokens.order import philox_reference
from cohobate.tokens import TokenGrid

KINDS = ("random", "block", "inverse_block", "tube")
ROUNDINGS = ("keep", "mask")
# The stream word of the random numbers: 10 bits of stage, 22 bits of epoch.
_STAGE_BITS, _EPOCH_BITS = 10, 22
# From one view's seed to the next: odd, so that no two of 2**64 views share one.
_NEXT_VIEW = 0x9E3779B97F4A7C15
# Blocks drawn for each sample, and shapes (evenly spaced in the logarithm of the aspect ratio) for each area.
_BLOCKS, _ASPECTS = 24, 64
# Where the counters of blocks begin; those of random_order count up from 0, so the two never meet.
_BLOCK_COUNTER = 1 << 31
_WORD = 0xFFFFFFFF


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


def mask_plan(
    grid: TokenGrid,
    sample_ids: Tensor,
    *,
    kind: str = "random",
    seed: int,
    stage: int,
    epoch: int,
    ratio: float,
    count: int | None = None,
    teacher_ratio: float | None = None,
    rounding: str = "keep",
    masks: int = 1,
    block_min: int = 16,
    block_aspect: float = 0.3,
) -> MaskPlan:
    """Masks, a pure function of (seed, stage, epoch, sample id, view): batch, worker, rank and device do not matter.

    Args:
        grid: the token grid.
        sample_ids: [B] int64; the plan lives on their device.
        kind: "random": tokens are hidden one by one (MAE). "block": rectangles are hidden until enough tokens are
            (BEiT, Bao et al., ICLR 2022, algorithm 1); "inverse_block": such rectangles are what stays visible
            (CAPI, Darcet et al., 2025). "tube": random in space, the same in every frame (VideoMAE, Tong et al.,
            NeurIPS 2022); blocks too are the same in every frame.
        seed: up to 64 bits.
        stage, epoch: below 2**10 and 2**22.
        ratio: share of tokens hidden from the student.
        count: how many tokens are hidden from the student, of a frame where frames are alike; wins over ``ratio``.
        teacher_ratio: share hidden from the teacher, at most the student's; None or 0 shows it everything.
        rounding: "keep" or "mask", see :func:`kept`.
        masks: M, independent masks of each sample. Whatever M is, view 0 is what a single mask would be.
        block_min, block_aspect: smallest area of a block and smallest ratio of its sides, see :func:`block_order`.

    Returns:
        A plan of [M * B, N] whose segments ascend (raster order): all samples of view 0, then all of view 1, ...
        Counts are exact, those of blocks too: the last block is cut off where enough tokens are hidden.

    Raises:
        UserError: an unknown kind, a ratio or count that leaves the student nothing, a teacher that would see less than
            the student, a stage or epoch out of range, or no mask at all.
    """
    if kind not in KINDS:
        raise UserError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if masks < 1:
        raise UserError(f"masks: expected at least 1, got {masks}")
    for name, value, bits in (("stage", stage, _STAGE_BITS), ("epoch", epoch, _EPOCH_BITS)):
        if not 0 <= value < 1 << bits:
            raise UserError(f"{name}: expected a number in [0, 2**{bits}), got {value}")
    frames = 1 if kind == "random" else grid.shape[0]
    places = grid.size // frames
    if count is not None and not 0 <= count < places:
        raise UserError(f"count: expected 0 to {places - 1} of {places} tokens, got {count}")
    student = kept(places, ratio, rounding) if count is None else places - count
    teacher = places if teacher_ratio is None else kept(places, teacher_ratio, rounding)
    if teacher < student:
        least = f"at least the student's {student} of {places} tokens visible"
        raise UserError(f"teacher_ratio: expected one that leaves {least}, got {teacher_ratio}, which leaves {teacher}")

    def drawn(view: int) -> Tensor:
        """[B, places] int32, what the student sees first."""
        stream, key = stage << _EPOCH_BITS | epoch, (seed + view * _NEXT_VIEW) % (1 << 64) if view else seed
        if "block" not in kind:
            return random_order(sample_ids, places, seed=key, stream=stream)
        wanted = student if kind == "inverse_block" else places - student
        order = block_order(
            sample_ids, grid.shape[1:], wanted, seed=key, stream=stream, smallest=block_min, aspect=block_aspect
        )
        return order if kind == "inverse_block" else order.flip(1)

    order = drawn(0) if masks == 1 else torch.cat([drawn(view) for view in range(masks)])
    segments = [part.sort(dim=1).values for part in order.tensor_split([student, teacher], dim=1)]
    if frames > 1:
        offsets = torch.arange(frames, dtype=torch.int32, device=order.device).view(1, -1, 1) * places
        segments = [(part.unsqueeze(1) + offsets).flatten(1) for part in segments]
    return MaskPlan(torch.cat(segments, dim=1), student * frames, teacher * frames)


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
    """:func:`mask_plan` of kind "random", or "tube"."""
    return mask_plan(
        grid,
        sample_ids,
        kind="tube" if tube else "random",
        seed=seed,
        stage=stage,
        epoch=epoch,
        ratio=ratio,
        teacher_ratio=teacher_ratio,
        rounding=rounding,
        masks=masks,
    )


def block_order(
    sample_ids: Tensor,
    shape: tuple[int, int],
    wanted: int,
    *,
    seed: int,
    stream: int = 0,
    smallest: int = 16,
    aspect: float = 0.3,
) -> Tensor:
    """Tokens in the order in which random blocks cover them, so that the first ``wanted`` are a block mask.

    As in BEiT's algorithm 1, one block after the other is drawn: its area evenly from ``smallest`` to what is still
    wanted, its height over its width from [aspect, 1 / aspect], evenly in the logarithm, its place evenly. Differences:
    areas are whole numbers and there are 64 ratios, so that everything is integers and no device rounds otherwise; a
    side longer than the grid is cut to it, where BEiT draws again; the last block is cut off, in raster order, where
    BEiT may end a few tokens short.

    Args:
        sample_ids: [B] int64. shape: (rows, columns) of the grid.
        wanted: tokens that a mask takes; later blocks have the smallest area.
        seed, stream: as in :func:`cohobate.kernels.tokens.random_order`.
        smallest: area of the smallest block. Where fewer than four of them are wanted, a quarter of ``wanted``, so
            that small grids have masks of several blocks too.
        aspect: smallest height over width, in (0, 1].

    Returns:
        [B, rows * columns] int32: block after block, in raster order inside each. Tokens that none of the 24 blocks has
        covered come last, in random order: of 4,000 masks of 14 x 14 tokens none needs them where half the tokens are
        wanted, 1.5 % need a few where three quarters are.

    Raises:
        UserError: a block without area, or a ratio out of range.
    """
    if smallest < 1:
        raise UserError(f"block_min: expected at least 1 token, got {smallest}")
    if not 0 < aspect <= 1:
        raise UserError(f"block_aspect: expected a number in (0, 1], got {aspect}")
    rows, columns = shape
    size, device = rows * columns, sample_ids.device
    smallest = min(smallest, max(1, wanted // 4))
    for_area, for_aspect, *for_place = _block_words(sample_ids, seed, stream)
    level, places = (for_aspect * _ASPECTS) >> 32, torch.stack(for_place, dim=-1)
    sides = _block_sides(rows, columns, aspect, device)
    line = torch.arange(0, 2 * max(shape), 2, device=device)  # places in half tokens
    free = torch.ones(len(sample_ids), rows, columns, dtype=torch.bool, device=device)
    cover = torch.zeros(len(sample_ids), rows, columns, dtype=torch.int64, device=device)  # blocks until a token's
    for block in range(_BLOCKS):
        areas = (free.sum((1, 2)) + (wanted - size - smallest + 1)).clamp_min(1)  # to choose from
        area = smallest + ((for_area[:, block] * areas) >> 32)
        reach, room = sides[area, level[:, block]].unbind(1)
        middle = torch.add(reach, (places[:, block] * room) >> 32, alpha=2)
        outside = (line - middle.unsqueeze(2)).abs() > reach.unsqueeze(2)  # [B, 2, places of a row or column]
        free &= outside[:, 0, :rows, None] | outside[:, 1, None, :columns]
        cover += free
    cover = cover.flatten(1)
    scattered = random_order(sample_ids, size, seed=seed, stream=stream)
    key = cover * size + torch.where(cover < _BLOCKS, torch.arange(size, device=device), scattered)
    return key.argsort(dim=1).to(torch.int32)


def _block_words(sample_ids: Tensor, seed: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words a block, [B, blocks] int64 each; word * n >> 32 is a number below n."""
    ids = sample_ids.view(-1, 1)
    zero = torch.zeros(len(sample_ids), _BLOCKS, dtype=torch.int64, device=ids.device)
    block = torch.arange(_BLOCK_COUNTER, _BLOCK_COUNTER + _BLOCKS, device=ids.device)
    counter = (zero + block, zero + (ids & _WORD), zero + ((ids >> 32) & _WORD), zero + stream)
    return philox_reference(counter, (seed & _WORD, (seed >> 32) & _WORD))


@lru_cache(maxsize=16)
def _block_sides(rows: int, columns: int, aspect: float, device: torch.device) -> Tensor:
    """[N + 1, 64, 2, 2] int64, by area and ratio: (height - 1, width - 1) of a block, and how many (tops, lefts).

    One less than a side is how far a block's outermost tokens are from its middle, in half tokens. Computed on the CPU,
    whatever the device.
    """
    middles = [(1 - 2 * (level + 0.5) / _ASPECTS) * math.log(aspect) for level in range(_ASPECTS)]
    ratio = torch.tensor([math.exp(middle) for middle in middles], dtype=torch.float64)
    area = torch.arange(rows * columns + 1, dtype=torch.float64).view(-1, 1)
    height, width = (area * ratio).sqrt().round().clamp(1, rows), (area / ratio).sqrt().round().clamp(1, columns)
    reach = torch.stack([height, width], dim=-1).long() - 1
    return torch.stack([reach, torch.tensor([rows, columns]) - reach], dim=-2).to(device)
