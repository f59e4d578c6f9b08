"""Checkpoints of VideoMAE (Tong et al., NeurIPS 2022): pretrained with a decoder, or fine-tuned, the encoder alone.

AMD's teachers are such files too. Biases are those of q and v, positions are computed and in no file.
"""

from __future__ import annotations

from dataclasses import replace

from cohobate.errors import UserError
from cohobate.interop.formats import Format
from cohobate.interop.parts import (
    HEADS,
    VIDEO_DECODER_HEADS,
    DecoderSizes,
    Hints,
    Parts,
    Sizes,
    clip_grid,
    depth_of,
    heads_of,
    hidden_of,
    shape_of,
)
from cohobate.interop.reading import File
from cohobate.interop.table import Entry, Table, affine, blocks, same
from cohobate.models.positions import sincos_1d

POSITIONS = "positions are in no file of this format: computed"
SURPLUS = (
    (r"head\.", "a classifier: features do not pass through it"),
    (r"norm\.(weight|bias)$", "beside fc_norm: the mean-pooled model's norm is fc_norm"),
)
LOST = (
    (r"student\.cls_token", "this format has no class token"),
    (r"decoder\.", "a decoder of MAE's layout, which this format has not"),
    (r"alignment\.", "this format has no projections or generators"),
)
DEAD_NORM = "the model has no final norm in use: 1 and 0"


def matches(file: File) -> bool:
    """A kernel with a time axis and separate biases of q and v."""
    keys = file.weights
    kernel = keys.get("encoder.patch_embed.proj.weight", keys.get("patch_embed.proj.weight"))
    video = kernel is not None and kernel.dim() == 5
    return video and not any(key.startswith(("encoder.projection_heads.", "generators.")) for key in keys)


def sizes(file: File, hints: Hints) -> Sizes:
    """Of a pretrained model (keys under ``encoder.``) or of a fine-tuned one."""
    weights = file.weights
    pretrained = "encoder.patch_embed.proj.weight" in weights
    front = "encoder." if pretrained else ""
    kernel = weights.get(f"{front}patch_embed.proj.weight")
    if kernel is None or kernel.dim() != 5:
        shape = "none" if kernel is None else list(kernel.shape)
        raise UserError(
            f"source: expected {front}patch_embed.proj.weight [D, C, t, h, w] in {file.where!r}, got {shape}"
        )
    width = kernel.shape[0]
    norms = ("encoder.norm",) if pretrained else ("fc_norm", "norm")
    norm = next((norm for norm in norms if f"{norm}.weight" in weights), None)
    found = Sizes(
        clip_grid(kernel, hints), width, depth_of(weights, f"{front}blocks."), heads_of(width, hints.heads, HEADS),
        hidden_of(weights, f"{front}blocks.0.mlp.fc1.weight", width), cls=False, bias="qv",
        kind=f"{'pretrained' if pretrained else 'finetuned'} {norm}",
    )  # fmt: skip
    if not pretrained or "encoder_to_decoder.weight" not in weights:
        return found
    narrow = shape_of(weights, "encoder_to_decoder.weight", 2)[0]
    decoder = DecoderSizes(
        narrow, depth_of(weights, "decoder.blocks."),
        heads_of(narrow, hints.decoder_heads, VIDEO_DECODER_HEADS, "decoder-heads"),
        hidden_of(weights, "decoder.blocks.0.mlp.fc1.weight", narrow),
        shape_of(weights, "decoder.head.weight", 2)[0], video=True, predicts="pixels",
    )  # fmt: skip
    return replace(found, decoder=decoder)


def table(sizes: Sizes) -> Table:
    """Encoder and decoder."""
    kind, norm = sizes.kind.split()
    front = "encoder." if kind == "pretrained" else ""
    lines = [Entry("student.pos_embed", (), reason=POSITIONS)]
    lines += same("student.", front, "patch_embed.proj.weight", "patch_embed.proj.bias")
    lines += blocks("student.blocks.", f"{front}blocks.", sizes.depth, bias="qv")
    if norm == "None":
        lines += [Entry(f"student.norm.{part}", (), reason=DEAD_NORM) for part in ("weight", "bias")]
    else:
        lines += affine("student.norm", norm)
    if sizes.decoder is None:
        return lines
    lines += [
        Entry("decoder.pos_embed", (), reason=POSITIONS),
        Entry("decoder.embed.weight", ("encoder_to_decoder.weight",)),
        Entry("decoder.mask_token", ("mask_token",)),
    ]
    lines += blocks("decoder.blocks.", "decoder.blocks.", sizes.decoder.depth, bias="qv")
    return [*lines, *affine("decoder.norm", "decoder.norm"), *affine("decoder.head", "decoder.head")]


def fit(parts: Parts, name: str = "videomae") -> Sizes:
    """A clip model with computed positions; a class token and MAE's decoder stay behind.

    Raises:
        UserError: an image model, or positions that the format would not compute.
    """
    sizes = parts.sizes
    if sizes.grid.frames == 1:
        raise UserError(f"to: expected a model of clips for {name}, got one of images; give --frames and --tubelet")
    if sizes.layer_scale is not None:
        raise UserError(f"to: expected a model without layer scales for {name}, got one with")
    table = parts.student.pos_embed
    if table is None or sizes.relative_positions:
        raise UserError(f"to: expected a model with absolute positions for {name}, got one with relative ones or none")
    positions = table[0, parts.student.prefix :]
    if not bool((positions.cpu() - sincos_1d(*positions.shape).float()).abs().max() < 1e-5):
        raise UserError(f"to: expected the 1-D sine-cosine positions that {name} computes, got others")
    decoder = sizes.decoder if sizes.decoder is not None and sizes.decoder.video else None
    if decoder is not None and sizes.cls:
        raise UserError(f"to: expected a decoder without a class token for {name}, got one with")
    return replace(sizes, decoder=decoder, alignment=None, bias="qv", kind="pretrained encoder.norm")


FORMAT = Format("videomae", matches, sizes, table, fit, SURPLUS, LOST)
