"""What the first bytes of an image file say: format, size, orientation; and whether its end is there."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

from PIL import Image

REASONS = {
    "missing": "no such file",
    "unreadable": "the file cannot be opened or read",
    "empty": "the file has no bytes",
    "unknown": "the bytes are of no image or video format known here",
    "truncated": "the end of the file is missing",
    "corrupt": "the bytes cannot be decoded",
    "too_large": "more pixels than max_pixels",
    "no_video": "no moving pictures: an image, or only sound",
    "no_frames": "a folder without images",
    "unsupported": "a pixel format with no meaning as colour (float, CIELAB, ...), or a video without times or decoder",
    "changed": "the size is not what it was when the manifest was made",
}
MAX_PIXELS = 89_478_485  # Pillow's own threshold for decompression bombs: 1 GB of 24-bit RGB / 4 / 3
TAIL = 64  # bytes at the end in which a whole JPEG or PNG has its end marker; writers pad, but not much


class BadImage(Exception):
    """An image or video that cannot be used; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """Size as stored (before the EXIF orientation is applied), and how the file may be decoded.

    ``plain_jpeg``: an 8-bit baseline or progressive JPEG in grey or YCbCr, which every decoder reads alike.
    ``complete``: the end is where it should be; if not, only decoding can tell.
    """

    height: int
    width: int
    orientation: int
    plain_jpeg: bool
    complete: bool

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) as displayed."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def sniff(head: bytes) -> str | None:
    """Name of the format that the first bytes belong to, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    for name, magics in _MAGICS.items():
        if head.startswith(magics):
            return name
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"mif1"):
        return "avif"
    return None


_MAGICS: dict[str, tuple[bytes, ...]] = {
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
    "tiff": (b"II*\0", b"MM\0*"),
    "ppm": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
    "jp2": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
}


def read_header(data: bytes, tail: bytes, size: int) -> Header:
    """Header of an image of ``size`` bytes.

    Args:
        data: the first bytes, or all of them; ``tail``: the last ``TAIL`` bytes at least.

    Raises:
        BadImage: no image format, a header that cannot be read, or an end that is certainly missing.
        NeedMore: ``data`` is only the beginning, and what is asked for lies behind it.
    """
    kind = sniff(data)
    if kind is None:
        raise BadImage("unknown" if size else "empty")
    if kind == "jpeg":
        return _jpeg(data, tail, partial=len(data) < size)
    if len(data) < size:
        raise NeedMore
    return _other(kind, data, tail, size)


def is_plain_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Whether a whole file is a JPEG that every decoder reads alike, of this (height, width)."""
    try:
        header = read_header(data, data[-TAIL:], len(data))
    except BadImage:
        return False  # the plain decoder says what is wrong, the same whoever asks
    return header.plain_jpeg and header.complete and header.upright == size


class NeedMore(Exception):
    """The header goes on behind the bytes given."""


def _jpeg(data: bytes, tail: bytes, partial: bool) -> Header:
    """Walk the segments up to the frame header (ISO/IEC 10918-1, annex B)."""
    orientation, adobe_transform, at = 1, None, 2
    while True:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if at + 4 > len(data):
            break
        if data[at] != 0xFF:
            raise BadImage("corrupt")
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xD9 or length < 2:
            raise BadImage("corrupt")
        body = data[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(body) < 6:
                break
            height, width, components = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
            if not width:
                raise BadImage("corrupt")
            rgb = adobe_transform == 0 and components == 3
            plain = marker <= 0xC2 and body[0] == 8 and components in (1, 3) and not rgb and height > 0
            return Header(height, width, orientation, plain, b"\xff\xd9" in tail)
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe_transform = body[11]
        at += 2 + length
    if partial:
        raise NeedMore
    raise BadImage("truncated")


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory (Exif 2.3); 1, upright, where there is none that makes sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    directory = struct.unpack_from(order + "I", tiff, 4)[0]
    if directory + 2 > len(tiff):
        return 1
    for entry in range(struct.unpack_from(order + "H", tiff, directory)[0]):
        at = directory + 2 + 12 * entry
        if at + 12 > len(tiff):
            break
        tag, kind = struct.unpack_from(order + "HH", tiff, at)
        if tag == 0x0112 and kind == 3:
            value: int = struct.unpack_from(order + "H", tiff, at + 8)[0]
            return value if 1 <= value <= 8 else 1
    return 1


def _other(kind: str, data: bytes, tail: bytes, size: int) -> Header:
    complete = None
    if kind == "png":
        complete = b"IEND" in tail
    elif kind == "webp":
        complete = size >= int.from_bytes(data[4:8], "little") + 8
    if complete is False:
        raise BadImage("truncated")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb: the size is checked by the caller; of odd EXIF: it is ignored
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                orientation = image.getexif().get(0x0112, 1)
    except Image.DecompressionBombError:
        raise BadImage("too_large") from None
    except Exception:  # a broken header makes Pillow's parsers raise nearly anything
        raise BadImage("corrupt") from None
    return Header(height, width, orientation if orientation in range(1, 9) else 1, False, bool(complete))
