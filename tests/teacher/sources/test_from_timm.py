"""timm's transformers: rebuilt, they give timm's numbers; what is not plain runs as it is and says why."""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from cohobate.errors import UserError
from cohobate.teacher.sources import fit, load_source
from cohobate.teacher.sources.source import agreement
from cohobate.tokens import TokenGrid

Make = Callable[..., Any]


def import_timm() -> Any:
    """timm; where torchvision is missing or does not fit this torch, with empty names in its place.

    timm's layers take two classes from torchvision that no ViT uses, and its data package a few more.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed", allow_module_level=True)
    try:
        importlib.import_module("torchvision")
    except Exception:
        pass
    else:
        return importlib.import_module("timm")

    class Empty(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    children = ("ops.misc", "models.feature_extraction", "transforms.functional", "datasets", "utils")
    names = {"torchvision"}
    for child in children:
        parts = child.split(".")
        names |= {".".join(["torchvision", *parts[: i + 1]]) for i in range(len(parts))}
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == "torchvision"}
    for name in sorted(names):
        module = Empty(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    modes = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name].InterpolationMode = modes  # type: ignore[attr-defined]
    try:
        return importlib.import_module("timm")
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


timm = import_timm()
vit: Any = importlib.import_module("timm.models.vision_transformer")
layers: Any = importlib.import_module("timm.layers")


def build(kind: Any = None, **options: Any) -> Any:
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = (kind or vit.VisionTransformer)(**(shape | options))
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return model


class Glu(layers.GluMlp):  # type: ignore[misc]
    """timm's gated MLP with SiLU and the gate behind the value."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"act_layer": nn.SiLU, "gate_last": True}))


Glu.__name__ = "GluMlp"

CLIP = {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": layers.QuickGELU}
PLAIN: dict[str, tuple[dict[str, Any], int, str]] = {
    "plain": ({}, 1, "gelu"),
    "no qkv bias": ({"qkv_bias": False}, 1, "gelu"),
    "no biases": ({"qkv_bias": False, "proj_bias": False}, 1, "gelu"),
    "layer scale": ({"init_values": 0.1}, 1, "gelu"),
    "registers": ({"reg_tokens": 3}, 4, "gelu"),
    "registers without positions": ({"reg_tokens": 3, "no_embed_class": True}, 4, "gelu"),
    "no class token": ({"class_token": False, "global_pool": "avg"}, 0, "gelu"),
    "attention pooling": ({"class_token": False, "global_pool": "map"}, 0, "gelu"),
    "clip": (CLIP, 1, "quick_gelu"),
    "tanh": ({"act_layer": partial(nn.GELU, approximate="tanh")}, 1, "gelu_tanh"),
    "swiglu packed": ({"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU}, 1, "swiglu"),
    "swiglu": ({"mlp_layer": layers.SwiGLU, "act_layer": nn.SiLU}, 1, "swiglu"),
    "swiglu gate last": ({"mlp_layer": Glu}, 1, "swiglu"),
    "no positions": ({"pos_embed": "none"}, 1, "gelu"),
    "any size": ({"dynamic_img_size": True}, 1, "gelu"),
    "wide": ({"img_size": (16, 40), "in_chans": 3}, 1, "gelu"),
    "dropping in training": ({"patch_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}, 1, "gelu"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_rebuilt_features_are_timms(name: str, scramble: Make, pixels_of: Make) -> None:
    options, prefix, activation = PLAIN[name]
    model = scramble(build(**options))
    source = load_source(model.train())
    assert source.reasons == () and source.anatomy is not None and source.original is not None and model.training
    assert (source.width, source.depth, source.prefix) == (32, 3, prefix)
    assert source.anatomy.activation == activation and source.mean == (0.4, 0.5, 0.6)

    pixels = pixels_of(source.grid)
    found = source.anatomy.forward(pixels, [0, 1, 2, 3])
    wanted = source.original.hidden_states(pixels, [0, 1, 2, 3])
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape == (2, prefix + source.grid.size, 32)
        # two evaluations of one formula in fp32: the bound every rebuilt source is held to; measured 1e-6
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    with torch.no_grad():
        last = model.eval().forward_features(source.original.images(pixels))
    torch.testing.assert_close(source.anatomy.forward(pixels, [3], norm=True)[0], last, rtol=1e-4, atol=1e-5)


def test_the_distilled_deit_has_two_tokens(scramble: Make) -> None:
    deit = importlib.import_module("timm.models.deit")
    source = load_source(scramble(build(deit.VisionTransformerDistilled)))
    assert source.reasons == () and source.prefix == 2


NOT_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "qk norm": ({"qk_norm": True}, "queries and keys are normalised"),
    "attention norm": ({"scale_attn_norm": True}, "the attention's output is normalised"),
    "mlp norm": ({"scale_mlp_norm": True}, "hidden values are normalised"),
    "post-norm": ({"block_fn": vit.ResPostBlock}, "its norms stand behind the branches"),
    "parallel": ({"block_fn": vit.ParallelScalingBlock}, "attention and MLP run side by side"),
    "many attentions": ({"block_fn": vit.ParallelThingsBlock}, "several attentions run side by side"),
    "patch norm": ({"embed_norm_layer": nn.LayerNorm}, "patches are normalised"),
    "relu": ({"act_layer": nn.ReLU}, "is ReLU, not one of gelu"),
    "sigmoid gate": ({"mlp_layer": layers.GluMlp, "act_layer": nn.Sigmoid}, "gated by Sigmoid"),
    "rms norm": ({"norm_layer": layers.RmsNorm}, "not a LayerNorm"),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_says_why(name: str, scramble: Make, pixels_of: Make) -> None:
    options, reason = NOT_PLAIN[name]
    model = scramble(build(**options))
    source = load_source(model)
    assert source.anatomy is None and reason in source.reasons[0]
    assert source.original is not None and (source.width, source.depth, source.prefix) == (32, 3, 1)
    pixels = pixels_of(source.grid)
    found = source.original.hidden_states(pixels, [3])[0]
    with torch.no_grad():
        wanted = model.forward_features(source.original.images(pixels))
    torch.testing.assert_close(model.norm(found), wanted)


def test_another_family_runs_as_it_is() -> None:
    options = {"img_size": 28, "embed_dim": 48, "num_heads": 3, "depth": 2}
    source = load_source("timm:eva02_tiny_patch14_224", pretrained=False, **options)
    assert source.anatomy is None and "rotary positions" in source.reasons[0] and source.original is not None
    assert source.grid.shape == (1, 2, 2) and source.depth == 2


def test_a_name_with_options() -> None:
    source = load_source("timm:vit_tiny_patch16_224?pretrained=false&depth=1&img_size=64")
    assert source.reasons == () and source.grid == TokenGrid.image(64, 16) and source.depth == 1
    assert source.mean == (0.5, 0.5, 0.5)  # of this name's pretrained_cfg


def test_refusals() -> None:
    with pytest.raises(UserError, match="timm cannot make 'vit_imaginary'"):
        load_source("timm:vit_imaginary", pretrained=False)
    model = build()
    del model.pretrained_cfg
    with pytest.raises(UserError, match="mean= and std="):
        load_source(model)
    assert load_source(model, mean=[0.5] * 3, std=[0.5] * 3).mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="give it hidden_states"):
        load_source("timm:resnet18", pretrained=False)


def test_another_size_is_what_timm_makes_of_it(scramble: Make) -> None:
    """A model of any size interpolates its table at every call; ours, interpolated once, gives its numbers."""
    source = load_source(scramble(build(dynamic_img_size=True, img_size=40, reg_tokens=2)))
    fitted, match = fit(source, TokenGrid.image((16, 32), 8), "positions")
    assert fitted.anatomy is not None and fitted.original is not None and match.grid.shape == (1, 2, 4)
    assert agreement(fitted.anatomy.forward, fitted.original, match.grid, [0, 3]) <= 1e-5
