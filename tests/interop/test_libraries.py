"""Models built by transformers and timm as oracles: features, losses, and folders that both sides can read."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cohobate import interop
from cohobate.errors import UserError
from cohobate.interop import Hints, convert
from cohobate.masking import MaskPlan
from cohobate.models.exports import load_encoder

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5  # relative, fp32 on both sides
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 128,
}  # fmt: skip
CLIP = {"num_frames": 4, "tubelet_size": 2, "image_size": 24, "use_mean_pooling": False}


def scrambled(model: Any, seed: int = 0) -> Any:
    """No neutral parameter is left: norms off 1 and 0, biases large. Tables of positions stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3, generator=generator)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif "pos" not in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def vit() -> Any:
    return scrambled(transformers.ViTModel(transformers.ViTConfig(**SHAPE), add_pooling_layer=False))


def vit_mae() -> Any:
    return scrambled(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SHAPE, norm_pix_loss=True)))


def videomae() -> Any:
    model = scrambled(transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**(SHAPE | CLIP))))
    model.decoder.norm.eps = 1e-6  # transformers leaves torch's 1e-5 there; the published code has 1e-6
    return model


def pixels_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    """[B, T, C, H, W]."""
    return ((pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 1, 4, 2, 3)


def close(found: Tensor, wanted: Tensor, name: str = "") -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("make", [vit, vit_mae, videomae])
def test_a_folder_of_transformers_and_back(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Features, keys and bits; and transformers reads what we wrote without a missing or an unexpected key."""
    model = make()
    model.save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "ours", "cohobate")
    assert done.before is not None and done.before.oracle == "transformers' own model"
    assert done.before.difference < TOLERANCE * done.before.largest
    encoder = load_encoder(tmp_path / "ours")
    pixels = pixels_of(2, *encoder.grid.pixel_shape)
    images = normalised(pixels, encoder.mean, encoder.std)
    images = images if make is videomae else images[:, 0]
    inner = model if make is vit else getattr(model, "videomae" if make is videomae else "vit")
    if make is vit_mae:
        model.config.mask_ratio = 0.0
        noise = torch.arange(16.0).expand(2, -1)
        wanted = inner(images, noise=noise).last_hidden_state
    else:
        wanted = inner(images).last_hidden_state
    precise = load_encoder(tmp_path / "ours", interop.parts.FP32)
    close(precise(pixels).detach(), wanted.detach())
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    kind = getattr(transformers, type(model).__name__)
    options = {"add_pooling_layer": False} if make is vit else {}
    again, found = kind.from_pretrained(tmp_path / "back", output_loading_info=True, **options)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    state = again.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def test_the_loss_of_vit_mae(tmp_path: Path) -> None:
    model = vit_mae()
    model.save_pretrained(tmp_path)
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)).argsort(1) >= 4
    pixels = pixels_of(3, 1, 32, 32, 3)
    images = normalised(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[:, 0]
    output = model(images, noise=mask.float())
    assert torch.equal(output.mask.bool(), mask)
    output.loss.backward()
    method = interop.load_mae(tmp_path)
    step = method.loss(batch(pixels), MaskPlan.from_boolean(mask))
    step.total.backward()
    close(step.total.detach(), output.loss.detach())
    head = interop.gradients(method)["decoder_pred.weight"]
    close(head, model.decoder.decoder_pred.weight.grad)
    close(interop.gradients(method)["cls_token"], model.vit.embeddings.cls_token.grad)


def test_the_loss_of_videomae(tmp_path: Path) -> None:
    model = videomae()
    model.save_pretrained(tmp_path)
    mask = torch.rand(2, 18, generator=torch.Generator().manual_seed(2)).argsort(1) >= 4
    pixels = pixels_of(2, 4, 24, 24, 3)
    clips = normalised(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    output = model(clips, bool_masked_pos=mask)
    output.loss.backward()
    method = interop.load_videomae(tmp_path)
    step = method.loss(batch(pixels), MaskPlan.from_boolean(mask))
    step.total.backward()
    close(step.total.detach(), output.loss.detach())
    gradients = interop.gradients(method)
    close(gradients["mask_token"], model.mask_token.grad)
    layer = model.videomae.encoder.layer[1].attention.attention
    close(gradients["encoder.blocks.1.attn.q_bias"], layer.query.bias.grad)
    close(gradients["encoder.blocks.1.attn.qkv.weight"][128:], layer.value.weight.grad)


def batch(pixels: Tensor) -> Any:
    class Batch:
        def __init__(self) -> None:
            self.pixels = pixels

    return Batch()


@pytest.mark.parametrize("spelling", ["published", "new"])
def test_both_spellings_of_the_keys(tmp_path: Path, spelling: str) -> None:
    """Files of transformers 4, and the names that its version 5 has inside."""
    model = vit_mae()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a", "cohobate")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    published = "vit.encoder.layer.0.attention.attention.query.weight"
    if spelling == "published":
        convert(tmp_path / "a", tmp_path / "b", "hf")
        weights = load_file(tmp_path / "b" / "model.safetensors")
        assert published in weights
    else:
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        assert published not in weights
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "c", "cohobate")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "c"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_videomae_without_its_biases_is_refused(tmp_path: Path) -> None:
    """Zeros would load without a word; only a configuration that has no biases may lack them."""
    videomae().save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {key: value for key, value in weights.items() if not key.endswith(("q_bias", "v_bias", "query.bias",
            "value.bias"))}  # fmt: skip
    assert len(bare) == len(weights) - 10
    save_file(bare, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"expected q_bias and v_bias in .* zeros in their place would be another model"
    ):
        convert(tmp_path / "hf", tmp_path / "out", "cohobate")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | {"qv_bias": False}))
    done = convert(tmp_path / "hf", tmp_path / "out", "cohobate")
    assert ("student.blocks.0.attn.qkv.bias", "the model has no biases of q, k and v: zeros") in done.read.missing


def test_another_eps_is_said(tmp_path: Path) -> None:
    """transformers' files have 1e-12 where the published codes have 1e-6."""
    model = vit_mae()
    model.config.layer_norm_eps = 1e-12
    model.save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "ours", "mae", hints=Hints(decoder_heads=2))
    assert "norms have eps 1e-12 there and 1e-06 here" in done.read.text()


def test_without_the_library_plain_torch_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (vit, vit_mae, videomae):
        make().save_pretrained(tmp_path / "hf")
        monkeypatch.setitem(sys.modules, "transformers", None)
        done = convert(tmp_path / "hf", tmp_path / "ours", "cohobate", force=True)
        assert done.before is not None and done.before.oracle == "plain torch on the file's own keys"
        assert done.before.difference < TOLERANCE * done.before.largest
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "hf")


def test_another_family_is_refused(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, said in (({"model_type": "dinov2"}, "got 'dinov2'"), ({"hidden_act": "relu"}, "got hidden_act 'relu'")):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "hf", tmp_path / "out", "cohobate")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm(tmp_path: Path, timm: Any) -> None:
    """A timm model with layer scales and no positions for the class token; and back, strictly."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 5}
    for options in ({}, {"init_values": 0.1}, {"no_embed_class": True}, {"qkv_bias": False}, {"global_pool": "avg"}):
        model = scrambled(timm.models.vision_transformer.VisionTransformer(**(shape | options)))
        torch.save(model.state_dict(), tmp_path / "timm.pth")
        done = convert(tmp_path / "timm.pth", tmp_path / "ours", "cohobate", form="timm", force=True)
        assert done.before is not None and done.before.oracle == "timm's own model"
        assert done.before.difference < TOLERANCE * done.before.largest
        assert "ImageNet's mean and std are assumed" in done.text()
        encoder = load_encoder(tmp_path / "ours", interop.parts.FP32)
        pixels = pixels_of(2, 1, 32, 32, 3)
        images = normalised(pixels, encoder.mean, encoder.std)[:, 0]
        if "global_pool" not in options:
            close(encoder(pixels).detach(), model.forward_features(images).detach())
        convert(tmp_path / "ours", tmp_path / "back", "timm", force=True)
        again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
        close(again.forward_features(images).detach(), encoder(pixels).detach())


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.usefixtures("timm")
def test_a_model_without_blocks_is_compared_where_timm_imports(upstream: Any, tmp_path: Path) -> None:
    """dBOT's first teacher of ViT-L and H: a library's model has no block to watch."""
    source = upstream.save(tmp_path / "teacher.pth", upstream.encoder(0))
    done = convert(source, tmp_path / "ours", "cohobate", hints=Hints(heads=4))
    assert done.after is not None and done.after.oracle == "plain torch on the file's own keys"
