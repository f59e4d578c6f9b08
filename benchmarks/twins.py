"""A method of the engine, its literal twin with the same weights, and one batch for both: what a step is timed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cohobate import models
from cohobate.benchmarks.reference import amd, dbot, mae, update, video, videomae, vit
from cohobate.benchmarks.reference.current import current
from cohobate.errors import UserError
from cohobate.masking import MaskPlan, random_plan
from cohobate.methods import AMD, DBOT, MAE, Alignment, AMDOptions, MAEOptions
from cohobate.models import Decoder, PixelDecoder, Precision, VisionTransformer
from cohobate.models.layers import Block
from cohobate.teacher import FrozenTeacher

FP32 = Precision(torch.float32, torch.float32)
BF16 = Precision()
MASK_RATIO = 0.75
TUBE_RATIO, TEACHER_TUBE_RATIO, TUBELET = 0.9, 0.75, 2
# AMD's teacher is a size larger than its student.
LARGER = {"tiny": "small", "small": "base", "base": "large", "large": "huge"}


@dataclass(frozen=True)
class Shape:
    """What is trained: a method, a named encoder, square images or clips, a batch."""

    recipe: str = "dbot"
    size: str = "base"
    image: int = 224
    batch: int = 8
    frames: int = 16  # of a clip

    def __str__(self) -> str:
        size = f"ViT-{self.size}"
        if self.recipe == "amd":
            size += f" from ViT-{LARGER[self.size]}"
        if self.recipe in CLIPS:
            return f"{size}, {self.frames} x {self.image} px, batch {self.batch}, tubes {TUBE_RATIO}"
        return f"{size}, {self.image} px, batch {self.batch}, mask {MASK_RATIO}"


@dataclass(frozen=True)
class Batch:
    """What a method reads of a batch."""

    pixels: Tensor


@dataclass
class Twins:
    """``method`` computes in bf16, ``exact()`` is the same in fp32 throughout; ``literal(*inputs)`` is the loss."""

    method: Any
    exact: Callable[[], Any]
    literal: nn.Module
    inputs: tuple[Tensor, ...]
    batch: Batch
    plan: MaskPlan


@dataclass(frozen=True)
class Variant:
    """One way to run the literal step: a baseline of the engine's.

    Several variants share a ``module`` and the optimizer state behind ``update``; all modules begin with the same
    weights and name their parameters alike.

    Attributes:
        role: "eager" (the literal fp32 step, of which there is one), "compile", or "other".
        dtype: "fp32", or "bf16" for autocast.
        module: its parameters that need a gradient are the step's.
        loss: the loss with its graph, 0-d, including whatever the loop does with it (``.item()``).
        update: call after backward: clipping, AdamW, and whatever the loop does after it (a wait for the device). Gives
            the global norm before clipping, 0-d.
    """

    name: str
    role: str
    dtype: str
    module: nn.Module
    loss: Callable[[], Tensor]
    update: Callable[[], Tensor]
    note: str = ""


def variants(twins: Twins, device: str) -> list[Variant]:
    """The literal step in fp32 and under autocast; then today's eager one, and what torch.compile makes of that.

    Nothing is compiled before it is first called.
    """
    module, step = twins.literal, update.published(twins.literal)
    today = current(module, half=True).to(device)
    fused = update.current(today)
    inputs = (twins.inputs[0], *_indices(twins))

    def literal() -> Tensor:
        loss = cast(Tensor, module(*twins.inputs))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss: expected a finite value, got {loss.item()}")
        for term in getattr(module, "terms", ()):
            term.item()  # into the log
        return loss

    def eager() -> Tensor:
        return cast(Tensor, today(*inputs))

    def compiled(mode: str, note: str = "") -> Variant:
        program = torch.compile(today, mode=mode, fullgraph=True)

        def loss() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step left in the graphs' memory may go
            return cast(Tensor, program(*inputs))

        name = "compiled bf16" if mode == "default" else f"compiled bf16 {mode}"
        return Variant(name, "compile", "bf16", today, autocast(loss, device), fused, note)

    found = [
        Variant("literal fp32", "eager", "fp32", module, literal, step),
        Variant("literal bf16 autocast", "other", "bf16", module, autocast(literal, device), step),
        Variant("eager bf16", "other", "bf16", today, autocast(eager, device), fused),
    ]
    if device == "cpu":
        same = "mode reduce-overhead is the default one on a CPU"
        return [*found, compiled("default", same), compiled("max-autotune")]
    return [*found, *(compiled(mode) for mode in ("default", "reduce-overhead", "max-autotune"))]


def _indices(twins: Twins) -> tuple[Tensor, ...]:
    """What the student sees and does not see, and what only AMD's teacher sees: int64 [B, n]."""
    plan = twins.plan
    between = (plan.diff.long(),) if isinstance(twins.method, AMD) else ()
    return plan.visible.long(), plan.masked.long(), *between


def autocast(loss: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """The same under bf16 autocast."""

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss()

    return run


def make(shape: Shape, device: str, seed: int) -> Twins:
    """Random weights and pixels; a teacher is drawn independently of its student.

    Raises:
        UserError: a method that is not known, or a size that AMD has no teacher for.
    """
    if shape.recipe not in MAKERS:
        raise UserError(f"--recipe: expected one of {', '.join(MAKERS)}; got {shape.recipe!r}")
    if shape.recipe == "amd" and shape.size not in LARGER:
        raise UserError(f"--size: expected one of {', '.join(LARGER)} for amd, got {shape.size!r}")
    generator = torch.Generator().manual_seed(seed)
    clip = shape.recipe in CLIPS
    size: dict[str, Any] = {"image_size": shape.image}
    if clip:
        size |= {"frames": shape.frames, "tubelet": TUBELET, "cls_token": False}
    build, literal_of = MAKERS[shape.recipe]
    teacher = None
    if shape.recipe in ("dbot", "amd"):
        teacher = models.build(LARGER[shape.size] if shape.recipe == "amd" else shape.size, **size)
        teacher.reset(generator)

    def engine(precision: Precision) -> nn.Module:
        student = models.build(shape.size, precision=precision, **size)
        return build(student, teacher).to(device)

    method = engine(BF16)
    for part in (method.student, method.decoder, getattr(method, "alignment", None)):
        if part is not None:
            cast(Any, part).reset(generator)
    student = cast(VisionTransformer, method.student)

    def exact() -> nn.Module:
        other = engine(FP32)
        other.load_state_dict(method.state_dict())
        return other

    shown = (shape.batch, *student.grid.pixel_shape)
    pixels = torch.randint(0, 256, shown, dtype=torch.uint8, generator=generator).to(device)
    plan = _plan(student, shape, seed, device)
    literal = literal_of(method, teacher).to(device)
    if clip:
        hidden, hidden_from_teacher = plan.to_boolean()
        masks = (hidden, hidden_from_teacher) if shape.recipe == "amd" else (hidden,)
        inputs = (video.normalise(pixels, student.mean, student.std), *masks)
    else:
        inputs = (vit.normalise(pixels, student.mean, student.std), plan.where.float())
    return Twins(method, exact, literal, inputs, Batch(pixels), plan)


def _plan(student: VisionTransformer, shape: Shape, seed: int, device: str) -> MaskPlan:
    ids = torch.arange(shape.batch, device=device)
    if shape.recipe not in CLIPS:
        return random_plan(student.grid, ids, seed=seed, stage=0, epoch=0, ratio=MASK_RATIO)
    teacher_ratio = TEACHER_TUBE_RATIO if shape.recipe == "amd" else None
    return random_plan(
        student.grid, ids, seed=seed, stage=0, epoch=0, ratio=TUBE_RATIO, teacher_ratio=teacher_ratio,
        rounding="mask", tube=True,
    )  # fmt: skip


# -- the engine's methods ----------------------------------------------------------------------------------------------


def _dbot(student: VisionTransformer, teacher: VisionTransformer | None) -> nn.Module:
    assert teacher is not None
    return DBOT(student, Decoder.for_encoder(student, teacher.width), _frozen(teacher, student))


def _mae(student: VisionTransformer, _: VisionTransformer | None) -> nn.Module:
    return MAE(student, Decoder.for_encoder(student))


def _videomae(student: VisionTransformer, _: VisionTransformer | None) -> nn.Module:
    return MAE(student, PixelDecoder.for_encoder(student), MAEOptions(convention="videomae"))


def _amd(student: VisionTransformer, teacher: VisionTransformer | None) -> nn.Module:
    assert teacher is not None
    pairs = _pairs(student, teacher)
    options = AMDOptions(direct=pairs, generation=pairs)
    alignment = Alignment(student, teacher.width, teacher.heads, options)
    frozen = _frozen(teacher, student, options.teacher_layers)
    return AMD(student, PixelDecoder.for_encoder(student), frozen, alignment, options)


def _frozen(
    teacher: VisionTransformer, student: VisionTransformer, layers: tuple[int, ...] | None = None
) -> FrozenTeacher:
    return FrozenTeacher(teacher, layers, precision=student.precision)


def _pairs(student: VisionTransformer, teacher: VisionTransformer) -> tuple[tuple[int, int], ...]:
    """The middle block and the last one, as published for ViT-S and ViT-B from ViT-L."""
    return (student.depth // 2, teacher.depth // 2), (student.depth, teacher.depth)


# -- their literal twins -----------------------------------------------------------------------------------------------


def _literal_dbot(method: Any, teacher: VisionTransformer | None) -> nn.Module:
    assert teacher is not None
    return dbot.DBOT(_encoder(method.student), _decoder(method.decoder), _encoder(teacher), MASK_RATIO)


def _literal_mae(method: Any, _: VisionTransformer | None) -> nn.Module:
    return mae.MAE(_encoder(method.student), _decoder(method.decoder), method.student.grid.patch[1], MASK_RATIO)


def _literal_videomae(method: Any, _: VisionTransformer | None) -> nn.Module:
    student = method.student
    return videomae.VideoMAE(
        _clip_encoder(student), _clip_decoder(method.decoder), student.grid.patch, student.mean, student.std
    )


def _literal_amd(method: Any, teacher: VisionTransformer | None) -> nn.Module:
    assert teacher is not None
    student, alignment = method.student, method.alignment
    generators = [amd.Generator(_table(g), g.depth, teacher.heads) for g in alignment.generators]
    twin = amd.Alignment(student.width, teacher.width, generators)
    twin.load_state_dict(_weights(alignment))
    return amd.AMD(
        _clip_encoder(student), _clip_decoder(method.decoder), _clip_encoder(teacher), twin, alignment.direct,
        student.grid.patch, student.mean, student.std,
    )  # fmt: skip


def _encoder(encoder: VisionTransformer) -> vit.Encoder:
    _, rows, columns = encoder.grid.shape
    twin = vit.Encoder((rows, columns), encoder.grid.patch[1], encoder.width, encoder.depth, encoder.heads)
    twin.load_state_dict(encoder.state_dict())
    return twin


def _decoder(decoder: Decoder) -> vit.Decoder:
    inner, heads = decoder.embed.in_features, cast(Block, decoder.blocks[0]).attn.heads
    twin = vit.Decoder(decoder.grid.size, inner, decoder.out, decoder.width, decoder.depth, heads)
    twin.load_state_dict(decoder.state_dict())
    return twin


def _clip_encoder(encoder: VisionTransformer) -> video.Encoder:
    twin = video.Encoder(_table(encoder), encoder.grid.patch, encoder.depth, encoder.heads)
    twin.load_state_dict(_weights(encoder))
    return twin


def _clip_decoder(decoder: Decoder) -> video.Decoder:
    heads = cast(Block, decoder.blocks[0]).attn.heads
    twin = video.Decoder(_table(decoder), decoder.embed.in_features, decoder.out, decoder.depth, heads)
    twin.load_state_dict(_weights(decoder))
    return twin


def _table(module: Any) -> Tensor:
    """Positions as VideoMAE and AMD keep them: outside of the weights, on the host."""
    return cast(Tensor, module.pos_embed).detach().cpu().clone()


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if not name.endswith("pos_embed")}


Maker = Callable[[VisionTransformer, VisionTransformer | None], nn.Module]
CLIPS = ("videomae", "amd")
MAKERS: dict[str, tuple[Maker, Callable[[Any, VisionTransformer | None], nn.Module]]] = {
    "dbot": (_dbot, _literal_dbot),
    "mae": (_mae, _literal_mae),
    "videomae": (_videomae, _literal_videomae),
    "amd": (_amd, _literal_amd),
}
