"""Checkpoints of dBOT's students of CLIP (Liu et al., ICLR 2024): BEiT's architecture, with relative positions.

Layer scales are ``gamma_1`` and ``gamma_2``, biases those of q and v, and one table of relative positions serves all
blocks. The mask token and the head of pretraining are left behind: features do not pass through them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop.formats import Format
from cohobate.interop.parts import Hints, Parts, Sizes, depth_of, hidden_of, image_grid, shape_of
from cohobate.interop.reading import File
from cohobate.interop.table import Table, affine, blocks, same
from cohobate.models.positions import relative_index

BIAS, INDEX = "rel_pos_bias.relative_position_bias_table", "rel_pos_bias.relative_position_index"
SURPLUS = (
    (r"rel_pos_bias\.relative_position_index", "follows from the size of the image"),
    (r"mask_token|lm_head\.", "of pretraining: features do not pass through it"),
    (r"head\.", "a classifier: features do not pass through it"),
)
LOST = (
    (r"decoder\.", "this format has no decoder"),
    (r"alignment\.", "this format has no projections or generators"),
)


def matches(file: File) -> bool:
    """A shared table of relative positions, and layer scales under BEiT's names."""
    return BIAS in file.weights and "blocks.0.gamma_1" in file.weights


def sizes(file: File, hints: Hints) -> Sizes:
    """Of the encoder; the table of relative positions says the heads, and the size of a square image."""
    weights = file.weights
    width, channels, rows, columns = shape_of(weights, "patch_embed.proj.weight", 4)
    offsets, heads = shape_of(weights, BIAS, 2)
    side = (round((offsets - 3) ** 0.5) + 1) // 2
    tokens = side * side
    if hints.image_size is not None:
        high, wide = hints.image_size[0] // rows, hints.image_size[1] // columns
        tokens = high * wide if (2 * high - 1) * (2 * wide - 1) + 3 == offsets else tokens
    grid = image_grid(tokens, (rows, columns), channels, hints.image_size)
    if (2 * grid.shape[1] - 1) * (2 * grid.shape[2] - 1) + 3 != offsets:
        raise UserError(f"source: expected {BIAS} of a square image in {file.where!r}, got {offsets} offsets")
    if "pos_embed" in weights:
        raise UserError(f"source: expected no absolute positions beside {BIAS} in {file.where!r}, got both")
    return Sizes(
        grid, width, depth_of(weights, "blocks."), heads, hidden_of(weights, "blocks.0.mlp.fc1.weight", width),
        cls=True, layer_scale=0.1, positions="none", relative_positions=True, bias="qv",
    )  # fmt: skip


def table(sizes: Sizes) -> Table:
    """The encoder."""
    lines = list(same("student.", "", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", BIAS))
    lines += blocks("student.blocks.", "blocks.", sizes.depth, bias="qv", scale=("gamma_1", "gamma_2"))
    return [*lines, *affine("student.norm", "norm")]


def fit(parts: Parts) -> Sizes:
    """The encoder alone.

    Raises:
        UserError: one of another architecture.
    """
    sizes = parts.sizes
    plain = sizes.cls and sizes.positions == "none" and sizes.relative_positions and sizes.layer_scale is not None
    if not plain:
        wanted = "relative positions alone, layer scales and a class token"
        raise UserError(f"to: expected a model with {wanted} for dbot-clip, got another")
    return replace(sizes, decoder=None, alignment=None, bias="qv")


def extra(sizes: Sizes) -> dict[str, tuple[Tensor, str]]:
    """The table's index, which the published code keeps in its files."""
    _, rows, columns = sizes.grid.shape
    return {INDEX: (relative_index(rows, columns, 1), "follows from the size of the image")}


def notes(file: File, sizes: Sizes) -> list[str]:
    """Whose statistics the pixels have."""
    return ["the file does not say how pixels are normalised: ImageNet's mean and std are assumed"]


FORMAT = Format("dbot-clip", matches, sizes, table, fit, SURPLUS, LOST, extra, notes=notes)
