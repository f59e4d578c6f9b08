"""A frozen teacher: computes only what the loss reads, and leaves no trace in the graph or among the parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer

INITS = ("copy", "independent")


class FrozenTeacher(nn.Module):
    """A copy of a model whose weights are buffers: matrices cast once to the compute dtype, never trained.

    It stays in eval mode, keeps no block beyond the last layer asked for, and runs under ``no_grad`` (not
    ``inference_mode``, whose tensors a loss may not save).

    Args:
        model: any of our encoders; it is copied and not changed.
        layers: which blocks' outputs are targets, 1-based and ascending; 0 is the embedding. Default: the last block.
        precision: dtypes; default the model's.

    Raises:
        UserError: layers that are not ascending inside [0, depth].
    """

    model: VisionTransformer

    def __init__(
        self, model: VisionTransformer, layers: Sequence[int] | None = None, *, precision: Precision | None = None
    ) -> None:
        super().__init__()
        self.layers = (model.depth,) if layers is None else tuple(layers)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"layers: expected ascending numbers, got {list(self.layers)}")
        if self.layers[0] < 0 or self.layers[-1] > model.depth:
            raise UserError(f"layers: expected numbers in [0, {model.depth}], got {list(self.layers)}")
        model = copy.deepcopy(model)
        del model.blocks[self.layers[-1] :]
        model.depth = self.layers[-1]
        model.precision = precision or model.precision
        _freeze(model, model.precision.compute)
        self.model = model
        self.train(False)

    @property
    def width(self) -> int:
        """D_T, width of a target."""
        return self.model.width

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Always eval."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, rows: Tensor | None = None, *, queries: Tensor | None = None, norm: bool = False
    ) -> list[Tensor]:
        """Targets, one a layer.

        Args:
            pixels: [B, T, H, W, C] uint8.
            rows: [B, n] int32, the patches the teacher sees (``plan.teacher_rows``); None for all.
            queries: [B, q] int32 in [0, P + n), the rows that the loss reads; None for all.
            norm: apply the final norm (off in dBOT: the target is the residual stream itself).

        Returns:
            [B, q or P + n, D_T] each, in the residual dtype, without a graph.
        """
        return self.model.intermediates(pixels, self.layers, rows, queries=queries, norm=norm)

    def flops(self, queries: int) -> int:
        """Multiply-adds x 2 of one sample, everything visible, ``queries`` rows read."""
        return self.model.flops(queries=queries)


def from_student(
    student: VisionTransformer,
    *,
    init: str = "copy",
    depth: int | None = None,
    generator: torch.Generator | None = None,
) -> FrozenTeacher:
    """The teacher of a stage, out of a student: its weights as they are, or a network of its shape drawn independently.

    A freshly drawn student's copy is dBOT's random teacher; at a stage boundary the copy is the previous student.

    Args:
        student: the model to start from; not changed.
        init: "copy" or "independent".
        depth: blocks of the teacher; 0 leaves a linear patch projection. Default the student's.
        generator: where "independent" draws from.

    Raises:
        UserError: an unknown ``init``, or a copy deeper than the student.
    """
    if init not in INITS:
        raise UserError(f"init: expected one of {', '.join(INITS)}; got {init!r}")
    depth = student.depth if depth is None else depth
    if init == "copy":
        if not 0 <= depth <= student.depth:
            raise UserError(f"depth: expected a copy of 0 to {student.depth} blocks, got {depth}")
        return FrozenTeacher(student, (depth,))
    model = student.like(depth=depth)
    model.reset(generator)
    return FrozenTeacher(model.to(student.pos_embed.device))


def _freeze(module: nn.Module, compute: torch.dtype) -> None:
    """Turn every parameter into a buffer of the same name; matrices take the compute dtype, the rest stays fp32."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            matrix = parameter.dim() > 1 and name == "weight"
            del child._parameters[name]
            child.register_buffer(name, parameter.detach().to(compute if matrix else parameter.dtype))
