"""MAE against the literal implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate import models, random_plan
from cohobate.errors import UserError
from cohobate.masking import MaskPlan
from cohobate.methods import MAE, MAEOptions
from cohobate.models import Decoder, PixelDecoder, Precision
from cohobate.models.pixels import normalise

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
    with pytest.raises(UserError, match="convention: expected one of mae, videomae; got 'timesformer'"):
        MAEOptions(convention="timesformer")
    with pytest.raises(UserError, match="plan: expected 3 samples, got 6"):
        method.loss(parts.batch(), parts.plan(encoder.grid, masks=2))


def test_videomae_is_that_of_transformers(parts: Any) -> None:
    """Loss and gradients of VideoMAEForPreTraining in float64, with the same weights and masks."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=(32, 48), patch_size=8, num_frames=4, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=192, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, layer_norm_eps=1e-6, use_mean_pooling=False, norm_pix_loss=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.VideoMAEForPreTraining(config).train()
    model.decoder.norm.eps = 1e-6  # as everywhere in the published model; transformers leaves torch's 1e-5 there
    for parameter in model.parameters():  # as large as ours, and no norm or bias left at 1 or 0
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if parameter.mean() == 1 else 0.0, 0.1)
        else:
            torch.nn.init.xavier_uniform_(parameter)
    student = parts.student(frames=4, tubelet=2, cls_token=False)
    decoder = PixelDecoder.for_encoder(student, width=32, depth=2, heads=2)
    method = MAE(student, decoder, MAEOptions(convention="videomae"))
    theirs = from_transformers(dict(model.named_parameters()))
    ours = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert set(ours) == set(theirs)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, *student.grid.pixel_shape), dtype=torch.uint8, generator=g)
    plan: MaskPlan = parts.plan(student.grid, tube=True)
    clips = normalise(pixels.double() / 255, student).movedim(-1, 2)
    expected = model.double()(clips, bool_masked_pos=plan.to_boolean()[0]).loss
    step = method.loss(parts.Batch(pixels), plan)
    assert float(step.total.detach()) == pytest.approx(float(expected.detach()), rel=LOSS)
    step.total.backward()
    expected.backward()
    wanted = from_transformers({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in ours.items():
        assert parameter.grad is not None and parts.relative(parameter.grad, wanted[name]) < GRADIENT, name


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the weights of a VideoMAE model, whose keys have no bias: zeros."""
    names = {
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.attention": "attn",
        "videomae.embeddings.patch_embeddings.projection": "student.patch_embed.proj",
        "videomae.encoder.layer": "student.blocks", "videomae.layernorm": "student.norm",
        "encoder_to_decoder": "decoder.embed", "decoder_layers": "blocks", "mask_token": "decoder.mask_token",
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    for query in [name for name in found if ".query." in name]:
        q, v = found.pop(query), found.pop(query.replace("query", "value"))
        k = found.pop(query.replace("query", "key"), torch.zeros_like(q))
        found[query.replace("query", "qkv")] = torch.cat([q, k, v])
    return found


@pytest.mark.parametrize("clip", [True, False])
def test_normalised_float_pixels_give_the_same_loss(parts: Any, clip: bool) -> None:
    student = parts.student(**({"frames": 4, "tubelet": 2, "cls_token": False} if clip else {}))
    decoder = (PixelDecoder if clip else Decoder).for_encoder(student, width=32, depth=2, heads=2)
    method = MAE(student, decoder, MAEOptions(convention="videomae" if clip else "mae"))
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, *student.grid.pixel_shape), dtype=torch.uint8, generator=g)
    plan: MaskPlan = parts.plan(student.grid)
    expected = method.loss(parts.Batch(pixels), plan).total
    got = method.loss(parts.Batch(normalise(pixels, student)), plan, signals=True)
    assert float(got.total.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)  # there and back in fp32
    trained = [p for p in method.parameters() if p.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(got.total, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        assert parts.relative(mine, theirs) < GRADIENT


def test_flops_of_videomae() -> None:
    """208.9 GFLOP a clip with a ViT-B, less 9.2 saved: hidden patches not embedded, visible ones not decoded."""
    with torch.device("meta"):
        student = models.build("base", frames=16, tubelet=2, cls_token=False)
        method = MAE(student, PixelDecoder.for_encoder(student), MAEOptions(convention="videomae"))
    plan = random_plan(student.grid, torch.arange(1), seed=0, stage=0, epoch=0, ratio=0.9, rounding="mask", tube=True)
    assert method.flops(plan) / 1e9 == pytest.approx(208.9 - 6.6 - 2.6, abs=0.15)
