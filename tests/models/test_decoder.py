"""The decoder: shapes, rows that are asked for alone, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cohobate import kernels, models, random_plan
from cohobate.errors import UserError
from cohobate.kernels.backends import use_attention
from cohobate.masking import MaskPlan
from cohobate.models import Decoder, PixelDecoder, Precision, VisionTransformer

FP32 = Precision(torch.float32, torch.float32)


def parts(**changes: object) -> tuple[VisionTransformer, Decoder, MaskPlan]:
    torch.manual_seed(0)
    arguments: dict[str, object] = {
        "image_size": 32,
        "patch": 8,
        "width": 48,
        "depth": 1,
        "heads": 4,
        "precision": FP32,
    }
    encoder = models.build("tiny", **(arguments | changes))  # type: ignore[arg-type]
    decoder = Decoder.for_encoder(encoder, 20, width=24, depth=2, heads=2)
    return encoder, decoder, random_plan(encoder.grid, torch.arange(3), seed=0, stage=0, epoch=0, ratio=0.75)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_rows_asked_for_alone_change_no_number(cls_token: bool, residual: torch.dtype) -> None:
    precision = Precision(torch.float32, residual)
    encoder, decoder, plan = parts(cls_token=cls_token, precision=precision)
    x = torch.randn(3, encoder.prefix + plan.student, 48)
    queries = plan.masked + encoder.prefix
    some = decoder(x, plan, queries)
    whole = kernels.tokens.take(decoder(x, plan), queries)
    assert some.shape == (3, 12, 20)
    tolerance = 1e-5 if residual == torch.float32 else 2e-2  # sums in another order; rounded to the residual's dtype
    torch.testing.assert_close(some, whole, rtol=tolerance, atol=tolerance)


def test_the_prediction_of_a_hidden_patch_depends_on_where_it_is() -> None:
    """Same mask token, other position: predictions differ; and the order of visible tokens in the plan is respected."""
    _, decoder, plan = parts()
    x = torch.randn(3, 1 + plan.student, 48)
    out = decoder(x, plan, plan.masked + 1)
    assert float((out[:, 0] - out[:, 1]).detach().abs().max()) > 1e-3
    order = plan.order.clone()
    order[:, [0, 1]] = order[:, [1, 0]]
    moved = x.clone()
    moved[:, [1, 2]] = moved[:, [2, 1]]
    swapped = MaskPlan(order, plan.student, plan.teacher)
    torch.testing.assert_close(decoder(moved, swapped, plan.masked + 1), out, rtol=1e-5, atol=1e-5)


def test_published_parameter_count() -> None:
    """26.01 M beside a ViT-B: 111.66 M trained in all, less the encoder's 85.65 M."""
    with torch.device("meta"):
        decoder = Decoder.for_encoder(models.build("base"), 768)
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(26.01, abs=0.01)


def test_reset_is_a_function_of_the_generator() -> None:
    _, first, _ = parts()
    before = {name: p.clone() for name, p in first.named_parameters()}
    _, second, _ = parts()
    for decoder in (first, second):
        decoder.reset(torch.Generator().manual_seed(4))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(before["mask_token"], first.mask_token)
    assert not torch.equal(before["head.weight"], first.head.weight)


def test_flops_are_what_torch_counts() -> None:
    _, decoder, plan = parts()
    x = torch.randn(3, 1 + plan.student, 48)
    counter = FlopCounterMode(display=False)  # it does not count SDPA on the CPU, nor our ops
    with counter, kernels.use_backend("reference"), use_attention("explicit"), torch.no_grad():
        decoder(x, plan, plan.masked + 1)
    assert counter.get_total_flops() == 3 * decoder.flops(plan.student, 12)


def test_a_decoder_of_another_encoder() -> None:
    encoder, decoder, _ = parts()
    other, _, _ = parts(width=96)
    decoder.check_fits(encoder)
    with pytest.raises(UserError, match="decoder: expected the student's encoder_width 96, got 48"):
        decoder.check_fits(other)
    with pytest.raises(UserError, match="out: expected at least 1"):
        Decoder.for_encoder(encoder, 0)


def clip_parts(precision: Precision = FP32, **changes: object) -> tuple[VisionTransformer, PixelDecoder, MaskPlan]:
    """A clip of 2 x 4 x 4 tubelets, 8 of 32 visible."""
    encoder, _, _ = parts(frames=4, tubelet=2, cls_token=False, precision=precision, **changes)
    decoder = PixelDecoder.for_encoder(encoder, 20, width=24, depth=2, heads=2)
    plan = random_plan(encoder.grid, torch.arange(3), seed=0, stage=0, epoch=0, ratio=0.75, tube=True)
    return encoder, decoder, plan


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_the_pixel_decoder_computes_masked_rows_alone(residual: torch.dtype) -> None:
    """Behind the visible rows, in the order of ``plan.masked``; all rows asked for give the same numbers there."""
    _, decoder, plan = clip_parts(Precision(torch.float32, residual))
    x = torch.randn(3, plan.student, 48)
    masked = decoder(x, plan)
    everything = torch.arange(32, dtype=torch.int32).expand(3, -1)
    tolerance = 1e-5 if residual == torch.float32 else 2e-2  # sums in another order; rounded to the residual's dtype
    torch.testing.assert_close(masked, decoder(x, plan, everything)[:, plan.student :], rtol=tolerance, atol=tolerance)
    assert masked.shape == (3, 24, 20) and torch.equal(decoder(x, plan, decoder.masked_rows(plan)), masked)


def test_the_pixel_decoder_does_not_mind_the_order_of_the_plan() -> None:
    """Visible tokens told in another order, with their positions: the same predictions; other positions: others."""
    _, decoder, plan = clip_parts()
    x = torch.randn(3, plan.student, 48)
    out = decoder(x, plan)
    order, moved = plan.order.clone(), x.clone()
    order[:, [0, 5]], moved[:, [0, 5]] = order[:, [5, 0]], moved[:, [5, 0]]
    same = decoder(moved, MaskPlan(order, plan.student, plan.teacher))
    torch.testing.assert_close(same, out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(decoder(moved, plan), out, rtol=1e-3, atol=1e-3)


def test_the_pixel_decoder_with_a_cls_token() -> None:
    encoder, _, plan = parts()
    decoder = PixelDecoder.for_encoder(encoder, 20, width=24, depth=1, heads=2)
    x = torch.randn(3, 1 + plan.student, 48, requires_grad=True)
    out = decoder(x, plan)
    assert out.shape == (3, 12, 20) and decoder.prefix == 1
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert float(gradient[:, 0].abs().min()) > 0  # masked rows attend to it


@pytest.mark.parametrize(("size", "width", "heads", "count"), [("small", 192, 3, 2.08), ("base", 384, 6, 7.69)])
def test_published_pixel_decoders(size: str, width: int, heads: int, count: float) -> None:
    """Four blocks of half the encoder's width; parameters (M) are counted without the embedding, which has no bias."""
    with torch.device("meta"):
        encoder = models.build(size, frames=16, tubelet=2, cls_token=False)
        decoder = PixelDecoder.for_encoder(encoder)
    assert (decoder.width, decoder.depth, decoder.out) == (width, 4, 1536)
    assert decoder.blocks[0].attn.heads == heads and decoder.embed.bias is None  # type: ignore[union-attr]
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad) - decoder.embed.weight.numel()
    assert trained / 1e6 == pytest.approx(count, abs=0.005)


def test_the_pixel_decoder_is_drawn_as_published() -> None:
    """The embedding as torch draws a Linear, half of Xavier's spread and less; the token cut at one deviation."""
    _, decoder, _ = clip_parts()
    decoder.reset(torch.Generator().manual_seed(4))
    first = decoder.mask_token.clone()
    bound = float(decoder.embed.weight.abs().max())
    assert 0.9 * 48**-0.5 < bound <= 48**-0.5
    assert 0.015 < float(first.abs().max()) <= 0.02
    decoder.reset(torch.Generator().manual_seed(4))
    assert torch.equal(decoder.mask_token, first)
    assert not decoder.head.bias.any()


def test_flops_of_the_pixel_decoder_are_what_torch_counts() -> None:
    _, decoder, plan = clip_parts()
    x = torch.randn(3, plan.student, 48)
    counter = FlopCounterMode(display=False)
    with counter, kernels.use_backend("reference"), use_attention("explicit"), torch.no_grad():
        decoder(x, plan)
    assert counter.get_total_flops() == 3 * decoder.flops(plan.student, 24)
