"""Normalised float pixels in a method: the loss of the bytes that they came from, whatever the teacher's statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cohobate import models
from cohobate.methods import DBOT, DBOTOptions, SymmetricDBOT
from cohobate.models import Decoder, MaskTokenHead
from cohobate.models.pixels import normalise
from cohobate.teacher import FrozenTeacher, ResizedTeacher

# fp32 against fp32: bytes normalised once or twice, and the same sums in another order.
LOSS, GRADIENT = 1e-6, 2e-5
THEIRS: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25)}


def method_of(parts: Any, kind: str, patch: int = 8) -> DBOT:
    student = parts.student()
    torch.manual_seed(2)
    size: Any = {"image_size": (parts.ROWS * patch, parts.COLUMNS * patch), "patch": patch}
    encoder = models.build("tiny", width=48, depth=2, heads=4, precision=parts.FP32, **size, **THEIRS)
    teacher: Any = FrozenTeacher(encoder)
    if patch != 8:
        teacher = ResizedTeacher(teacher, student.grid)
    torch.manual_seed(1)
    if kind == "symmetric":
        return SymmetricDBOT(student, MaskTokenHead(student, 48), teacher)
    decoder = Decoder.for_encoder(student, 48, width=32, depth=2, heads=2)
    return DBOT(student, decoder, teacher, DBOTOptions(target_norm=True))


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("masks", [1, 2])
def test_the_loss_is_that_of_the_bytes(parts: Any, kind: str, masks: int) -> None:
    method = method_of(parts, kind)
    plan, pixels = parts.plan(method.student.grid, masks=masks), parts.batch().pixels
    losses, gradients = [], []
    for given in (pixels, normalise(pixels, method.student)):
        method.zero_grad()
        step = method.loss(parts.Batch(given), plan, signals=True)
        step.total.backward()
        losses.append((float(step.total.detach()), float(step.signals["target/std"])))
        gradients.append({name: gradient.clone() for name, gradient in parts.gradients(method).items()})
    assert losses[1] == pytest.approx(losses[0], rel=LOSS)
    for name, gradient in gradients[0].items():
        assert parts.relative(gradients[1][name], gradient) < GRADIENT, name
    wanted, found = (method.targets(parts.Batch(given)) for given in (pixels, normalise(pixels, method.student)))
    assert parts.relative(found, wanted) < 1e-5


def test_statistics_that_are_not_taken_over_would_show(parts: Any) -> None:
    """The student's floats given to the teacher as they are: another target altogether."""
    method = method_of(parts, "asymmetric")
    wanted = method.targets(parts.batch())
    floats = normalise(parts.batch().pixels, method.student)
    (wrong,) = method.teacher(floats, norm=True)
    (right,) = method.teacher(normalise(parts.batch().pixels, method.teacher), norm=True)
    (bytes_,) = method.teacher(parts.batch().pixels, norm=True)
    assert parts.relative(right, bytes_) < 1e-5 and parts.relative(wrong, bytes_) > 0.1
    assert parts.relative(method.targets(parts.Batch(floats)), wanted) < 1e-5


def test_a_teacher_of_another_size_gets_resized_floats(parts: Any) -> None:
    """Bytes are rounded behind the resize, floats are not: up to half of 1/255, 0.3 % of the spread; 1 % is allowed."""
    method = method_of(parts, "asymmetric", patch=4)
    wanted = method.targets(parts.batch())
    found = method.targets(parts.Batch(normalise(parts.batch().pixels, method.student)))
    assert 1e-6 < parts.relative(found, wanted) < 1e-2
