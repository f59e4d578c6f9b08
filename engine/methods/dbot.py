"""dBOT: predict the features of a frozen teacher at the tokens that were hidden (Liu et al., ICLR 2024).

The student sees ``plan.visible``; the teacher sees the whole image. The target is the residual stream after the
teacher's last block, without the final norm, standardised per token; the loss is smooth-L1 with beta 2 over the hidden
patches and the cls token. Only what the loss reads is computed: the last decoder block, the head and the last teacher
block run for the counted rows alone, which changes no number.

A plan may hold several masks of each crop. The teacher then runs once on the crops, for all rows, and student and
decoder run on every view; the loss is the mean of the single masks' losses, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels.alignment import Standardise
from cohobate.kernels.alignment.align import standardise_reference
from cohobate.masking import MaskPlan
from cohobate.methods.objective import AlignTerm, HasPixels, StepLoss, objective
from cohobate.models import Decoder, VisionTransformer
from cohobate.models.pixels import renormalise
from cohobate.teacher import OriginalTeacher, Teacher

PUBLISHED = Standardise(ddof=1, eps=1e-6, eps_inside=True)


@dataclass(frozen=True)
class DBOTOptions:
    """What the loss compares, and how; the defaults are the published recipe.

    ``target_norm``: apply the teacher's final norm first. ``standardise``: per-token standardisation of the target,
    None for none. ``cls``: count the cls token.
    """

    loss: str = "smooth_l1"
    beta: float = 2.0
    standardise: Standardise | None = PUBLISHED
    target_norm: bool = False
    cls: bool = True


class DBOT(nn.Module):
    """Student, decoder and frozen teacher; :meth:`parameters` are the student's and the decoder's alone.

    Args:
        student: the encoder being trained.
        decoder: with ``out`` equal to the teacher's width.
        teacher: frozen, on the same token grid, of any width; one layer. Its cls token, if that counts, is its row 0.
        options: see :class:`DBOTOptions`.

    Raises:
        UserError: parts that do not fit each other; the message names them.
    """

    def __init__(
        self,
        student: VisionTransformer,
        decoder: Decoder,
        teacher: Teacher,
        options: DBOTOptions | None = None,
    ) -> None:
        super().__init__()
        self.student, self.decoder, self.options = student, decoder, options or DBOTOptions()
        decoder.check_fits(student)
        if self.options.cls and not student.prefix:
            raise UserError("cls: expected a student with a cls token, or cls=False")
        self.set_teacher(teacher)

    def set_teacher(self, teacher: Teacher) -> None:
        """Swap the teacher, as at a stage boundary.

        Raises:
            UserError: a teacher of another grid, width or number of layers, or without a cls token or norm that counts.
        """
        if teacher.grid != self.student.grid:
            raise UserError(f"teacher: expected the student's grid {self.student.grid}, got {teacher.grid}")
        if teacher.width != self.decoder.out:
            raise UserError(
                f"teacher: expected the width of the decoder's head {self.decoder.out}, got {teacher.width}"
            )
        if len(teacher.layers) != 1:
            raise UserError(f"teacher: expected one target layer, got {list(teacher.layers)}")
        if self.options.cls and not teacher.prefix:
            raise UserError("cls: expected a teacher with a cls token, or cls=False")
        if self.options.target_norm and isinstance(getattr(teacher, "teacher", teacher), OriginalTeacher):
            raise UserError(f"target_norm: expected False, for {teacher.name} runs as it is and offers no final norm")
        self.teacher = teacher

    def counted(self, plan: MaskPlan, prefix: int) -> Tensor:
        """Rows that the loss reads, [B, c + M] int32 behind a prefix: the cls token if counted, the hidden patches.

        Raises:
            UserError: a plan of another number of tokens, nothing is hidden, or the teacher would not see what is.
        """
        if plan.tokens != self.student.grid.size:
            raise UserError(f"plan: expected masks of {self.student.grid.size} tokens, got {plan.tokens}")
        if plan.teacher != plan.tokens:
            raise UserError(f"plan: expected a teacher that sees all {plan.tokens} tokens, got {plan.teacher}")
        if plan.student == plan.tokens and not self.options.cls:
            raise UserError("plan: expected at least one hidden token, got none")
        rows = plan.masked + prefix
        return torch.cat([rows.new_zeros(rows.shape[0], 1), rows], dim=1) if self.options.cls else rows

    def forward(
        self,
        batch: HasPixels,
        plan: MaskPlan,
        *,
        generator: torch.Generator | None = None,
        signals: bool = False,
        features: Sequence[Tensor] | None = None,
    ) -> StepLoss:
        """As :meth:`loss`: a wrapper such as DDP calls the module."""
        return self.loss(batch, plan, generator=generator, signals=signals, features=features)

    def teach(self, batch: HasPixels, plan: MaskPlan, ask: Callable[..., Any] | None = None) -> Any:
        """The teacher's features of a batch, a list of one, as :meth:`loss` takes them: a function of batch and plan.

        ``ask`` is called in the teacher's place, such as :meth:`cohobate.teacher.graphs.Ahead.start`; what it returns
        is returned.

        Raises:
            UserError: as :meth:`loss`.
        """
        rows = self.counted(plan, self.teacher.prefix) if self._masks(batch, plan) == 1 else None
        seen = renormalise(batch.pixels, self.student, self.teacher)
        return (self.teacher if ask is None else ask)(seen, queries=rows, norm=self.options.target_norm)

    def loss(
        self,
        batch: HasPixels,
        plan: MaskPlan,
        *,
        generator: torch.Generator | None = None,
        signals: bool = False,
        features: Sequence[Tensor] | None = None,
    ) -> StepLoss:
        """One step's loss.

        Args:
            batch: ``batch.pixels`` [B, T, H, W, C], uint8, or floating and normalised by the student's ``mean`` and
                ``std`` (the teacher gets them by its own).
            plan: what the student sees; the teacher sees everything. [B, N], or M masks a sample, [M * B, N] with the
                views one after the other (``random_plan(masks=M)``).
            generator: where drop path draws from.
            signals: add "target/std", the spread of the raw target over tokens, mean over channels: 0 says that the
                teacher gives every token the same target. Over the counted tokens, with several masks over all.
            features: what :meth:`teach` gave for this batch and plan; None to ask the teacher here.

        Returns:
            terms: "loss/align".

        Raises:
            UserError: a plan for another number of samples, or one that :meth:`counted` refuses.
        """
        pixels, options, masks = batch.pixels, self.options, self._masks(batch, plan)
        (target,) = self.teach(batch, plan) if features is None else features
        if masks > 1:
            pixels = pixels.repeat(masks, 1, 1, 1, 1)
        prediction = self.predict(pixels, plan, self.counted(plan, self.student.prefix), generator)
        term = AlignTerm(
            "loss/align",
            [prediction] if masks == 1 else prediction.chunk(masks),
            [target] * masks,
            loss=options.loss,
            beta=options.beta,
            standardise=options.standardise,
            target_rows=None if masks == 1 else self.counted(plan, self.teacher.prefix).chunk(masks),
        )
        spread = {"target/std": target.float().flatten(0, 1).std(0).mean()} if signals else None
        return objective([term], spread)

    @staticmethod
    def _masks(batch: HasPixels, plan: MaskPlan) -> int:
        """Masks of each sample."""
        samples = len(batch.pixels)
        masks = len(plan.order) // max(samples, 1)
        if len(plan.order) != masks * samples or not masks:
            raise UserError(f"plan: expected {samples} samples or a multiple, got {len(plan.order)}")
        return masks

    def predict(self, pixels: Tensor, plan: MaskPlan, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the student makes of the rows [B, q] int32 in [0, P + N): [B, q, D_T]."""
        encoded = self.student(pixels, plan.visible, generator=generator)
        predicted: Tensor = self.decoder(encoded, plan, rows, generator=generator)
        return predicted

    @torch.no_grad()
    def targets(self, batch: HasPixels) -> Tensor:
        """The targets of all patches, [B, N, D_T] fp32, standardised as in the loss: for pictures."""
        seen = renormalise(batch.pixels, self.student, self.teacher)
        (target,) = self.teacher(seen, norm=self.options.target_norm)
        target = target[:, self.teacher.prefix :].float()
        standardise = self.options.standardise
        return target if standardise is None else standardise_reference(target, standardise)

    def flops(self, plan: MaskPlan, masks: int = 1) -> int:
        """Multiply-adds x 2 of one crop's step: teacher forward, and a forward and backward of the rest a mask."""
        counted = plan.tokens - plan.student + int(self.options.cls)
        no_gradient = 2 * plan.student * self.student.grid.row_length * self.student.width  # pixels need none
        trained = 3 * self.predict_flops(plan, counted) - no_gradient
        return self.teacher.flops(counted if masks == 1 else None) + masks * trained

    def predict_flops(self, plan: MaskPlan, counted: int) -> int:
        """Of :meth:`predict` for one sample and ``counted`` rows."""
        return self.student.flops(plan.student) + self.decoder.flops(plan.student, counted)
