"""Mask plans: permutations, nesting, both rounding rules, tubes, blocks, and randomness as a function of the sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cohobate import MaskPlan, TokenGrid, random_plan
from cohobate.errors import UserError
from cohobate.kernels.tokens import random_order
from cohobate.kernels.tokens.order import philox_reference
from cohobate.masking import KINDS, block_order, kept, mask_plan

GRID = TokenGrid.image(224, 16)
IDS = torch.tensor([7, 3, 2**40, 0])


def plan_of(ids: Tensor = IDS, grid: TokenGrid = GRID, **changes: object) -> MaskPlan:
    arguments: dict[str, object] = {"seed": 5, "stage": 1, "epoch": 9, "ratio": 0.75} | changes
    draw = mask_plan if arguments.keys() & {"kind", "count", "block_min", "block_aspect"} else random_plan
    return draw(grid, ids, **arguments)  # type: ignore[operator]


def assert_well_formed(plan: MaskPlan) -> None:
    batch, tokens = plan.order.shape
    everything = torch.arange(tokens, dtype=torch.int32).expand(batch, -1)
    assert torch.equal(plan.order.sort(1).values, everything)
    assert torch.equal(plan.order.gather(1, plan.where.long()), everything)
    for segment in plan.order.tensor_split([plan.student, plan.teacher], dim=1):
        assert bool((segment.diff(dim=1) > 0).all())


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    ratio=st.floats(0, 0.95),
    share=st.floats(0, 1),
    rounding=st.sampled_from(["keep", "mask"]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_plan_is_a_nested_permutation(
    height: int, width: int, ratio: float, share: float, rounding: str, kind: str, seed: int
) -> None:
    grid = TokenGrid.image((height * 4, width * 4), 4)
    try:
        kept(grid.size, ratio, rounding)
    except UserError:
        return
    plan = plan_of(grid=grid, ratio=ratio, teacher_ratio=ratio * share, rounding=rounding, kind=kind, seed=seed)
    assert_well_formed(plan)
    student, teacher = plan.to_boolean()
    assert bool((teacher <= student).all())
    assert int((~student).sum()) == len(IDS) * plan.student
    assert int((~teacher).sum()) == len(IDS) * plan.teacher


def test_the_counts_of_the_papers() -> None:
    image = plan_of()
    assert (image.student, image.teacher, image.masked.shape[1], image.diff.shape[1]) == (49, 196, 147, 147)
    clip = plan_of(grid=TokenGrid(16, 224, 224, (2, 16, 16)), ratio=0.9, teacher_ratio=0.75, rounding="mask", tube=True)
    assert (clip.student, clip.teacher, clip.diff.shape[1], clip.masked.shape[1]) == (160, 392, 232, 1408)


def test_the_two_rounding_rules_differ() -> None:
    assert (kept(196, 0.9, "keep"), kept(196, 0.9, "mask")) == (19, 20)


def test_tubes_repeat_the_spatial_mask_in_every_frame() -> None:
    plan = plan_of(grid=TokenGrid(8, 24, 16, (2, 4, 4)), ratio=0.8, teacher_ratio=0.4, rounding="mask", tube=True)
    assert_well_formed(plan)
    for mask in plan.to_boolean():
        frames = mask.view(len(IDS), 4, 24)
        assert torch.equal(frames, frames[:, :1].expand_as(frames))
    assert not torch.equal(plan.order[0], plan.order[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_same_mask_in_any_batch(kind: str) -> None:
    whole = plan_of(kind=kind)
    for i in range(len(IDS)):
        assert torch.equal(plan_of(IDS[i : i + 1], kind=kind).order[0], whole.order[i])
    assert torch.equal(plan_of(IDS.flip(0), kind=kind).order, whole.order.flip(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"seed": 6}, {"stage": 2}, {"epoch": 10}, {"stage": 0, "epoch": 9 + 2**10}])
def test_seed_stage_and_epoch_change_the_mask(change: dict[str, int], kind: str) -> None:
    assert not torch.equal(plan_of(kind=kind, **change).order, plan_of(kind=kind).order)


def test_no_two_epochs_of_any_stage_share_masks() -> None:
    ids = torch.arange(1)
    orders = {
        plan_of(ids, stage=stage, epoch=epoch).order.numpy().tobytes() for stage in range(4) for epoch in range(16)
    }
    assert len(orders) == 64


@pytest.mark.parametrize("kind", ["block", "inverse_block"])
def test_several_block_masks_of_a_sample(kind: str) -> None:
    plan, one = plan_of(masks=3, kind=kind), plan_of(kind=kind)
    assert_well_formed(plan)
    assert torch.equal(plan.order[: len(IDS)], one.order)
    assert len({row.numpy().tobytes() for row in plan.order}) == 3 * len(IDS)


@pytest.mark.parametrize("seed", [5, -3, 2**64 - 1])
def test_several_masks_of_a_sample(seed: int) -> None:
    """View 0 is the single mask, bit for bit; further views are functions of the sample too, and are not alike."""
    plan, one = plan_of(masks=3, seed=seed), plan_of(seed=seed)
    assert_well_formed(plan)
    views, drawn = plan.order.chunk(3), random_order(IDS, 196, seed=seed, stream=1 << 22 | 9)
    assert torch.equal(one.visible, drawn[:, :49].sort(dim=1).values)  # so that old runs can be repeated
    assert plan.order.shape == (3 * len(IDS), 196) and torch.equal(views[0], one.order)
    assert (plan.student, plan.teacher) == (one.student, one.teacher)
    assert len({row.numpy().tobytes() for row in plan.order}) == 3 * len(IDS)
    assert torch.equal(plan_of(IDS[2:3], masks=3, seed=seed).order, torch.stack([view[2] for view in views]))
    assert torch.equal(plan_of(masks=2, seed=seed).order, plan.order[: 2 * len(IDS)])
    # of 49 visible tokens two independent masks share a quarter: about 12, and never half
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(views[0][:, :49], views[1][:, :49], strict=True)]
    assert all(2 < count < 25 for count in shared)


def test_masks_are_uniform() -> None:
    """Every token is visible equally often: 4096 samples, 6 standard deviations of a binomial share."""
    plan = plan_of(torch.arange(4096))
    share = (~plan.to_boolean()[0]).double().mean(0)
    assert float((share - 0.25).abs().max()) < 6 * (0.25 * 0.75 / 4096) ** 0.5


def test_a_count_wins_over_the_ratio() -> None:
    """BEiT hides 78 of 196 tokens, CLIP's ViT-H student 78 of 256; a count is of a frame where frames are alike."""
    assert plan_of(kind="block", count=78).student == 118
    assert plan_of(kind="block", count=78, grid=TokenGrid.image(224, 14)).student == 178
    assert plan_of(kind="tube", count=20, grid=TokenGrid(8, 24, 16, (2, 4, 4))).student == 4 * 4


def covered(sample: int, shape: tuple[int, int], wanted: int, smallest: int, aspect: float) -> list[int]:
    """The order in which blocks cover the tokens of one sample, literally: token by token, block by block."""
    rows, columns = shape
    smallest = min(smallest, max(1, wanted // 4))
    order: list[int] = []
    for block in range(24):
        counter = (2**31 + block, sample & 0xFFFFFFFF, sample >> 32, 77)
        words = philox_reference(tuple(torch.tensor(word) for word in counter), (3, 0))  # type: ignore[arg-type]
        u = [int(word) / 2**32 for word in words]
        most = max(smallest, wanted - len(order))
        area = smallest + int(u[0] * (most - smallest + 1))
        ratio = math.exp(math.log(aspect) + (int(u[1] * 64) + 0.5) / 64 * (math.log(1 / aspect) - math.log(aspect)))
        height = min(max(round((area * ratio) ** 0.5), 1), rows)
        width = min(max(round((area / ratio) ** 0.5), 1), columns)
        top, left = int(u[2] * (rows - height + 1)), int(u[3] * (columns - width + 1))
        for y in range(top, top + height):
            for x in range(left, left + width):
                if y * columns + x not in order:
                    order.append(y * columns + x)
    scattered = random_order(torch.tensor([sample]), rows * columns, seed=3, stream=77)[0].tolist()
    return order + sorted(set(range(rows * columns)) - set(order), key=lambda token: scattered[token])


@pytest.mark.parametrize(
    ("shape", "wanted", "smallest", "aspect"),
    [((14, 14), 78, 16, 0.3), ((14, 14), 180, 16, 0.3), ((4, 4), 12, 16, 0.3), ((3, 9), 9, 4, 0.1), ((1, 1), 0, 16, 1)],
)
def test_blocks_are_what_the_algorithm_says(shape: tuple[int, int], wanted: int, smallest: int, aspect: float) -> None:
    ids = torch.tensor([0, 5, 2**40 + 3])
    found = block_order(ids, shape, wanted, seed=3, stream=77, smallest=smallest, aspect=aspect)
    assert found.tolist() == [covered(sample, shape, wanted, smallest, aspect) for sample in ids.tolist()]


def test_what_a_block_mask_hides_and_an_inverse_one_shows_hangs_together() -> None:
    """The share of right neighbours that are in the set too: 40 % where tokens are alone, far more in blocks."""

    def together(members: Tensor) -> float:
        inside = members.view(-1, 14, 14)
        return float((inside[:, :, :-1] & inside[:, :, 1:]).sum() / inside[:, :, :-1].sum())

    ids = torch.arange(512)
    hidden = {kind: plan_of(ids, kind=kind, ratio=0.6).to_boolean()[0] for kind in ("random", "block", "inverse_block")}
    assert together(~hidden["random"]) == pytest.approx(0.4, abs=0.02)
    assert together(hidden["block"]) > 0.85
    assert together(~hidden["inverse_block"]) > 0.8


def test_the_teacher_of_a_block_mask_lacks_its_first_blocks() -> None:
    plan = plan_of(kind="block", ratio=0.6, teacher_ratio=0.3)
    order = block_order(IDS, (14, 14), 196 - kept(196, 0.6), seed=5, stream=1 << 22 | 9)
    assert torch.equal(plan.order[:, plan.teacher :], order[:, : 196 - plan.teacher].sort(1).values)
    assert torch.equal(plan.visible, order[:, -plan.student :].sort(1).values)


@pytest.mark.parametrize("kind", ["block", "inverse_block"])
def test_blocks_are_the_same_in_every_frame(kind: str) -> None:
    plan = plan_of(grid=TokenGrid(8, 64, 48, (2, 8, 8)), kind=kind, ratio=0.5)
    assert_well_formed(plan)
    frames = plan.to_boolean()[0].view(len(IDS), 4, 48)
    assert torch.equal(frames, frames[:, :1].expand_as(frames)) and int(frames[0, 0].sum()) == 24


class IntegersOnly(TorchDispatchMode):
    """Fails on every floating tensor: devices may round it differently."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            assert not (isinstance(part, Tensor) and part.is_floating_point()), func
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_integer_functions(kind: str) -> None:
    plan_of(kind=kind)  # the table of a grid's blocks is computed once, on the CPU
    with IntegersOnly():
        plan_of(kind=kind)


def test_boolean_masks_convert_both_ways() -> None:
    plan = plan_of(ratio=0.8, teacher_ratio=0.5)
    back = MaskPlan.from_boolean(*plan.to_boolean())
    assert torch.equal(back.order, plan.order) and (back.student, back.teacher) == (plan.student, plan.teacher)
    trusted = MaskPlan.from_boolean(*plan.to_boolean(), counts=(plan.student, plan.teacher))
    assert torch.equal(trusted.order, plan.order)
    alone = MaskPlan.from_boolean(plan.to_boolean()[0])
    assert alone.teacher == 196 and torch.equal(alone.visible, plan.visible)


def test_boolean_masks_that_do_not_fit() -> None:
    student, teacher = plan_of(ratio=0.8, teacher_ratio=0.5).to_boolean()
    with pytest.raises(UserError, match="teacher: expected every token the student sees"):
        MaskPlan.from_boolean(teacher, student)
    uneven = student.clone()
    uneven[0] = False
    with pytest.raises(UserError, match="student: expected as many visible tokens in every sample, got from 39 to 196"):
        MaskPlan.from_boolean(uneven)
    with pytest.raises(UserError, match="teacher: expected the student's shape"):
        MaskPlan.from_boolean(student, teacher[:2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ratio": 1.0}, "ratio: expected a mask ratio in"),
        ({"ratio": -0.1}, "ratio: expected a mask ratio in"),
        ({"ratio": 0.999}, "ratio: .*leaves at least 1 of 196"),
        ({"teacher_ratio": 0.8}, "teacher_ratio: expected one that leaves at least .* got 0.8, which leaves 39"),
        ({"teacher_ratio": 0.3, "count": 20}, "teacher_ratio: .*the student's 176 of 196 .*which leaves 137"),
        ({"kind": "blocks"}, "kind: expected one of random, block, inverse_block, tube; got 'blocks'"),
        ({"count": 196}, "count: expected 0 to 195 of 196 tokens, got 196"),
        ({"kind": "block", "block_min": 0}, "block_min: expected at least 1 token, got 0"),
        ({"kind": "block", "block_aspect": 1.5}, r"block_aspect: expected a number in \(0, 1\], got 1.5"),
        ({"masks": 0}, "masks: expected at least 1, got 0"),
        ({"rounding": "floor"}, "rounding: expected one of keep, mask"),
        ({"stage": 2**10}, "stage: expected"),
        ({"epoch": -1}, "epoch: expected"),
    ],
)
def test_refuses(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        plan_of(**change)


def test_a_ratio_that_double_arithmetic_rounds_to_nothing() -> None:
    with pytest.raises(UserError, match="leaves at least 1 of 10"):
        kept(10, 0.9)


@pytest.mark.parametrize(("student", "teacher"), [(0, 4), (3, 2), (2, 9)])
def test_cuts_that_do_not_nest(student: int, teacher: int) -> None:
    with pytest.raises(UserError, match="student, teacher: expected 0 < student"):
        MaskPlan(torch.arange(8, dtype=torch.int32).view(1, 8), student, teacher)


def test_an_order_of_another_dtype() -> None:
    with pytest.raises(UserError, match="order: expected int32"):
        MaskPlan(torch.arange(8).view(1, 8), 2, 8)
