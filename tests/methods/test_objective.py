"""An objective: the weighted sum of its terms, whatever launches they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cohobate.methods import AlignTerm, PixelTerm, objective
from cohobate.models.pixels import normalise


def test_terms_of_the_same_kind_and_of_another() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c, t = (torch.randn(2, 5, 8, generator=g) for _ in range(4))
    a.requires_grad_()
    pixels = torch.randint(0, 256, (2, 1, 4, 4, 3), dtype=torch.uint8, generator=g)
    rows = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
    guess = torch.randn(2, 2, 12, generator=g)
    step = objective(
        [
            AlignTerm("direct", [a, b], [t, t], weight=2.0, loss="mse"),
            PixelTerm("pixels", guess, pixels, rows, (1, 2, 2), (0.5,) * 3, (0.5,) * 3, weight=3.0, normalise=False),
            AlignTerm("sharp", [b], [t], loss="l1"),
            AlignTerm("generated", [c], [t], weight=0.5, loss="mse"),
        ],
        {"signal": torch.tensor(1.0)},
    )
    patches = (pixels / 255 - 0.5) / 0.5
    patches = patches.view(2, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 12)
    chosen = torch.stack([patches[i, rows[i].long()] for i in range(2)])
    expected = {
        "direct": (F.mse_loss(a, t) + F.mse_loss(b, t)) / 2,
        "generated": F.mse_loss(c, t),
        "sharp": F.l1_loss(b, t),
        "pixels": F.mse_loss(guess, chosen),
    }
    assert {name: float(value) for name, value in step.terms.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in expected.items()}, rel=1e-5
    )
    total = 2 * expected["direct"] + 0.5 * expected["generated"] + expected["sharp"] + 3 * expected["pixels"]
    assert float(step.total) == pytest.approx(float(total), rel=1e-5)
    (got,), (want,) = torch.autograd.grad(step.total, a), torch.autograd.grad(total, a)
    torch.testing.assert_close(got, want)
    assert float(step.signals["signal"]) == 1.0


def test_the_sum_over_layers() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, t = (torch.randn(2, 5, 8, generator=g) for _ in range(3))
    step = objective([AlignTerm("sum", [a, b], [t, t], 2.0, loss="mse", reduction="sum")])
    expected = float(F.mse_loss(a, t) + F.mse_loss(b, t))
    assert float(step.terms["sum"]) == pytest.approx(expected, rel=1e-6)
    assert float(step.total) == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("convention", ["mae", "videomae"])
def test_normalised_float_pixels_have_the_same_target(convention: str, normalised: bool) -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 2, 8, 4, 3), dtype=torch.uint8, generator=g)
    rows = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
    guess = torch.randn(2, 2, 48, generator=g, requires_grad=True)

    def term(images: torch.Tensor) -> PixelTerm:
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
        return PixelTerm("pixels", guess, images, rows, (2, 4, 2), mean, std, 1.0, convention, normalised)

    results: list[Any] = []
    floats = normalise(pixels, term(pixels))
    for images in (pixels, floats, floats.double()):
        step = objective([term(images)])
        results.append((float(step.total.detach()), torch.autograd.grad(step.total, guess)[0]))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-7)
