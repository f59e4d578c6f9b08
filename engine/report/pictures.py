"""Pictures of images and clips: masks, reconstructions, features as colours, attention, nearest images.

Every function takes arrays and returns a figure; none knows a model. An image is a clip of one frame. A clip is shown
as a few of its frames side by side, and what is known of a token is drawn over every frame that the token covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cohobate.report.plots import BLUE, GREY, INK, WIDTH, styled
from cohobate.report.run import Retrieval, Samples

HIDDEN = 225  # the light grey of what is not shown
COLUMNS = 8  # pictures side by side
FRAMES = 4  # of a clip
LARGEST = 1.9  # inches, where there are few pictures
MARGIN, LABELS = 0.06, 1.15  # inches: around the sheet, and of the column of names on its left
BETWEEN_FRAMES, BETWEEN_SAMPLES, BETWEEN_ROWS, BETWEEN_BANDS = 0.025, 0.09, 0.09, 0.25
# Dark to bright, perceptually uniform, and thinned so that the image shows through; the colour bar is thinned too.
HEAT, THROUGH = "inferno", 0.25

Clips = NDArray[Any]  # [n,T,H,W,3], uint8, or floating in 0..1
Tokens = NDArray[Any]  # [n,t,h,w] or [n,t,h,w,3], one value a token


class Row(NamedTuple):
    """One line of a sheet: its name, and a clip of each sample."""

    name: str
    clips: Clips


def over_pixels(tokens: Tokens, clips: Clips) -> NDArray[Any]:
    """``tokens`` spread over the frames, rows and columns of ``clips``: [n,t,h,w,...] -> [n,T,H,W,...]."""
    for axis in (1, 2, 3):
        size, count = clips.shape[axis], tokens.shape[axis]
        tokens = np.take(tokens, np.arange(size) * count // size, axis=axis)
    return tokens


def kept(clips: Clips, visible: NDArray[np.bool_]) -> Clips:
    """The clips, light grey outside the tokens ``visible`` [n,t,h,w]."""
    grey = HIDDEN if clips.dtype == np.uint8 else HIDDEN / 255
    return np.where(over_pixels(visible, clips)[..., None], clips, np.asarray(grey, clips.dtype))


def overlay(clips: Clips, heat: NDArray[np.floating[Any]], top: float) -> Clips:
    """A heat map [n,t,h,w] over the greys of the clips; ``top`` and more is brightest."""
    unit = clips / 255 if clips.dtype == np.uint8 else clips
    grey = unit @ np.array([0.299, 0.587, 0.114])
    colour = colormaps[HEAT](np.clip(over_pixels(heat, clips) / top, 0, 1))[..., :3]
    shown: Clips = THROUGH * grey[..., None] + (1 - THROUGH) * colour
    return shown


@styled
def sheet(rows: Sequence[Row], titles: Sequence[str] | None = None, *, bar: tuple[str, float] | None = None) -> Figure:
    """A column a sample, a line a row, in as many bands as they need.

    Args:
        rows: with the same number of clips each, of one size and number of frames.
        titles: a short name above each sample.
        bar: text and upper end of a colour bar of :data:`HEAT` from 0, at the bottom.
    """
    count, frames = rows[0].clips.shape[:2]
    frames_shown = shown_frames(frames)
    line = min(count, max(1, COLUMNS // len(frames_shown)))
    ratio = rows[0].clips.shape[2] / rows[0].clips.shape[3]
    gaps = line * (len(frames_shown) - 1) * BETWEEN_FRAMES + (line - 1) * BETWEEN_SAMPLES
    side = min(LARGEST, (WIDTH - LABELS - MARGIN - gaps) / (line * len(frames_shown)))
    above = 0.2 if titles is not None or frames > 1 else 0.0
    step = side * ratio + BETWEEN_ROWS
    band = above + len(rows) * step - BETWEEN_ROWS + BETWEEN_BANDS
    bands = -(-count // line)
    page = _Page(2 * MARGIN + bands * band - BETWEEN_BANDS + (0.55 if bar else 0.0))
    for sample in range(count):
        x0 = LABELS + (sample % line) * (len(frames_shown) * (side + BETWEEN_FRAMES) + BETWEEN_SAMPLES - BETWEEN_FRAMES)
        y0 = MARGIN + (sample // line) * band + above
        for place, frame in enumerate(frames_shown):
            x = x0 + place * (side + BETWEEN_FRAMES)
            for number, row in enumerate(rows):
                page.picture(x, y0 + number * step, side, side * ratio, row.clips[sample, frame])
            if titles is None and frames > 1:
                text = f"frame {frame + 1}" if place == 0 else f"{frame + 1}"
                page.text(x + side / 2, y0 - 0.04, text, va="bottom", ha="center", fontsize=8, color=GREY)
        if titles is not None:
            whole = len(frames_shown) * (side + BETWEEN_FRAMES) - BETWEEN_FRAMES
            page.text(x0 + whole / 2, y0 - 0.04, _short(titles[sample], whole), va="bottom", ha="center", fontsize=8)
    for top in (MARGIN + number * band + above for number in range(bands)):
        for number, row in enumerate(rows):
            page.text(LABELS - 0.1, top + number * step + side * ratio / 2, row.name, va="center", ha="right")
    if bar is not None:
        page.bar(LABELS, *bar)
    return page.figure


def shown_frames(frames: int) -> list[int]:
    """Which frames of a clip are shown: all of a few, else the first, the last and some between, evenly spread."""
    if frames <= FRAMES:
        return list(range(frames))
    return [round(place * (frames - 1) / (FRAMES - 1)) for place in range(FRAMES)]


def masks(
    clips: Clips,
    visible: NDArray[np.bool_],
    teacher_visible: NDArray[np.bool_] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """What the student is shown, and the teacher where that is less than everything; masks are [n,t,h,w]."""
    return sheet(_seen(clips, visible, teacher_visible), titles)


def reconstruction(
    clips: Clips, visible: NDArray[np.bool_], predicted: Clips, titles: Sequence[str] | None = None
) -> Figure:
    """The original, what the student saw of it, and the pixels that were predicted for the rest."""
    return sheet([*_seen(clips, visible, None), Row("reconstruction", predicted)], titles)


def components(
    clips: Clips, colours: Tokens, name: str = "features\n(PCA)", titles: Sequence[str] | None = None
) -> Figure:
    """The images, and below them one colour a token, [n,t,h,w,3] in 0..1."""
    return sheet([_whole(clips), Row(name, over_pixels(colours, clips))], titles)


def few(found: Samples) -> Samples:
    """The samples that a page has room for: a line of images, or two of clips."""
    most = COLUMNS if found.images.shape[1] == 1 else 2 * max(1, COLUMNS // FRAMES)
    arrays: dict[str, Any] = {name: value for name, value in vars(found).items() if isinstance(value, np.ndarray)}
    return replace(found, **{name: array[:most] for name, array in arrays.items() if name != "attention_heads"})


def samples(found: Samples) -> Figure:
    """What a stage saw and asked for: masks; the reconstruction, if it predicts pixels; the features, if it has any."""
    rows = _seen(found.images, found.visible, found.teacher_visible)
    if found.reconstruction is not None:
        rows.append(Row("reconstruction", found.reconstruction))
    if found.target == "pixels" and found.reconstruction is not None:
        return sheet(rows)  # the colours of pixels are better seen as they are
    if found.target_pca is not None:
        clips = over_pixels(np.clip(found.target_pca, 0, 1), found.images)
        asked = np.ones_like(found.visible) if found.teacher_visible is None else found.teacher_visible
        rows.append(Row("target\n(PCA)", kept(clips, asked)))
    if found.prediction_pca is not None:
        clips = over_pixels(np.clip(found.prediction_pca, 0, 1), found.images)
        rows.append(
            Row("prediction\n(PCA)", kept(clips, ~found.visible if found.predicted is None else found.predicted))
        )
    return sheet(rows)


def attention(
    clips: Clips,
    weights: NDArray[np.floating[Any]],
    heads: Sequence[int],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Where the last block looks: the mean over heads and single heads over the images, one scale for all.

    Args:
        clips: [n,T,H,W,3].
        weights: [n,1+k,t,h,w] shares of attention; the mean over all heads first, then k single heads.
        heads: the k heads' numbers, from 0.
    """
    even = weights * weights[0, 0].size
    top = max(2.0, float(np.ceil(np.quantile(even, 0.995))))
    names = ["mean of\nall heads", *(f"head {head + 1}" for head in heads)]
    rows = [Row(name, overlay(clips, even[:, place], top)) for place, name in enumerate(names)]
    return sheet([_whole(clips), *rows], titles, bar=("attention, as a multiple of an even share", top))


@styled
def retrieval(found: Retrieval, most: int = 8) -> Figure:
    """A line a query: the image, and its nearest images with their cosine similarity; of clips the first frames."""
    count, near = min(most, len(found.queries)), min(COLUMNS - 1, found.neighbours.shape[1])
    aside = 0.16  # between the query and its neighbours
    ratio = found.queries.shape[2] / found.queries.shape[3]
    side = min(1.3, (WIDTH - 2 * MARGIN - aside - near * BETWEEN_SAMPLES) / (near + 1))
    step, above, labelled = side * ratio + 0.24, 0.22, found.same is not None
    page = _Page(2 * MARGIN + above + count * step + (0.22 if labelled else 0.0))
    columns = [MARGIN + (n > 0) * aside + n * (side + BETWEEN_SAMPLES) for n in range(near + 1)]
    page.text(columns[0] + side / 2, MARGIN + above - 0.06, "query", va="bottom", ha="center")
    clips = found.queries.shape[1] > 1
    named = f"nearest {'clips (first frames)' if clips else 'images'} and their cosine similarity"
    page.text(columns[1], MARGIN + above - 0.06, named, va="bottom", ha="left")
    for query in range(count):
        y = MARGIN + above + query * step
        page.picture(columns[0], y, side, side * ratio, found.queries[query, 0])
        for place, x in enumerate(columns[1:]):
            equal = found.same is not None and bool(found.same[query, place])
            page.picture(x, y, side, side * ratio, found.neighbours[query, place, 0], BLUE if equal else None)
            text = f"{found.similarity[query, place]:.3f}" + (" same" if equal else "")
            page.text(x + side / 2, y + side * ratio + 0.03, text, va="top", ha="center", fontsize=8,
                      color=BLUE if equal else INK)  # fmt: skip
    if labelled:
        text = f'blue frame, "same": the query\'s own label{f" ({found.label})" if found.label else ""}'
        page.text(columns[1], MARGIN + above + count * step + 0.05, text, va="top", ha="left", fontsize=8, color=GREY)
    return page.figure


def _whole(clips: Clips) -> Row:
    return Row("clip" if clips.shape[1] > 1 else "image", clips)


def _seen(clips: Clips, visible: NDArray[np.bool_], teacher_visible: NDArray[np.bool_] | None) -> list[Row]:
    rows = [_whole(clips), Row("student sees", kept(clips, visible))]
    if teacher_visible is not None:
        rows.append(Row("teacher sees", kept(clips, teacher_visible)))
    return rows


def _short(text: str, inches: float) -> str:
    """Cut to what fits at 8 points."""
    most = max(4, int(inches / 0.075))
    head = (most - 1) // 3  # names of files differ at their ends
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - most + 1 + head :]}"


class _Page:
    """A white figure of the page's width; places are inches from its top left corner."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), facecolor="white")

    def _axes(self, x: float, y: float, width: float, height: float) -> Axes:
        place = (x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(place)

    def picture(
        self, x: float, y: float, width: float, height: float, picture: NDArray[Any], frame: str | None = None
    ) -> None:
        ax = self._axes(x, y, width, height)
        ax.imshow(picture, interpolation="nearest", aspect="auto")
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(frame is not None)
            side.set_color(frame or INK)
            side.set_linewidth(2.5)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **style)

    def bar(self, x: float, text: str, top: float) -> None:
        """The colours of :data:`HEAT` from 0 to ``top`` and beyond, at the bottom of the page."""
        ax = self._axes(x, self.height - MARGIN - 0.36, 2.6, 0.13)
        colours = THROUGH * 0.5 + (1 - THROUGH) * colormaps[HEAT](np.linspace(0, 1, 256))[:, :3]
        scale = ScalarMappable(Normalize(0, top), ListedColormap(colours))
        made = self.figure.colorbar(scale, cax=ax, orientation="horizontal", extend="max")
        made.set_ticks([0, 1, top] if top > 3 else [0, 1, 2, top])
        made.ax.tick_params(labelsize=8, length=2)
        made.outline.set_visible(False)
        self.text(x + 2.8, self.height - MARGIN - 0.295, text, va="center", ha="left", fontsize=8.5)
