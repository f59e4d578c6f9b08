"""Our own encoders as teachers: an instance, freshly drawn weights, or an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models import SIZES, Precision, VisionTransformer, build
from cohobate.models.layers import NORM_EPS
from cohobate.teacher.anatomy import Affine, Anatomy, BlockWeights
from cohobate.teacher.sources.source import Original, Source, assemble
from cohobate.tokens import TokenGrid

WEIGHTS, CONFIG = "model.safetensors", "config.json"


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


def find_export(path: str | Path) -> Path:
    """The export folder meant by ``path``: itself, or the last stage's of a run folder.

    Raises:
        UserError: neither.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        return folder
    found = [file.parent for file in folder.glob(f"exports/*/{WEIGHTS}")]
    if not found:
        raise UserError(f"weights: expected a run folder or an export with {WEIGHTS} and {CONFIG}, got {str(path)!r}")
    return max(found, key=lambda item: int(item.name.split("-")[0]))


def load_encoder(path: str | Path, precision: Precision | None = None) -> VisionTransformer:
    """Rebuild an encoder from a folder with ``model.safetensors`` and ``config.json``, or from the last of a run.

    Raises:
        UserError: no export there; one that cannot be read; or one with missing, surplus or wrongly shaped keys, which
            the message lists.
    """
    from safetensors.torch import load_file

    folder = find_export(path)
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = load_file(str(folder / WEIGHTS))
    except Exception as error:  # OSError, JSONDecodeError, SafetensorError
        raise UserError(f"weights: cannot read the export in {str(folder)!r}: {error}") from error
    if "model_args" not in settings or "pretrained_cfg" not in settings:
        hint = f"; for a Hugging Face folder write hf:{path}" if "model_type" in settings else ""
        raise UserError(f"weights: expected an export of this package in {str(folder)!r}, got another {CONFIG}{hint}")
    shape, shown = settings["model_args"], settings["pretrained_cfg"]
    height, width = shape["img_size"]
    model = VisionTransformer(
        TokenGrid(1, height, width, (1, *shape["patch_size"]), shape["in_chans"]),
        shape["embed_dim"], shape["depth"], shape["num_heads"], shape["mlp_ratio"], shape["class_token"],
        precision=precision, mean=shown["mean"], std=shown["std"],
    )  # fmt: skip
    wanted = model.state_dict()
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    check_keys(str(folder), [k for k in wanted if k not in found], [k for k in found if k not in wanted], shapes)
    model.load_state_dict(found)
    return model


def check_keys(where: str, missing: Sequence[str], surplus: Sequence[str], shapes: Sequence[str] = ()) -> None:
    """Refuse a checkpoint that does not fit, and list what does not.

    Raises:
        UserError: unless all three are empty.
    """
    problems = []
    for what, keys in (("missing", missing), ("surplus", surplus), ("wrong shapes", shapes)):
        if keys:
            more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
            problems.append(f"{what}: {', '.join(sorted(keys)[:10])}{more}")
    if problems:
        raise UserError(f"source: the weights in {where!r} do not fit the model: {'; '.join(problems)}")


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
        )
        for i in range(model.depth)
    ]
    positions = weights["pos_embed"][0]
    prefix = positions[: model.prefix]
    return Anatomy(
        name=name,
        grid=model.grid,
        heads=model.heads,
        patch=model.patch_embed.proj.rows().detach(),
        patch_bias=weights["patch_embed.proj.bias"],
        prefix=prefix + weights["cls_token"][0] if model.prefix else prefix,
        positions=positions[model.prefix :],
        blocks=tuple(blocks),
        norm=affine("norm"),
        mean=model.mean,
        std=model.std,
        eps=NORM_EPS,
    )
