"""MAE: predict the pixels of the patches that were hidden (He et al., CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels.alignment.pixel import pixel_target_reference
from cohobate.masking import MaskPlan
from cohobate.methods.objective import HasPixels, PixelTerm, StepLoss, objective
from cohobate.models import Decoder, VisionTransformer


@dataclass(frozen=True)
class MAEOptions:
    """``norm_pix``: standardise the pixels of each patch. ``convention``: "mae" patchwise, "videomae" per colour."""

    norm_pix: bool = True
    convention: str = "mae"


class MAE(nn.Module):
    """Student and decoder, trained on the mean squared error of hidden patches.

    Args:
        student: the encoder being trained.
        decoder: with ``out`` equal to the grid's ``row_length``.
        options: see :class:`MAEOptions`.

    Raises:
        UserError: parts that do not fit each other.
    """

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
            batch: ``batch.pixels`` uint8 [B, T, H, W, C].
            plan: what the student sees.
            generator: where drop path draws from.
            signals: add "target/std", as in dBOT.

        Returns:
            terms: "loss/pixels".

        Raises:
            UserError: nothing is hidden.
        """
        if plan.student == plan.tokens:
            raise UserError("plan: expected at least one hidden token, got none")
        student, options = self.student, self.options
        encoded = student(batch.pixels, plan.visible, generator=generator)
        prediction = self.decoder(encoded, plan, plan.masked + student.prefix, generator=generator)
        term = PixelTerm(
            "loss/pixels",
            prediction,
            batch.pixels,
            plan.masked,
            student.grid.patch,
            student.mean,
            student.std,
            convention=options.convention,
            normalise=options.norm_pix,
        )
        spread = {"target/std": self.targets(batch).flatten(0, 1).std(0).mean()} if signals else None
        return objective([term], spread)

    @torch.no_grad()
    def targets(self, batch: HasPixels) -> Tensor:
        """The targets of all patches, [B, N, row_length] fp32, as in the loss: for pictures."""
        student = self.student
        return pixel_target_reference(
            batch.pixels,
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
