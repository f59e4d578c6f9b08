"""Position tables against the formulas of the papers, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from cohobate import TokenGrid
from cohobate.errors import UserError
from cohobate.models.positions import position_table


def test_image_positions_token_by_token() -> None:
    """p(y, x) = [sin xw, cos xw, sin yw, cos yw], w_i = 10000^(-i / (D / 4)), on a grid that is not square."""
    width, grid = 12, TokenGrid.image((8, 20), 4)
    table = position_table(grid, width, prefix=1)
    assert table.shape == (1, 11, width) and table.dtype == torch.float32
    assert not table[0, 0].any()
    for y in range(2):
        for x in range(5):
            angles = [[p * 10000 ** (-i / 3) for i in range(3)] for p in (x, y)]
            expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            torch.testing.assert_close(
                table[0, 1 + y * 5 + x], torch.tensor(expected), rtol=0, atol=6e-8
            )  # one fp32 ulp


def test_clip_positions_token_by_token() -> None:
    """1-D over the flattened index, sine at even places, cosine at odd ones."""
    table = position_table(TokenGrid(4, 8, 8, (2, 4, 4)), 6, prefix=0)
    assert table.shape == (1, 8, 6)
    for n in range(8):
        expected = [(math.sin, math.cos)[j % 2](n / 10000 ** (2 * (j // 2) / 6)) for j in range(6)]
        torch.testing.assert_close(table[0, n], torch.tensor(expected), rtol=0, atol=6e-8)


def test_widths_that_do_not_split() -> None:
    with pytest.raises(UserError, match="width: expected a multiple of 4"):
        position_table(TokenGrid.image(8, 4), 6, prefix=1)
    with pytest.raises(UserError, match="width: expected a multiple of 2"):
        position_table(TokenGrid(4, 8, 8, (2, 4, 4)), 5, prefix=0)
