"""The decoders: mask tokens take the place of what was hidden, blocks, and a head that predicts.

:class:`Decoder` is that of MAE and dBOT, :class:`PixelDecoder` that of VideoMAE and AMD. They differ in the order of
their tokens, in a bias, and in how they are drawn.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.masking import MaskPlan
from cohobate.models.layers import (
    Block,
    DropPath,
    Linear,
    Norm,
    Precision,
    Stream,
    blocks_flops,
    draw,
    draw_normal,
    draw_uniform,
    run_blocks,
)
from cohobate.models.positions import position_table
from cohobate.models.vit import VisionTransformer
from cohobate.tokens import TokenGrid

AnyDecoder = TypeVar("AnyDecoder", bound="Decoder")


class Decoder(nn.Module):
    """Linear, mask tokens and fixed positions in raster order, blocks, norm, and a linear head.

    Args:
        grid: the encoder's token grid.
        encoder_width: D, width of the tokens that come in.
        out: width of a prediction: the teacher's width (dBOT) or a patch's ``row_length`` (MAE).
        width, depth, heads: of the decoder itself; 512, 8 and 16 in both papers.
        prefix: tokens in front of the patches (1 with a cls token).
        drop_path: rate of the last block; the first block has 0.
        precision: dtypes of products and of the residual stream.

    Raises:
        UserError: an argument that does not fit; the message names it.
    """

    layout = "raster"
    embed_bias = True

    def __init__(
        self,
        grid: TokenGrid,
        encoder_width: int,
        out: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        prefix: int = 1,
        drop_path: float = 0.0,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        if out < 1:
            raise UserError(f"out: expected at least 1, got {out}")
        if depth < 0:
            raise UserError(f"depth: expected 0 or more blocks, got {depth}")
        self.grid, self.width, self.depth, self.out, self.prefix = grid, width, depth, out, prefix
        self.precision = precision or Precision()
        self.embed = Linear(encoder_width, width, bias=self.embed_bias)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(position_table(grid, width, prefix), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = Norm(width)
        self.head = Linear(width, out)
        self.drop_path = DropPath(drop_path, depth)
        self.reset()

    @classmethod
    def for_encoder(
        cls: type[AnyDecoder],
        encoder: VisionTransformer,
        out: int | None = None,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        drop_path: float = 0.0,
    ) -> AnyDecoder:
        """A decoder with an encoder's grid, cls token and precision; ``out`` defaults to the pixels of a patch."""
        return cls(
            encoder.grid,
            encoder.width,
            encoder.grid.row_length if out is None else out,
            width,
            depth,
            heads,
            prefix=encoder.prefix,
            drop_path=drop_path,
            precision=encoder.precision,
        )

    def check_fits(self, encoder: VisionTransformer) -> None:
        """Raise a UserError unless this decoder fits the encoder."""
        for name, expected, got in (
            ("grid", encoder.grid, self.grid),
            ("prefix", encoder.prefix, self.prefix),
            ("encoder_width", encoder.width, self.embed.in_features),
        ):
            if expected != got:
                raise UserError(f"decoder: expected the student's {name} {expected}, got {got}")

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew from the generator: Linear Xavier uniform, norms 1 and 0, the mask token N(0, 0.02)."""
        draw(self, generator)
        draw_normal(self.mask_token, 0.02, generator)

    def masked_rows(self, plan: MaskPlan) -> Tensor:
        """[B, N - a] int32, the rows of this decoder's sequence that stand for ``plan.masked``, in its order."""
        return plan.masked + self.prefix

    def forward(
        self,
        x: Tensor,
        plan: MaskPlan,
        queries: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predictions at the rows ``queries``.

        Args:
            x: [B, P + a, D], the encoder's tokens of ``plan.visible``.
            plan: where they came from.
            queries: [B, q] int32 in [0, P + N), the rows to predict (the cls token is row 0, patch n is row P + n);
                the last block and the head compute nothing else. None for all.
            generator: where drop path draws from while training; None for torch's default.

        Returns:
            [B, q, out] in the compute dtype.
        """
        x = tokens.assemble(
            self.embed(x).to(self.precision.residual),
            self.mask_token.view(-1),
            self.pos_embed[0],
            plan.where if self.layout == "raster" else plan.order,
            layout=self.layout,
            prefix=self.prefix,
        )
        drop = self.drop_path(x.shape[0], generator)
        stream = run_blocks(self.blocks, Stream(x), self.precision.compute, drop, queries)
        return self.head(self.norm.add(stream, self.precision.compute)[1])

    def flops(self, visible: int, queries: int) -> int:
        """Multiply-adds x 2 of one sample's forward pass."""
        n = self.grid.size + self.prefix
        embed = 2 * (visible + self.prefix) * self.embed.in_features * self.width
        head = 2 * queries * self.width * self.out
        return embed + head + blocks_flops(self.blocks, n, queries)


class PixelDecoder(Decoder):
    """The decoder of VideoMAE and AMD: visible tokens first, mask tokens behind them, each with its own position.

    Nothing is put back in raster order: positions (1-D over a clip, 2-D over an image) say where a token belongs, and
    attention does not mind the order. The embedding has no bias. Arguments are those of :class:`Decoder`; published
    sizes (width, depth, heads) are 192, 4, 3 beside a ViT-S, 384, 4, 6 beside a ViT-B, 512, 12, 8 beside a ViT-L.
    """

    layout = "visible_first"
    embed_bias = False

    @classmethod
    def for_encoder(
        cls,
        encoder: VisionTransformer,
        out: int | None = None,
        *,
        width: int | None = None,
        depth: int = 4,
        heads: int | None = None,
        drop_path: float = 0.0,
    ) -> PixelDecoder:
        """As :meth:`Decoder.for_encoder`; by default half as wide as the encoder, with heads of 64 channels."""
        width = encoder.width // 2 if width is None else width
        heads = max(width // 64, 1) if heads is None else heads
        return super().for_encoder(encoder, out, width=width, depth=depth, heads=heads, drop_path=drop_path)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew as the published code does: the embedding uniform in +-1/sqrt(D), torch's default for a
        Linear, every other one Xavier uniform, norms 1 and 0, the mask token N(0, 0.02) inside +-0.02."""
        draw(self, generator)
        draw_uniform(self.embed.weight, self.embed.in_features**-0.5, generator)
        draw_truncated(self.mask_token, 0.02, generator)

    def masked_rows(self, plan: MaskPlan) -> Tensor:
        """[B, N - a] int32: the last rows."""
        return span(plan, self.prefix + plan.student, self.prefix + plan.tokens)

    def forward(
        self,
        x: Tensor,
        plan: MaskPlan,
        queries: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predictions of the hidden patches.

        Args:
            x: [B, P + a, D], the encoder's tokens of ``plan.visible``.
            plan: where they came from.
            queries: [B, q] int32, rows of the sequence (prefix, ``plan.visible``, ``plan.masked``); None for those of
                ``plan.masked``. The last block and the head compute nothing else.
            generator: where drop path draws from while training; None for torch's default.

        Returns:
            [B, q or N - a, out] in the compute dtype.
        """
        queries = self.masked_rows(plan) if queries is None else queries
        return super().forward(x, plan, queries, generator=generator)


def span(plan: MaskPlan, start: int, stop: int) -> Tensor:
    """[B, stop - start] int32: the same consecutive rows of every sample, on the plan's device."""
    rows = torch.arange(start, stop, dtype=torch.int32, device=plan.order.device)
    return rows.expand(len(plan.order), -1)


@torch.no_grad()
def draw_truncated(tensor: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal with mean 0, cut at one standard deviation; drawn on the CPU, as :func:`.layers.draw` does."""
    tensor.copy_(nn.init.trunc_normal_(torch.empty(tensor.shape), 0.0, std, -std, std, generator))
