"""The published loaders: pixels against numpy, frames by a number written into each, boxes against what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cohobate.benchmarks.reference import loader
from cohobate.data.video.encode import encode_clip

SIZE = 16


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 x 32, four flat quarters."""
    pixels = np.zeros((32, 40, 3), dtype=np.uint8)
    pixels[:16, :20], pixels[:16, 20:], pixels[16:, :20], pixels[16:, 20:] = 50, 100, 150, (10, 20, 30)
    path = tmp_path_factory.mktemp("images") / "quarters.png"
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """90 frames of 64 x 48, frame t of level 2 t + 20; a key frame every 25."""
    frames = np.broadcast_to((np.arange(90) * 2 + 20).astype(np.uint8)[:, None, None, None], (90, 48, 64, 3))
    path = tmp_path_factory.mktemp("videos") / "levels.mp4"
    path.write_bytes(encode_clip(np.ascontiguousarray(frames), g="25", crf="4", preset="veryfast"))
    return str(path)


def test_an_image_is_cropped_and_mirrored(picture: str) -> None:
    """A box in the lower right quarter is flat; one over the two upper ones changes sides with the flip."""
    assert (loader.image(picture, (16, 20, 16, 20), False, SIZE) == (10, 20, 30)).all()
    plain, flipped = (loader.image(picture, (0, 0, 16, 40), flip, SIZE) for flip in (False, True))
    assert (plain[:, 0] == 50).all() and (plain[:, -1] == 100).all()
    assert np.array_equal(plain, flipped[:, ::-1])


def test_images_are_resized_bicubically(picture: str) -> None:
    """Which overshoots beside an edge."""
    pixels = loader.image(picture, (0, 0, 16, 40), False, 80)
    assert pixels.min() < 50 and pixels.max() > 100


def test_floats_are_the_normalised_pixels() -> None:
    pixels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = loader.normalised(pixels)
    assert got.shape == (3, 2, 4, 5) and got.is_contiguous()
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(got[channel], (pixels[..., channel] / 255 - mean) / std)


def test_a_clip_has_the_frames_asked_for(video: str) -> None:
    """Beyond a key frame, and the last one twice; lossy coding and limited range shift a level by two at most."""
    wanted = [30, 34, 55, 89, 89]
    pixels = loader.clip(video, wanted, (0, 0, 48, 48), SIZE)
    assert pixels.shape == (5, SIZE, SIZE, 3)
    assert np.abs(pixels.mean((1, 2, 3)) - (np.array(wanted) * 2 + 20)).max() < 2


def test_a_random_clip_is_a_window(video: str) -> None:
    levels = loader.clip(video, None, None, SIZE).mean((1, 2, 3))
    assert len(levels) == 16
    assert np.abs(np.diff(levels) - 8).max() < 4  # four frames of two levels each


@pytest.mark.parametrize("floats", [True, False])
def test_batches_never_end(picture: str, video: str, floats: bool) -> None:
    for samples, shape in (
        (loader.Images([picture] * 3, SIZE, floats), ()),
        (loader.Clips([video], SIZE, floats), (16,)),
    ):
        made = loader.batches(samples, 2, workers=0)
        for _ in range(2):  # more than there are files
            batch = next(made)
            assert batch.shape == ((2, 3, *shape, SIZE, SIZE) if floats else (2, *shape, SIZE, SIZE, 3))
            assert batch.dtype == (torch.float32 if floats else torch.uint8)


def test_multi_scale_boxes() -> None:
    """All four sides, no two more than a step apart; 13 places; inside of the frame."""
    boxes = {loader.multi_scale_box(100, 160) for _ in range(3000)}
    sides = {(h, w) for _, _, h, w in boxes}
    assert {h for h, _ in sides} == {100, 87, 75, 66}
    assert len(sides) == 10 and (100, 75) not in sides and (87, 66) not in sides
    assert len({(top, left) for top, left, h, w in boxes if (h, w) == (66, 66)}) == 13
    assert all(top >= 0 and left >= 0 and top + h <= 100 and left + w <= 160 for top, left, h, w in boxes)


def test_random_boxes() -> None:
    for _ in range(300):
        top, left, h, w = loader.random_box(90, 120)
        assert 0 <= top <= 90 - h and 0 <= left <= 120 - w
        assert 0.19 < h * w / (90 * 120) <= 1 and 0.73 < w / h < 1.37  # whole pixels
