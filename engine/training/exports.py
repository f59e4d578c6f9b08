"""Weights for others: safetensors with timm's key names, and a config.json to rebuild the encoder from.

Reading them back is :mod:`cohobate.teacher.sources.own`'s, for an export is a teacher's source too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from cohobate.models import SIZES, VisionTransformer
from cohobate.teacher.sources.own import CONFIG, WEIGHTS, find_export, load_encoder

__all__ = ["export", "find_export", "load_encoder", "read_config"]

DECODER = "decoder.safetensors"


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
    _save(folder / WEIGHTS, encoder)
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


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an export, or of the last export of a run folder.

    Raises:
        UserError: no export at ``path``.
    """
    settings: dict[str, Any] = json.loads((find_export(path) / CONFIG).read_text(encoding="utf-8"))
    return settings
