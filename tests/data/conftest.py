"""Image files of every kind, made on the spot: good ones, odd ones, broken ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cohobate import data

Pixels = NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """A smooth random picture with some grain: like a photograph to a codec."""
    rng = np.random.default_rng([seed, height, width])
    total: NDArray[np.float32] = np.zeros((height, width, 3), dtype=np.float32)
    for cells, share in ((3, 0.6), (12, 0.4)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) * share
    return np.clip(total + rng.normal(0, 3, total.shape), 0, 255).astype(np.uint8)


def encoded(image: Any, kind: str = "JPEG", **options: Any) -> bytes:
    """Bytes of an image file; ``image`` is a Pillow image or an array."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        options.setdefault("quality", 90)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(image: Pixels, orientation: int) -> bytes:
    """A JPEG with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif)


def good_files() -> dict[str, bytes]:
    """Files that must decode to three channels."""
    base = picture(48, 64)
    pillow = Image.fromarray(base)
    grey16 = (np.asarray(pillow.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    rgba = pillow.copy()
    rgba.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))))
    palette = pillow.quantize(32)
    files = {
        "baseline.jpg": encoded(base),
        "progressive.jpg": encoded(base, progressive=True),
        "full_colour.jpg": encoded(base, subsampling=0),
        "grey.jpg": encoded(pillow.convert("L")),
        "cmyk.jpg": encoded(pillow.convert("CMYK")),
        "rgb_in_jpeg.jpg": encoded(pillow, keep_rgb=True),
        "long_name.jpeg": encoded(base),
        "upper.JPG": encoded(base),
        "no_extension": encoded(base),
        "with_tail.jpg": encoded(base) + b"\0" * 16,
        "with_long_tail.jpg": encoded(base) + b"maker notes" * 40,
        "big_exif.jpg": encoded(base, exif=_big_exif()),
        "rgb.png": encoded(base, "PNG"),
        "grey.png": encoded(pillow.convert("L"), "PNG"),
        "alpha.png": encoded(rgba, "PNG"),
        "grey_alpha.png": encoded(rgba.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette_transparent.png": encoded(palette, "PNG", transparency=3),
        "bits.png": encoded(pillow.convert("1"), "PNG"),
        "grey16.png": encoded(Image.fromarray(grey16), "PNG"),
        "grey16.tif": encoded(Image.fromarray(grey16), "TIFF"),
        "rgb16.png": png16(base),
        "photo.webp": encoded(base, "WEBP", quality=95),
        "photo.bmp": encoded(base, "BMP"),
        "photo.gif": encoded(base, "GIF"),
        "photo.ppm": encoded(base, "PPM"),
        "tiny.jpg": encoded(picture(1, 1)),
        "thin.jpg": encoded(picture(5, 300)),
    }
    files |= {f"turned{turn}.jpg": oriented(base, turn) for turn in range(1, 9)}
    return files


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that must be left out, and the reason they must be left out for."""
    good = encoded(picture(48, 64))
    png = encoded(picture(48, 64), "PNG")
    return {
        "zero.jpg": (b"", "empty"),
        "page.jpg": (b"<html><body>404 Not Found</body></html>", "unknown"),
        "noise.png": (np.random.default_rng(3).bytes(500), "unknown"),
        "start_only.jpg": (b"\xff\xd8\xff", "truncated"),
        "header_only.jpg": (good[:180], "truncated"),
        "half.jpg": (good[: len(good) // 2], "truncated"),
        "last_bytes_lost.jpg": (good[:-200], "truncated"),
        "end_lost.jpg": (good[:-2], "truncated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "float.tif": (encoded(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), "unsupported"),
        "bomb.png": (_bomb(), "too_large"),
    }


def png16(image: Pixels) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    import struct
    import zlib

    height, width, _ = image.shape
    wide = (image.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bomb() -> bytes:
    """A PNG of a few bytes that says it has 400 million pixels."""
    png = bytearray(encoded(np.zeros((2, 2, 3), dtype=np.uint8), "PNG"))
    png[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    return bytes(png)


def _big_exif() -> bytes:
    """EXIF of more than the 64 KB that are read first, in two segments at least."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 65000
    return exif.tobytes()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write({"name": bytes}, "folder")`` -> the folder."""

    def writer(files: dict[str, bytes], folder: str = "images") -> Path:
        root = tmp_path / folder
        root.mkdir(parents=True, exist_ok=True)
        for name, body in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(body)
        return root

    return writer


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated set of 96 + 40 images."""
    return data.make_images(tmp_path_factory.mktemp("generated") / "set", train=96, test=40, processes=1)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Pixels]:
    return picture


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture(scope="session")
def good() -> dict[str, bytes]:
    return good_files()


@pytest.fixture(scope="session")
def bad() -> dict[str, tuple[bytes, str]]:
    return bad_files()
