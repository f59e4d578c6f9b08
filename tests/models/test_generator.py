"""AMD's generator: shapes, rows that are asked for alone, its token, initialisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cohobate import TokenGrid, kernels, random_plan
from cohobate.errors import UserError
from cohobate.kernels.backends import use_attention
from cohobate.masking import MaskPlan
from cohobate.models import Generator, Precision
from cohobate.models.layers import Stream

FP32 = Precision(torch.float32, torch.float32)
CLIP = TokenGrid(4, 32, 32, (2, 8, 8))


def parts(grid: TokenGrid = CLIP, **changes: Any) -> tuple[Generator, MaskPlan, torch.Tensor]:
    """A generator of 2 blocks and a plan in which the student sees 8 of 32 tokens and the teacher 16 (clips)."""
    torch.manual_seed(0)
    generator = Generator(grid, 32, 4, **({"precision": FP32} | changes))
    plan = random_plan(grid, torch.arange(3), seed=0, stage=0, epoch=0, ratio=0.75, teacher_ratio=0.5)
    return generator, plan, torch.randn(3, generator.prefix + plan.student, 32)


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_last_block_computes_the_generated_rows_alone(prefix: int) -> None:
    """Plain blocks over all rows of concat(x + E[visible], token + E[diff]) give the same numbers there; no norm."""
    grid = TokenGrid.image(32, 8) if prefix else CLIP
    generator, plan, x = parts(grid, prefix=prefix)
    table = generator.pos_embed[0]
    rows = torch.cat([x[:, prefix:], generator.mask_token.expand(3, plan.teacher - plan.student, -1)], dim=1)
    rows = rows + table[prefix + plan.teacher_rows.long()]
    stream = torch.cat([x[:, :prefix] + table[:prefix], rows], dim=1)
    state = Stream(stream)
    for block in generator.blocks:
        state = block(state, torch.float32)
    whole = state.settled()
    got = generator(x, plan)
    assert got.shape == (3, plan.teacher - plan.student, 32)
    torch.testing.assert_close(got, whole[:, prefix + plan.student :], rtol=1e-5, atol=1e-5)


def test_the_token_is_trained_or_frozen() -> None:
    for frozen in (False, True):
        generator, plan, x = parts(frozen_token=frozen)
        generator(x, plan).square().sum().backward()
        assert ("mask_token" in dict(generator.named_parameters())) != frozen
        assert "mask_token" in generator.state_dict()
        assert (generator.mask_token.grad is None) == frozen
    trained, _, _ = parts()
    trained.load_state_dict(generator.state_dict())  # one kind's weights go into the other


def test_it_is_drawn_from_the_generator() -> None:
    first, _, _ = parts()
    second, _, _ = parts(frozen_token=True)
    for module in (first, second):
        module.reset(torch.Generator().manual_seed(7))
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert 0.01 < float(first.mask_token.abs().max()) <= 0.02


def test_flops_are_what_torch_counts() -> None:
    generator, plan, x = parts()
    counter = FlopCounterMode(display=False)
    with counter, kernels.use_backend("reference"), use_attention("explicit"), torch.no_grad():
        generator(x, plan)
    assert counter.get_total_flops() == 3 * generator.flops(plan.student, plan.teacher)


def test_residual_stream_and_products_have_their_dtypes() -> None:
    generator, plan, x = parts(precision=Precision(torch.bfloat16, torch.float32))
    assert generator(x.bfloat16(), plan).dtype == torch.float32
    low, _, _ = parts(precision=Precision(torch.bfloat16, torch.bfloat16))
    assert low(x.bfloat16(), plan).dtype == torch.bfloat16


def test_refuses() -> None:
    with pytest.raises(UserError, match="depth: expected at least 1 block, got 0"):
        parts(depth=0)
    with pytest.raises(UserError, match="heads: expected a divisor of the width 32, got 5"):
        Generator(CLIP, 32, 5)
