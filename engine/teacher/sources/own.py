"""Our own encoders as teachers: an instance, freshly drawn weights, or an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models import SIZES, Precision, VisionTransformer, build
from cohobate.models.exports import load_encoder
from cohobate.models.layers import NORM_EPS
from cohobate.teacher.anatomy import Affine, Anatomy, BlockWeights
from cohobate.teacher.sources.source import Original, Source, assemble


def from_encoder(model: VisionTransformer, name: str = "encoder") -> Source:
    """An encoder's source; its weights are copied, so that it may go on training."""
    return _source(model, name, own_weights=True)


def from_random(size: str, *, seed: int = 0, **options: Any) -> Source:
    """A freshly drawn encoder: a function of ``seed`` and the sizes alone.

    Args:
        size: one of the named sizes, with or without ``vit_`` in front.
        seed: of the generator that all weights come from.
        options: of :func:`cohobate.models.build`: image_size, patch, channels, frames, tubelet, width, depth, ...

    Raises:
        UserError: an unknown size or option.
    """
    size = size.removeprefix("vit_")
    if size not in SIZES:
        raise UserError(f"source: expected random:NAME with NAME one of {', '.join(SIZES)}; got {size!r}")
    try:
        model = build(size, **{"precision": _FP32} | options)
    except TypeError as error:
        raise UserError(f"source: random:{size} does not take these options: {error}") from error
    model.reset(torch.Generator().manual_seed(seed))
    return _source(model, f"random {size}, seed {seed}", own_weights=False)


def from_export(path: str | Path) -> Source:
    """The source of an exported encoder; see :func:`load_encoder`."""
    return _source(load_encoder(path, _FP32), str(path), own_weights=False)


_FP32 = Precision(torch.float32, torch.float32)


def _source(model: VisionTransformer, name: str, own_weights: bool) -> Source:
    original = Original(
        model, _run, model.grid, width=model.width, depth=model.depth, prefix=model.prefix,
        mean=model.mean, std=model.std,
    )  # fmt: skip
    return assemble(name, original, lambda exact: read(exact.module, name), own_weights=own_weights)


def _run(original: Original, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
    model: Any = original.module
    return model.intermediates(pixels, list(layers))


def read(model: Any, name: str) -> Anatomy:
    """The anatomy of a VisionTransformer; it shares the encoder's tensors."""
    weights = {key: value.detach() for key, value in model.state_dict().items()}

    def affine(key: str) -> Affine:
        return Affine(weights[f"{key}.weight"], weights[f"{key}.bias"])

    blocks = [
        BlockWeights(
            norm1=affine(f"blocks.{i}.norm1"),
            qkv=weights[f"blocks.{i}.attn.qkv.weight"],
            qkv_bias=weights[f"blocks.{i}.attn.qkv.bias"],
            proj=weights[f"blocks.{i}.attn.proj.weight"],
            proj_bias=weights[f"blocks.{i}.attn.proj.bias"],
            norm2=affine(f"blocks.{i}.norm2"),
            fc1=weights[f"blocks.{i}.mlp.fc1.weight"],
            fc1_bias=weights[f"blocks.{i}.mlp.fc1.bias"],
            fc2=weights[f"blocks.{i}.mlp.fc2.weight"],
            fc2_bias=weights[f"blocks.{i}.mlp.fc2.bias"],
            scale1=weights.get(f"blocks.{i}.ls1.gamma"),
            scale2=weights.get(f"blocks.{i}.ls2.gamma"),
        )
        for i in range(model.depth)
    ]
    table = weights["pos_embed"][0] if "pos_embed" in weights else None
    prefix = weights["cls_token"][0] if model.prefix else weights["norm.weight"].new_zeros(0, model.width)
    return Anatomy(
        name=name,
        grid=model.grid,
        heads=model.heads,
        patch=model.patch_embed.proj.rows().detach(),
        patch_bias=weights["patch_embed.proj.bias"],
        prefix=prefix if table is None else prefix + table[: model.prefix],
        positions=None if table is None else table[model.prefix :],
        blocks=tuple(blocks),
        norm=affine("norm"),
        mean=model.mean,
        std=model.std,
        eps=NORM_EPS,
        relative=model.rel_pos_bias().detach() if model.relative_positions else None,
    )
