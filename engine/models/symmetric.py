"""What a symmetric student has beside its encoder: the token that stands for a hidden patch, and a linear head.

BEiT's form of masked modelling (Bao et al., ICLR 2022), which dBOT uses for CLIP teachers: hidden patches are mask
tokens at the encoder's own input, there is no decoder, and the head predicts from the encoder's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.masking import MaskPlan
from cohobate.models.layers import Linear, draw, draw_normal
from cohobate.models.vit import VisionTransformer


class MaskTokenHead(nn.Module):
    """A mask token of the encoder's width, and a linear head from it to the target's.

    Args:
        encoder: whose width, D, it has.
        out: D_T, of a prediction: the teacher's width.

    Raises:
        UserError: ``out`` below 1.
    """

    def __init__(self, encoder: VisionTransformer, out: int) -> None:
        super().__init__()
        if out < 1:
            raise UserError(f"out: expected at least 1, got {out}")
        self.width, self.out = encoder.width, out
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width))
        self.head = Linear(self.width, out)
        self.reset()

    def check_fits(self, encoder: VisionTransformer) -> None:
        """Raise a UserError unless this head fits the encoder."""
        if encoder.width != self.width:
            raise UserError(f"head: expected the student's width {encoder.width}, got {self.width}")

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: the head Xavier uniform with bias 0, the mask token N(0, 0.02)."""
        draw(self, generator)
        draw_normal(self.mask_token, 0.02, generator)

    def fill(self, x: Tensor, plan: MaskPlan, encoder: VisionTransformer) -> Tensor:
        """The encoder's input with mask tokens in place of what is hidden, in raster order, positions added.

        Args:
            x: [B, P + a, D], the embedded patches ``plan.visible`` without positions.
            plan: where they came from.
            encoder: whose positions are added, where it has some.

        Returns:
            [B, P + N, D] in x's dtype.
        """
        table = None if encoder.pos_embed is None else encoder.pos_embed[0]
        return tokens.assemble(x, self.mask_token.view(-1), table, plan.where, layout="raster", prefix=encoder.prefix)

    def forward(self, x: Tensor) -> Tensor:
        """[B, q, D] -> [B, q, out], in x's dtype."""
        return self.head(x)

    def flops(self, queries: int) -> int:
        """Multiply-adds x 2 of one sample's ``queries`` rows."""
        return 2 * queries * self.width * self.out
