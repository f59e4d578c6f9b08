"""One call from a name to a teacher on the student's tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.models import Precision
from cohobate.models.pixels import check_pixels
from cohobate.teacher.frozen import FrozenTeacher
from cohobate.teacher.original import OriginalTeacher
from cohobate.teacher.sources import Source, fit, load_source, resize_pixels
from cohobate.tokens import TokenGrid

log = logging.getLogger("cohobate.teacher")
_said: set[str] = set()


class ResizedTeacher(nn.Module):
    """A teacher that is fed the student's crop in a size of its own; otherwise the teacher that it holds.

    Args:
        teacher: with as many tokens as ``grid`` has, in the same order.
        grid: of the pixels that come in: the student's.

    Attributes:
        grid: as given. name, width, prefix, layers, depth, mean, std: of the teacher.

    Raises:
        UserError: a teacher with other tokens.
    """

    def __init__(self, teacher: FrozenTeacher | OriginalTeacher, grid: TokenGrid) -> None:
        super().__init__()
        if teacher.grid.shape != grid.shape:
            raise UserError(f"teacher: expected {grid.shape} tokens, the student's, got {teacher.grid.shape}")
        self.teacher, self.grid = teacher, grid
        self.name, self.width, self.prefix = teacher.name, teacher.width, teacher.prefix
        self.layers, self.depth = teacher.layers, teacher.depth
        self.mean, self.std = teacher.mean, teacher.std

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, rows: Tensor | None = None, *, queries: Tensor | None = None, norm: bool = False
    ) -> list[Tensor]:
        """As the teacher's, for pixels of ``grid``; :func:`cohobate.teacher.sources.resize_pixels` says how.

        Raises:
            UserError: pixels of another shape, and what the teacher raises.
        """
        check_pixels(pixels, self.grid)
        size = (self.teacher.grid.height, self.teacher.grid.width)
        found: list[Tensor] = self.teacher(resize_pixels(pixels, size, self), rows, queries=queries, norm=norm)
        return found

    def flops(self, queries: int | None = None, patches: int | None = None) -> int:
        """The teacher's own; resizing is not counted."""
        return self.teacher.flops(queries, patches)

    def fingerprint(self) -> str:
        """The teacher's own."""
        return self.teacher.fingerprint()

    def train(self, mode: bool = True) -> ResizedTeacher:
        """Always eval."""
        return super().train(False)


Teacher = FrozenTeacher | OriginalTeacher | ResizedTeacher


def load_teacher(
    spec: str | Path | nn.Module | Source,
    student_grid: TokenGrid | None = None,
    *,
    layers: Sequence[int] | None = None,
    resize: str | None = None,
    precision: Precision | None = None,
) -> Teacher:
    """A frozen teacher, ready to be called with uint8 pixels (or floating ones, normalised by its mean and std).

    Args:
        spec: what :func:`cohobate.teacher.sources.load_source` takes ("timm:NAME", "hf:FOLDER", "random:vit_small",
            "hf:FOLDER?projection=true" for CLIP's projected tokens, an export's folder, a module), or a source.
        student_grid: how the student cuts its pixels; the teacher's tokens are then the student's. None: the teacher's
            own grid.
        layers: which blocks' outputs are targets, 1-based and ascending; 0 is the embedding. Default: the last block.
        resize: None, "positions" or "pixels", as :func:`cohobate.teacher.sources.fit` does it; nothing unasked.
        precision: dtypes of a rebuilt teacher; default bf16 with an fp32 residual stream.

    Returns:
        A :class:`FrozenTeacher` where the source could be rebuilt; else an :class:`OriginalTeacher`, and the log says
        why. Either one inside a :class:`ResizedTeacher` where its pixels are resized. All of them have ``grid``,
        ``prefix``, ``width``, ``layers``, ``mean``, ``std``, ``flops`` and ``fingerprint``, and no parameters.

    Raises:
        UserError: a source that cannot be read, grids that do not match, or layers out of range.
    """
    source = spec if isinstance(spec, Source) else load_source(spec)
    resized = False
    if student_grid is not None:
        source, match = fit(source, student_grid, resize)
        resized = match.resize_pixels
    elif resize is not None:
        raise UserError(f"resize: expected None without a student_grid, got {resize!r}")
    for note in source.notes:
        _say(log.info, f"teacher {source.name}: {note}")
    if source.anatomy is not None:
        teacher: FrozenTeacher | OriginalTeacher = FrozenTeacher(source.anatomy, layers, precision=precision)
    else:
        teacher = OriginalTeacher(source, layers)
        _say(log.warning, f"teacher {source.name} runs as it is, whole: {'; '.join(source.reasons)}")
    return ResizedTeacher(teacher, student_grid) if resized and student_grid is not None else teacher


def _say(level: Callable[[str], None], text: str) -> None:
    """Once a process: every stage loads its teacher anew."""
    if text not in _said:
        _said.add(text)
        level(text)
