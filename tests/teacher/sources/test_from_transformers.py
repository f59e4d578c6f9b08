"""Every transformers family: rebuilt, it gives the numbers of the transformers model itself, at every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate.errors import UserError
from cohobate.models import Precision
from cohobate.teacher import FrozenTeacher
from cohobate.teacher.sources import fit, load_source
from cohobate.teacher.sources.source import Original, agreement

transformers = pytest.importorskip("transformers")

Make = Callable[..., Any]
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}

# name: (config class, model class, options, prefix tokens, activation)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "vit": ("ViTConfig", "ViTModel", {}, 1, "gelu"),
    "vit without qkv bias": ("ViTConfig", "ViTModel", {"qkv_bias": False}, 1, "gelu"),
    "vit classifier": ("ViTConfig", "ViTForImageClassification", {"hidden_act": "gelu_new"}, 1, "gelu_tanh"),
    "vit wide": ("ViTConfig", "ViTModel", {"image_size": (16, 40), "patch_size": (8, 8)}, 1, "gelu"),
    "deit": ("DeiTConfig", "DeiTModel", {}, 2, "gelu"),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}, 1, "gelu"),
    "dinov2 giant": ("Dinov2Config", "Dinov2Model", {"use_swiglu_ffn": True}, 1, "swiglu"),
    "dinov2 registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 3},
        4,
        "gelu",
    ),
    "clip tower": ("CLIPVisionConfig", "CLIPVisionModel", {}, 1, "quick_gelu"),
    "clip projection": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {"hidden_act": "gelu"}, 1, "gelu"),
    "siglip tower": ("SiglipVisionConfig", "SiglipVisionModel", {}, 0, "gelu_tanh"),
    "mae": ("ViTMAEConfig", "ViTMAEModel", {}, 1, "gelu"),
    "mae pretraining": ("ViTMAEConfig", "ViTMAEForPreTraining", DECODER, 1, "gelu"),
    "videomae": ("VideoMAEConfig", "VideoMAEModel", {"num_frames": 4}, 0, "gelu"),
}


def build(config: str, model: str, options: dict[str, Any]) -> Any:
    return getattr(transformers, model)(getattr(transformers, config)(**(SMALL | options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_features_are_the_models(family: str, scramble: Make, pixels_of: Make) -> None:
    config, kind, options, prefix, activation = FAMILIES[family]
    model = scramble(build(config, kind, options))
    source = load_source(model)
    assert source.reasons == () and source.anatomy is not None and source.original is not None
    assert (source.width, source.depth, source.prefix) == (32, 3, prefix)
    assert source.anatomy.activation == activation

    pixels, layers = pixels_of(source.grid), [0, 1, 2, 3]
    wanted = source.original.hidden_states(pixels, layers)
    found = source.anatomy.forward(pixels, layers)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape == (2, prefix + source.grid.size, 32)
        # two evaluations of one formula in fp32: the bound every rebuilt source is held to; measured 1e-6
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_the_adapter_gives_what_the_model_calls_hidden_states(scramble: Make, pixels_of: Make) -> None:
    """The layers' numbering against transformers' own, with an input normalised by hand."""
    model = scramble(build("Dinov2Config", "Dinov2Model", {}))
    source = load_source(model, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    assert source.original is not None
    pixels = pixels_of(source.grid)
    images = pixels[:, 0].permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        wanted = model(images, output_hidden_states=True).hidden_states
    found = source.original.hidden_states(pixels, [0, 2, 3])
    for layer, x in zip((0, 2, 3), found, strict=True):
        torch.testing.assert_close(x, wanted[layer])


def test_the_final_norm_is_read(scramble: Make, pixels_of: Make) -> None:
    model = scramble(build("ViTConfig", "ViTModel", {}))
    source = load_source(model)
    assert source.anatomy is not None and source.original is not None
    pixels = pixels_of(source.grid)
    with torch.no_grad():
        wanted = model(source.original.images(pixels)).last_hidden_state
    torch.testing.assert_close(source.anatomy.forward(pixels, [3], norm=True)[0], wanted, rtol=1e-5, atol=1e-5)


def test_mae_masks_nothing_and_stays_as_it_was(scramble: Make, pixels_of: Make) -> None:
    model = scramble(build("ViTMAEConfig", "ViTMAEModel", {"mask_ratio": 0.75})).train()
    source = load_source(model)
    assert source.original is not None
    x = source.original.hidden_states(pixels_of(source.grid), [3])[0]
    again = source.original.hidden_states(pixels_of(source.grid), [3])[0]
    assert x.shape[1] == 1 + source.grid.size and torch.equal(x, again)
    assert model.config.mask_ratio == 0.75 and model.training and model.layernorm.training


def test_videomae_has_no_bias_for_keys(scramble: Make) -> None:
    source = load_source(scramble(build("VideoMAEConfig", "VideoMAEModel", {"num_frames": 4})))
    assert source.grid.shape == (2, 3, 3) and source.anatomy is not None
    bias = source.anatomy.blocks[0].qkv_bias
    assert bias is not None
    q, k, v = bias.chunk(3)
    assert not k.any() and q.all() and v.all()


def test_dinov3_runs_as_it_is(scramble: Make, pixels_of: Make) -> None:
    model = scramble(build("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}))
    source = load_source(model)
    assert source.anatomy is None and "rotary positions" in source.reasons[0]
    assert source.original is not None and source.prefix == 5 and source.width == 32
    pixels = pixels_of(source.grid)
    found = source.original.hidden_states(pixels, [2, 3])
    assert not found[1].requires_grad and found[1].shape == (2, 14, 32)
    with torch.no_grad():
        wanted = model(source.original.images(pixels)).last_hidden_state
    torch.testing.assert_close(model.norm(found[1]), wanted)


def test_relative_positions_run_as_they_are(scramble: Make) -> None:
    model = scramble(build("BeitConfig", "BeitModel", {"use_relative_position_bias": True}))
    with pytest.raises(UserError, match="mean= and std="):
        load_source(model)
    source = load_source(model, mean=[0.5] * 3, std=[0.5] * 3)
    assert source.anatomy is None and "relative positions" in source.reasons[0]


def test_a_wrong_reading_is_caught(scramble: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose forward is not what its parts look like: the self-check refuses it."""
    model = scramble(build("ViTConfig", "ViTModel", {}))
    block = type(first_layer(model))
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: 1.001 * result(forward(*args, **kwargs)))
    source = load_source(model)
    assert source.anatomy is None and source.reasons[0].startswith("rebuilt features differ by")
    assert source.original is not None


def first_layer(model: Any) -> Any:
    return (model.layers if hasattr(model, "layers") else model.encoder.layer)[0]


def result(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def test_a_half_precision_instance_is_checked_in_fp32(scramble: Make, pixels_of: Make) -> None:
    model = scramble(build("Dinov2Config", "Dinov2Model", {})).bfloat16()
    source = load_source(model)
    assert source.reasons == () and source.anatomy is not None and source.anatomy.patch.dtype == torch.float32
    assert source.original is not None
    assert source.original.hidden_states(pixels_of(source.grid), [1])[0].dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


def test_weights_of_an_instance_are_copied(scramble: Make, pixels_of: Make) -> None:
    model = scramble(build("ViTConfig", "ViTModel", {}))
    source = load_source(model)
    assert source.anatomy is not None
    pixels = pixels_of(source.grid)
    before = source.anatomy.forward(pixels, [3])[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(source.anatomy.forward(pixels, [3])[0], before)


# ----------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_a_preprocessor(tmp_path: Path, scramble: Make) -> None:
    model = scramble(build("Dinov2Config", "Dinov2Model", {}))
    model.save_pretrained(tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    source = load_source(f"hf:{tmp_path}")
    assert source.anatomy is not None and source.original is not None
    assert source.mean == pytest.approx((0.1, 0.2, 0.3)) and source.std == pytest.approx((0.4, 0.5, 0.6))
    assert "preprocessor_config.json" in source.notes[0]
    torch.testing.assert_close(source.anatomy.blocks[1].fc1, model.state_dict()["encoder.layer.1.mlp.fc1.weight"])


def test_rescaling_by_another_factor_is_folded_in(tmp_path: Path, scramble: Make) -> None:
    """Bytes brought to [-1, 1] by x / 127.5 - 1 there are (x / 255 - 0.5) / 0.5 here."""
    scramble(build("ViTConfig", "ViTModel", {})).save_pretrained(tmp_path)
    settings = {"image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0], "rescale_factor": 1 / 127.5}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    source = load_source(f"hf:{tmp_path}")
    assert source.mean == pytest.approx((0.5, 0.5, 0.5)) and source.std == pytest.approx((0.5, 0.5, 0.5))


def test_a_folder_without_one_uses_the_familys(tmp_path: Path, scramble: Make) -> None:
    scramble(build("CLIPVisionConfig", "CLIPVisionModel", {})).save_pretrained(tmp_path)
    source = load_source(f"hf:{tmp_path}")
    assert source.mean[0] == pytest.approx(0.48145466) and "CLIP's" in source.notes[0]


def test_the_tower_of_a_two_tower_checkpoint(tmp_path: Path, scramble: Make, pixels_of: Make) -> None:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "vocab_size": 99,
    }
    model = scramble(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL)))
    model.save_pretrained(tmp_path)
    source, whole = load_source(f"hf:{tmp_path}"), load_source(model)
    assert source.reasons == () and source.anatomy is not None and whole.anatomy is not None
    pixels = pixels_of(source.grid)
    torch.testing.assert_close(source.anatomy.forward(pixels, [3]), whole.anatomy.forward(pixels, [3]))


# ------------------------------------------------------------------------------------------------- CLIP's projection


def clip(scramble: Make, **options: Any) -> Any:
    return scramble(build("CLIPVisionConfig", "CLIPVisionModelWithProjection", {"projection_dim": 20} | options))


def projected(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Every token as CLIP makes its class token: the final norm, then the projection."""
    with torch.no_grad():
        tower = model.vision_model
        tokens = model.visual_projection(tower.post_layernorm(tower(images).last_hidden_state))
        torch.testing.assert_close(tokens[:, 0], model(images).image_embeds, rtol=1e-5, atol=1e-5)
    return tokens


def test_clips_tokens_behind_its_projection(scramble: Make, pixels_of: Make) -> None:
    model = clip(scramble)
    source = load_source(model, projection=True)
    assert source.anatomy is not None and source.original is not None
    assert (source.width, source.anatomy.width, source.prefix) == (20, 32, 1)
    pixels = pixels_of(source.grid)
    wanted = projected(model, source.original.images(pixels))
    for found in (
        source.anatomy.forward(pixels, [3])[0],
        FrozenTeacher(source.anatomy, precision=Precision(torch.float32, torch.float32))(pixels)[0],
    ):
        # two evaluations of one formula in fp32, as everywhere here
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    plain = load_source(model)
    assert plain.anatomy is not None and plain.anatomy.head is None and plain.width == 32
    with torch.no_grad():
        model.visual_projection.weight.add_(1)  # its owner goes on training it
    assert torch.equal(source.anatomy.forward(pixels, [3])[0], source.anatomy.forward(pixels, [3])[0])
    assert not torch.equal(source.anatomy.head, model.visual_projection.weight)


@pytest.mark.parametrize("towers", [1, 2])
def test_a_folder_with_its_projection(towers: int, tmp_path: Path, scramble: Make, pixels_of: Make) -> None:
    if towers == 1:
        model = clip(scramble)
    else:
        text = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_hidden_layers": 1, "vocab_size": 99}
        config = transformers.CLIPConfig(
            text_config=text | {"num_attention_heads": 4, "projection_dim": 20},
            vision_config=SMALL | {"projection_dim": 20},
            projection_dim=20,
        )
        model = scramble(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    source = load_source(f"hf:{tmp_path}?projection=true")
    assert source.anatomy is not None and source.anatomy.head is not None and source.width == 20
    assert torch.equal(source.anatomy.head, model.visual_projection.weight)
    assert load_source(f"hf:{tmp_path}").width == 32
    pixels = pixels_of(source.grid)
    found, instance = source.anatomy, load_source(model, projection=True).anatomy
    assert instance is not None
    torch.testing.assert_close(found.forward(pixels, [3]), instance.forward(pixels, [3]))


def test_a_projection_that_is_missing(tmp_path: Path, scramble: Make) -> None:
    """From a checkpoint that lacks it, transformers would draw one; without the option nobody would miss it."""
    clip(scramble).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("visual_projection.weight"))
    assert load_source(f"hf:{tmp_path}").reasons == ()
    with pytest.raises(UserError, match=r"missing: visual_projection\.weight"):
        load_source(f"hf:{tmp_path}?projection=true")


def test_models_without_a_projection(tmp_path: Path, scramble: Make) -> None:
    siglip = scramble(build("SiglipVisionConfig", "SiglipVisionModel", {}))
    with pytest.raises(UserError, match="projection: expected a CLIP model with a projection, got Siglip"):
        load_source(siglip, projection=True)
    siglip.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="projection: expected a CLIP model with a projection, got siglip"):
        load_source(f"hf:{tmp_path}?projection=true")
    assert load_source(f"hf:{tmp_path}").width == 32


def test_a_projection_of_a_model_that_cannot_be_rebuilt(scramble: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = clip(scramble)
    block = type(model.vision_model.encoder.layers[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: 1.001 * result(forward(*args, **kwargs)))
    with pytest.raises(UserError, match=r"projection: hf .* could not be rebuilt: rebuilt features differ"):
        load_source(model, projection=True)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_surplus_keys_are_listed(tmp_path: Path, scramble: Make) -> None:
    scramble(build("Dinov2Config", "Dinov2Model", {})).save_pretrained(tmp_path)

    def change(weights: dict[str, Any]) -> None:
        del weights["encoder.layer.1.norm1.weight"]
        weights["encoder.layer.9.norm1.weight"] = torch.ones(32)

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        load_source(f"hf:{tmp_path}")
    assert "missing: encoder.layer.1.norm1.weight" in str(error.value)
    assert "surplus: encoder.layer.9.norm1.weight" in str(error.value)


def test_heads_may_be_there_or_not(tmp_path: Path, scramble: Make) -> None:
    """A classifier's checkpoint has a head that the encoder lacks, and lacks the encoder's pooler."""
    scramble(build("ViTConfig", "ViTForImageClassification", {})).save_pretrained(tmp_path)
    assert load_source(f"hf:{tmp_path}").reasons == ()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load"):
        load_source(f"hf:{tmp_path}")


# ------------------------------------------------------------------------------------------------------ another size


def test_another_size_is_what_the_model_makes_of_it(scramble: Make, pixels_of: Make) -> None:
    """DINOv2 with registers fits its own positions to the input: ours, interpolated once, give its numbers."""
    model = scramble(build("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"image_size": 40}))
    source = load_source(model)
    student = type(source.grid).image(48, 16)  # 3 x 3 tokens
    fitted, match = fit(source, student, "pixels")
    assert match.grid.shape == (1, 3, 3) and match.pixel_size == (24, 24) and fitted.grid == match.grid
    assert fitted.anatomy is not None and isinstance(fitted.original, Original)
    # fp32 interpolation in one order; a table that is not antialiased is off by 1e-1
    assert agreement(fitted.anatomy.forward, fitted.original, match.grid, [0, 3]) <= 1e-5
    assert source.grid.shape == (1, 5, 5)


def test_a_module_of_one_size_is_left_behind(scramble: Make) -> None:
    source = load_source(scramble(build("ViTConfig", "ViTModel", {})))
    fitted, _ = fit(source, type(source.grid).image(32, 8), "positions")
    assert fitted.anatomy is not None and fitted.original is None and fitted.grid.shape == (1, 4, 4)


def test_rotary_positions_fit_any_size(scramble: Make, pixels_of: Make) -> None:
    model = scramble(build("DINOv3ViTConfig", "DINOv3ViTModel", {}))
    fitted, match = fit(load_source(model), type(load_source(model).grid).image(64, 16), "pixels")
    assert fitted.anatomy is None and fitted.original is not None
    x = fitted.original.hidden_states(pixels_of(match.grid), [3])[0]
    assert x.shape == (2, fitted.prefix + 16, 32)
