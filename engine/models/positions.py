"""Fixed sine-cosine position tables."""

from __future__ import annotations

import torch
from torch import Tensor

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
