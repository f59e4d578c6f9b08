"""The generator of AMD: what the teacher makes of tokens that the student does not see, out of those that it does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.masking import MaskPlan
from cohobate.models.decoder import draw_truncated, span
from cohobate.models.layers import Block, Precision, Stream, blocks_flops, draw, run_blocks
from cohobate.models.positions import position_table
from cohobate.tokens import TokenGrid


class Generator(nn.Module):
    """Mask tokens behind the student's projected tokens, fixed positions, and blocks, all of the teacher's width.

    There is no norm behind the last block: what it predicts, the teacher's residual stream, has none either (AMD, Zhao
    et al., CVPR 2024, "generation alignment").

    Args:
        grid: the token grid of student and teacher.
        width: D_T, the teacher's width.
        heads: attention heads, dividing the width; the teacher's in the paper.
        depth: blocks; 2 in the paper.
        prefix: tokens in front of the student's patches (1 with a cls token). They are read, never predicted.
        precision: dtypes of products and of the residual stream.
        frozen_token: keep the mask token as it was drawn. The published code never trained its token, although the
            paper calls it learnable. It is then a buffer: no optimizer sees it, a ``state_dict`` still holds it.

    Raises:
        UserError: an argument that does not fit; the message names it.
    """

    mask_token: Tensor

    def __init__(
        self,
        grid: TokenGrid,
        width: int,
        heads: int,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        prefix: int = 0,
        precision: Precision | None = None,
        frozen_token: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"depth: expected at least 1 block, got {depth}")
        self.grid, self.width, self.depth, self.prefix = grid, width, depth, prefix
        self.precision = precision or Precision()
        if frozen_token:
            self.register_buffer("mask_token", torch.empty(1, 1, width))
        else:
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(position_table(grid, width, prefix), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: Linear Xavier uniform, norms 1 and 0, the mask token N(0, 0.02) inside +-0.02."""
        draw(self, generator)
        draw_truncated(self.mask_token, 0.02, generator)

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """Predictions of what the teacher says at ``plan.diff``.

        Args:
            x: [B, P + a, D_T], the student's tokens of ``plan.visible``, projected to the teacher's width.
            plan: where they came from, and which tokens the teacher sees beside them.

        Returns:
            [B, b - a, D_T] in the residual dtype; the last block computes no other row.
        """
        x = tokens.assemble(
            x.to(self.precision.residual),
            self.mask_token.view(-1),
            self.pos_embed[0],
            plan.teacher_rows,
            layout="visible_first",
            prefix=self.prefix,
        )
        generated = span(plan, self.prefix + plan.student, self.prefix + plan.teacher)
        return run_blocks(self.blocks, Stream(x), self.precision.compute, queries=generated).settled()

    def flops(self, visible: int, seen: int) -> int:
        """Multiply-adds x 2 of one sample's forward: the student sees ``visible`` patches, the teacher ``seen``."""
        return blocks_flops(self.blocks, self.prefix + seen, seen - visible)
