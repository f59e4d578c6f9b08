"""Exports rebuild every encoder and decoder that the package has, and so do the frozen teachers made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cohobate.errors import UserError
from cohobate.models import Decoder, PixelDecoder, Precision, VisionTransformer
from cohobate.models.exports import export, load_decoder, load_encoder, read_config
from cohobate.teacher import FrozenTeacher
from cohobate.tokens import TokenGrid

FP32 = Precision(torch.float32, torch.float32)
IMAGE, CLIP = TokenGrid.image((16, 24), 8), TokenGrid(4, 16, 16, (2, 8, 8))
KINDS: dict[str, tuple[TokenGrid, dict[str, Any]]] = {
    "plain": (IMAGE, {}),
    "without a class token": (IMAGE, {"cls_token": False}),
    "clip": (CLIP, {"cls_token": False}),
    "clip with a class token": (CLIP, {}),
    "frames without tubelets": (TokenGrid(3, 16, 16, (1, 8, 8)), {}),
    "layer scales": (IMAGE, {"layer_scale": 0.1}),
    "BEiT's": (IMAGE, {"layer_scale": 0.1, "positions": "none", "relative_positions": True}),
}


def encoder(kind: str) -> VisionTransformer:
    """With no neutral parameter left."""
    grid, options = KINDS[kind]
    model = VisionTransformer(grid, 32, 2, 2, 3.0, precision=FP32, mean=(0.1, 0.2, 0.3), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_comes_back(tmp_path: Path, kind: str) -> None:
    model = encoder(kind)
    again = load_encoder(export(tmp_path, model, None, {"stage": "a"}), FP32)
    assert (again.grid, again.mean, again.prefix) == (model.grid, model.mean, model.prefix)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    usual = {
        "img_size",
        "patch_size",
        "in_chans",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "class_token",
        "fc_norm",
    }
    extra = {"clip": {"frames", "tubelet"}, "layer scales": {"init_values"}, "plain": set()}
    if kind in extra:  # what timm does not know stands there only where it is needed
        assert set(read_config(tmp_path)["model_args"]) - usual == extra[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_teacher_of_it_gives_its_features(kind: str) -> None:
    model = encoder(kind)
    pixels = torch.randint(0, 256, (2, *model.grid.pixel_shape), dtype=torch.uint8)
    for found, wanted in zip(FrozenTeacher(model, (1, 2))(pixels), model.intermediates(pixels, [1, 2]), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)  # fp32, norms folded into products


@pytest.mark.parametrize("layout", [Decoder, PixelDecoder])
def test_a_decoder_comes_back(tmp_path: Path, layout: type[Decoder]) -> None:
    model = encoder("clip")
    decoder = layout(model.grid, 32, 7, 48, 3, 4, 2.0, prefix=0)
    export(tmp_path, model, decoder, {})
    again = load_decoder(tmp_path, load_encoder(tmp_path))
    assert type(again) is layout and again.grid == model.grid and again.out == 7
    assert all(torch.equal(again.state_dict()[key], value) for key, value in decoder.state_dict().items())


def test_exports_without_a_decoder_or_with_another_one(tmp_path: Path) -> None:
    model = encoder("plain")
    export(tmp_path, model, None, {})
    assert load_decoder(tmp_path, model) is None
    export(tmp_path, model, nn.Linear(2, 2), {})
    with pytest.raises(UserError, match="expected the decoder's sizes in"):
        load_decoder(tmp_path, model)
    export(tmp_path, model, Decoder(model.grid, 32, 7, 48, 1, 4), {})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["decoder"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"missing: blocks\.1\."):
        load_decoder(tmp_path, model)


def test_a_garbled_export_is_one_clear_line(tmp_path: Path) -> None:
    """A configuration without a size, of an odd size, and a weight that is not a number."""
    model = encoder("plain")
    export(tmp_path, model, None, {})
    whole = json.loads((tmp_path / "config.json").read_text())
    for key, value, said in (
        ("embed_dim", None, "KeyError: 'embed_dim'"),
        ("img_size", 16, "TypeError"),
        ("patch_size", [8, "a"], "TypeError"),
    ):
        shape = {name: size for name, size in (whole["model_args"] | {key: value}).items() if size is not None}
        (tmp_path / "config.json").write_text(json.dumps(whole | {"model_args": shape}))
        with pytest.raises(UserError, match=f"expected all sizes in '.*config.json', got others .{said}"):
            load_encoder(tmp_path)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    export(tmp_path, model, None, {})
    with pytest.raises(UserError, match=r"expected finite numbers in .*, got NaN or inf in norm\.weight"):
        load_encoder(tmp_path)
