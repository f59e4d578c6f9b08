"""The vision transformer, from pixels to tokens; state-dict keys are timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.models.layers import (
    Block,
    DropPath,
    Norm,
    Precision,
    Stream,
    blocks_flops,
    draw,
    draw_normal,
    draw_uniform,
    draw_xavier,
    run_blocks,
)
from cohobate.models.pixels import check_pixels, project
from cohobate.models.positions import RelativePositionBias, position_table
from cohobate.tokens import TokenGrid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
POSITIONS = ("sincos", "none")


class Features(NamedTuple):
    """What evaluation reads: the cls token (None without one) and the mean of the patch tokens, [B, D] fp32 each."""

    cls: Tensor | None
    mean: Tensor


class PatchProjection(nn.Module):
    """Kernel and bias of the patch embedding; :func:`tokens.embed_patches` is the product."""

    weight: Tensor
    bias: Tensor

    def __init__(self, grid: TokenGrid, width: int) -> None:
        super().__init__()
        # A clip's kernel has a time axis, an image's has none, as in a Conv3d and a Conv2d.
        kernel = grid.patch if grid.shape[0] > 1 or grid.patch[0] > 1 else grid.patch[1:]
        self.weight = nn.Parameter(torch.empty(width, grid.channels, *kernel))
        self.bias = nn.Parameter(torch.empty(width))

    def rows(self) -> Tensor:
        """The kernel as [D, pt*ph*pw*C], ordered as a patch row is: (frame, row, column, channel)."""
        return self.weight.movedim(1, -1).flatten(1)


class PatchEmbed(nn.Module):
    """Gives the projection timm's name, ``patch_embed.proj``."""

    def __init__(self, grid: TokenGrid, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(grid, width)


class VisionTransformer(nn.Module):
    """Pre-norm ViT with fixed sine-cosine positions, or BEiT's: none, but a bias of the scores that all blocks share.

    Args:
        grid: how pixels are cut into tokens.
        width: D.
        depth: blocks; 0 leaves the embedding alone.
        heads: attention heads, dividing the width.
        mlp_ratio: hidden width of an MLP over D.
        cls_token: put a learned token in front (P = 1), or not (P = 0).
        drop_path: rate of the last block; the first block has 0.
        precision: dtypes of products and of the residual stream.
        mean, std: normalisation of pixels / 255, one number a channel.
        positions: "sincos" adds the fixed table to the tokens, "none" adds nothing.
        layer_scale: first value of the learned scales of the branches (CaiT, BEiT); None leaves them out.
        relative_positions: a learned bias of the attention's scores by relative position, shared by all blocks (BEiT);
            attention then runs on the backends that take one.

    Raises:
        UserError: an argument that does not fit; the message names it.
    """

    cls_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    rel_pos_bias: RelativePositionBias | None

    def __init__(
        self,
        grid: TokenGrid,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        cls_token: bool = True,
        drop_path: float = 0.0,
        precision: Precision | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        positions: str = "sincos",
        layer_scale: float | None = None,
        relative_positions: bool = False,
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != grid.channels:
                raise UserError(f"{name}: expected {grid.channels} numbers, one a channel, got {len(values)}")
        if depth < 0:
            raise UserError(f"depth: expected 0 or more blocks, got {depth}")
        if positions not in POSITIONS:
            raise UserError(f"positions: expected one of {', '.join(POSITIONS)}; got {positions!r}")
        if layer_scale is not None and not layer_scale > 0:
            raise UserError(f"layer_scale: expected a number above 0 or None, got {layer_scale}")
        self.grid, self.width, self.depth, self.heads = grid, width, depth, heads
        self.prefix = int(cls_token)
        self.precision = precision or Precision()
        self.mean, self.std = tuple(mean), tuple(std)
        self.positions, self.layer_scale, self.relative_positions = positions, layer_scale, relative_positions
        self._shape: dict[str, Any] = {"grid": grid, "width": width, "heads": heads, "mlp_ratio": mlp_ratio}
        self._shape |= {"cls_token": cls_token, "mean": self.mean, "std": self.std}
        self._shape |= {"positions": positions, "layer_scale": layer_scale, "relative_positions": relative_positions}

        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if cls_token else None
        table = position_table(grid, width, self.prefix) if positions == "sincos" else None
        self.pos_embed = None if table is None else nn.Parameter(table, requires_grad=False)
        self.rel_pos_bias = RelativePositionBias(grid, heads, self.prefix) if relative_positions else None
        self.patch_embed = PatchEmbed(grid, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = Norm(width)
        self.drop_path = DropPath(drop_path, depth)
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embed.proj.weight.device

    def like(self, *, depth: int | None = None, precision: Precision | None = None) -> VisionTransformer:
        """A freshly drawn model of the same shape without drop path, of another depth or precision if given."""
        return VisionTransformer(
            depth=self.depth if depth is None else depth, precision=precision or self.precision, **self._shape
        )

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None, *, keep_patch_bias: bool = False) -> None:
        """Draw all weights anew: a function of the generator alone, the same on every device and rank.

        Linear and patch kernels are Xavier uniform, biases 0, norms 1 and 0, the cls token N(0, 0.02), the patch bias
        uniform in +-1/sqrt(row length) (torch's convolution default; of clips the patch kernel, too, as in VideoMAE),
        relative positions 0. ``keep_patch_bias`` leaves the patch bias as it is, as the published dBOT code does at a
        stage boundary; its number is drawn all the same.
        """
        draw(self, generator)
        kernel, bias, bound = self.patch_embed.proj.weight, self.patch_embed.proj.bias, self.grid.row_length**-0.5
        if kernel.dim() == 5:
            draw_uniform(kernel, bound, generator)
        else:
            draw_xavier(kernel, generator)
        draw_uniform(torch.empty_like(bias) if keep_patch_bias else bias, bound, generator)
        if self.cls_token is not None:
            draw_normal(self.cls_token, 0.02, generator)
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.relative_position_bias_table.zero_()

    def embed(self, pixels: Tensor, rows: Tensor | None = None, *, positions: bool = True) -> Tensor:
        """Pixels [B, T, H, W, C] -> [B, P + n, D] in the residual dtype; only the patches ``rows`` [B, n] int32.

        ``pixels`` are as in :meth:`forward`; ``positions=False`` leaves them to somebody who adds them later.

        Raises:
            UserError: pixels of another shape than the grid's.
        """
        table = None if self.pos_embed is None or not positions else self.pos_embed[0]
        front = self.patch_embed.proj.bias.new_empty(0, self.width) if self.cls_token is None else self.cls_token[0]
        return embed_tokens(
            pixels,
            rows,
            self.patch_embed.proj.rows(),
            self.patch_embed.proj.bias,
            None if table is None else table[self.prefix :],
            front if table is None else front + table[: self.prefix],
            grid=self.grid,
            mean=self.mean,
            std=self.std,
            precision=self.precision,
        )

    def forward(
        self, pixels: Tensor, rows: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens after the last block and the final norm.

        Args:
            pixels: [B, T, H, W, C], uint8, or floating and normalised by ``mean`` and ``std`` already (slower).
            rows: [B, n] int32, the patches to look at (``plan.visible``); None for all N.
            generator: where drop path draws from while training; None for torch's default.

        Returns:
            [B, P + n, D] in the compute dtype, the cls token first.
        """
        return self.encode(self.embed(pixels, rows), rows, generator=generator)

    def encode(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What :meth:`forward` does behind the embedding.

        Args:
            x: [B, P + n, D] in the residual dtype, the embedded tokens.
            rows: [B, n] int32, the patches that they are; None for all N.
            queries: [B, q] int32, the rows of [0, P + n) that are read; the last block computes nothing else.
            generator: where drop path draws from while training; None for torch's default.

        Returns:
            [B, q or P + n, D] in the compute dtype, behind the final norm.
        """
        drop = self.drop_path(x.shape[0], generator)
        stream = run_blocks(self.blocks, Stream(x), self.precision.compute, drop, queries, self._bias(rows))
        return self.norm.add(stream, self.precision.compute)[1]

    def _bias(self, rows: Tensor | None) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias(rows)

    def intermediates(
        self,
        pixels: Tensor,
        layers: Sequence[int],
        rows: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Residual streams after the blocks ``layers`` (1-based and ascending; 0 is the embedding), no further.

        Args:
            pixels, rows, generator: as in :meth:`forward`.
            layers: which blocks' outputs.
            queries: [B, q] int32, the rows of [0, P + n) that are read; the last block computes nothing else.
            norm: apply the final norm to each.

        Returns:
            One [B, q or P + n, D] a layer, in the residual dtype.

        Raises:
            UserError: layers that are not ascending inside [0, depth].
        """
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > self.depth:
            raise UserError(f"layers: expected ascending numbers in [0, {self.depth}], got {list(layers)}")
        stream = Stream(self.embed(pixels, rows))
        drop, bias = self.drop_path(pixels.shape[0], generator), self._bias(rows)
        found, start = [], 0
        for layer in layers:
            last = layer == layers[-1]
            stream = run_blocks(
                self.blocks[start:layer],
                stream,
                self.precision.compute,
                None if drop is None else drop[start:layer],
                queries if last else None,
                bias,
            )
            stream = Stream(stream.settled())
            found.append(stream.x if last or queries is None else tokens.take(stream.x, queries))
            start = layer
        return [self.norm(x) for x in found] if norm else found

    def features(self, pixels: Tensor) -> Features:
        """Features of whole images for evaluation, after the final norm."""
        x = self(pixels).float()
        return Features(x[:, 0] if self.prefix else None, x[:, self.prefix :].mean(1))

    def flops(self, visible: int | None = None, queries: int | None = None) -> int:
        """Multiply-adds x 2 of one sample's forward over ``visible`` patches, the last block for ``queries`` rows."""
        patches = self.grid.size if visible is None else visible
        n = patches + self.prefix
        embed = 2 * patches * self.grid.row_length * self.width
        return embed + blocks_flops(self.blocks, n, n if queries is None else queries)


def embed_tokens(
    pixels: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    prefix: Tensor,
    *,
    grid: TokenGrid,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> Tensor:
    """The residual stream in front of the first block, [B, P + n, D] in the residual dtype.

    Args:
        pixels: [B, T, H, W, C], uint8, or floating and normalised by ``mean`` and ``std`` already.
        rows: [B, n] int32, the patches that are seen; None for all N.
        weight, bias: patch kernel [D, row_length] and its bias [D]. positions: [N, D], of the patches; None for none.
        prefix: [P, D], the tokens in front of them, positions added.

    Raises:
        UserError: pixels of another shape than the grid's.
    """
    check_pixels(pixels, grid)
    fused = False
    if pixels.is_floating_point():
        x = project(pixels, rows, weight.to(precision.compute), bias, grid)
    else:
        fused = precision.compute == precision.residual  # else the sum must not be rounded to the compute dtype
        x = tokens.embed_patches(
            pixels,
            rows,
            weight,
            bias,
            positions if fused else None,
            patch=grid.patch,
            mean=mean,
            std=std,
            dtype=precision.compute,
        )
    if positions is not None and not fused:
        x = x + (positions if rows is None else positions[rows.long()])
    x = x.to(precision.residual)
    if not prefix.shape[0]:
        return x
    return torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
