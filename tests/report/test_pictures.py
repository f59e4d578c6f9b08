"""Pictures, by their numbers: what is drawn where, and that every word stands outside the images and on the page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cohobate.report import Retrieval, Samples, pictures

INFERNO = (0.001462, 0.000466, 0.013866), (0.988362, 0.998364, 0.644924)  # its ends, as published
RNG = np.random.default_rng(0)


def clips_of(count: int, frames: int = 1, height: int = 16, width: int = 24) -> NDArray[np.uint8]:
    return RNG.integers(0, 200, (count, frames, height, width, 3), dtype=np.uint8)  # never the grey of hidden patches


def drawn(figure: Figure) -> list[NDArray[Any]]:
    """The images of a figure, in the order of drawing."""
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.get_images()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def check_words(figure: Figure) -> None:
    """No word lies over an image or beyond the page, no two words touch, and no two images."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for text, box in zip(figure.texts, boxes):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, f"{text.get_text()!r} leaves the page"
        assert not any(box.overlaps(ax.bbox) for ax in figure.axes), f"{text.get_text()!r} lies over an image"
        assert sum(box.overlaps(other) for other in boxes) == 1, f"{text.get_text()!r} touches another word"
    for ax in figure.axes:
        assert sum(ax.bbox.overlaps(other.bbox) for other in figure.axes) == 1


def test_patches_that_are_not_kept_are_grey_and_the_others_untouched() -> None:
    images = clips_of(2, height=4, width=8)
    visible = np.array([[[True, False]], [[False, True]]])[:, None]  # a grid of 1 x 2 patches of 4 x 4 pixels
    shown = pictures.kept(images, visible)
    np.testing.assert_array_equal(shown[0, :, :, :4], images[0, :, :, :4])
    np.testing.assert_array_equal(shown[1, :, :, 4:], images[1, :, :, 4:])
    assert (shown[0, :, :, 4:] == 225).all() and (shown[1, :, :, :4] == 225).all()


def test_a_token_covers_its_frames_rows_and_columns() -> None:
    tokens = np.arange(2 * 2 * 3).reshape(1, 2, 2, 3)
    spread = pictures.over_pixels(tokens, clips_of(1, 4, 8, 6))
    assert spread.shape == (1, 4, 8, 6)
    assert spread[0, 1, 3, 1] == tokens[0, 0, 0, 0] and spread[0, 2, 4, 2] == tokens[0, 1, 1, 1]
    for t in range(2):  # every token the same block of 2 frames x 4 rows x 2 columns
        for y in range(2):
            for x in range(3):
                block = spread[0, 2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 2 * x : 2 * x + 2]
                assert (block == tokens[0, t, y, x]).all()


@pytest.mark.parametrize(
    ("frames", "shown"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (8, [0, 2, 5, 7]), (16, [0, 5, 10, 15])]
)
def test_a_few_frames_of_a_clip(frames: int, shown: list[int]) -> None:
    assert pictures.shown_frames(frames) == shown


def test_masks_are_drawn_where_they_are() -> None:
    clips, visible = clips_of(3), RNG.random((3, 1, 4, 6)) < 0.25
    figure = pictures.masks(clips, visible, titles=["a", "b", "a long name that is cut.jpg"])
    found = drawn(figure)
    assert len(found) == 6
    for sample in range(3):  # column by column
        np.testing.assert_array_equal(found[2 * sample], clips[sample, 0])
        hidden = (found[2 * sample + 1] == 225).all(axis=2).reshape(4, 4, 6, 4).all(axis=(1, 3))
        np.testing.assert_array_equal(hidden, ~visible[sample, 0])
    check_words(figure)


def test_nested_masks_of_clips() -> None:
    clips = clips_of(3, 16, 16, 16)
    code = RNG.random((3, 1, 4, 4))
    student, teacher = np.repeat(code < 0.25, 8, axis=1), np.repeat(code < 0.5, 8, axis=1)
    figure = pictures.masks(clips, student, teacher)
    found = drawn(figure)
    assert len(found) == 3 * 4 * 3  # clips, frames, rows
    for place, frame in enumerate((0, 5, 10, 15)):
        whole, seen, taught = found[12 + 3 * place : 12 + 3 * place + 3]  # of the second clip
        np.testing.assert_array_equal(whole, clips[1, frame])
        for picture, mask in ((seen, student), (taught, teacher)):
            shown = (picture != 225).any(axis=2)
            np.testing.assert_array_equal(shown, mask[1, 0].repeat(4, 0).repeat(4, 1))
    assert texts(figure)[:4] == ["frame 1", "6", "11", "16"]
    check_words(figure)


def full(**changes: Any) -> Samples:
    arrays: dict[str, Any] = {"images": clips_of(2), "visible": np.zeros((2, 1, 4, 6), bool)}
    arrays["visible"][:, :, 0] = True
    arrays |= {"target_pca": RNG.random((2, 1, 4, 6, 3)), "prediction_pca": RNG.random((2, 1, 4, 6, 3))}
    return Samples("1 stage", **(arrays | changes))


def test_samples_have_the_rows_that_the_method_has() -> None:
    seen = ["image", "student sees"]
    colours = ["target\n(PCA)", "prediction\n(PCA)"]
    pixels = {"reconstruction": clips_of(2), "target": "pixels"}
    teacher = {"teacher_visible": np.ones((2, 1, 4, 6), bool)}
    assert texts(pictures.samples(full())) == [*seen, *colours]
    assert texts(pictures.samples(full(**pixels))) == [*seen, "reconstruction"]
    assert texts(pictures.samples(full(target_pca=None, prediction_pca=None))) == seen
    amd = full(**pixels | teacher | {"target": "features"})
    assert texts(pictures.samples(amd)) == [*seen, "teacher sees", "reconstruction", *colours]
    check_words(pictures.samples(amd))


def test_predictions_are_drawn_where_there_are_some() -> None:
    found = full()
    target, prediction = drawn(pictures.samples(found))[2:4]
    assert found.target_pca is not None and found.prediction_pca is not None
    np.testing.assert_array_equal(target[5, 9], found.target_pca[0, 0, 1, 2])
    np.testing.assert_array_equal(prediction[5, 9], found.prediction_pca[0, 0, 1, 2])
    assert (prediction[:4] == 225 / 255).all() and (prediction[4:] != 225 / 255).any(axis=2).all()
    elsewhere = full(predicted=found.visible)
    prediction = drawn(pictures.samples(elsewhere))[3]
    assert (prediction[4:] == 225 / 255).all() and (prediction[:4] != 225 / 255).any(axis=2).all()


def test_a_report_shows_a_band_of_clips() -> None:
    clips = clips_of(8, 16)
    found = pictures.few(Samples("1 amd", clips, np.ones((8, 8, 4, 6), bool), attention_heads=np.arange(3)))
    assert len(found.images) == len(found.visible) == 4
    assert found.attention_heads is not None and found.attention_heads.tolist() == [0, 1, 2]
    figure = pictures.samples(found)
    assert len(drawn(figure)) == 4 * 4 * 2  # four clips, four frames, two rows


def test_attention_is_a_multiple_of_an_even_share() -> None:
    """Twice the even share over one half, none over the other: the ends of the colour bar."""
    clips = np.full((1, 1, 8, 8, 3), 128, np.uint8)
    weights = np.zeros((1, 2, 1, 2, 2))
    weights[..., 0] = 0.5
    figure = pictures.attention(clips, weights, [4])
    assert texts(figure)[:3] == ["image", "mean of\nall heads", "head 5"]
    bar = next(ax for ax in figure.axes if ax.get_xlim()[1] == 2.0)
    assert bar.get_xlim() == (0.0, 2.0)
    for picture in drawn(figure)[1:3]:
        for half, colour in ((picture[:, :4], INFERNO[1]), (picture[:, 4:], INFERNO[0])):
            wanted = 0.25 * 128 / 255 + 0.75 * np.array(colour)
            np.testing.assert_allclose(half, np.broadcast_to(wanted, half.shape), rtol=1e-5)
    check_words(figure)


def test_nearest_images_with_labels() -> None:
    queries, near = clips_of(2), clips_of(14).reshape(2, 7, 1, 16, 24, 3)
    similarity = np.sort(RNG.random((2, 7)), axis=1)[:, ::-1]
    same = np.zeros((2, 7), bool)
    same[1, 3] = True
    figure = pictures.retrieval(Retrieval("1 mae", queries, near, similarity, same, "texture"))
    found = drawn(figure)
    np.testing.assert_array_equal(found[0], queries[0, 0])
    np.testing.assert_array_equal(found[8 + 4], near[1, 3, 0])
    words = texts(figure)
    assert sum(word.endswith(" same") for word in words) == 1 and f"{similarity[1, 3]:.3f} same" in words
    assert "(texture)" in words[-1]
    framed = [number for number, ax in enumerate(figure.axes) if ax.spines["left"].get_visible()]
    assert framed == [12]
    check_words(figure)
    bare = pictures.retrieval(Retrieval("", queries[:1], near[:1, :2], similarity[:1, :2]))
    assert len(drawn(bare)) == 3 and not any("label" in word for word in texts(bare))
    check_words(bare)
    clips = pictures.retrieval(Retrieval("", clips_of(2, 4), clips_of(14, 4).reshape(2, 7, 4, 16, 24, 3), similarity))
    assert texts(figure)[1] == "nearest images and their cosine similarity"
    assert texts(clips)[1] == "nearest clips (first frames) and their cosine similarity"
    check_words(clips)


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_any_number_of_images_fits_the_page(count: int) -> None:
    figure = pictures.components(
        clips_of(count), RNG.random((count, 1, 4, 6, 3)), titles=[f"{n:08}.jpg" for n in range(count)]
    )
    for ax in figure.axes:
        box = ax.get_position()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1
        ratio = ax.bbox.width / ax.bbox.height
        assert abs(ratio - 1.5) < 0.01  # pictures are not stretched
    check_words(figure)
