"""The export format: safetensors with timm's key names, and a config.json that says what to rebuild.

model.safetensors      the encoder
decoder.safetensors    its decoder, where there is one
alignment.safetensors  AMD's projections and generators, where there are some
config.json            ``model_args`` and ``pretrained_cfg`` as timm writes them; the sizes of the other two as
                       ``decoder`` and ``alignment``; as ``cohobate`` where the weights came from
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.models.decoder import Decoder, PixelDecoder
from cohobate.models.layers import Block, Linear, Precision
from cohobate.models.sizes import SIZES
from cohobate.models.vit import VisionTransformer
from cohobate.tokens import TokenGrid

WEIGHTS, DECODER, CONFIG = "model.safetensors", "decoder.safetensors", "config.json"
ALIGNMENT = "alignment.safetensors"
LAYOUTS: dict[str, type[Decoder]] = {kind.layout: kind for kind in (Decoder, PixelDecoder)}


def export(
    folder: Path,
    encoder: VisionTransformer,
    decoder: nn.Module | None,
    about: dict[str, Any],
    interpolation: str = "bicubic",
    alignment: nn.Module | None = None,
) -> Path:
    """Write the files that this module names into ``folder``; fp32, on the CPU.

    ``about`` is kept in config.json; ``interpolation`` is how images were resized; ``alignment`` is AMD's.

    ``timm.create_model("local-dir:<folder>")`` reads the encoder where it is one that timm can build.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / WEIGHTS, encoder)
    settings = describe(encoder, interpolation)
    if decoder is not None:
        save(folder / DECODER, decoder)
    if isinstance(decoder, Decoder):
        settings["decoder"] = describe_decoder(decoder)
    if alignment is not None:
        save(folder / ALIGNMENT, alignment)
        settings["alignment"] = describe_alignment(alignment)
    text = json.dumps(settings | {"cohobate": about}, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def save(path: Path, module: nn.Module) -> None:
    """A module's state dict as safetensors, fp32, written aside and renamed."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    aside = path.with_name(path.name + ".writing")
    save_file(tensors, str(aside), metadata={"format": "pt"})
    aside.replace(path)


def describe(encoder: VisionTransformer, interpolation: str = "bicubic") -> dict[str, Any]:
    """The part of config.json that timm reads, in its words; what it has none for is there only if not usual."""
    grid = encoder.grid
    side = grid.patch[-1]
    sizes = (encoder.width, encoder.depth, encoder.heads)
    name = next((key for key, size in SIZES.items() if (size.width, size.depth, size.heads) == sizes), "custom")
    known = name if name != "custom" else "base"
    weight = encoder.state_dict().get("blocks.0.mlp.fc1.weight")
    hidden = 4 * encoder.width if weight is None else weight.shape[0]
    unusual = {
        "pos_embed": None if encoder.positions == "sincos" else encoder.positions,  # timm's words for the two
        "init_values": encoder.layer_scale,
        "relative_positions": encoder.relative_positions or None,
        "frames": grid.frames if grid.frames > 1 else None,
        "tubelet": grid.patch[0] if grid.patch[0] > 1 else None,
    }
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
        }
        | {key: value for key, value in unusual.items() if value is not None},
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


def describe_decoder(decoder: Decoder) -> dict[str, Any]:
    """Sizes of a decoder, and the order of its tokens."""
    blocks = [block for block in decoder.blocks if isinstance(block, Block)]
    hidden = blocks[0].mlp.fc1.out_features if blocks else 4 * decoder.width
    return {
        "layout": decoder.layout,
        "width": decoder.width,
        "depth": decoder.depth,
        "heads": blocks[0].attn.heads if blocks else 1,
        "mlp_ratio": hidden / decoder.width,
        "out": decoder.out,
    }


def describe_alignment(alignment: nn.Module) -> dict[str, int]:
    """Sizes of AMD's projections and generators: how many of each, the teacher's width, and a generator's blocks."""
    projections, generators = (cast(nn.ModuleList, part) for part in (alignment.projections, alignment.generators))
    blocks = [block for block in alignment.modules() if isinstance(block, Block)]
    width = cast(Linear, projections[0]).out_features
    return {
        "count": len(projections),
        "generators": len(generators),
        "width": width,
        "depth": len(blocks) // max(len(generators), 1),
        "heads": blocks[0].attn.heads if blocks else 1,
        "hidden": blocks[0].mlp.fc1.out_features if blocks else 4 * width,
    }


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
        UserError: no export there; one that cannot be read, or has NaN or inf in a weight; or one with missing, surplus
            or wrongly shaped keys, which the message lists.
    """
    folder = find_export(path)
    settings, found = _settings(folder), _tensors(folder / WEIGHTS)
    if "model_args" not in settings or "pretrained_cfg" not in settings:
        hint = f"; for a Hugging Face folder write hf:{path}" if "model_type" in settings else ""
        raise UserError(f"weights: expected an export of this package in {str(folder)!r}, got another {CONFIG}{hint}")
    shape, shown = settings["model_args"], settings["pretrained_cfg"]
    with well_formed(folder):
        model = VisionTransformer(
            grid_of(shape),
            shape["embed_dim"], shape["depth"], shape["num_heads"], shape["mlp_ratio"], shape["class_token"],
            precision=precision, mean=shown["mean"], std=shown["std"], positions=shape.get("pos_embed", "sincos"),
            layer_scale=shape.get("init_values"), relative_positions=shape.get("relative_positions", False),
        )  # fmt: skip
    fill(model, found, str(folder))
    return model


def grid_of(shape: Mapping[str, Any]) -> TokenGrid:
    """The grid that ``model_args`` in config.json describe; a KeyError, TypeError or ValueError if they do not."""
    height, width = shape["img_size"]
    patch = (shape.get("tubelet", 1), *shape["patch_size"])
    return TokenGrid(shape.get("frames", 1), height, width, patch, shape["in_chans"])


def load_decoder(path: str | Path, encoder: VisionTransformer) -> Decoder | None:
    """Rebuild the decoder beside an encoder of :func:`load_encoder`; None where the export has none.

    Raises:
        UserError: a decoder whose sizes config.json does not say, or whose keys do not fit.
    """
    folder = find_export(path)
    if not (folder / DECODER).is_file():
        return None
    shape = _settings(folder).get("decoder")
    if not isinstance(shape, dict) or shape.get("layout") not in LAYOUTS:
        raise UserError(f"weights: expected the decoder's sizes in {str(folder / CONFIG)!r}, found none that fit")
    with well_formed(folder):
        model = LAYOUTS[shape["layout"]](
            encoder.grid, encoder.width, shape["out"], shape["width"], shape["depth"], shape["heads"],
            shape["mlp_ratio"], encoder.prefix, precision=encoder.precision,
        )  # fmt: skip
    fill(model, _tensors(folder / DECODER), str(folder / DECODER))
    return model


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an export, or of the last export of a run folder.

    Raises:
        UserError: no export at ``path``.
    """
    return _settings(find_export(path))


def fill(model: nn.Module, found: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that fits exactly.

    Raises:
        UserError: missing, surplus or wrongly shaped keys; the message lists them.
    """
    wanted = model.state_dict()
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    check_keys(where, [k for k in wanted if k not in found], [k for k in found if k not in wanted], shapes)
    model.load_state_dict(dict(found))


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


@contextmanager
def well_formed(folder: Path) -> Iterator[None]:
    """Turn what a garbled config.json raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"weights: expected all sizes in {str(folder / CONFIG)!r}, got others ({what})") from error


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"weights: cannot read the export in {str(folder)!r}: {error}") from error
    return settings


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        found = load_file(str(path))
    except Exception as error:  # OSError, SafetensorError
        raise UserError(f"weights: cannot read the export in {str(path.parent)!r}: {error}") from error
    for key, value in found.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"weights: expected finite numbers in {path.parent}, got NaN or inf in {key}")
    return found
