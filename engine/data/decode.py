"""Files to pixels on the CPU: the one decoder whose answer is right, whatever the format; the others must agree."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cohobate.data.headers import BadImage, sniff

try:
    import simplejpeg
except ImportError:  # an optional dependency, half of Pillow's time for a JPEG
    simplejpeg = None

Pixels = NDArray[np.uint8]


def read_file(path: str) -> bytes:
    """All bytes of a file.

    Raises:
        BadImage: missing, unreadable, empty.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except FileNotFoundError:
        raise BadImage("missing") from None
    except OSError:
        raise BadImage("unreadable") from None
    if not data:
        raise BadImage("empty")
    return data


def decode(data: bytes, channels: int = 3, orientation: int = 1) -> Pixels:
    """An image as uint8 [H, W, channels], upright.

    16-bit values are divided by 257 and rounded (65535 is 255); transparency is dropped; a palette is looked up; CMYK
    is converted. One channel is the luma of ITU-R BT.601.

    Args:
        data: all bytes of a file. channels: 3 (RGB) or 1. orientation: EXIF orientation, 1 to 8, to undo.

    Raises:
        BadImage: "unknown", "truncated", "corrupt", "too_large" or "unsupported".
    """
    image = None
    if simplejpeg is not None and data.startswith(b"\xff\xd8\xff") and _three_or_one(data):
        try:
            image = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        except ValueError:
            image = None  # also for mere warnings, so Pillow decides
    if image is None:
        image = _decode_pillow(data, channels)
    return image if orientation == 1 else np.ascontiguousarray(upright(image, orientation))


def encode_jpeg(image: Pixels, quality: int) -> bytes:
    """A baseline JPEG, 4:2:0, of uint8 [H, W, 3]."""
    if simplejpeg is not None:
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420"))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _three_or_one(data: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray")
    except ValueError:
        return False


def _decode_pillow(data: bytes, channels: int) -> Pixels:
    mode = "RGB" if channels == 3 else "L"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith("I"):
                    return _sixteen_bits(np.asarray(image), channels)
                if image.mode in ("F", "LAB", "HSV"):
                    raise BadImage("unsupported")
                if image.mode == "P" and "transparency" in image.info:
                    del image.info["transparency"]  # dropped like any other transparency
                pixels = np.array(image.convert(mode))  # a copy: what Pillow shares is read-only
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("too_large") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise BadImage(_reason(data, str(error))) from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _reason(data: bytes, message: str) -> str:
    kind = sniff(data)
    if kind is None:
        return "unknown"
    endless = kind == "jpeg" and b"\xff\xd9" not in data
    return "truncated" if endless or "truncated" in message.lower() else "corrupt"


def _sixteen_bits(values: NDArray[np.generic], channels: int) -> Pixels:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise BadImage("unsupported")
    grey = ((wide + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], channels, axis=2)


def upright(image: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: a view of uint8 [H, W, C]."""
    if orientation >= 5:  # first the transposition, then the mirrors
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def render(
    image: Pixels, box: tuple[int, int, int, int], flip: bool, size: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """Cut a box out, then resize it (antialiased, as torchvision's ``resized_crop``), then mirror it.

    Args:
        image: uint8 [H, W, C]. box: top, left, height, width. size: (height, width) of the result.
        interpolation: "bilinear" or "bicubic" (Keys' kernel with a = -0.5).

    Returns:
        uint8 [height, width, C].
    """
    top, left, height, width = box
    # Contiguous [H, W, C] seen as channels-last [C, H, W]: torch's fastest path, and the result has the same layout.
    part = torch.from_numpy(np.ascontiguousarray(image[top : top + height, left : left + width]))
    if (height, width) != size:
        planes = part.permute(2, 0, 1).unsqueeze(0)
        planes = torch.nn.functional.interpolate(planes, size=size, mode=interpolation, antialias=True)
        part = planes[0].permute(1, 2, 0)
    return part.flip(1) if flip else part
