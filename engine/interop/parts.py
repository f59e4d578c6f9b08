"""What every format is read into and written from: an encoder, and the decoder and alignment that may come with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.methods import Alignment, AMDOptions
from cohobate.models import Decoder, PixelDecoder, Precision, VisionTransformer
from cohobate.models.exports import describe_alignment, describe_decoder
from cohobate.models.positions import sincos_1d
from cohobate.models.vit import IMAGENET_MEAN, IMAGENET_STD
from cohobate.tokens import TokenGrid

FP32 = Precision(torch.float32, torch.float32)
Predicts = Literal["pixels", "features"]
# Heads by width: 64 channels a head but for the huge models.
HEADS = {1280: 16}
MAE_DECODER_HEADS = {512: 16}
VIDEO_DECODER_HEADS = {640: 8}


@dataclass(frozen=True)
class Hints:
    """What a file may not say of its model; None where it does or where the published sizes will do.

    ``heads``, ``decoder_heads`` and ``teacher_heads`` (of AMD's generators) are attention heads. ``image_size``
    (height, width), ``frames`` and ``tubelet`` are what the converted model has: a table of positions for another size
    is resized. ``mean`` and ``std`` normalise pixels in [0, 1].
    """

    heads: int | None = None
    decoder_heads: int | None = None
    teacher_heads: int | None = None
    image_size: tuple[int, int] | None = None
    frames: int | None = None
    tubelet: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raise a UserError for a number below 1."""
        for name in ("heads", "decoder_heads", "teacher_heads", "image_size", "frames", "tubelet"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
                raise UserError(f"{name.replace('_', '-')}: expected at least 1, got {value}")


@dataclass(frozen=True)
class DecoderSizes:
    """``video``: VideoMAE's layout. ``predicts``: what its head was trained for."""

    width: int
    depth: int
    heads: int
    hidden: int
    out: int
    video: bool
    predicts: Predicts


@dataclass(frozen=True)
class AlignmentSizes:
    """AMD's projections, ``count`` of them, and generators (-1: as many); ``width`` is the teacher's."""

    count: int
    width: int
    depth: int
    heads: int
    hidden: int
    generators: int = -1

    def __post_init__(self) -> None:
        if self.generators < 0:
            object.__setattr__(self, "generators", self.count)


@dataclass(frozen=True)
class Sizes:
    """All that modules and tables of keys follow from. ``kind``: a format's own mark, such as where its norm is."""

    grid: TokenGrid
    width: int
    depth: int
    heads: int
    hidden: int
    cls: bool
    decoder: DecoderSizes | None = None
    alignment: AlignmentSizes | None = None
    layer_scale: float | None = None
    positions: str = "sincos"
    relative_positions: bool = False
    bias: str = "fused"
    kind: str = ""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class Parts(nn.Module):
    """The modules, under the names that the methods have for them: ``student``, ``decoder``, ``alignment``."""

    student: VisionTransformer
    decoder: Decoder | None
    alignment: Alignment | None

    def __init__(self, student: VisionTransformer, decoder: Decoder | None, alignment: Alignment | None, sizes: Sizes):
        super().__init__()
        self.student, self.decoder, self.alignment, self.sizes = student, decoder, alignment, sizes


def build(sizes: Sizes, precision: Precision = FP32) -> Parts:
    """Modules of these sizes, drawn from a fixed seed; biases 0, norms 1 and 0, positions as computed.

    Raises:
        UserError: sizes that do not go together.
    """
    student = VisionTransformer(
        sizes.grid, sizes.width, sizes.depth, sizes.heads, ratio(sizes.hidden, sizes.width), sizes.cls,
        precision=precision, mean=sizes.mean, std=sizes.std, positions=sizes.positions, layer_scale=sizes.layer_scale,
        relative_positions=sizes.relative_positions,
    )  # fmt: skip
    decoder: Decoder | None = None
    if sizes.decoder is not None:
        d = sizes.decoder
        decoder = (PixelDecoder if d.video else Decoder)(
            sizes.grid, sizes.width, d.out, d.width, d.depth, d.heads, ratio(d.hidden, d.width), int(sizes.cls),
            precision=precision,
        )  # fmt: skip
    alignment: Alignment | None = None
    if sizes.alignment is not None:
        a = sizes.alignment
        if a.hidden != 4 * a.width:
            raise UserError(f"generators: expected MLPs of {4 * a.width} channels, got {a.hidden}")
        pairs = aligned_pairs(a.count, sizes.depth)
        generation = tuple(pairs[place % a.count] for place in range(a.generators))
        options = AMDOptions(direct=pairs, generation=generation, generation_weight=float(a.generators > 0))
        alignment = Alignment(student, a.width, a.heads, options, depth=a.depth)
    parts = Parts(student, decoder, alignment, sizes)
    generator = torch.Generator().manual_seed(0)
    for module in (student, decoder, alignment):
        if module is not None:
            module.reset(generator)
    if not sizes.cls and sizes.grid.patch[0] > 1 and sizes.positions == "sincos":
        _one_dimensional(parts)
    return parts


@torch.no_grad()
def _one_dimensional(parts: Parts) -> None:
    """VideoMAE's positions are the 1-D table, even where a clip is so short that it has one layer of tubelets."""
    for name, table in parts.named_parameters():
        if name.endswith("pos_embed"):
            table.copy_(sincos_1d(table.shape[1], table.shape[2]).float()[None])


def measured(
    student: VisionTransformer, decoder: Decoder | None, alignment: Alignment | None, predicts: Predicts
) -> Sizes:
    """The sizes of modules that are there already; ``predicts`` is what the decoder's head is for."""
    state = student.state_dict()
    found = Sizes(
        student.grid, student.width, student.depth, student.heads,
        hidden_of(state, "blocks.0.mlp.fc1.weight", student.width), bool(student.prefix),
        layer_scale=student.layer_scale, positions=student.positions, relative_positions=student.relative_positions,
        mean=student.mean, std=student.std,
    )  # fmt: skip
    if decoder is not None:
        shape = describe_decoder(decoder)
        hidden = hidden_of(decoder.state_dict(), "blocks.0.mlp.fc1.weight", decoder.width)
        video = isinstance(decoder, PixelDecoder)
        sizes = DecoderSizes(decoder.width, decoder.depth, shape["heads"], hidden, decoder.out, video, predicts)
        found = replace(found, decoder=sizes)
    if alignment is not None:
        found = replace(found, alignment=AlignmentSizes(**describe_alignment(alignment)))
    return found


def aligned_pairs(count: int, depth: int) -> tuple[tuple[int, int], ...]:
    """Student blocks spread evenly, the last one among them, and teacher blocks twice as deep: 6, 12 and 12, 24."""
    layers = [depth * (k + 1) // count for k in range(count)]
    return tuple((layer, 2 * layer) for layer in layers)


def ratio(hidden: int, width: int) -> float:
    """The MLP ratio that gives exactly ``hidden`` channels."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def depth_of(keys: Iterable[str], prefix: str) -> int:
    """How many blocks there are under ``prefix``.

    Raises:
        UserError: a number is missing among them.
    """
    found = {int(match.group(1)) for key in keys if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    if found != set(range(len(found))):
        raise UserError(f"source: expected the blocks {prefix}0 to {prefix}{max(found)}, found {len(found)} of them")
    return len(found)


def heads_of(width: int, given: int | None, known: Mapping[int, int], flag: str = "heads") -> int:
    """Attention heads, which no file of weights says: as given, as published for this width, or 64 channels each.

    Raises:
        UserError: none of these.
    """
    if given is not None:
        if width % given:
            raise UserError(f"{flag}: expected a divisor of the width {width}, got {given}")
        return given
    if width in known:
        return known[width]
    if width % 64:
        raise UserError(
            f"{flag}: expected a number, which no published model of width {width} tells and the file does not; give "
            f"--{flag} N"
        )
    return width // 64


def image_grid(tokens: int, patch: tuple[int, int], channels: int, size: tuple[int, int] | None) -> TokenGrid:
    """The grid of a table of ``tokens`` positions: that of ``size`` if it has so many, else square.

    Raises:
        UserError: neither.
    """
    rows, columns = patch
    fits = size is not None and size[0] % rows == 0 == size[1] % columns
    if size is not None and fits and (size[0] // rows) * (size[1] // columns) == tokens:
        return TokenGrid.image(size, patch, channels)
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(
            f"image-size: expected the (height, width) that the {tokens} positions in the file are for, got "
            f"{size or 'none'}, and they are no square"
        )
    return TokenGrid.image((side * rows, side * columns), patch, channels)


def clip_grid(kernel: Tensor, hints: Hints) -> TokenGrid:
    """The grid of a model whose file has no positions: 16 frames of 224 x 224 unless the hints say otherwise."""
    _, channels, tubelet, rows, columns = kernel.shape
    height, width = hints.image_size or (224, 224)
    return TokenGrid(clip_frames(tubelet, hints, 16), height, width, (tubelet, rows, columns), channels)


def clip_frames(tubelet: int, hints: Hints, usual: int) -> int:
    """Frames of a clip as a file is read; one frame is what the model shall have in the end, and not the file's."""
    return hints.frames if hints.frames is not None and hints.frames >= tubelet else usual


def shape_of(weights: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there.

    Raises:
        UserError: it is not, or has another number of dimensions.
    """
    if key not in weights:
        raise UserError(f"source: expected a tensor {key!r}, found none among {', '.join(list(weights)[:6])}, ...")
    if weights[key].dim() != dims:
        raise UserError(f"source: expected {key!r} with {dims} dimensions, got {list(weights[key].shape)}")
    return tuple(weights[key].shape)


def hidden_of(weights: Mapping[str, Tensor], key: str, width: int) -> int:
    """Hidden width of an MLP whose first matrix is ``key``; four times the width where there is no block."""
    return shape_of(weights, key, 2)[0] if key in weights else 4 * width
