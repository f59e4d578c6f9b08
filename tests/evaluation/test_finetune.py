"""Fine-tuning: rates a layer, schedule, the model that comes out, and that it learns; the recipes are the published."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cohobate import data
from cohobate.errors import UserError
from cohobate.evaluation import RECIPES, Classifier, ImageSource, finetune
from cohobate.evaluation.finetune import _Updater, layer_id, rate, trainable
from cohobate.models import Precision, VisionTransformer, build
from cohobate.teacher.sources import load_source
from cohobate.teacher.sources.own import read

EXACT = Precision(torch.float32, torch.float32)
QUICK = dataclasses.replace(RECIPES["quick"], epochs=6, warmup=1, blr=0.02, batch=16)


def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return build(image_size=16, patch=4, width=24, depth=3, heads=2, precision=EXACT)


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, brighter or not."""
    root, draw = tmp_path_factory.mktemp("shades"), np.random.default_rng(0)
    for part, count in (("train", 64), ("test", 24)):
        for index in range(count):
            pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8) + np.uint8(60 * (index % 2))
            folder = root / part / ("dark", "light")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def sources(root: Path) -> tuple[ImageSource, ImageSource]:
    train, test = (
        ImageSource(data.build_manifest(root, split=part), (16, 16), batch_size=16, workers=0)
        for part in ("train", "test")
    )
    return train, test


def test_rates_fall_from_the_head_to_the_embedding() -> None:
    """layer_decay ^ (L + 1 - id), and no decay for biases, norms, tokens and positions."""
    model = Classifier(encoder(), 5, drop_path=0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in model.groups(0.5, 0.05):
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["scale"], group["weight_decay"]
    assert found["head.weight"] == (1.0, 0.05) and found["head.bias"] == found["fc_norm.weight"] == (1.0, 0.0)
    assert found["encoder.blocks.2.mlp.fc1.weight"] == (0.5, 0.05)
    assert found["encoder.blocks.0.norm1.bias"] == (0.125, 0.0)
    assert found["encoder.patch_embed.proj.weight"] == (0.0625, 0.05)
    assert found["encoder.cls_token"] == found["encoder.pos_embed"] == (0.0625, 0.0)
    assert set(found) == {n for n in names.values() if not n.startswith("encoder.norm.")}
    assert layer_id("encoder.rel_pos_bias.relative_position_bias_table", 3) == 0 and layer_id("fc_norm.bias", 3) == 4


def test_the_schedule_and_the_published_recipes() -> None:
    recipe = RECIPES["mae_base"]
    peak = recipe.blr * 1024 / 256
    assert [rate(e, recipe, peak) for e in (0, 2.5, 5, 52.5, 100)] == pytest.approx(
        [0, 1e-3, 2e-3, (2e-3 + 1e-6) / 2, 1e-6]
    )
    table = {name: (r.epochs, r.warmup, r.layer_decay, r.drop_path, r.blr * 4, r.clip) for name, r in RECIPES.items()}
    assert table["mae_large"] == (50, 5, 0.75, 0.2, 4e-3, None)
    assert table["dbot_large"] == (50, 5, 0.75, 0.25, pytest.approx(1.2e-3), 1.0)
    assert table["dbot_huge_448"] == (10, 2, 0.9, 0.4, pytest.approx(2.8e-4), None)
    assert table["clip_base"] == (100, 20, 0.65, 0.1, pytest.approx(2e-4), None)  # an absolute rate at batch 1024
    with pytest.raises(UserError, match="layer_decay: expected more than 0, at most 1, got 2"):
        dataclasses.replace(recipe, layer_decay=2)


def test_the_classifier_is_timms_average_pooling_with_fc_norm() -> None:
    """Its exported weights through a literal forward: blocks, mean over patches, norm, head."""
    model = Classifier(encoder(), 5, drop_path=0.0, head_std=0.5).eval()
    weights = model.weights()
    assert {"fc_norm.weight", "head.bias", "blocks.2.attn.qkv.weight", "pos_embed"} <= set(weights)
    assert not any(key.startswith("norm.") for key in weights)
    pixels = torch.randint(0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (x,) = read(model.encoder, "it").forward(pixels, [3])
    pooled = F.layer_norm(x[:, 1:].mean(1), (24,), weights["fc_norm.weight"], weights["fc_norm.bias"], 1e-6)
    wanted = F.linear(pooled, weights["head.weight"], weights["head.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), wanted, rtol=1e-4, atol=1e-5)


def test_it_learns_and_repeats(shades: Path) -> None:
    lines: list[str] = []
    model, row = finetune(encoder(), *sources(shades), QUICK, say=lines.append)
    assert row["value"] > 0.9 and row["label"] == "class" and row["skipped"] == 0 and len(lines) == 6
    before = encoder()
    assert before.pos_embed is not None and model.encoder.pos_embed is not None
    assert not torch.equal(before.pos_embed, model.encoder.pos_embed)  # positions are trained
    assert torch.equal(before.norm.weight, model.encoder.norm.weight)  # and the final norm is out of use
    again, same = finetune(encoder(), *sources(shades), QUICK)
    assert row == same
    assert all(torch.equal(a, b) for a, b in zip(model.weights().values(), again.weights().values()))


def test_a_batch_in_parts_is_the_batch(shades: Path) -> None:
    """Without drop path the gradient of four passes is that of one; AdamW magnifies what rounding differs by."""
    recipe = dataclasses.replace(QUICK, drop_path=0.0, batch=32, epochs=2, warmup=1)
    results = []
    for size in (32, 8):
        train, test = sources(shades)
        train.batch_size = size
        results.append(finetune(encoder(), train, test, recipe))
    (whole, row), (parts, other) = results
    assert row["batch"] == other["batch"] == 32 and other["loss"] == pytest.approx(row["loss"], rel=1e-4)
    for key, value in whole.weights().items():
        torch.testing.assert_close(parts.weights()[key], value, rtol=1e-3, atol=1e-3)


def test_accumulated_batches_and_all_augmentations(shades: Path) -> None:
    """Four passes an update; every part of the published recipe at once runs and stays finite."""
    recipe = dataclasses.replace(RECIPES["mae_base"], epochs=2, warmup=1, batch=32, ema=0.9, clip=1.0)
    train, test = sources(shades)
    train.batch_size = 8
    model, row = finetune(encoder(), train, test, recipe)
    assert row["batch"] == 32 and math.isfinite(row["loss"]) and row["skipped"] == 0
    assert all(bool(value.isfinite().all()) for value in model.weights().values())


def test_averaged_weights_are_the_result() -> None:
    """The average after three updates, by hand; its decay starts low so that it follows early on."""
    recipe = dataclasses.replace(RECIPES["quick"], ema=0.99, warmup=0)
    model = Classifier(encoder(), 3, drop_path=0.0)
    updater = _Updater(model, recipe, batch=256)
    average = model.head.weight.detach().clone()
    for update in range(3):
        for parameter in updater.parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        updater.step(epoch=1.0)
        decay = (1 + update) / (10 + update)
        average = decay * average + (1 - decay) * model.head.weight.detach()
    updater.finish()
    torch.testing.assert_close(model.head.weight.detach(), average, rtol=1e-5, atol=1e-7)


def test_an_update_that_is_not_finite_is_skipped() -> None:
    model = Classifier(encoder(), 3, drop_path=0.0)
    updater = _Updater(model, dataclasses.replace(RECIPES["quick"], warmup=0), batch=256)
    before = model.head.weight.detach().clone()
    for parameter in updater.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    updater.step(epoch=1.0)
    assert torch.equal(model.head.weight.detach(), before) and int(updater.skipped) == 1


def test_any_plain_vit_can_be_trained() -> None:
    """A rebuilt source, its layer scales folded, is the same function."""
    donor = build(image_size=16, patch=4, width=24, depth=2, heads=2, precision=EXACT, layer_scale=0.5)
    source = load_source(donor)
    model = trainable(source, EXACT)
    pixels = torch.randint(0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model.intermediates(pixels, [2])[0], donor.intermediates(pixels, [2])[0], rtol=1e-4, atol=1e-5
        )
    odd = load_source(build(image_size=16, patch=4, width=24, depth=2, heads=2, relative_positions=True))
    with pytest.raises(UserError, match="expected a plain ViT to fine-tune, encoder has relative positions"):
        trainable(odd)


def test_settings_that_cannot_be(shades: Path) -> None:
    train, test = sources(shades)
    with pytest.raises(UserError, match="label: expected one of class; got 'colour'"):
        finetune(encoder(), train, test, QUICK, label="colour")
    with pytest.raises(UserError, match=r"blr: expected less than 1e\+30: no loss of epoch"):
        finetune(encoder(), train, test, dataclasses.replace(QUICK, blr=1e30, epochs=3))
    unlabelled = dataclasses.replace(train, manifest=dataclasses.replace(train.manifest, labels=None, label_names=()))
    with pytest.raises(UserError, match="labels: expected labelled images in the train part"):
        finetune(encoder(), unlabelled, test, QUICK)
    assert train.manifest.labels is not None
    one = train.manifest.subset(np.flatnonzero(train.manifest.labels[:, 0] == 1))
    with pytest.raises(UserError, match="labels: expected two or more classes of 'class' in the train part, got only"):
        finetune(encoder(), dataclasses.replace(train, manifest=one), test, QUICK)
