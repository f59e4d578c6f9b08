"""Our own export folders, with the alignment of AMD beside encoder and decoder where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cohobate.errors import UserError
from cohobate.interop.formats import Format
from cohobate.interop.parts import AlignmentSizes, DecoderSizes, Hints, Parts, Predicts, Sizes, build, hidden_of
from cohobate.interop.reading import File, read
from cohobate.interop.table import Entry, Table
from cohobate.models.exports import ALIGNMENT, DECODER, describe, describe_decoder, grid_of, well_formed


def matches(file: File) -> bool:
    """Our mark in config.json; what `cohobate eval finetune` keeps has it too, but is a model of timm's."""
    return "cohobate" in file.settings and "fc_norm.weight" not in file.weights


def prepare(file: File) -> File:
    """With the tensors of the files beside model.safetensors, under ``decoder.`` and ``alignment.``."""
    if not matches(file):
        raise UserError(f"source: expected an export of this package at {file.where!r}, got another file")
    weights, aside = dict(file.weights), list(file.aside)
    for name, key in ((DECODER, "decoder"), (ALIGNMENT, "alignment")):
        path = Path(file.where) / name
        if path.is_file() and key in file.settings:
            weights |= {f"{key}.{inner}": value for inner, value in read(path).weights.items()}
        elif path.is_file():
            aside.append((name, "its sizes are not in config.json"))
    return replace(file, weights=weights, aside=tuple(aside))


def sizes(file: File, hints: Hints) -> Sizes:
    """As config.json says."""
    with well_formed(Path(file.where)):
        return _sizes(file)


def _sizes(file: File) -> Sizes:
    shape, shown = file.settings["model_args"], file.settings["pretrained_cfg"]
    found = Sizes(
        grid_of(shape), shape["embed_dim"], shape["depth"], shape["num_heads"],
        hidden_of(file.weights, "blocks.0.mlp.fc1.weight", shape["embed_dim"]), shape["class_token"],
        layer_scale=shape.get("init_values"), positions=shape.get("pos_embed") or "sincos",
        relative_positions=shape.get("relative_positions", False),
        mean=tuple(shown["mean"]), std=tuple(shown["std"]),
    )  # fmt: skip
    if "decoder" in file.settings:
        d, video = file.settings["decoder"], file.settings["decoder"]["layout"] != "raster"
        hidden = hidden_of(file.weights, "decoder.blocks.0.mlp.fc1.weight", d["width"])
        decoder = DecoderSizes(d["width"], d["depth"], d["heads"], hidden, d["out"], video, _predicts(file))
        found = replace(found, decoder=decoder)
    if "alignment" in file.settings:
        found = replace(found, alignment=AlignmentSizes(**file.settings["alignment"]))
    return found


def _predicts(file: File) -> Predicts:
    """What the head was trained for: pixels, unless the method was dBOT."""
    return "features" if str(file.settings["cohobate"].get("method", "")).startswith("dbot") else "pixels"


def table(sizes: Sizes) -> Table:
    """Every key is ours; the encoder's stand in a file without ``student.``."""
    return [Entry(key, (key.removeprefix("student."),)) for key in build(sizes).state_dict()]


def fit(parts: Parts) -> Sizes:
    """Everything fits."""
    return parts.sizes


def settings(parts: Parts, sizes: Sizes) -> dict[str, Any]:
    """config.json."""
    found = describe(parts.student)
    method = "mae"
    if parts.decoder is not None and sizes.decoder is not None:
        found["decoder"] = describe_decoder(parts.decoder)
        method = "videomae" if sizes.decoder.video else "mae" if sizes.decoder.predicts == "pixels" else "dbot"
    if sizes.alignment is not None:
        found["alignment"] = vars(sizes.alignment)
        method = "amd"
    return found | {"cohobate": {"stage": "converted", "method": method}}


FORMAT = Format("cohobate", matches, sizes, table, fit, settings=settings, prepare=prepare)
