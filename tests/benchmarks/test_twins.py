"""Every method of the step benchmark against its literal twin: two programs, written apart, that compute one step."""

from __future__ import annotations

import pytest
import torch

from cohobate.benchmarks import step
from cohobate.benchmarks.harness import errors
from cohobate.benchmarks.twins import MAKERS, Shape, make
from cohobate.errors import UserError


@pytest.mark.parametrize("recipe", MAKERS)
def test_the_engines_step_is_the_literal_one(recipe: str) -> None:
    twins = make(Shape(recipe, "tiny", image=64, batch=2, frames=4), "cpu", seed=0)
    literal = step.Step(twins.literal, lambda: twins.literal(*twins.inputs), step.literal_update(twins.literal))
    method = twins.exact()
    engine = step.Step(method, lambda: method.loss(twins.batch, twins.plan).total, step.engine_update(method))
    assert engine.parameters.keys() == literal.parameters.keys()
    assert max(value or 0 for value in errors(engine.results(engine()), literal.results(literal()))) < step.SAME_MATHS


def test_a_twin_with_other_weights_is_noticed() -> None:
    twins = make(Shape("amd", "tiny", image=64, batch=1, frames=4), "cpu", seed=0)
    expected = twins.literal(*twins.inputs)
    with torch.no_grad():
        twins.literal.alignment.generators[0].mask_token += 0.1  # type: ignore[union-attr, index]
    assert not torch.isclose(twins.literal(*twins.inputs), expected, rtol=step.SAME_MATHS)


def test_there_is_no_teacher_larger_than_the_largest() -> None:
    with pytest.raises(UserError, match=r"--size: expected one of .*large for amd, got 'huge'"):
        make(Shape("amd", "huge"), "cpu", seed=0)
