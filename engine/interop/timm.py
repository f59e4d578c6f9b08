"""timm's vision transformers (written against timm 1.0): plain pre-norm encoders, with or without layer scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cohobate.interop import mae
from cohobate.interop.formats import Format
from cohobate.interop.parts import HEADS, Hints, Parts, Sizes, depth_of, heads_of, hidden_of, image_grid, shape_of
from cohobate.interop.reading import File
from cohobate.interop.table import Entry, Table, affine, blocks, same
from cohobate.models.exports import describe

SURPLUS = (
    (r"head(_drop)?\.", "a classifier: features do not pass through it"),
    (r"fc_norm\.", "a classifier's norm beside the encoder's own"),
)
LOST = (
    (r"decoder\.", "a timm model has no decoder"),
    (r"alignment\.", "a timm model has no projections or generators"),
)
SCALES = ("ls1.gamma", "ls2.gamma")


def matches(file: File) -> bool:
    """timm's keys, with a config.json beside them or parts that MAE's encoders have not."""
    return "patch_embed.proj.weight" in file.weights and "pos_embed" in file.weights


def sizes(file: File, hints: Hints) -> Sizes:
    """Of an encoder; a config.json says more than the shapes do."""
    weights, given = file.weights, file.settings.get("model_args") or {}
    shown = file.settings.get("pretrained_cfg") or {}
    width, channels, rows, columns = shape_of(weights, "patch_embed.proj.weight", 4)
    cls = "cls_token" in weights
    table = shape_of(weights, "pos_embed", 3)[1]
    size = hints.image_size
    if "img_size" in given:  # of the table; hints may ask for another one
        side = given["img_size"]
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
    whole = cls and given.get("no_embed_class") is not True and not _square(table, size, rows, columns)
    bias = "fused" if "blocks.0.attn.qkv.bias" in weights or "blocks.0.norm1.weight" not in weights else "none"
    statistics: dict[str, Any] = {key: tuple(shown[key]) for key in ("mean", "std") if key in shown}
    norm = "norm" if "norm.weight" in weights else "fc_norm"
    return Sizes(
        image_grid(table - int(whole), (rows, columns), channels, size),
        width, depth_of(weights, "blocks."), heads_of(width, hints.heads or given.get("num_heads"), HEADS),
        hidden_of(weights, "blocks.0.mlp.fc1.weight", width), cls,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in weights else None,
        bias=bias, kind=f"{norm} {'whole' if whole or not cls else 'patches'}", **statistics,
    )  # fmt: skip


def _square(tokens: int, size: tuple[int, int] | None, rows: int, columns: int) -> bool:
    """Whether a table is one of the patches alone."""
    if size is not None:
        return tokens == (size[0] // rows) * (size[1] // columns)
    return round(tokens**0.5) ** 2 == tokens


def table(sizes: Sizes) -> Table:
    """The encoder."""
    norm, positions = sizes.kind.split()
    lines = list(same("student.", "", *(["cls_token"] if sizes.cls else [])))
    lines.append(Entry("student.pos_embed", ("pos_embed",), "patches" if positions == "patches" else "same"))
    lines += same("student.", "", "patch_embed.proj.weight", "patch_embed.proj.bias")
    scale = SCALES if sizes.layer_scale is not None else None
    lines += blocks("student.blocks.", "blocks.", sizes.depth, bias=sizes.bias, scale=scale)
    return [*lines, *affine("student.norm", norm)]


def fit(parts: Parts) -> Sizes:
    """The encoder alone."""
    sizes = parts.sizes
    if sizes.cls:
        sizes = mae.image_only(parts, "timm")
    else:
        mae.still(parts, "timm")
    return replace(sizes, decoder=None, alignment=None, bias="fused", kind="norm whole")


def settings(parts: Parts, sizes: Sizes) -> dict[str, Any]:
    """config.json, for ``timm.create_model("local-dir:FOLDER")``."""
    return describe(parts.student)


def notes(file: File, sizes: Sizes) -> list[str]:
    """Whose statistics the pixels have."""
    said = file.settings.get("pretrained_cfg") or {}
    if "mean" in said:
        return []
    return [
        "the file does not say how pixels are normalised: ImageNet's mean and std are assumed (many of timm's have 0.5)"
    ]


FORMAT = Format("timm", matches, sizes, table, fit, SURPLUS, LOST, settings=settings, notes=notes)
