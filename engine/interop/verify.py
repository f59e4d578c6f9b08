"""Features of a checkpoint, computed without our model: by its own library, or in plain torch from its own keys."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop.formats import Format
from cohobate.interop.parts import Parts
from cohobate.interop.reading import File
from cohobate.teacher.sources import from_timm, from_transformers

TOLERANCE = 1e-4  # of the largest feature; fp32 products in another order differ by about 1e-6
LOOSE = 5e-2  # where norms have another eps: it weighs as eps against a token's variance, which may be small


@dataclass(frozen=True)
class Agreement:
    """Largest difference of the residual stream behind the last block, the largest value, and who computed it."""

    difference: float
    largest: float
    oracle: str

    def text(self) -> str:
        """One line."""
        relative = self.difference / max(self.largest, 1e-30)
        return (
            f"largest difference {self.difference:.1e} ({relative:.1e} of the largest feature), against {self.oracle}"
        )


@torch.no_grad()
def compare(form: Format, file: File, parts: Parts) -> Agreement | None:
    """Our model's features against those of the file that it was read from, or written to, on random pixels.

    None for a model with relative positions in a file that does not say which belongs to which pair of tokens.

    Raises:
        UserError: they differ by more than rounding.
    """
    student = parts.student
    if student.relative_positions and "rel_pos_bias.relative_position_index" not in file.weights:
        return None
    generator = torch.Generator().manual_seed(0)
    batch = 2 if student.grid.size <= 512 else 1
    pixels = torch.randint(0, 256, (batch, *student.grid.pixel_shape), dtype=torch.uint8, generator=generator)
    (ours,) = student.intermediates(pixels, [student.depth])
    theirs, oracle = _oracle(form, file, parts, pixels)
    if theirs.shape != ours.shape:
        raise UserError(f"source: expected features {list(theirs.shape)}, as {oracle} gives, got {list(ours.shape)}")
    found = Agreement(float((ours - theirs).abs().max()), float(theirs.abs().max()), oracle)
    bound = LOOSE if eps(form, file) != student.norm.eps else TOLERANCE
    if not found.difference <= bound * found.largest:
        raise UserError(
            f"source: {file.where!r} as {form.name} gives other features than the model here: {found.text()}"
        )
    return found


def eps(form: Format, file: File) -> float:
    """Of the norms: 1e-6 in every published code but transformers, whose configuration says."""
    return float(file.settings.get("layer_norm_eps", 1e-12)) if form.name == "hf" else 1e-6


def _oracle(form: Format, file: File, parts: Parts, pixels: Tensor) -> tuple[Tensor, str]:
    """[B, P + N, D] behind the last block, and whose they are."""
    depth, source = parts.student.depth, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if depth:  # without blocks there is nothing to watch in a library's model
            source = _transformers(file) if form.name == "hf" else _timm(form, file, parts)
    if source is not None and source.original is not None and source.original.grid == parts.student.grid:
        source.original.mean, source.original.std = parts.student.mean, parts.student.std
        (found,) = source.original.hidden_states(pixels, [depth])
        return found, "timm's own model" if form.name != "hf" else "transformers' own model"
    mean, std = torch.tensor(parts.student.mean), torch.tensor(parts.student.std)
    images = ((pixels.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    heads = parts.student.heads
    return stream(form.prepare(file).weights, images, heads, eps(form, file)), "plain torch on the file's own keys"


def _transformers(file: File) -> Any:
    """The library's own model of a folder, where transformers imports."""
    try:
        library = importlib.import_module("transformers")
    except Exception:  # not installed, or broken in any way
        return None
    library.logging.set_verbosity_error()
    getattr(library.logging, "disable_progress_bar", lambda: None)()
    return from_transformers.load(library, file.where) if Path(file.where).is_dir() else None


def _timm(form: Format, file: File, parts: Parts) -> Any:
    """timm's own model with the file's weights, where timm imports and the format is its."""
    if form.name not in ("timm", "cohobate") or parts.sizes.grid.frames > 1 or parts.sizes.relative_positions:
        return None
    try:
        kind: Any = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    except Exception:  # not installed, or broken in any way
        return None
    sizes, weights = parts.sizes, file.weights
    try:
        model = kind(
            img_size=(sizes.grid.height, sizes.grid.width), patch_size=sizes.grid.patch[1:], num_classes=0,
            in_chans=sizes.grid.channels, embed_dim=sizes.width, depth=sizes.depth, num_heads=sizes.heads,
            mlp_ratio=sizes.hidden / sizes.width, class_token=sizes.cls, global_pool="token" if sizes.cls else "avg",
            qkv_bias="blocks.0.attn.qkv.bias" in weights, init_values=sizes.layer_scale, fc_norm=False,
            no_embed_class=weights["pos_embed"].shape[1] == sizes.grid.size,
        )  # fmt: skip
    except Exception:  # an older or newer timm without one of these
        return None
    model.load_state_dict({key: weights[key].float() for key in model.state_dict() if key in weights}, strict=False)
    return from_timm.from_model(model, mean=sizes.mean, std=sizes.std, name="timm")


def stream(weights: Mapping[str, Tensor], images: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """The residual stream behind the last block, from upstream keys.

    Args:
        weights: of any format, under its own keys.
        images: [B, C, T, H, W], normalised.
        heads: of the attention.
        eps: of the norms.

    Returns:
        [B, P + N, D].
    """
    weights = {key: value if value.dtype == torch.int64 else value.float() for key, value in weights.items()}
    stem = "embeddings.patch_embeddings.projection.weight"
    hugging = next((key for key in weights if key.endswith(stem)), None)
    plain = next((key for key in weights if key.endswith("patch_embed.proj.weight")), "")
    name = hugging or plain
    kernel, bias = weights[name], weights[name.removesuffix("weight") + "bias"]
    if kernel.dim() == 5:
        x = F.conv3d(images, kernel, bias, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    else:
        x = F.conv2d(images[:, :, 0], kernel, bias, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    front = name.removesuffix(stem if hugging else "patch_embed.proj.weight")
    token = weights.get(f"{front}embeddings.cls_token" if hugging else "cls_token")
    table = weights.get(f"{front}embeddings.position_embeddings" if hugging else "pos_embed")
    if kernel.dim() == 5 and (table is None or hugging):
        x = x + _sinusoid(x.shape[1], x.shape[2])
    elif table is not None and table.shape[1] == x.shape[1]:
        x = x + table
    elif table is not None and token is not None:
        x = x + table[:, 1:]
        token = token + table[:, :1]
    if token is not None:
        x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
    index = weights.get("rel_pos_bias.relative_position_index")
    relative: Tensor | float = 0.0
    if index is not None:
        relative = weights["rel_pos_bias.relative_position_bias_table"][index.long()].permute(2, 0, 1)
    i = 0
    stem = "encoder.layer." if hugging else "blocks."
    while any(key.startswith(f"{front}{stem}{i}.") for key in weights):
        part = {
            key.removeprefix(f"{front}{stem}{i}."): value
            for key, value in weights.items()
            if key.startswith(f"{front}{stem}{i}.")
        }
        x = _layer(x, part, heads, eps) if hugging else _block(x, part, heads, eps, relative)
        i += 1
    return x


def _sinusoid(length: int, width: int) -> Tensor:
    """sin at even and cos at odd channels of position / 10000^(2 floor(j / 2) / width)."""
    rows = [[n / math.pow(10000, 2 * (j // 2) / width) for j in range(width)] for n in range(length)]
    table = torch.tensor(rows, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = table[:, 0::2].sin(), table[:, 1::2].cos()
    return table.float()


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, relative: Tensor | float = 0.0) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + relative
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _block(x: Tensor, w: Mapping[str, Tensor], heads: int, eps: float, relative: Tensor | float) -> Tensor:
    """timm's names, a fused bias or q_bias and v_bias, layer scales where there are any (BEiT's are ``gamma``)."""
    width = x.shape[-1]
    bias = w.get("attn.qkv.bias")
    if "attn.q_bias" in w:
        bias = torch.cat([w["attn.q_bias"], torch.zeros(width), w["attn.v_bias"]])
    y = F.layer_norm(x, (width,), w["norm1.weight"], w["norm1.bias"], eps)
    q, k, v = F.linear(y, w["attn.qkv.weight"], bias).chunk(3, dim=-1)
    y = F.linear(_attention(q, k, v, heads, relative), w["attn.proj.weight"], w["attn.proj.bias"])
    x = x + y * w.get("ls1.gamma", w.get("gamma_1", torch.ones(width)))
    y = F.layer_norm(x, (width,), w["norm2.weight"], w["norm2.bias"], eps)
    y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
    return x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"]) * w.get(
        "ls2.gamma", w.get("gamma_2", torch.ones(width))
    )


def _layer(x: Tensor, w: Mapping[str, Tensor], heads: int, eps: float) -> Tensor:
    """transformers' names."""
    width, inner = x.shape[-1], "attention.attention."
    bias = [
        w.get(f"{inner}query.bias", w.get(f"{inner}q_bias")),
        w.get(f"{inner}key.bias"),
        w.get(f"{inner}value.bias", w.get(f"{inner}v_bias")),
    ]
    y = F.layer_norm(x, (width,), w["layernorm_before.weight"], w["layernorm_before.bias"], eps)
    names = ("query", "key", "value")
    q, k, v = (F.linear(y, w[f"{inner}{name}.weight"], b) for name, b in zip(names, bias, strict=True))
    y = _attention(q, k, v, heads)
    x = x + F.linear(y, w["attention.output.dense.weight"], w["attention.output.dense.bias"])
    y = F.layer_norm(x, (width,), w["layernorm_after.weight"], w["layernorm_after.bias"], eps)
    y = F.gelu(F.linear(y, w["intermediate.dense.weight"], w["intermediate.dense.bias"]))
    return x + F.linear(y, w["output.dense.weight"], w["output.dense.bias"])
