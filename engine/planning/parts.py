"""GFLOP, bytes and kept activations of a training step, by part.

FLOPs are those of the methods' own ``flops`` (2 a multiply-add; a block over n tokens is 24 D^2 n + 4 n^2 D, of which
only the rows that are read are computed in a last block), and add up to them exactly. A backward pass costs twice its
forward, but the pixels need no gradient.

Bytes are a floor. What a part leaves for its backward pass (:func:`block_kept`, the tensors that this engine's ops
save) is written once and read by the next op, read again in the backward pass, where its gradient is written and read:
5 times its size; a frozen part's tensors are written and read: 2 times. Weights are added once a forward pass: 12
bytes a trained value (read twice, gradient written), 2 a frozen one. What activation checkpointing does not keep is
written and read once more, in the backward pass; products computed again are counted beside the FLOPs, not among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import nn

from cohobate.kernels.alignment.align import align_cost
from cohobate.methods import AMD, DBOT, SymmetricDBOT
from cohobate.models import Decoder, VisionTransformer
from cohobate.models.generator import Generator
from cohobate.models.layers import Block, Linear, blocks_flops
from cohobate.training.stages import Stage

TRAINED, FROZEN = 5, 2
READS_LSE = 256  # keys; beyond, attention keeps a number a row and head beside its output


@dataclass(frozen=True)
class Part:
    """A part of the step of one image or clip (all its masks), forward and backward.

    Attributes:
        flops: multiply-adds x 2. bytes: moved for each image. kept: bytes that wait for the backward pass, each image.
        fixed: bytes moved once a forward pass, whatever the batch: weights. update: bytes moved once an update.
        blocks: trained blocks, which the host has to call one by one.
        again: multiply-adds x 2 that checkpointing computes a second time. spared: bytes that it does not keep.
    """

    name: str
    flops: int = 0
    bytes: int = 0
    kept: int = 0
    fixed: int = 0
    update: int = 0
    blocks: int = 0
    again: int = 0
    spared: int = 0


class Kept(NamedTuple):
    """Bytes of one sample, and bytes that checkpointing does not keep of them."""

    bytes: int
    spared: int


def block_kept(
    block: Block, tokens: int, rows: int, compute: int, residual: int, kind: str = "none", *, biased: bool = False
) -> int:
    """Bytes that a block keeps of one sample for its backward pass, its output not counted.

    Args:
        tokens: n. rows: of which that many are computed behind the attention. compute, residual: bytes a value.
        kind: of checkpointing. biased: attention has a bias, so its scores are kept.
    """
    width, hidden, heads = block.mlp.fc1.in_features, block.mlp.fc1.out_features, block.attn.heads
    scaled = not isinstance(block.ls1, nn.Identity)
    if kind == "blocks":  # the stream, and the branch that is to be added to it
        return (residual + compute) * width * tokens
    statistics = 4 * heads * rows * (tokens > READS_LSE)
    if kind == "operations":  # the stream, and what the products give, in their order
        packed = width * (3 * tokens if rows == tokens else 2 * tokens + rows)
        attention = heads * rows * tokens * biased + width * rows
        branches = (2 + scaled) * width * rows  # a scaled one is not what its product gave
        return residual * width * tokens + compute * (packed + attention + branches + hidden * rows) + statistics
    norms = (residual * width + 8) * (tokens + rows)  # the stream in front of each, and two statistics a row
    inputs = compute * width * (tokens + 2 * rows)  # of qkv, of the projection, of the MLP
    packed = compute * width * (3 * tokens if rows == tokens else 2 * tokens + 2 * rows)  # q's own input, too
    mlp = 2 * compute * hidden * rows  # before and behind GELU
    scores = 2 * compute * heads * rows * tokens if biased else statistics
    return norms + inputs + packed + mlp + 2 * compute * width * rows * scaled + scores


def blocks_kept(
    blocks: Iterable[nn.Module],
    tokens: int,
    rows: int,
    compute: int,
    residual: int,
    kind: str = "none",
    *,
    biased: bool = False,
) -> Kept:
    """Of consecutive blocks, the last one for ``rows``."""
    every = [cast(Block, block) for block in blocks]
    everything, kept = (
        sum(
            block_kept(block, tokens, rows if block is every[-1] else tokens, compute, residual, each, biased=biased)
            for block in every
        )
        for each in ("none", kind)
    )
    return Kept(kept, everything - kept)


def parameters(module: nn.Module) -> int:
    """Values that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def step_parts(stage: Stage, teacher: VisionTransformer | None) -> list[Part]:
    """Every part of a stage's step, in the order in which it runs; ``teacher``: the frozen model, None for none."""
    return _Counter(stage, teacher).parts()


class _Counter:
    def __init__(self, stage: Stage, teacher: VisionTransformer | None) -> None:
        self.stage, self.method, self.frozen = stage, stage.method, teacher
        self.student, self.config = stage.method.student, stage.config
        plan = stage.plan(torch.zeros(1, dtype=torch.int64), 0, masks=1)
        self.seen, self.shown, self.all = plan.student, plan.teacher, plan.tokens
        self.masks = stage.config.mask.masks
        self.compute, self.residual = _size(stage.config.precision.compute), _size(stage.config.precision.residual)
        self.kind = stage.config.execution.checkpointing

    def parts(self) -> list[Part]:
        method = self.method
        found = [self._embedding()]
        if isinstance(method, (DBOT, AMD)):
            found.append(self._teacher())
        found.append(self._encoder())
        if isinstance(method, SymmetricDBOT):
            found.append(self._head(method.decoder, self._counted()))
        else:
            rows = self._counted() if isinstance(method, DBOT) else self.all - self.seen
            found += [self._decoder(rows), self._head(method.decoder, rows)]
        if isinstance(method, AMD):
            found += self._alignment(method)
        found.append(self._loss())
        found.append(self._optimizer())
        return found

    def _counted(self) -> int:
        return self.all - self.seen + int(self.config.dbot.cls)

    def _encoder_rows(self) -> tuple[int, int]:
        """Tokens in the student, and rows that its last block computes."""
        if isinstance(self.method, SymmetricDBOT):
            return self.all + self.student.prefix, self._counted()
        n = self.seen + self.student.prefix
        return n, n

    def _embedding(self) -> Part:
        student = self.student
        product = 2 * self.seen * student.grid.row_length * student.width
        written = self.seen * (student.grid.row_length + 2 * self.residual * student.width)
        fixed = 12 * parameters(student.patch_embed)
        return Part("patch embedding", 2 * product * self.masks, written * self.masks, 0, fixed)

    def _teacher(self) -> Part:
        teacher, model = cast(DBOT, self.method).teacher, self.frozen
        assert model is not None
        single = self.masks == 1
        if isinstance(self.method, AMD):
            rows = n = self.shown + model.prefix
            flops = teacher.flops(patches=self.shown)
        else:
            n = self.all + model.prefix
            rows = self._counted() if single else n
            flops = teacher.flops(self._counted() if single else None)
        size = _size(self.config.precision.teacher)
        moved = FROZEN * blocks_kept(model.blocks, n, rows, size, self.residual).bytes
        moved += n * (model.grid.row_length + 2 * self.residual * model.width)
        kept = self.residual * teacher.width * rows * len(teacher.layers)  # the targets wait for the loss
        weights = sum(p.numel() for p in model.parameters())
        return Part("teacher", flops, moved, kept, size * weights)

    def _encoder(self) -> Part:
        student, (n, rows) = self.student, self._encoder_rows()
        patches = n - student.prefix
        embedded = 2 * patches * student.grid.row_length * student.width
        flops = 3 * (student.flops(patches, rows) - embedded)
        norm = (self.residual * student.width + 8 + self.compute * student.width) * rows
        fixed = 12 * (parameters(student) - parameters(student.patch_embed))
        part = self._trained("student encoder", flops, norm, fixed)
        return self._with_blocks(part, student.blocks, n, rows, biased=student.relative_positions)

    def _decoder(self, rows: int) -> Part:
        decoder = self.method.decoder
        flops = 3 * (decoder.flops(self.seen, rows) - 2 * rows * decoder.width * decoder.out)
        norm = (self.residual * decoder.width + 8 + self.compute * decoder.width) * rows
        fixed = 12 * (parameters(decoder) - parameters(decoder.head))
        part = self._trained("decoder", flops, norm, fixed)
        return self._with_blocks(part, decoder.blocks, self.all + decoder.prefix, rows)

    def _head(self, decoder: Decoder, rows: int) -> Part:
        return self._trained("head", 3 * 2 * rows * decoder.width * decoder.out, 0, 12 * parameters(decoder.head))

    def _alignment(self, method: AMD) -> list[Part]:
        alignment, n = method.alignment, self.seen + self.student.prefix
        values = parameters(alignment.projections)
        kept = self.compute * self.student.width * n * len(alignment.layers)
        projections = self._trained("projections", 3 * 2 * n * values, kept, 12 * values)
        made = [cast(Generator, module) for module in alignment.generators]
        if not made:
            return [projections]
        flops = sum(3 * module.flops(self.seen, self.shown) for module in made)
        part = self._trained("generators", flops, 0, 12 * parameters(alignment.generators))
        for module in made:
            part = self._with_blocks(part, module.blocks, self.shown + module.prefix, self.shown - self.seen)
        return [projections, part]

    def _trained(self, name: str, flops: int, kept: int, fixed: int) -> Part:
        return Part(name, flops * self.masks, TRAINED * kept * self.masks, kept * self.masks, fixed)

    def _with_blocks(self, part: Part, blocks: nn.ModuleList, tokens: int, rows: int, *, biased: bool = False) -> Part:
        """A part and what its blocks keep, and compute again; their FLOPs and weights are the part's already."""
        kept, spared = blocks_kept(blocks, tokens, rows, self.compute, self.residual, self.kind, biased=biased)
        moved = TRAINED * (kept + spared) + FROZEN * spared
        return replace(
            part,
            bytes=part.bytes + moved * self.masks,
            kept=part.kept + kept * self.masks,
            blocks=part.blocks + len(blocks),
            again=part.again + blocks_flops(blocks, tokens, rows) * self.masks * (self.kind == "blocks"),
            spared=part.spared + spared * self.masks,
        )

    def _loss(self) -> Part:
        """Prediction and target read once, the gradient written, kept and read again."""
        method, hidden = self.method, self.all - self.seen
        kept = moved = 0
        if isinstance(method, DBOT):
            rows, width = self._counted(), method.decoder.out
            kept = rows * width * self.compute * self.masks
            moved = align_cost(1, rows, width, self.compute, self.residual).bytes * self.masks + kept
        else:
            kept = hidden * method.decoder.out * self.compute
            moved = 3 * kept + hidden * method.decoder.out  # the pixels are bytes
        if isinstance(method, AMD):
            width, cls = method.alignment.width, int(self.config.amd.align_cls) * self.student.prefix
            direct = (self.seen + cls) * width * self.compute * len(method.alignment.direct)
            generated = (self.shown - self.seen) * width * self.residual * len(method.alignment.generation)
            kept += direct + generated
            moved += 5 * (direct + generated)
        return Part("loss", 0, moved, kept)

    def _optimizer(self) -> Part:
        """AdamW reads weight, gradient and two moments and writes three of them; the norm reads the gradient."""
        moved = 32 * parameters(self.method)
        settings = self.config.stages[self.stage.index].teacher
        if settings.momentum is not None and self.frozen is not None:
            weights = sum(p.numel() for p in self.frozen.parameters())
            moved += (12 + 4 + 2) * weights // settings.every  # average, student, average; then packed in bf16
        return Part("optimizer", update=moved)


def frozen_bytes(stage: Stage, teacher: VisionTransformer | None, device: str) -> int:
    """Memory of a teacher's weights: in its dtype; on a CPU once more, laid out for the products; and an average."""
    if teacher is None:
        return 0
    values = sum(p.numel() for p in teacher.parameters())
    average = 4 * values if stage.config.stages[stage.index].teacher.momentum is not None else 0
    return _size(stage.config.precision.teacher) * values * (2 if device == "cpu" else 1) + average


def copies_bytes(stage: Stage, device: str) -> int:
    """Of the matrices in bf16, where products read such copies: kept by the optimizer, or cast and kept by autograd."""
    if device == "cpu" or stage.config.precision.compute != "bf16":
        return 0
    layers = (layer for layer in stage.method.modules() if isinstance(layer, Linear))
    return 2 * sum(layer.weight.numel() for layer in layers if layer.weight.requires_grad)


def _size(name: str) -> int:
    return {"bf16": 2, "fp32": 4, "fp8": 2}[name]  # around its fp8 products a teacher keeps bf16
