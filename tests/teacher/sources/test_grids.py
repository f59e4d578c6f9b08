"""A teacher's grid against the student's: every case is either equal, resized as asked, or refused with both grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.errors import UserError
from cohobate.teacher.sources import fit, load_source, match_grid, resize_pixels
from cohobate.tokens import TokenGrid

Make = Callable[..., Any]
STUDENT = TokenGrid.image(224, 16)


def test_equal_grids_need_nothing() -> None:
    for resize in (None, "positions", "pixels"):
        match = match_grid(STUDENT, STUDENT, resize)
        assert match == (STUDENT, (224, 224), False, False)


def test_patch_14_is_fed_196_pixels() -> None:
    """dBOT's rule for its H/14 teacher."""
    match = match_grid(TokenGrid.image(224, 14), STUDENT, "pixels")
    assert match.grid == TokenGrid.image(196, 14) and match.grid.shape == STUDENT.shape
    assert match.pixel_size == (196, 196) and match.resize_pixels and match.resize_positions


def test_patch_14_made_for_196_keeps_its_positions() -> None:
    match = match_grid(TokenGrid.image(196, 14), STUDENT, "pixels")
    assert match.resize_pixels and not match.resize_positions


def test_a_smaller_student_of_the_same_patch_keeps_its_pixels() -> None:
    student = TokenGrid.image((96, 160), 16)
    for resize in ("positions", "pixels"):
        match = match_grid(STUDENT, student, resize)
        assert match.grid == student and not match.resize_pixels and match.resize_positions


@pytest.mark.parametrize(
    "teacher", [TokenGrid.image(224, 14), TokenGrid.image(196, 14), TokenGrid.image(384, 16)], ids=str
)
def test_nothing_is_resized_silently(teacher: TokenGrid) -> None:
    with pytest.raises(UserError) as error:
        match_grid(teacher, STUDENT)
    text, (_, rows, columns) = str(error.value), teacher.shape
    assert f"{teacher.height} x {teacher.width} px" in text and f"({rows} x {columns} tokens)" in text
    assert "224 x 224 px in patches of 16 x 16 (14 x 14 tokens)" in text
    assert "resize='pixels'" in text and "resize='positions'" in text


def test_positions_alone_cannot_match_another_patch() -> None:
    with pytest.raises(UserError, match="'pixels' feeds the teacher 196 x 196 px"):
        match_grid(TokenGrid.image(224, 14), STUDENT, "positions")


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (STUDENT, TokenGrid(16, 224, 224, (2, 16, 16))),
        (TokenGrid(16, 224, 224, (2, 16, 16)), STUDENT),
        (TokenGrid(8, 224, 224, (2, 16, 16)), TokenGrid(16, 224, 224, (2, 16, 16))),
        (TokenGrid(16, 224, 224, (4, 16, 16)), TokenGrid(16, 224, 224, (2, 16, 16))),
        (TokenGrid(8, 224, 224, (1, 16, 16)), TokenGrid(16, 224, 224, (2, 16, 16))),
    ],
    ids=["image teacher", "clip teacher", "frames", "tubelets", "slots alone agree"],
)
def test_time_is_never_resized(teacher: TokenGrid, student: TokenGrid) -> None:
    for resize in (None, "positions", "pixels"):
        with pytest.raises(UserError, match="time is not resized"):
            match_grid(teacher, student, resize)


def test_other_refusals() -> None:
    with pytest.raises(UserError, match="resize: expected None, 'positions' or 'pixels', got 'both'"):
        match_grid(STUDENT, STUDENT, "both")
    with pytest.raises(UserError, match=r"3 channels .* got 1"):
        match_grid(TokenGrid.image(224, 16, 1), STUDENT, "pixels")


def test_a_source_moves_to_the_students_tokens(pixels_of: Make) -> None:
    source = load_source("random:tiny?image_size=40&patch=8&width=24&depth=1&heads=2")
    fitted, match = fit(source, TokenGrid.image(48, 16), "pixels")
    assert match.pixel_size == (24, 24) and fitted.grid.shape == (1, 3, 3) and source.grid.shape == (1, 5, 5)
    assert fitted.anatomy is not None and fitted.original is None
    pixels = resize_pixels(pixels_of(TokenGrid.image(48, 16)), match.pixel_size)
    assert fitted.anatomy.forward(pixels, [1])[0].shape == (2, 10, 24)
    same, _ = fit(source, source.grid)
    assert same is source


def test_resized_pixels_are_pillows() -> None:
    """Bicubic and antialiased as in Pillow, which rounds between its two passes: bytes differ by at most 1."""
    generator = np.random.default_rng(0)
    image = np.kron(generator.integers(64, 192, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((49, 42), Image.Resampling.BICUBIC))
    found = resize_pixels(torch.from_numpy(image)[None, None].expand(2, 3, -1, -1, -1), (42, 49))
    assert found.dtype == torch.uint8 and found.shape == (2, 3, 42, 49, 3)
    assert np.abs(found[1, 2].numpy().astype(int) - wanted.astype(int)).max() <= 1


def test_overshoot_is_clamped_and_does_not_wrap() -> None:
    edge = torch.zeros(1, 1, 32, 32, 1, dtype=torch.uint8)
    edge[:, :, :, 16:] = 255
    found = resize_pixels(edge, (20, 20))[0, 0, :, :, 0].int()
    assert bool((found.diff(dim=1) >= 0).all()) and int(found.min()) == 0 and int(found.max()) == 255


def test_resizing_to_the_same_size_changes_nothing(pixels_of: Make) -> None:
    pixels = pixels_of(TokenGrid.image(16, 8))
    assert resize_pixels(pixels, (16, 16)) is pixels
