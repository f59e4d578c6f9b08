"""Checkpoints of MAE (He et al., CVPR 2022): encoders, and whole models with the decoder that predicts pixels."""

from __future__ import annotations

from dataclasses import replace

from cohobate.errors import UserError
from cohobate.interop.formats import Format
from cohobate.interop.parts import (
    HEADS,
    MAE_DECODER_HEADS,
    DecoderSizes,
    Hints,
    Parts,
    Sizes,
    depth_of,
    heads_of,
    hidden_of,
    image_grid,
    shape_of,
)
from cohobate.interop.reading import File
from cohobate.interop.table import Entry, Table, affine, blocks, same

HEAD = "decoder_pred"
NO_HEAD = "the file has no head for pixels: drawn anew from a fixed seed"
SURPLUS = (
    (r"head\.", "a classifier: features do not pass through it"),
    (r"fc_norm\.", "a classifier's norm beside the encoder's own"),
)
OTHER_HEAD = "a head of another kind: what it predicts is not what this format's head predicts"
LOST = (
    (r"decoder\.", "a decoder of VideoMAE's layout, which this format has not"),
    (r"alignment\.", "this format has no projections or generators"),
)


def matches(file: File) -> bool:
    """An encoder with timm's keys and a class token, nothing of timm's newer parts, and no head of dBOT's."""
    keys = file.weights
    plain = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} <= set(keys)  # fine-tuned: fc_norm
    return plain and not file.settings and "decoder_predp.weight" not in keys and not _newer(file)


def _newer(file: File) -> bool:
    return any(".ls1." in key or ".q_norm." in key or key in ("reg_token", "norm_pre.weight") for key in file.weights)


def encoder_sizes(file: File, hints: Hints) -> Sizes:
    """Sizes of an image encoder with timm's keys."""
    weights = file.weights
    width, channels, rows, columns = shape_of(weights, "patch_embed.proj.weight", 4)
    positions = shape_of(weights, "pos_embed", 3)
    return Sizes(
        image_grid(positions[1] - 1, (rows, columns), channels, hints.image_size),
        width, depth_of(weights, "blocks."), heads_of(width, hints.heads, HEADS),
        hidden_of(weights, "blocks.0.mlp.fc1.weight", width), cls=True,
    )  # fmt: skip


def sizes(file: File, hints: Hints, head: str = HEAD, predicts: str = "pixels") -> Sizes:
    """Sizes of an encoder, and of its decoder where the file has one."""
    found, weights = encoder_sizes(file, hints), file.weights
    if "decoder_embed.weight" not in weights:
        return replace(found, kind="encoder")
    width = shape_of(weights, "decoder_embed.weight", 2)[0]
    headless = f"{head}.weight" not in weights
    usual = found.grid.row_length if predicts == "pixels" else found.width
    decoder = DecoderSizes(
        width, depth_of(weights, "decoder_blocks."), heads_of(width, hints.decoder_heads, MAE_DECODER_HEADS,
        "decoder-heads"), hidden_of(weights, "decoder_blocks.0.mlp.fc1.weight", width),
        usual if headless else shape_of(weights, f"{head}.weight", 2)[0], video=False,
        predicts="pixels" if predicts == "pixels" else "features",
    )  # fmt: skip
    return replace(found, decoder=decoder, kind="headless" if headless else "whole")


def encoder_table(depth: int) -> Table:
    """Our encoder's keys are theirs."""
    table = list(same("student.", "", "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"))
    return [*table, *blocks("student.blocks.", "blocks.", depth), *affine("student.norm", "norm")]


def table(sizes: Sizes, head: str = HEAD) -> Table:
    """Encoder and decoder."""
    lines = encoder_table(sizes.depth)
    if sizes.decoder is None:
        return lines
    lines += affine("decoder.embed", "decoder_embed")
    lines += [Entry("decoder.mask_token", ("mask_token",)), Entry("decoder.pos_embed", ("decoder_pos_embed",))]
    lines += blocks("decoder.blocks.", "decoder_blocks.", sizes.decoder.depth)
    lines += affine("decoder.norm", "decoder_norm")
    if sizes.kind == "headless":
        return lines + [
            Entry(f"decoder.head.{part}", (), reason=NO_HEAD, lost=OTHER_HEAD) for part in ("weight", "bias")
        ]
    return [*lines, *affine("decoder.head", head)]


def fit(parts: Parts, name: str = "mae", predicts: str = "pixels") -> Sizes:
    """As it is; a decoder of VideoMAE's layout, or a head of another kind, stays behind."""
    sizes = image_only(parts, name)
    decoder = sizes.decoder
    if decoder is None or decoder.video:
        return replace(sizes, decoder=None, alignment=None, kind="encoder")
    return replace(sizes, alignment=None, kind="whole" if decoder.predicts == predicts else "headless")


def image_only(parts: Parts, name: str) -> Sizes:
    """The sizes, of a plain image encoder with a class token.

    Raises:
        UserError: another one.
    """
    sizes = still(parts, name)
    if not sizes.cls:
        raise UserError(f"to: expected a model with a class token for {name}, got one without")
    if sizes.layer_scale is not None and name != "timm":
        raise UserError(f"to: expected a model without layer scales for {name}, got one with")
    return sizes


def still(parts: Parts, name: str) -> Sizes:
    """The sizes, of a model of still images.

    Raises:
        UserError: one of clips.
    """
    grid = parts.sizes.grid
    if parts.sizes.positions != "sincos" or parts.sizes.relative_positions:
        raise UserError(f"to: expected a model with absolute positions for {name}, got one with relative ones or none")
    if grid.frames > 1 or grid.patch[0] > 1:
        raise UserError(f"to: expected a model of images for {name}, got one of {grid.frames} frames; give --frames 1")
    return parts.sizes


FORMAT = Format("mae", matches, sizes, table, fit, SURPLUS, LOST)
