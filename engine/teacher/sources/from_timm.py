"""timm's vision transformers as teachers (written against timm 1.0).

``VisionTransformer`` and its distilled form are rebuilt: class, distillation and register tokens, with or without
positions of their own; a norm before the blocks (CLIP); layer scales; GELU, its tanh form, CLIP's quick GELU, SwiGLU.
Dropping of patches, paths and activations is off in a teacher, so it does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.teacher.anatomy import Anatomy, BlockWeights
from cohobate.teacher.sources.parts import Norms, activation, is_silu, linear, patch_rows, stacked
from cohobate.teacher.sources.source import NotPlainError, Original, Source, assemble, hooked, measure
from cohobate.tokens import TokenGrid

PLAIN = ("VisionTransformer", "VisionTransformerDistilled")
BLOCKS = {
    "ResPostBlock": "its norms stand behind the branches (ResPostBlock)",
    "ParallelScalingBlock": "attention and MLP run side by side (ParallelScalingBlock)",
    "DiffParallelScalingBlock": "attention and MLP run side by side (DiffParallelScalingBlock)",
    "ParallelThingsBlock": "several attentions run side by side (ParallelThingsBlock)",
}
OTHERS = {
    "Eva": "rotary positions or norms inside its attention",
    "Beit": "relative positions inside its attention",
    "VisionTransformerRelPos": "relative positions inside its attention",
}


def load(timm: Any, name: str, *, pretrained: bool = True, **options: Any) -> Source:
    """``timm.create_model(name, pretrained=..., **options)`` as a source.

    Raises:
        UserError: a model that timm cannot make.
    """
    mean, std = options.pop("mean", None), options.pop("std", None)
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm, its hub client and the file readers raise a dozen kinds
        raise UserError(f"source: timm cannot make {name!r} (pretrained={pretrained}): {_short(error)}") from error
    return from_model(model, name=f"timm {name}", mean=mean, std=std, own_weights=False)


def from_model(
    model: Any, name: str | None = None, *, mean: Any = None, std: Any = None, own_weights: bool = True
) -> Source:
    """A timm model as a source; ``mean`` and ``std`` default to those of its ``pretrained_cfg``.

    Raises:
        UserError: a model without a fixed input size, without blocks, or without statistics of its pixels.
    """
    name = name or f"timm {type(model).__name__}"
    shown = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    mean, std = mean or shown.get("mean"), std or shown.get("std")
    if mean is None or std is None:
        raise UserError(f"source: {name} does not say how its pixels are normalised: give mean= and std=")
    embed: Any = getattr(model, "patch_embed", None)
    size, cut = getattr(embed, "img_size", None), getattr(embed, "grid_size", None)
    blocks = getattr(model, "blocks", None)
    if size is None or cut is None or not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise UserError(
            f"source: {name} ({type(model).__name__}) has no fixed input size, patches and list of blocks to watch: "
            "give it hidden_states and the rest of cohobate.teacher.sources.TeacherModule"
        )
    patch = (size[0] // cut[0], size[1] // cut[1])
    grid = TokenGrid.image(tuple(size), patch, getattr(model, "in_chans", None) or embed.proj.in_channels)
    original = Original(
        model, hooked("blocks", lambda module, images: module.forward_features(images)), grid,
        width=0, depth=len(blocks), prefix=0, mean=mean, std=std,
        any_size=bool(getattr(model, "dynamic_img_size", False)),
    )  # fmt: skip
    original = measure(original)
    return assemble(name, original, lambda exact: read(name, exact), own_weights=own_weights)


def read(name: str, original: Original) -> Anatomy:
    """The anatomy of a plain timm ViT.

    Raises:
        NotPlainError: a part that an Anatomy cannot express.
    """
    model: Any = original.module
    kind = type(model).__name__
    if kind not in PLAIN:
        raise NotPlainError(
            f"{kind} is not a plain VisionTransformer" + (f": {OTHERS[kind]}" if kind in OTHERS else "")
        )
    norms = Norms()
    if not isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity):
        raise NotPlainError("patches are normalised before the positions are added")
    patch, patch_bias = patch_rows(model.patch_embed.proj, original.grid)
    prefix, positions = _positions(model, original.width)
    pre_norm = getattr(model, "norm_pre", nn.Identity())
    embed_norm = None if isinstance(pre_norm, nn.Identity) else norms(pre_norm, "norm_pre")
    parts = [_block(block, f"blocks[{i}]", norms) for i, block in enumerate(model.blocks)]
    heads, activations = {part[1] for part in parts}, {part[2] for part in parts}
    if len(heads) > 1 or len(activations) > 1:
        raise NotPlainError("its blocks differ in heads or activation")
    last = model.norm
    return Anatomy(
        name=name,
        grid=original.grid,
        heads=heads.pop(),
        patch=patch,
        patch_bias=patch_bias,
        prefix=prefix,
        positions=positions,
        blocks=tuple(part[0] for part in parts),
        norm=None if isinstance(last, nn.Identity) else norms(last, "norm"),
        mean=original.mean,
        std=original.std,
        activation=activations.pop(),
        eps=norms.eps or 0.0,
        embed_norm=embed_norm,
    )


def _positions(model: Any, width: int) -> tuple[Tensor, Tensor | None]:
    """Tokens in front [P, D], their positions added, and the positions of the patches."""
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [getattr(model, name)[0].detach() for name in names if getattr(model, name, None) is not None]
    embed = model.pos_embed
    prefix = torch.cat(tokens) if tokens else torch.zeros(0, width)
    if embed is None:
        return prefix, None
    table = embed[0].detach()
    if model.no_embed_class:
        return prefix, table
    return prefix + table[: len(prefix)], table[len(prefix) :]


def _block(block: Any, what: str, norms: Norms) -> tuple[BlockWeights, int, str]:
    """Weights, heads and activation of one block."""
    kind = type(block).__name__
    if kind != "Block":
        raise NotPlainError(f"{what} is {kind}: {BLOCKS.get(kind, 'not the pre-norm Block')}")
    attention, mlp = block.attn, block.mlp
    _plain_attention(attention, f"{what}.attn")
    width = attention.proj.out_features
    qkv, qkv_bias = linear(attention.qkv, f"{what}.attn.qkv")
    if qkv.shape[0] != 3 * width:
        raise NotPlainError(f"{what}.attn has heads of another total width than the model's")
    proj, proj_bias = linear(attention.proj, f"{what}.attn.proj")
    (fc1, fc1_bias), name = _mlp(mlp, f"{what}.mlp")
    fc2, fc2_bias = linear(mlp.fc2, f"{what}.mlp.fc2")
    weights = BlockWeights(
        norm1=norms(block.norm1, f"{what}.norm1"),
        qkv=qkv, qkv_bias=qkv_bias, proj=proj, proj_bias=proj_bias,
        norm2=norms(block.norm2, f"{what}.norm2"),
        fc1=fc1, fc1_bias=fc1_bias, fc2=fc2, fc2_bias=fc2_bias,
        scale1=_scale(block.ls1, f"{what}.ls1"), scale2=_scale(block.ls2, f"{what}.ls2"),
    )  # fmt: skip
    return weights, attention.num_heads, name


def _plain_attention(attention: Any, what: str) -> None:
    if type(attention).__name__ != "Attention":
        raise NotPlainError(f"{what} is {type(attention).__name__}, not the plain Attention")
    for part, reason in (
        ("q_norm", "queries and keys are normalised (qk_norm)"),
        ("k_norm", "queries and keys are normalised (qk_norm)"),
        ("norm", "the attention's output is normalised (scale_norm)"),
    ):
        if not isinstance(getattr(attention, part, nn.Identity()), nn.Identity):
            raise NotPlainError(f"{what}: {reason}")
    if getattr(attention, "gate", None) is not None:
        raise NotPlainError(f"{what}: the attention's output is gated")


def _mlp(mlp: Any, what: str) -> tuple[tuple[Tensor, Tensor | None], str]:
    """First layer, and the activation behind it."""
    kind = type(mlp).__name__
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise NotPlainError(f"{what}: hidden values are normalised (scale_norm)")
    if kind == "Mlp":
        return linear(mlp.fc1, f"{what}.fc1"), activation(mlp.act, f"{what}.act")
    if kind not in ("GluMlp", "SwiGLU"):
        raise NotPlainError(f"{what} is {kind}, not an Mlp or a SwiGLU")
    if not is_silu(mlp.act):
        raise NotPlainError(f"{what} is gated by {type(mlp.act).__name__}, not by SiLU")
    if kind == "SwiGLU":
        return stacked([linear(mlp.fc1_g, f"{what}.fc1_g"), linear(mlp.fc1_x, f"{what}.fc1_x")]), "swiglu"
    weight, bias = linear(mlp.fc1, f"{what}.fc1")
    if mlp.gate_last:  # [value; gate] in timm, [gate; value] here
        half = weight.shape[0] // 2
        weight, bias = weight.roll(half, 0), None if bias is None else bias.roll(half, 0)
    return (weight, bias), "swiglu"


def _scale(layer: Any, what: str) -> Tensor | None:
    if isinstance(layer, nn.Identity):
        return None
    if type(layer).__name__ != "LayerScale":
        raise NotPlainError(f"{what} is {type(layer).__name__}, not a LayerScale")
    return layer.gamma.detach()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
