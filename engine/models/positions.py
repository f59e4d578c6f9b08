"""Positions: fixed sine-cosine tables, and a learned bias of the attention's scores by relative position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.tokens import TokenGrid


def position_table(grid: TokenGrid, width: int, prefix: int) -> Tensor:
    """Positions of a grid, [1, prefix + N, width] fp32; the prefix rows (the cls token) are zero.

    An image gets the 2-D table of MAE and dBOT, a clip the 1-D table of VideoMAE and AMD over the flattened index.

    Raises:
        UserError: a width that the table cannot be split into.
    """
    frames, rows, columns = grid.shape
    body = sincos_2d(rows, columns, width) if frames == 1 else sincos_1d(grid.size, width)
    return torch.cat([torch.zeros(prefix, width), body.float()]).unsqueeze(0)


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width] fp64: p(y, x) = [sin xw, cos xw, sin yw, cos yw], w_i = 10000^(-4i / width) (MAE)."""
    if width % 4:
        raise UserError(f"width: expected a multiple of 4 for 2-D positions, got {width}")
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * frequency for axis in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def sincos_1d(length: int, width: int) -> Tensor:
    """[length, width] fp64: angle = n / 10000^(2 floor(j / 2) / width), sine at even j, cosine at odd j (VideoMAE)."""
    if width % 2:
        raise UserError(f"width: expected a multiple of 2 for 1-D positions, got {width}")
    frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64).view(-1, 1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class RelativePositionBias(nn.Module):
    """Bias of the attention's scores, one number a head and an offset between query and key; all blocks share it.

    Rows of the table: (dy + H - 1)(2W - 1) + dx + W - 1 for a query dy rows below and dx columns right of its key;
    then, with a class token, one each for class -> patch, patch -> class and class -> class, the query first (BEiT, Bao
    et al., ICLR 2022).

    Args:
        grid: of an image. heads: of the attention. prefix: 1 with a class token in front, or 0.

    Raises:
        UserError: a clip's grid.
    """

    relative_position_index: Tensor

    def __init__(self, grid: TokenGrid, heads: int, prefix: int) -> None:
        super().__init__()
        frames, rows, columns = grid.shape
        if frames > 1:
            raise UserError(f"relative_positions: expected the grid of an image, got one of {frames} frames")
        self.prefix = prefix
        count = (2 * rows - 1) * (2 * columns - 1) + 3 * prefix
        self.relative_position_bias_table = nn.Parameter(torch.zeros(count, heads))
        self.register_buffer("relative_position_index", relative_index(rows, columns, prefix), persistent=False)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """[heads, P + N, P + N] in the table's dtype; of the patches ``rows`` [B, n] alone [B, heads, P + n, P + n]."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()
        return bias if rows is None else bias_of_patches(bias, rows, self.prefix)


def relative_index(rows: int, columns: int, prefix: int) -> Tensor:
    """[P + N, P + N] int64: the row of :class:`RelativePositionBias`'s table for a query and a key."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    dy, dx = (axis.reshape(-1, 1) - axis.reshape(1, -1) for axis in (y, x))
    patches = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    if not prefix:
        return patches
    last = (2 * rows - 1) * (2 * columns - 1)
    index = patches.new_empty(patches.shape[0] + 1, patches.shape[1] + 1)
    index[1:, 1:] = patches
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


def bias_of_patches(bias: Tensor, rows: Tensor, prefix: int) -> Tensor:
    """[heads, P + N, P + N] -> [B, heads, P + n, P + n]: the prefix and the patches ``rows`` [B, n] int32."""
    front = torch.arange(prefix, device=rows.device).expand(rows.shape[0], -1)
    chosen = torch.cat([front, rows.long() + prefix], dim=1)
    return bias[:, chosen[:, :, None], chosen[:, None, :]].transpose(0, 1)


def bias_of_queries(bias: Tensor, queries: Tensor) -> Tensor:
    """[heads, n, n] or [B, heads, n, n] -> [B, heads, q, n]: what the queries [B, q] int32 in [0, n) see."""
    chosen = queries.long()
    if bias.dim() == 3:
        return bias[:, chosen].transpose(0, 1)
    sample = torch.arange(len(chosen), device=chosen.device)[:, None]
    return bias[sample, :, chosen].transpose(1, 2)
