"""The token grid: sizes, raster order, and what it refuses."""

from __future__ import annotations

import pytest

from cohobate import TokenGrid
from cohobate.errors import UserError


def test_image_grid() -> None:
    grid = TokenGrid.image(224, 16)
    assert (grid.shape, grid.size, grid.row_length, grid.pixel_shape) == ((1, 14, 14), 196, 768, (1, 224, 224, 3))


def test_non_square_other_channels() -> None:
    grid = TokenGrid.image((32, 48), (4, 8), channels=5)
    assert (grid.shape, grid.size, grid.row_length) == ((1, 8, 6), 48, 4 * 8 * 5)


def test_clip_grid() -> None:
    grid = TokenGrid(16, 224, 224, (2, 16, 16))
    assert (grid.shape, grid.size, grid.row_length) == ((8, 14, 14), 1568, 1536)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"frames": 3}, "frames: expected a positive multiple of the patch size 2, got 3"),
        ({"height": 30}, "height: .* 16, got 30"),
        ({"width": 0}, "width: .* got 0"),
        ({"channels": 0}, "channels: expected at least 1"),
        ({"patch": (2, 0, 16)}, "patch: expected three positive"),
        ({"patch": (16, 16)}, "patch: expected three positive"),
    ],
)
def test_refuses(arguments: dict[str, object], named: str) -> None:
    good = {"frames": 2, "height": 32, "width": 32, "patch": (2, 16, 16)}
    with pytest.raises(UserError, match=named):
        TokenGrid(**(good | arguments))  # type: ignore[arg-type]
