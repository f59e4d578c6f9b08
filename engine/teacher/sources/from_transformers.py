"""Hugging Face vision transformers as teachers (written against transformers 5, with the names of 4.50 to 4.57 too).

Rebuilt: ViT, DeiT, DINOv2 with and without registers, the vision towers of CLIP and SigLIP, ViTMAE (nothing masked and
nothing shuffled), VideoMAE. DINOv3 runs as it is: its positions are rotations inside the attention. Any other model
with a list of layers runs as it is too, if it cannot be read the same way. CLIP may come with its projection: its
features are then those of every token behind the final norm and the projection, as dBOT's CLIP teachers give them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.models.exports import check_keys
from cohobate.models.vit import IMAGENET_MEAN, IMAGENET_STD
from cohobate.teacher.anatomy import Anatomy, BlockWeights
from cohobate.teacher.sources.parts import Norms, activation, first, is_silu, linear, patch_rows, stacked
from cohobate.teacher.sources.source import (
    TOLERANCE,
    NotPlainError,
    Original,
    Source,
    assemble,
    evaluating,
    hooked,
    in_fp32,
    measure,
)
from cohobate.tokens import TokenGrid


class Statistics(NamedTuple):
    """Normalisation of pixels in [0, 1], and whose it is."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    whose: str


IMAGENET = Statistics(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's")
HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "0.5")
OPENAI = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "CLIP's")

# What the authors of each family normalised pixels with, by the config's model_type.
FAMILIES: dict[str, Statistics] = {
    "vit": HALF,
    "deit": IMAGENET,
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "clip_vision_model": OPENAI,
    "siglip_vision_model": HALF,
    "vit_mae": IMAGENET,
    "videomae": IMAGENET,
}
TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}  # of two-tower configs, the one that sees
PROJECTED = dict.fromkeys(("clip", "clip_vision_model"), "CLIPVisionModelWithProjection")
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
# Parts that features do not pass through: a checkpoint may lack them or have more of them.
ASIDE = (
    "pooler", "head", "classifier", "cls_classifier", "distillation_classifier", "fc_norm", "decoder",
    "encoder_to_decoder", "mask_token", "text_model", "logit_scale", "logit_bias", "visual_projection",
    "text_projection", "position_ids",
)  # fmt: skip
LAYERS = ("layers", "layer", "encoder.layers", "encoder.layer", "model.layer", "model.layers")


def load(
    transformers: Any, where: str, *, mean: Any = None, std: Any = None, projection: bool = False, **options: Any
) -> Source:
    """A local folder or a hub id as a source, in fp32; ``options`` go to ``from_pretrained``.

    Statistics of the pixels are those of the preprocessor's configuration beside the weights, or else the family's.
    ``projection``: see :func:`from_model`.

    Raises:
        UserError: nothing usable there, or weights whose keys do not fit the model; the message lists them.
    """
    if Path(where).is_dir():
        options = {"local_files_only": True} | options
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        if projection and config.model_type not in PROJECTED:
            raise UserError(f"projection: expected a CLIP model with a projection, got {config.model_type}")
        kind = getattr(transformers, (PROJECTED if projection else TOWERS).get(config.model_type, "AutoModel"))
        model, found = kind.from_pretrained(where, output_loading_info=True, **options)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError and the hub client's own
        lines = str(error).strip().splitlines()
        detail = f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise UserError(f"source: transformers cannot load {where!r}: {detail}") from error
    shapes = [str(item[0] if isinstance(item, tuple) else item) for item in found.get("mismatched_keys", ())]
    aside = set(ASIDE) - ({"visual_projection"} if projection else set())
    check_keys(where, _needed(found["missing_keys"], aside), _needed(found["unexpected_keys"], aside), shapes)
    notes = []
    if mean is None or std is None:
        settings = _preprocessor(where, options)
        if settings is not None:
            mean, std = _statistics(*settings)
            notes.append(f"pixels are normalised as {settings[0]} says: mean {mean}, std {std}")
    name = f"hf {where}"
    return from_model(model.float(), name, mean=mean, std=std, projection=projection, notes=notes, own_weights=False)


def from_model(
    model: Any,
    name: str | None = None,
    *,
    mean: Any = None,
    std: Any = None,
    projection: bool = False,
    notes: Sequence[str] = (),
    own_weights: bool = True,
) -> Source:
    """A transformers model as a source; of a model with a head or of two towers, the vision encoder inside.

    ``projection``: keep the projection of a CLIP model. It becomes the anatomy's head: features are every token behind
    the final norm and the projection, of which CLIP itself uses the class token's alone.

    Raises:
        UserError: a model without patches and a list of layers, or of an unknown family and no ``mean`` and ``std``; or
            ``projection`` of a model that has none or cannot be rebuilt.
    """
    projector = first(model, "visual_projection")
    if projection and projector is None:
        raise UserError(f"projection: expected a CLIP model with a projection, got {type(model).__name__}")
    model = _tower(model)
    config = model.config
    name = name or f"hf {type(model).__name__}"
    notes = list(notes)
    if mean is None or std is None:
        known = FAMILIES.get(config.model_type)
        if known is None:
            raise UserError(f"source: {name} does not say how its pixels are normalised: give mean= and std=")
        mean, std = known.mean, known.std
        notes.append(f"no preprocessor's configuration: pixels are normalised by {known.whose} mean and std")
    blocks = next((path for path in LAYERS if isinstance(first(model, path), nn.ModuleList)), None)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if blocks is None or size is None or patch is None:
        raise UserError(
            f"source: {name} ({type(model).__name__}) has no image_size, patch_size and list of layers to watch: "
            "give it hidden_states and the rest of cohobate.teacher.sources.TeacherModule"
        )
    frames, tubelet = (getattr(config, "num_frames", 1), getattr(config, "tubelet_size", 1))
    grid = TokenGrid(
        frames, *_pair(size), (tubelet, *_pair(patch)), getattr(config, "num_channels", 3)
    )  # fmt: skip
    original = Original(
        model, hooked(blocks, _call), grid, width=0, depth=len(first(model, blocks)), prefix=0, mean=mean, std=std,
        # These two fit their positions to the input by themselves: antialiased as Anatomy.resized does, or exactly.
        any_size=config.model_type in ("dinov2_with_registers", "dinov3_vit"),
    )  # fmt: skip
    original = measure(original)
    source = assemble(name, original, lambda exact: read(name, exact, blocks), notes, own_weights=own_weights)
    return _projected(source, projector) if projection else source


@torch.no_grad()
def _projected(source: Source, projector: Any) -> Source:
    """The source with CLIP's projection as its head, checked on the class token against the model's own output."""
    if source.anatomy is None or source.original is None:
        raise UserError(f"projection: {source.name} could not be rebuilt: {'; '.join(source.reasons)}")
    try:
        weight, bias = linear(projector, "the projection")
    except NotPlainError as reason:
        raise UserError(f"projection: {reason}") from reason
    if bias is not None:
        raise UserError("projection: expected one without a bias")
    tower = in_fp32(source.original)
    head = weight.to(tower.device, torch.float32, copy=True)
    anatomy = replace(source.anatomy, head=head)
    blank = torch.zeros(1, *source.grid.pixel_shape, dtype=torch.uint8, device=tower.device)
    with evaluating(tower.module), torch.autocast(tower.device.type, enabled=False):
        pooled: Any = tower.module(tower.images(blank))
    wanted = head @ pooled.pooler_output[0]
    found = anatomy.forward(blank, [anatomy.depth])[0][0, 0]
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE:
        raise UserError(f"projection: the class token differs by {error:.1e} of the model's, more than {TOLERANCE:g}")
    return replace(source, anatomy=anatomy)


def _call(model: Any, images: Tensor) -> None:
    """The model's forward on [B, C, H, W] or [B, C, T, H, W], nothing masked and nothing shuffled."""
    kind = model.config.model_type
    if kind == "vit_mae":
        with _masking_nothing(model.config):
            order = torch.arange(model.embeddings.patch_embeddings.num_patches, device=images.device)
            model(images, noise=order.float().expand(images.shape[0], -1))
    else:
        model(images.transpose(1, 2) if images.dim() == 5 else images)  # clips are [B, T, C, H, W] there


@contextmanager
def _masking_nothing(config: Any) -> Iterator[None]:
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def read(name: str, original: Original, blocks: str) -> Anatomy:
    """The anatomy of a plain transformers ViT.

    Raises:
        NotPlainError: a part that an Anatomy cannot express.
    """
    model: Any = original.module
    layers: Any = model.get_submodule(blocks)
    if first(model, "rope_embeddings", "rotary_emb", "rope", "encoder.rotary_emb") is not None:
        raise NotPlainError(f"{type(model).__name__} has rotary positions inside its attention")
    config, embeddings, norms = model.config, first(model, "embeddings"), Norms()
    for flag in ("use_relative_position_bias", "use_shared_relative_position_bias"):
        if getattr(config, flag, False):
            raise NotPlainError(f"{type(model).__name__} has relative positions inside its attention")
    conv = first(embeddings, "patch_embeddings.projection", "patch_embedding", "patch_embeddings")
    patch, patch_bias = patch_rows(conv, original.grid)
    prefix, positions = _positions(embeddings, original)
    pre_norm = first(model, "pre_layrnorm")
    last = first(model, "layernorm", "post_layernorm", "norm")
    embed_norm = None if pre_norm is None else norms(pre_norm, "pre_layrnorm")
    parts = [_block(layer, f"{type(layer).__name__}[{i}]", norms) for i, layer in enumerate(layers)]
    activations = {part[1] for part in parts}
    if len(activations) > 1:
        raise NotPlainError("its layers differ in activation")
    return Anatomy(
        name=name,
        grid=original.grid,
        heads=config.num_attention_heads,
        patch=patch,
        patch_bias=patch_bias,
        prefix=prefix,
        positions=positions,
        blocks=tuple(part[0] for part in parts),
        norm=None if last is None else norms(last, "the final norm"),
        mean=original.mean,
        std=original.std,
        activation=activations.pop(),
        eps=norms.eps or 0.0,
        embed_norm=embed_norm,
    )


def _positions(embeddings: Any, original: Original) -> tuple[Tensor, Tensor]:
    """Tokens in front [P, D], their positions added, and the positions of the patches."""
    table = first(embeddings, "position_embeddings", "position_embedding.weight")
    if not isinstance(table, Tensor):
        raise NotPlainError("there is no table of positions among its embeddings")
    table = table.detach().to(original.device).reshape(-1, original.width)
    tokens = [first(embeddings, *names) for names in (("cls_token", "class_embedding"), ("distillation_token",))]
    front = [token.detach().reshape(-1, original.width) for token in tokens if token is not None]
    prefix = torch.cat(front) if front else table.new_zeros(0, original.width)
    if len(table) != original.grid.size + len(prefix):
        raise NotPlainError(f"{len(table)} positions for {len(prefix)} + {original.grid.size} tokens")
    prefix, positions = prefix + table[: len(prefix)], table[len(prefix) :]
    registers = first(embeddings, "register_tokens")  # they stand behind the class token and have no positions
    if registers is not None:
        prefix = torch.cat([prefix, registers.detach().reshape(-1, original.width)])
    return prefix, positions


def _block(layer: Any, what: str, norms: Norms) -> tuple[BlockWeights, str]:
    """Weights and activation of one layer."""
    attention = first(layer, "attention.attention", "attention", "self_attn")
    names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    qkv = [linear(first(attention, *pair), f"{what} {pair[1]}") for pair in names]
    # VideoMAE in transformers 4 keeps the biases of queries and values beside the layers, and has none for keys.
    aside = (first(attention, "q_bias"), None, first(attention, "v_bias"))
    qkv = [(w, b if extra is None else extra.detach()) for (w, b), extra in zip(qkv, aside)]
    proj, proj_bias = linear(
        first(layer, "attention.o_proj", "attention.output.dense", "self_attn.out_proj"), f"{what} output projection"
    )
    weight, bias = stacked(qkv)
    (fc1, fc1_bias), (fc2, fc2_bias), name = _mlp(layer, what)
    scales = [first(layer, f"{key}.lambda1") for key in ("layer_scale1", "layer_scale2")]
    weights = BlockWeights(
        norm1=norms(first(layer, "layernorm_before", "norm1", "layer_norm1"), f"{what} first norm"),
        qkv=weight, qkv_bias=bias, proj=proj, proj_bias=proj_bias,
        norm2=norms(first(layer, "layernorm_after", "norm2", "layer_norm2"), f"{what} second norm"),
        fc1=fc1, fc1_bias=fc1_bias, fc2=fc2, fc2_bias=fc2_bias,
        scale1=None if scales[0] is None else scales[0].detach(),
        scale2=None if scales[1] is None else scales[1].detach(),
    )  # fmt: skip
    return weights, name


Layer = tuple[Tensor, "Tensor | None"]


def _mlp(layer: Any, what: str) -> tuple[Layer, Layer, str]:
    """The two layers of an MLP, and the activation between them."""
    mlp = first(layer, "mlp")
    if first(mlp, "gate_proj") is not None:
        if not is_silu(first(mlp, "act_fn")):
            raise NotPlainError(f"{what} is not gated by SiLU")
        gated = stacked([linear(mlp.gate_proj, f"{what} gate"), linear(mlp.up_proj, f"{what} value")])
        return gated, linear(mlp.down_proj, f"{what} second MLP layer"), "swiglu"
    if first(mlp, "weights_in") is not None:  # transformers 4: [gate; value] in one, SiLU in the forward
        return linear(mlp.weights_in, f"{what} gate"), linear(mlp.weights_out, f"{what} second MLP layer"), "swiglu"
    act = first(layer, "mlp.activation_fn", "mlp.activation", "intermediate.intermediate_act_fn")
    return (
        linear(first(layer, "mlp.fc1", "intermediate.dense"), f"{what} first MLP layer"),
        linear(first(layer, "mlp.fc2", "output.dense"), f"{what} second MLP layer"),
        activation(act, f"{what} activation"),
    )


def _tower(model: Any) -> Any:
    """The vision encoder inside a model with a head or with two towers."""
    while first(model, "embeddings") is None:
        inner = first(model, "vision_model") or first(model, "base_model") or model
        if inner is model:
            break
        model = inner
    return model


def _needed(keys: Sequence[str], aside: Collection[str]) -> list[str]:
    """Keys of layers that features pass through, those named in ``aside`` being no such."""
    return [key for key in keys if not set(key.split(".")) & set(aside)]


def _preprocessor(where: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(file name, settings) of the preprocessor beside the weights."""
    from transformers.utils import cached_file

    kept = {key: options[key] for key in ("local_files_only", "revision", "token", "cache_dir") if key in options}
    for name in PREPROCESSORS:
        try:
            path = cached_file(where, name, **kept)
        except OSError:
            continue
        if path is None:
            continue
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = settings.get("image_processor", settings)
        if "image_mean" in settings or settings.get("do_normalize") is False:
            return name, settings
    return None


def _statistics(name: str, settings: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixels in [0, 1] from a preprocessor that rescales bytes by a factor of its own."""
    normalised = settings.get("do_normalize", True)
    mean = settings["image_mean"] if normalised else (0.0, 0.0, 0.0)
    std = settings["image_std"] if normalised else (1.0, 1.0, 1.0)
    scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    unit = 255 * scale  # bytes are multiplied by scale there, and by 1 / 255 here
    if abs(unit - 1) < 1e-6:
        unit = 1.0
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
