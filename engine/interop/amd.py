"""Checkpoints of AMD (Zhao et al., CVPR 2024): VideoMAE's, and the projections and generators of the alignment.

The generators' mask tokens are in no file, for the published code kept them out of its modules, and the generators'
final norms are, although nothing passes through them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop import videomae
from cohobate.interop.formats import Format
from cohobate.interop.parts import HEADS, AlignmentSizes, Hints, Parts, Sizes, depth_of, heads_of, hidden_of, shape_of
from cohobate.interop.reading import File
from cohobate.interop.table import Entry, Table, blocks

TOKEN = "published files have no mask tokens of the generators: drawn anew from a fixed seed, or as given"
DEAD = "the generator's final norm, which nothing passes through"


def matches(file: File) -> bool:
    """Projections beside VideoMAE's encoder."""
    return any(key.startswith(("encoder.projection_heads.", "generators.")) for key in file.weights)


def sizes(file: File, hints: Hints) -> Sizes:
    """VideoMAE's, with the alignment's."""
    found, weights = videomae.sizes(file, hints), file.weights
    count = depth_of(weights, "encoder.projection_heads.")
    generators = depth_of(weights, "generators.")
    if not count or generators != count:
        raise UserError(
            f"source: expected as many generators as projections in {file.where!r}, got {generators}, {count}"
        )
    width = shape_of(weights, "encoder.projection_heads.0.weight", 2)[0]
    alignment = AlignmentSizes(
        count, width, depth_of(weights, "generators.0.blocks."),
        heads_of(width, hints.teacher_heads, HEADS, "teacher-heads"),
        hidden_of(weights, "generators.0.blocks.0.mlp.fc1.weight", width),
    )  # fmt: skip
    return replace(found, alignment=alignment)


def table(sizes: Sizes) -> Table:
    """VideoMAE's, with the alignment's."""
    lines = videomae.table(sizes)
    if sizes.alignment is None:
        return lines
    for k in range(sizes.alignment.count):
        lines.append(Entry(f"alignment.projections.{k}.weight", (f"encoder.projection_heads.{k}.weight",)))
    for k in range(sizes.alignment.generators):
        ours, theirs = f"alignment.generators.{k}.", f"generators.{k}."
        lines.append(Entry(f"{ours}mask_token", (), reason=TOKEN))
        lines.append(Entry(f"{ours}pos_embed", (), reason=videomae.POSITIONS))
        lines += blocks(f"{ours}blocks.", f"{theirs}blocks.", sizes.alignment.depth, bias="qv")
    return lines


def fit(parts: Parts) -> Sizes:
    """As VideoMAE's, with the alignment.

    Raises:
        UserError: none of it there.
    """
    if parts.sizes.alignment is None:
        raise UserError("to: expected a model with projections and generators for amd, got one without; try videomae")
    return replace(videomae.fit(parts, "amd"), alignment=parts.sizes.alignment)


def extra(sizes: Sizes) -> dict[str, tuple[Tensor, str]]:
    """The dead norms, so that the published code loads the file strictly.

    Raises:
        UserError: another number of generators than of projections, which the published code cannot have.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    if sizes.alignment is not None:
        count, generators = sizes.alignment.count, sizes.alignment.generators
        if generators != count:
            raise UserError(
                f"to: expected as many generators as projections for amd, got {generators}, {count}; try videomae"
            )
        for k in range(sizes.alignment.count):
            found[f"generators.{k}.norm.weight"] = (torch.ones(sizes.alignment.width), f"{DEAD}: 1")
            found[f"generators.{k}.norm.bias"] = (torch.zeros(sizes.alignment.width), f"{DEAD}: 0")
    return found


FORMAT = Format(
    "amd", matches, sizes, table, fit, (*videomae.SURPLUS, (r"generators\.\d+\.norm\.", DEAD)), videomae.LOST[:2], extra
)
