"""dBOT with a symmetric student, as it is trained on CLIP's features (Liu et al., ICLR 2024, with BEiT's architecture).

Mask tokens stand in the encoder's input for the hidden patches, all tokens run through the encoder, and a linear head
predicts the teacher's tokens at the hidden patches; there is no decoder. Only what the loss reads is computed: the
patch embedding runs for the visible patches, the last block, the final norm and the head for the counted rows alone,
which changes no number.

The released code minimises the negative mean cosine; the loss "cosine" is 1 more, so the gradient is the same.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cohobate.masking import MaskPlan
from cohobate.methods.dbot import DBOT, DBOTOptions
from cohobate.models import Decoder, MaskTokenHead, VisionTransformer
from cohobate.teacher import Teacher

CLIP = DBOTOptions(loss="cosine", standardise=None, target_norm=True, cls=False)


class SymmetricDBOT(DBOT):
    """Student, head and frozen teacher; :meth:`parameters` are the student's and the head's alone.

    The head stands where :class:`DBOT` has its decoder, and its weights are named ``decoder.*``.

    Args:
        student: the encoder being trained; for the published recipe without positions of its own, with relative ones
            and a layer scale of 0.1.
        head: mask token and head, ``out`` equal to the teacher's width.
        teacher: frozen, on the same token grid, of any width; one layer.
        options: default :data:`CLIP`, the published recipe for CLIP teachers: cosine distance to the normed, projected
            tokens of the hidden patches, without the cls token.

    Raises:
        UserError: parts that do not fit each other; the message names them.
    """

    def __init__(
        self, student: VisionTransformer, head: MaskTokenHead, teacher: Teacher, options: DBOTOptions | None = None
    ) -> None:
        super().__init__(student, cast(Decoder, head), teacher, CLIP if options is None else options)

    @property
    def head(self) -> MaskTokenHead:
        """The head, which :class:`DBOT` knows as its decoder."""
        return cast(MaskTokenHead, self.decoder)

    def predict(self, pixels: Tensor, plan: MaskPlan, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the student makes of the rows [B, q] int32 in [0, P + N): [B, q, D_T]."""
        visible = self.student.embed(pixels, plan.visible, positions=False)
        x = self.head.fill(visible, plan, self.student)
        prediction: Tensor = self.head(self.student.encode(x, queries=rows, generator=generator))
        return prediction

    def predict_flops(self, plan: MaskPlan, counted: int) -> int:
        """Of :meth:`predict` for one sample and ``counted`` rows."""
        hidden = 2 * (plan.tokens - plan.student) * self.student.grid.row_length * self.student.width  # not embedded
        return self.student.flops(queries=counted) - hidden + self.head.flops(counted)
