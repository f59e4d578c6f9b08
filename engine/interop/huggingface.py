"""Folders of Hugging Face's transformers: ViT, ViTMAE and VideoMAE.

Keys are those of published files, which are transformers 4's; a model saved under the names of transformers 5 is read
too. VideoMAE's biases are q_bias and v_bias there: a file of a model with such biases that has none is refused, for
zeros in their place would give other features without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop import mae, videomae
from cohobate.interop.formats import Format
from cohobate.interop.parts import (
    HEADS,
    MAE_DECODER_HEADS,
    VIDEO_DECODER_HEADS,
    DecoderSizes,
    Hints,
    Parts,
    Sizes,
    clip_frames,
    depth_of,
    heads_of,
    hidden_of,
    image_grid,
    shape_of,
)
from cohobate.interop.reading import File
from cohobate.interop.table import KEY_BIAS, Entry, Table, affine
from cohobate.models.layers import NORM_EPS
from cohobate.teacher.sources.from_transformers import FAMILIES
from cohobate.tokens import TokenGrid

PROJECTION = "embeddings.patch_embeddings.projection"
TOWERS = {"vit": "vit.", "vit_mae": "vit.", "videomae": "videomae."}
SPELLINGS = (  # of transformers 5, as transformers 4 has them
    (r"\bdecoder_encoder\.layer\.(\d+)\.", r"decoder_layers.\1."),  # of ViTMAE, when it is saved
    (r"(?<!\w)layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
VIDEO_SPELLINGS = (
    (r"\.attention\.query\.bias$", ".attention.q_bias"),
    (r"\.attention\.value\.bias$", ".attention.v_bias"),
)
SURPLUS = (
    (r"classifier\.", "a classifier: features do not pass through it"),
    (r"(vit\.)?pooler\.", "a classifier's pooling: features do not pass through it"),
    (r"(vit\.)?embeddings\.mask_token", "a mask token in front of the encoder, which our encoder has not"),
    (r"(videomae\.)?layernorm\.", "beside fc_norm: the mean-pooled model's norm is fc_norm"),
    (r".*\.attention\.attention\.key\.bias$", KEY_BIAS),
)
LOST = (
    (r"student\.cls_token", "VideoMAE has no class token"),
    (r"decoder\.", "transformers has no model with this decoder and head"),
    (r"alignment\.", "transformers has no model with projections or generators"),
)


def matches(file: File) -> bool:
    """A config.json of transformers, or its name of the patch embedding."""
    return any(key.endswith(f"{PROJECTION}.weight") for key in file.weights)


def renamed(file: File) -> File:
    """The same with keys in transformers 4's spelling.

    Raises:
        UserError: two keys that are the same then.
    """
    video = _kind(file) == "videomae"
    weights: dict[str, Tensor] = {}
    for key, value in file.weights.items():
        name = key
        for pattern, plain in (*SPELLINGS, *(VIDEO_SPELLINGS if video else ())):
            name = re.sub(pattern, plain, name)
        if name in weights:
            raise UserError(f"source: expected one tensor {name!r} in {file.where!r}, found two spellings of it")
        weights[name] = value
    return replace(file, weights=weights)


def _kind(file: File) -> str:
    """The model_type, told by the keys where there is no config.json."""
    kind = file.settings.get("model_type")
    if kind is None:
        kernel = next((value for key, value in file.weights.items() if key.endswith(f"{PROJECTION}.weight")), None)
        decoder = any(key.startswith("decoder.decoder_embed.") for key in file.weights)
        kind = "videomae" if kernel is not None and kernel.dim() == 5 else "vit_mae" if decoder else "vit"
    if kind not in TOWERS:
        raise UserError(f"source: expected a model_type of {', '.join(TOWERS)} in {file.where!r}, got {kind!r}")
    return str(kind)


def sizes(file: File, hints: Hints) -> Sizes:
    """Of the encoder, and of the decoder of a pretrained model.

    Raises:
        UserError: another kind of model, another activation, or biases that the configuration promises and the file
            has not.
    """
    kind, weights, given = _kind(file), file.weights, file.settings
    if given.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"source: expected GELU in {file.where!r}, got hidden_act {given['hidden_act']!r}")
    front = TOWERS[kind] if f"{TOWERS[kind]}{PROJECTION}.weight" in weights else ""
    shape = shape_of(weights, f"{front}{PROJECTION}.weight", 5 if kind == "videomae" else 4)
    width, channels, (rows, columns) = shape[0], shape[1], shape[-2:]
    mean, std = _statistics(file, kind)
    norm = f"{front}layernorm" if f"{front}layernorm.weight" in weights else "None"
    if kind == "videomae":
        height, wide = hints.image_size or _pair(given.get("image_size", 224))
        frames = clip_frames(shape[2], hints, given.get("num_frames", 16))
        grid = TokenGrid(frames, height, wide, (shape[2], rows, columns), channels)
        norm = "fc_norm" if "fc_norm.weight" in weights else norm
    else:
        table = shape_of(weights, f"{front}embeddings.position_embeddings", 3)[1]
        size = _pair(given["image_size"]) if "image_size" in given else hints.image_size
        grid = image_grid(table - 1, (rows, columns), channels, size)
    blocks = f"{front}encoder.layer."
    found = Sizes(
        grid, width, depth_of(weights, blocks),
        heads_of(width, hints.heads or given.get("num_attention_heads"), HEADS),
        hidden_of(weights, f"{blocks}0.intermediate.dense.weight", width), cls=kind != "videomae",
        bias=_bias(file, kind, blocks), kind=f"{kind} {front or '-'} {norm}", mean=mean, std=std,
    )  # fmt: skip
    decoder = {"vit_mae": "decoder.decoder_embed.weight", "videomae": "encoder_to_decoder.weight"}.get(kind, "")
    return replace(found, decoder=_decoder(file, hints, kind, decoder)) if decoder in weights else found


def _statistics(file: File, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the preprocessor's configuration beside the weights, or else the family's."""
    given = file.settings.get("preprocessor") or {}
    if "image_mean" in given and "image_std" in given and given.get("do_normalize", True):
        return tuple(given["image_mean"]), tuple(given["image_std"])
    return FAMILIES[kind].mean, FAMILIES[kind].std


def _bias(file: File, kind: str, blocks: str) -> str:
    """How q, k and v are biased; a promise that the file does not keep is an error, not zeros."""
    names = ("q_bias", "v_bias") if kind == "videomae" else ("query.bias", "value.bias")
    here = [f"{blocks}0.attention.attention.{name}" in file.weights for name in names]
    promised = file.settings.get("qv_bias" if kind == "videomae" else "qkv_bias", file.settings.get("qkv_bias", True))
    if not any(here) and not promised:
        return "none"
    if not all(here) and f"{blocks}0.layernorm_before.weight" in file.weights:
        raise UserError(
            f"source: expected {' and '.join(names)} in {file.where!r}, which its configuration promises; the file has "
            "none, and zeros in their place would be another model"
        )
    return "qv" if kind == "videomae" else "rows"


def _decoder(file: File, hints: Hints, kind: str, key: str) -> DecoderSizes:
    weights, given, video = file.weights, file.settings, kind == "videomae"
    width = shape_of(weights, key, 2)[0]
    heads = hints.decoder_heads or given.get("decoder_num_attention_heads")
    known = VIDEO_DECODER_HEADS if video else MAE_DECODER_HEADS
    head = "decoder.head.weight" if video else "decoder.decoder_pred.weight"
    return DecoderSizes(
        width, depth_of(weights, "decoder.decoder_layers."), heads_of(width, heads, known, "decoder-heads"),
        hidden_of(weights, "decoder.decoder_layers.0.intermediate.dense.weight", width),
        shape_of(weights, head, 2)[0], video, predicts="pixels",
    )  # fmt: skip


def _layers(ours: str, theirs: str, depth: int, bias: str) -> Iterator[Entry]:
    for i in range(depth):
        a, b = f"{ours}{i}.", f"{theirs}{i}."
        inner = f"{b}attention.attention."
        yield from affine(f"{a}norm1", f"{b}layernorm_before")
        yield Entry(f"{a}attn.qkv.weight", tuple(f"{inner}{x}.weight" for x in ("query", "key", "value")), "rows")
        if bias == "none":
            yield Entry(f"{a}attn.qkv.bias", (), reason="the model has no biases of q, k and v: zeros")
        elif bias == "qv":
            yield Entry(f"{a}attn.qkv.bias", (f"{inner}q_bias", f"{inner}v_bias"), "qv")
        else:
            yield Entry(f"{a}attn.qkv.bias", tuple(f"{inner}{x}.bias" for x in ("query", "key", "value")), "rows")
        for mine, other in (
            ("attn.proj", "attention.output.dense"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            yield from affine(a + mine, b + other)


def table(sizes: Sizes) -> Table:
    """Encoder and decoder."""
    kind, front, norm = sizes.kind.split()
    front = "" if front == "-" else front
    video = kind == "videomae"
    lines: Table = []
    if video:
        lines.append(Entry("student.pos_embed", (), reason=videomae.POSITIONS))
    else:
        lines.append(Entry("student.cls_token", (f"{front}embeddings.cls_token",)))
        lines.append(Entry("student.pos_embed", (f"{front}embeddings.position_embeddings",)))
    lines += affine("student.patch_embed.proj", f"{front}{PROJECTION}")
    lines += _layers("student.blocks.", f"{front}encoder.layer.", sizes.depth, sizes.bias)
    if norm == "None":
        lines += [Entry(f"student.norm.{part}", (), reason=videomae.DEAD_NORM) for part in ("weight", "bias")]
    else:
        lines += affine("student.norm", norm)
    if sizes.decoder is None:
        return lines
    if video:
        lines.append(Entry("decoder.pos_embed", (), reason=videomae.POSITIONS))
        lines.append(Entry("decoder.embed.weight", ("encoder_to_decoder.weight",)))
        lines.append(Entry("decoder.mask_token", ("mask_token",)))
        ends = ("decoder.norm", "decoder.head")
    else:
        lines += affine("decoder.embed", "decoder.decoder_embed")
        lines.append(Entry("decoder.mask_token", ("decoder.mask_token",)))
        lines.append(Entry("decoder.pos_embed", ("decoder.decoder_pos_embed",)))
        ends = ("decoder.decoder_norm", "decoder.decoder_pred")
    lines += _layers("decoder.blocks.", "decoder.decoder_layers.", sizes.decoder.depth, sizes.bias)
    return [*lines, *affine("decoder.norm", ends[0]), *affine("decoder.head", ends[1])]


def fit(parts: Parts) -> Sizes:
    """ViTMAE with a decoder for pixels, ViT without, VideoMAE of clips."""
    sizes = parts.sizes
    if sizes.grid.frames > 1:
        found = videomae.fit(parts, "hf")
        front = "videomae." if found.decoder is not None else "-"
        return replace(found, kind=f"videomae {front} {'' if front == '-' else front}layernorm")
    sizes = mae.image_only(parts, "hf")
    decoder = sizes.decoder
    if sizes.grid.height != sizes.grid.width:
        decoder = None  # ViTMAE's decoder is square
    if decoder is None or decoder.video or decoder.predicts != "pixels":
        return replace(sizes, decoder=None, alignment=None, bias="rows", kind="vit - layernorm")
    return replace(sizes, alignment=None, bias="rows", kind="vit_mae vit. vit.layernorm")


def settings(parts: Parts, sizes: Sizes) -> dict[str, Any]:
    """config.json."""
    kind, grid, decoder = sizes.kind.split()[0], sizes.grid, sizes.decoder
    names = {
        "vit": "ViTModel",
        "vit_mae": "ViTMAEForPreTraining",
        "videomae": "VideoMAEModel" if decoder is None else "VideoMAEForPreTraining",
    }
    square = grid.height == grid.width and grid.patch[1] == grid.patch[2]
    found: dict[str, Any] = {
        "model_type": kind,
        "architectures": [names[kind]],
        "image_size": grid.height if square else [grid.height, grid.width],
        "patch_size": grid.patch[1] if square else list(grid.patch[1:]),
        "num_channels": grid.channels,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "torch_dtype": "float32",
    }
    if kind == "videomae":
        found |= {"num_frames": grid.frames, "tubelet_size": grid.patch[0], "qkv_bias": True, "use_mean_pooling": False}
    else:
        found["qkv_bias"] = True
    if decoder is not None:
        found |= {
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": decoder.hidden,
            "norm_pix_loss": True,
        }
    return found


def notes(file: File, sizes: Sizes) -> list[str]:
    """Whose statistics the pixels have, and the eps of the norms."""
    kind, found = sizes.kind.split()[0], []
    eps = file.settings.get("layer_norm_eps", 1e-12)
    if eps != NORM_EPS:
        found.append(f"norms have eps {eps:g} there and {NORM_EPS:g} here: features differ by about as much")
    if "image_mean" not in (file.settings.get("preprocessor") or {}):
        whose = FAMILIES[kind].whose
        found.append(f"no preprocessor's configuration: pixels are normalised by {whose} mean and std")
    return found


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FORMAT = Format("hf", matches, sizes, table, fit, SURPLUS, LOST, settings=settings, notes=notes, prepare=renamed)
