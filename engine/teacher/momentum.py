"""A teacher that follows its student: the moving average of the student's weights, as in BYOL and DINO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.teacher.frozen import FrozenTeacher, Layer
from cohobate.teacher.sources import own


class MomentumTeacher(FrozenTeacher):
    """The runtime of an average of a student's weights, packed again into the same storage whenever that has moved.

    The average stays in fp32 beside the packed weights: in bf16 a step of 1 - momentum would be rounded away.

    Args:
        start: what the average begins with; a student or its first blocks. It becomes the average itself.
        momentum: how much of the average is kept in a step.
        precision: dtypes of the packed weights; default the encoder's.

    Attributes:
        average: the encoder that holds the average, on the teacher's device; what a resume point keeps. It is in no
            ``state_dict`` and has no parameter that the teacher would show. After writing into it, call :meth:`pack`.

    Raises:
        UserError: a momentum outside [0, 1).
    """

    def __init__(self, start: VisionTransformer, momentum: float, *, precision: Precision | None = None) -> None:
        if not 0 <= momentum < 1:
            raise UserError(f"momentum: expected 0 <= momentum < 1, got {momentum}")
        super().__init__(start, precision=precision)
        self.momentum = momentum
        self._average = (start.eval().requires_grad_(False),)  # in a tuple no module registers it

    @property
    def average(self) -> VisionTransformer:
        return self._average[0]

    @torch.no_grad()
    def follow(self, student: VisionTransformer) -> None:
        """average = momentum * average + (1 - momentum) * student, parameter by parameter.

        Raises:
            UserError: a student that lacks a parameter of the average, or has it in another shape.
        """
        theirs: dict[str, Tensor] = dict(student.named_parameters())
        mine = dict(self.average.named_parameters())
        for name, held in mine.items():
            if name not in theirs or theirs[name].shape != held.shape:
                raise UserError(f"teacher.momentum: expected a student of the teacher's shape, got another {name}")
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - self.momentum)
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Fold and cast the average into the weights that are computed with, where they lie: CUDA graphs stay valid."""
        source = own.read(self.average, self.name)
        for name, held in self._tensors.items():
            value: Any = source
            for part in name.split(".") if held is not None else ():
                value = getattr(value, part)
            if held is not None:
                held.copy_(value)
        for layer, weights in zip(self._blocks, source.blocks, strict=True):
            fresh = Layer(weights, self.activation, self.precision.compute)
            for name in ("qkv", "proj", "fc1", "fc2"):
                old, new = getattr(layer, name), getattr(fresh, name)
                old.weight.copy_(new.weight)
                if old.bias is not None:
                    old.bias.copy_(new.bias)
            layer.move(lambda x: x)  # what a CPU has laid out for its kernels is out of date

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MomentumTeacher:
        """Move to a device, the average too; a change of dtype is not taken over."""
        device = fn(self._tensors["patch"].new_empty(0)).device
        self.average.to(device)
        super()._apply(fn, recurse)
        return self
