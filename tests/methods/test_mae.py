"""MAE against the literal implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cohobate.errors import UserError
from cohobate.methods import MAE, MAEOptions
from cohobate.models import Precision

LOSS, GRADIENT = 1e-6, 1e-5  # fp32 against fp32: the same sums in another order


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_gradients_are_the_literal_ones(parts: Any, norm_pix: bool) -> None:
    method = parts.mae_method(MAEOptions(norm_pix=norm_pix))
    literal = parts.literal_mae(method, norm_pix)
    plan = parts.plan(method.student.grid)
    step = method.loss(parts.batch(), plan)
    expected = literal(parts.images(method.student), plan.where.float())
    assert float(step.total.detach()) == pytest.approx(float(expected.detach()), rel=LOSS)
    step.total.backward()
    expected.backward()
    got, want = parts.gradients(method), parts.gradients(literal)
    assert set(got) == set(want)
    for name, gradient in want.items():
        assert parts.relative(got[name], gradient) < GRADIENT, name


def test_bf16_trains_the_same_parameters(parts: Any) -> None:
    method = parts.mae_method(precision=Precision())
    step = method(parts.batch(), parts.plan(method.student.grid), signals=True)
    step.total.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert set(step.terms) == {"loss/pixels"} and float(step.signals["target/std"]) > 0
    exact = parts.mae_method().loss(parts.batch(), parts.plan(method.student.grid)).total
    assert float(step.total) == pytest.approx(float(exact), rel=5e-3)


def test_videomae_targets_of_a_clip(parts: Any) -> None:
    """Each colour of a tubelet is standardised by itself: zero mean and unit variance over its pixels."""
    encoder = parts.student(frames=4, tubelet=2, cls_token=False)
    method = MAE(encoder, parts.decoder(encoder), MAEOptions(convention="videomae"))
    pixels = torch.randint(0, 256, (2, 4, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = method.targets(parts.Batch(pixels))
    assert target.shape == (2, 48, 2 * 8 * 8 * 3)
    colours = target.unflatten(-1, (-1, 3))
    torch.testing.assert_close(colours.mean(-2), torch.zeros(2, 48, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(colours.std(-2), torch.ones(2, 48, 3), rtol=0, atol=1e-4)


def test_refuses(parts: Any) -> None:
    encoder = parts.student()
    with pytest.raises(UserError, match="decoder: expected a head of 192 pixels, got 20"):
        MAE(encoder, parts.decoder(encoder, 20))
    method = parts.mae_method()
    with pytest.raises(UserError, match="plan: expected at least one hidden token, got none"):
        method.loss(parts.batch(), parts.plan(encoder.grid, ratio=0.0))
