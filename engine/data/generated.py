"""A generated, labelled set of JPEG files: eight texture families over the whole image, and one small shape on it.

It is made for watching a small network learn features in minutes. Two labels a file: the texture family (easy to
learn, hard to read from raw pixels) and the shape (hard, so there is headroom). Nothing else tells them: colours,
phase, frequency and tilt are random; every texture covers the same distribution of areas with its two colours, every
shape has the same area, so that the mean colour of an image carries no information about either label.

Every number of image ``i`` comes from one Philox stream keyed by (seed, split, i): image ``i`` is the same whatever the
order, the number of images, or the number of processes. Labels and parameters are exact; a pixel can differ by one
between builds of numpy, and a JPEG byte between builds of the encoder. So a set is known by its parameters
(``fingerprint.json``), never by the bytes of its files.
"""

from __future__ import annotations

import functools
import io
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cohobate.errors import UserError

Array = NDArray[np.float32]

TEXTURES = ("horizontal", "vertical", "diagonal", "checker", "dots", "rings", "zigzag", "blobs")
SHAPES = ("disc", "square", "triangle", "diamond", "plus", "ring", "star", "crescent")
LABEL_NAMES = ("texture", "shape")
SPLITS = ("train", "test")

_VERSION = 1  # part of the fingerprint: raise it when a change below changes an image
_QUALITY = 90
_CHUNK = 128  # files a task of the process pool


@dataclass(frozen=True)
class Variant:
    """Size of a generated set's images (pixels, square), and how many periods of the texture they show."""

    size: int
    periods: tuple[float, float]


VARIANTS = {"small": Variant(40, (4.0, 7.0)), "large": Variant(96, (5.0, 10.0))}


def make_images(
    folder: str | os.PathLike[str],
    *,
    train: int = 4096,
    test: int = 1024,
    variant: str = "small",
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Write the set into ``folder`` unless it is there already; return the folder.

    Files: ``train/000000.jpg ...``, ``test/...``, and for each split a list ``train.txt`` with a line
    ``train/000000.jpg TEXTURE SHAPE`` for each file. The folder appears at the end, whole: an interrupted run leaves
    nothing that looks like a set.

    Args:
        folder: new or empty, or an earlier result of the same parameters (then nothing is done).
        train, test: number of images of each split; any number, 100,000 are fine.
        variant: "small" (40 px, for crops of 32) or "large" (96 px).
        seed: 0 or more; another seed gives another set with the same distribution.
        processes: how many draw the images; the CPU cores of this process if not given. They change nothing else.

    Raises:
        UserError: a bad argument, or ``folder`` holds something else.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    counts = {"train": train, "test": test}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}: expected at least 1 image, got {count}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: expected 0 to 2^63 - 1, got {seed}")
    fingerprint = {"generator": _VERSION, "variant": variant, "seed": seed, "quality": _QUALITY, **counts}
    return write_set(
        Path(folder),
        fingerprint,
        counts,
        label_names=LABEL_NAMES,
        labels=labels_of,
        suffix=".jpg",
        encode=functools.partial(_encode, variant, seed),
        processes=processes,
    )


def labels_of(index: int) -> tuple[int, int]:
    """(texture, shape) of an image, positions in ``TEXTURES`` and ``SHAPES``."""
    return index % len(TEXTURES), index // len(TEXTURES) % len(SHAPES)


def draw(variant: str, split: str, index: int, seed: int = 0) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """One image before it is compressed, and its labels.

    Returns:
        uint8 [size, size, 3], and (texture, shape), positions in ``TEXTURES`` and ``SHAPES``.
    """
    kind = VARIANTS[variant]
    labels = labels_of(index)
    raw = np.random.Philox(
        key=np.array([seed, list(VARIANTS).index(variant)], dtype=np.uint64),
        counter=np.array([0, SPLITS.index(split), index, 0], dtype=np.uint64),
    )
    draws = uniforms(raw)
    chosen = colours(draws)
    mask = _texture(TEXTURES[labels[0]], kind, draws)
    ground, figure, mark = (colour[None, None] for colour in chosen)
    image = ground + mask[..., None] * (figure - ground)
    image *= 1 + 0.15 * _slope(kind.size, draws)[..., None]  # light from one side
    shape = _shape(SHAPES[labels[1]], kind.size, draws)
    image += shape[..., None] * (mark - image)
    noise = raw.random_raw(math.ceil(image.size / 8)).view(np.uint8)[: image.size].reshape(image.shape)
    image = image * 255 + (noise.astype(np.float32) - 127.5) * (16 / 127.5)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), labels


def _encode(variant: str, seed: int, split: str, index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(variant, split, index, seed)[0]).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


# -- files -------------------------------------------------------------------------------------------------------------


def write_set(
    folder: Path,
    fingerprint: dict[str, Any],
    counts: dict[str, int],
    *,
    label_names: tuple[str, ...],
    labels: Callable[[int], tuple[int, ...]],
    suffix: str,
    encode: Callable[[str, int], bytes],
    processes: int | None,
) -> Path:
    """Write ``encode(split, index)`` to a file for every index below a split's count, and the lists of their labels.

    The folder appears whole, at the end; it is left alone if it is there with the same fingerprint.
    """
    if holds(folder, fingerprint):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        chunks = []
        for split, count in counts.items():
            (aside / split).mkdir(parents=True)
            lines = [f"{name(split, i, suffix)} {' '.join(map(str, labels(i)))}\n" for i in range(count)]
            header = f"# labels: {' '.join(label_names)}\n"
            (aside / f"{split}.txt").write_text(header + "".join(lines), encoding="utf-8")
            chunks += [(split, begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK)]
        write = functools.partial(_write_chunk, aside, suffix, encode)
        processes = min(processes or available_cores(), len(chunks))
        if processes > 1 and "fork" in multiprocessing.get_all_start_methods():
            # Forked, because a spawned process would import the caller's main module again.
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
                list(pool.map(write, chunks))
        else:
            for chunk in chunks:
                write(chunk)
        (aside / "fingerprint.json").write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")
        try:
            aside.rename(folder)
        except OSError:  # somebody else finished first; theirs is as good if it is the same
            if not holds(folder, fingerprint):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write_chunk(folder: Path, suffix: str, encode: Callable[[str, int], bytes], chunk: tuple[str, int, int]) -> None:
    split, begin, end = chunk
    for index in range(begin, end):
        (folder / name(split, index, suffix)).write_bytes(encode(split, index))


def name(split: str, index: int, suffix: str) -> str:
    """Path of a file, relative to the set's folder."""
    return f"{split}/{index:06d}{suffix}"


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mark_folder(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Make a folder that holds what ``fingerprint`` says, or go on with it.

    Raises:
        UserError: it is something else.
    """
    if not holds(folder, fingerprint):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fingerprint.json").write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")


def holds(folder: Path, fingerprint: dict[str, Any]) -> bool:
    """True if the folder is this very set, False if it is new or empty.

    Raises:
        UserError: it is something else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"folder: expected a folder, got the file {folder}")
    file = folder / "fingerprint.json"
    if not file.is_file():
        if any(folder.iterdir()):
            raise UserError(f"folder: expected a new or empty folder or a generated set, got {folder} with other files")
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"folder: {file} is no fingerprint of a generated set") from None
    if found != fingerprint:
        raise UserError(f"folder: {folder} holds another generated set: {found}, asked for {fingerprint}")
    return True


# -- the picture -------------------------------------------------------------------------------------------------------


def uniforms(raw: np.random.Philox) -> Iterator[float]:
    """64 uniforms in [0, 1) from raw 64-bit words: numpy promises that these bits never change."""
    return iter(((raw.random_raw(64) >> np.uint64(11)) * 2.0**-53).tolist())


def between(draws: Iterator[float], low: float, high: float) -> float:
    return low + (high - low) * next(draws)


def colours(draws: Iterator[float]) -> tuple[Array, Array, Array]:
    """Ground, figure and shape colour, float32 [3] in 0..1: random, but never too close to be told apart."""

    def colour() -> Array:
        return np.array([between(draws, 0.05, 0.95) for _ in range(3)], dtype=np.float32)

    def apart(others: list[Array]) -> Array:
        # Of four candidates the one farthest from the nearest of the others: no loop of unknown length.
        return max((colour() for _ in range(4)), key=lambda c: min(float(np.abs(c - o).sum()) for o in others))

    ground = colour()
    figure = apart([ground])
    return ground, figure, apart([ground, figure])


@functools.lru_cache(maxsize=4)
def grid(size: int) -> tuple[Array, Array]:
    """Coordinates of pixel centres, -0.5 to 0.5, as a row and a column."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5).astype(np.float32)
    return axis[:, None], axis[None, :]


def _slope(size: int, draws: Iterator[float]) -> Array:
    y, x = grid(size)
    angle = between(draws, 0, 2 * math.pi)
    return math.sin(angle) * y + math.cos(angle) * x


def _texture(family: str, kind: Variant, draws: Iterator[float]) -> Array:
    """How much of the figure's colour each pixel has, float32 [size, size] in 0..1.

    The family's height field is cut at its own quantile, drawn from one distribution for all families: each covers the
    same share of the image.
    """
    y, x = grid(kind.size)
    tilt = between(draws, -0.21, 0.21)  # 12 degrees
    periods = math.exp(between(draws, math.log(kind.periods[0]), math.log(kind.periods[1])))
    phase, phase2 = between(draws, 0, 2 * math.pi), between(draws, 0, 2 * math.pi)
    share = between(draws, 0.3, 0.42)
    height = FIELDS[family](x, y, tilt, 2 * math.pi * periods, phase, phase2, draws)
    cut = int((1 - share) * height.size)
    level = np.partition(height.ravel(), cut)[cut]
    # The edge is about a pixel wide: a height's slope is about its deviation times the phase advance of a pixel.
    edge = 1.4 * float(height.std()) * 2 * math.pi * periods / kind.size
    return np.clip((height - level) / edge + 0.5, 0, 1)


def _rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y, c * y - s * x


def _horizontal(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    return np.cos(k * _rotate(x, y, tilt)[1] + p)


def _vertical(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    return np.cos(k * _rotate(x, y, tilt)[0] + p)


def _diagonal(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    quarter = math.copysign(math.pi / 4, next(draws) - 0.5)
    return np.cos(k * _rotate(x, y, quarter + tilt)[1] + p)


def _checker(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    u, v = _rotate(x, y, tilt)
    return np.cos(k / 2 * u + p) * np.cos(k / 2 * v + q)


def _dots(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    u, v = _rotate(x, y, tilt)
    return np.cos(k * u + p) + np.cos(k * v + q)


def _rings(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    cx, cy = between(draws, -0.3, 0.3), between(draws, -0.3, 0.3)
    return np.cos(k * np.hypot(x - cx, y - cy) + p)


def _zigzag(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    u, v = _rotate(x, y, tilt + (math.pi / 2 if next(draws) < 0.5 else 0.0))
    wave = np.arcsin(np.sin(0.5 * k * u + q))  # a triangle of slope one half, before the next factor
    return np.cos(k * v + 1.6 * wave + p)


def _blobs(x: Array, y: Array, tilt: float, k: float, p: float, q: float, draws: Iterator[float]) -> Array:
    # Twelve plane waves of one length in all directions: spots without order.
    total: Array = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.float32)
    for wave in range(12):
        angle = p + math.pi / 12 * (wave + next(draws))
        total += np.cos(0.8 * k * (math.cos(angle) * x + math.sin(angle) * y) + 2 * math.pi * next(draws))
    return total


FIELDS: dict[str, Callable[..., Array]] = {
    "horizontal": _horizontal,
    "vertical": _vertical,
    "diagonal": _diagonal,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "zigzag": _zigzag,
    "blobs": _blobs,
}


def _shape(kind: str, size: int, draws: Iterator[float]) -> Array:
    """Cover of the small shape, float32 [size, size] in 0..1: random place, size and turn of up to 15 degrees."""
    y, x = grid(size)
    radius = between(draws, 0.13, 0.18)  # of a disc with the same area, in image widths
    cy, cx = between(draws, -0.28, 0.28), between(draws, -0.28, 0.28)
    u, v = _rotate(x - cx, y - cy, between(draws, -0.26, 0.26))
    scale = radius * _unit(kind)
    inside = OUTLINES[kind](u / scale, v / scale)
    return np.clip(inside * scale * size + 0.5, 0, 1)


@functools.lru_cache(maxsize=len(SHAPES))
def _unit(kind: str) -> float:
    """Scale that gives a shape the area of the unit disc."""
    axis = np.linspace(-2, 2, 401, dtype=np.float32)
    area = float((OUTLINES[kind](axis[None, :], axis[:, None]) > 0).mean()) * 16
    return math.sqrt(math.pi / area)


def _star(x: Array, y: Array) -> Array:
    angle = np.arctan2(x, -y)
    return 1 + 0.42 * np.cos(5 * angle) - np.hypot(x, y)


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.minimum(half_width - np.abs(x), half_height - np.abs(y))


def _crescent(x: Array, y: Array) -> Array:
    return np.minimum(1 - np.hypot(x, y), np.hypot(x - np.float32(0.55), y) - 0.75)


# About the distance to the outline, positive inside.
OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "square": lambda x, y: _box(x, y, 1, 1),
    "triangle": lambda x, y: np.float32(0.6) - np.maximum(y, np.float32(0.866) * np.abs(x) - y / 2),
    "diamond": lambda x, y: np.float32(0.7071) * (1 - np.abs(x) - np.abs(y)),
    "plus": lambda x, y: np.maximum(_box(x, y, 1, 0.35), _box(x, y, 0.35, 1)),
    "ring": lambda x, y: np.float32(0.25) - np.abs(np.hypot(x, y) - np.float32(0.75)),
    "star": _star,
    "crescent": _crescent,
}
