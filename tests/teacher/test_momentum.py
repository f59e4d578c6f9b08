"""A teacher that follows: what it computes is the average's, and only the average moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cohobate import TokenGrid
from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.teacher import FrozenTeacher
from cohobate.teacher.momentum import MomentumTeacher

GRID = TokenGrid.image(16, 4)
EXACT = Precision(torch.float32, torch.float32)


def encoder(seed: int, depth: int = 2, **shape: Any) -> VisionTransformer:
    """No neutral parameter: norms off 1 and 0, so that a weight left out shows."""
    model = VisionTransformer(GRID, 24, depth, 2, precision=EXACT, **shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, *GRID.pixel_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


BEIT = {"positions": "none", "layer_scale": 0.1, "relative_positions": True}


@pytest.mark.parametrize("precision", [EXACT, Precision()], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("norm", "shape"), [(False, {}), (True, {}), (True, BEIT)])
def test_it_is_the_teacher_of_the_average(precision: Precision, norm: bool, shape: dict[str, Any]) -> None:
    """Against a frozen teacher built anew from weights that were averaged one by one; the very same bits."""
    student, start = encoder(1, **shape), encoder(2, **shape)
    expected = copy.deepcopy(start)
    teacher = MomentumTeacher(start, 0.9, precision=precision)
    teacher(pixels())  # whatever a CPU has laid out by now must not survive
    with torch.no_grad():
        for _ in range(3):
            teacher.follow(student)
            for mine, theirs in zip(expected.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 1 - 0.9)
            for parameter in student.parameters():
                parameter.mul_(1.1 if parameter.requires_grad else 1.0)
    for queries in (None, torch.tensor([[0, 3], [2, 16]], dtype=torch.int32)):
        (found,) = teacher(pixels(), queries=queries, norm=norm)
        (right,) = FrozenTeacher(expected, precision=precision)(pixels(), queries=queries, norm=norm)
        assert torch.equal(found, right)


def test_a_small_step_is_not_rounded_away() -> None:
    """300 steps of 1e-4 move bf16 features; in bf16 weights none of them would."""
    teacher, student = MomentumTeacher(encoder(2), 0.9999, precision=Precision()), encoder(1)
    before = teacher(pixels())[0]
    name, parameter = next(iter(teacher.average.named_parameters()))
    start = parameter.clone()
    for _ in range(300):
        teacher.follow(student)
    moved = (teacher.average.get_parameter(name) - start) / (student.get_parameter(name) - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**300), rtol=1e-3, atol=0)
    assert not torch.equal(teacher(pixels())[0], before)


def test_the_first_blocks_of_a_student() -> None:
    """dBOT's first teacher for ViT-L has none: only the patch embedding follows then."""
    student = encoder(1)
    teacher = MomentumTeacher(encoder(2, depth=0), 0.0, precision=EXACT)
    teacher.follow(student)
    assert torch.equal(teacher(pixels())[0], FrozenTeacher(student, (0,), precision=EXACT)(pixels())[0])


def test_it_shows_no_parameters_and_keeps_its_storage() -> None:
    teacher = MomentumTeacher(encoder(2), 0.5)
    assert not list(teacher.parameters()) and not teacher.state_dict() and not list(teacher.buffers())
    places = [layer.qkv.weight.data_ptr() for layer in teacher._blocks]
    fingerprint = teacher.fingerprint()
    teacher.follow(encoder(1))
    assert [layer.qkv.weight.data_ptr() for layer in teacher._blocks] == places  # CUDA graphs read there
    assert teacher.fingerprint() == fingerprint
    assert not any(parameter.requires_grad for parameter in teacher.average.parameters())


def test_refuses() -> None:
    with pytest.raises(UserError, match=r"momentum: expected 0 <= momentum < 1, got 1\.0"):
        MomentumTeacher(encoder(2), 1.0)
    with pytest.raises(UserError, match=r"teacher\.momentum: expected a student of the teacher's shape, got another"):
        MomentumTeacher(encoder(2, depth=3), 0.5).follow(encoder(1))
