"""Short clips to the bytes of a video file, for generated sets and for tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from cohobate.data.decode import Pixels
from cohobate.data.video.pyav import library
from cohobate.errors import UserError

# Container, encoder, options: a key frame every 16 frames, for whoever reads a clip from the middle.
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("mp4", "libx264", {"crf": "20", "g": "16", "preset": "medium"}),
    "vp9": ("webm", "libvpx-vp9", {"crf": "24", "b": "0", "g": "16", "deadline": "realtime", "cpu-used": "7"}),
    "mjpeg": ("avi", "mjpeg", {"qmin": "2", "qmax": "3"}),
}


def encode_clip(frames: Pixels, codec: str = "h264", *, rate: int = 30, **options: str) -> bytes:
    """A video file of uint8 [T, H, W, 3], H and W even, in 8-bit 4:2:0.

    Raises:
        UserError: an unknown codec, or PyAV is not installed.
    """
    if codec not in CODECS:
        raise UserError(f"codec: expected one of {', '.join(CODECS)}, got {codec!r}")
    av: Any = library()
    container, encoder, settings = CODECS[codec]
    buffer = io.BytesIO()
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as file:  # no random ids, no dates
        stream = file.add_stream(encoder, rate=rate, options=settings | options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1  # the same bytes every time; x264 now and then finds others
        for planes in _planes(frames, full_range=codec == "mjpeg"):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format=pixels)))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def _planes(frames: Pixels, full_range: bool) -> Pixels:
    """uint8 [T, 3 H / 2, W]: luma, then both chroma planes at half the size (ITU-R BT.601).

    FFmpeg's own conversion does not give the same bytes every time.
    """
    rgb = frames.astype(np.float32)
    y = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    blue, red = ((rgb[..., channel] - y) / (2 - 2 * weight) for channel, weight in ((2, 0.114), (0, 0.299)))
    count, height, width = y.shape
    halves = [
        chroma.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4)).reshape(count, height // 4, width)
        for chroma in (blue, red)
    ]
    if not full_range:
        y, halves = 16 + y * (219 / 255), [chroma * (224 / 255) for chroma in halves]
    stacked = np.concatenate([y, *(chroma + 128 for chroma in halves)], axis=1)
    return np.clip(np.rint(stacked), 0, 255).astype(np.uint8)
