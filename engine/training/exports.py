"""Weights for others: safetensors with timm's key names, and a config.json to rebuild the encoder from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cohobate.errors import UserError
from cohobate.models import SIZES, Precision, VisionTransformer
from cohobate.tokens import TokenGrid

ENCODER, DECODER, CONFIG = "model.safetensors", "decoder.safetensors", "config.json"


def export(
    folder: Path,
    encoder: VisionTransformer,
    decoder: nn.Module | None,
    about: dict[str, Any],
    interpolation: str = "bicubic",
) -> Path:
    """Write ``model.safetensors``, ``decoder.safetensors`` and ``config.json`` into ``folder``; fp32, on the CPU.

    ``about`` is kept in config.json; ``interpolation`` is how images were resized.

    ``timm.create_model("local-dir:<folder>")`` reads the encoder where its sizes are ones that timm can build.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / ENCODER, encoder)
    if decoder is not None:
        _save(folder / DECODER, decoder)
    text = json.dumps(describe(encoder, interpolation) | {"cohobate": about}, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def _save(path: Path, module: nn.Module) -> None:
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    aside = path.with_name(path.name + ".writing")
    save_file(tensors, str(aside), metadata={"format": "pt"})
    aside.replace(path)


def describe(encoder: VisionTransformer, interpolation: str = "bicubic") -> dict[str, Any]:
    """The part of config.json that timm reads."""
    grid = encoder.grid
    side = grid.patch[-1]
    sizes = (encoder.width, encoder.depth, encoder.heads)
    name = next((key for key, size in SIZES.items() if (size.width, size.depth, size.heads) == sizes), "custom")
    known = name if name != "custom" else "base"
    weight = encoder.state_dict().get("blocks.0.mlp.fc1.weight")
    hidden = 4 * encoder.width if weight is None else weight.shape[0]
    return {
        "architecture": f"vit_{known}_patch{14 if known == 'huge' else 16}_224",
        "name": f"vit_{name}_patch{side}_{grid.height}",
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "token" if encoder.prefix else "avg",
        "model_args": {
            "img_size": [grid.height, grid.width],
            "patch_size": list(grid.patch[1:]),
            "in_chans": grid.channels,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": hidden / encoder.width,
            "class_token": bool(encoder.prefix),
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [grid.channels, grid.height, grid.width],
            "interpolation": interpolation,
            "crop_pct": 0.875,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def find_export(path: str | Path) -> Path:
    """The export folder meant by ``path``: itself, or the last stage's of a run folder.

    Raises:
        UserError: neither.
    """
    folder = Path(path)
    if (folder / ENCODER).is_file() and (folder / CONFIG).is_file():
        return folder
    found = [file.parent for file in folder.glob(f"exports/*/{ENCODER}")]
    if not found:
        raise UserError(f"weights: expected a run folder or an export with {ENCODER} and {CONFIG}, got {str(path)!r}")
    return max(found, key=lambda item: int(item.name.split("-")[0]))


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an export, or of the last export of a run folder.

    Raises:
        UserError: no export at ``path``.
    """
    settings: dict[str, Any] = json.loads((find_export(path) / CONFIG).read_text(encoding="utf-8"))
    return settings


def load_encoder(path: str | Path, precision: Precision | None = None) -> VisionTransformer:
    """Rebuild an encoder from an export, or from the last export of a run folder; every key must fit.

    Raises:
        UserError: no export at ``path``, or one whose keys or shapes do not fit.
    """
    folder, settings = find_export(path), read_config(path)
    shape, shown = settings["model_args"], settings["pretrained_cfg"]
    height, width = shape["img_size"]
    encoder = VisionTransformer(
        TokenGrid(1, height, width, (1, *shape["patch_size"]), shape["in_chans"]),
        shape["embed_dim"],
        shape["depth"],
        shape["num_heads"],
        shape["mlp_ratio"],
        shape["class_token"],
        precision=precision,
        mean=shown["mean"],
        std=shown["std"],
    )
    load_weights(encoder, folder / ENCODER)
    return encoder


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy a safetensors file into ``module``, strictly.

    Raises:
        UserError: missing, unexpected or wrongly shaped keys; the message lists the first of them.
    """
    found, wanted = load_file(str(path)), module.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is unexpected" for key in found if key not in wanted]
    for key in wanted.keys() & found.keys():
        if wanted[key].shape != found[key].shape:
            problems.append(f"{key} has shape {list(found[key].shape)}, not {list(wanted[key].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"weights: expected the keys of this model in {path}, got: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found[key])
