"""MAE and VideoMAE: predict the pixels of the patches that were hidden.

MAE (He et al., CVPR 2022) reads images and standardises the pixels of a patch together; VideoMAE (Tong et al., NeurIPS
2022) reads clips, standardises each colour of a patch by itself, and has a :class:`cohobate.models.PixelDecoder`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels.alignment.pixel import CONVENTIONS, pixel_target_reference
from cohobate.masking import MaskPlan
from cohobate.methods.objective import HasPixels, PixelTerm, StepLoss, byte_levels, objective
from cohobate.models import Decoder, VisionTransformer


@dataclass(frozen=True)
class MAEOptions:
    """``norm_pix``: standardise the pixels of each patch. ``convention``: "mae" patchwise, "videomae" per colour.

    Raises:
        UserError: an unknown convention.
    """

    norm_pix: bool = True
    convention: str = "mae"

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise UserError(f"convention: expected one of {', '.join(CONVENTIONS)}; got {self.convention!r}")


class MAE(nn.Module):
    """Student and decoder, trained on the mean squared error of hidden patches.

    Args:
        student: the encoder being trained.
        decoder: a Decoder or a PixelDecoder, with ``out`` equal to the grid's ``row_length``.
        options: see :class:`MAEOptions`.

    Raises:
        UserError: parts that do not fit each other.
    """

    options: MAEOptions

    def __init__(self, student: VisionTransformer, decoder: Decoder, options: MAEOptions | None = None) -> None:
        super().__init__()
        self.student, self.decoder, self.options = student, decoder, options or MAEOptions()
        decoder.check_fits(student)
        if decoder.out != student.grid.row_length:
            raise UserError(f"decoder: expected a head of {student.grid.row_length} pixels, got {decoder.out}")

    def forward(
        self,
        batch: HasPixels,
        plan: MaskPlan,
        *,
        generator: torch.Generator | None = None,
        signals: bool = False,
    ) -> StepLoss:
        """As :meth:`loss`: a wrapper such as DDP calls the module."""
        return self.loss(batch, plan, generator=generator, signals=signals)

    def loss(
        self,
        batch: HasPixels,
        plan: MaskPlan,
        *,
        generator: torch.Generator | None = None,
        signals: bool = False,
    ) -> StepLoss:
        """One step's loss.

        Args:
            batch: ``batch.pixels`` uint8 [B, T, H, W, C], or floating and normalised by the student's mean and std.
            plan: what the student sees.
            generator: where drop path draws from.
            signals: add "target/std", as in dBOT.

        Returns:
            terms: "loss/pixels".

        Raises:
            UserError: nothing is hidden, or a plan for another number of samples.
        """
        self.check_plan(batch, plan)
        encoded = self.student(batch.pixels, plan.visible, generator=generator)
        term = self.pixel_term(encoded, batch, plan, generator)
        spread = {"target/std": self.targets(batch).flatten(0, 1).std(0).mean()} if signals else None
        return objective([term], spread)

    def check_plan(self, batch: HasPixels, plan: MaskPlan) -> None:
        """Raise a UserError unless the plan is for this batch and hides something."""
        if len(plan.order) != len(batch.pixels):
            raise UserError(f"plan: expected {len(batch.pixels)} samples, got {len(plan.order)}")
        if plan.tokens != self.student.grid.size:
            raise UserError(f"plan: expected masks of {self.student.grid.size} tokens, got {plan.tokens}")
        if plan.student == plan.tokens:
            raise UserError("plan: expected at least one hidden token, got none")

    def pixel_term(
        self,
        encoded: Tensor,
        batch: HasPixels,
        plan: MaskPlan,
        generator: torch.Generator | None = None,
        weight: float = 1.0,
    ) -> PixelTerm:
        """The decoder's prediction of the hidden patches, out of the student's tokens [B, P + a, D], and its target."""
        student, options = self.student, self.options
        return PixelTerm(
            "loss/pixels",
            self.decoder(encoded, plan, self.decoder.masked_rows(plan), generator=generator),
            batch.pixels,
            plan.masked,
            student.grid.patch,
            student.mean,
            student.std,
            weight,
            options.convention,
            options.norm_pix,
        )

    @torch.no_grad()
    def targets(self, batch: HasPixels) -> Tensor:
        """The pixel targets of all patches, [B, N, row_length] fp32, as in the loss: for pictures."""
        student = self.student
        return pixel_target_reference(
            byte_levels(batch.pixels, student),
            None,
            patch=student.grid.patch,
            mean=student.mean,
            std=student.std,
            convention=self.options.convention,
            normalise=self.options.norm_pix,
        )

    def flops(self, plan: MaskPlan) -> int:
        """Multiply-adds x 2 of one sample's training step, forward and backward."""
        trained = self.student.flops(plan.student) + self.decoder.flops(plan.student, plan.tokens - plan.student)
        no_gradient = 2 * plan.student * self.student.grid.row_length * self.student.width  # pixels need none
        return 3 * trained - no_gradient
