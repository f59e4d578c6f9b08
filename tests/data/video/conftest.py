"""Video files of every kind, made on the spot."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cohobate import data
from cohobate.data.video.encode import encode_clip
from cohobate.data.video.generated import draw_clip

try:
    import av
except ImportError:  # Python 3.10 has none new enough: what needs no video files is tested all the same
    collect_ignore = [f"test_{name}.py" for name in ("command", "files", "generated", "loader", "shards", "torchcodec")]

Pixels = NDArray[np.uint8]


def encoded(
    folder: Path,
    frames: Pixels,
    container: str = "mp4",
    encoder: str = "libx264",
    *,
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    turn: int | None = None,
    muxing: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """Bytes of a video. ``times``: when each frame is shown, in 1/600 s. ``turn``: how far it is to be rotated."""
    path = folder / "being.written"  # some options make FFmpeg open the file a second time
    with av.open(str(path), "w", format=container, options=muxing or {}) as file:
        stream = file.add_stream(encoder, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        if turn is not None:
            stream.set_display_rotation(turn)
        for index, pixels_ in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    body = path.read_bytes()
    path.unlink()
    return body


def sound() -> bytes:
    """An MP4 with nothing but a moment of silence."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def exact_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of PyAV, which DALI's and Pillow's are compared with, whatever else is installed."""
    monkeypatch.setenv("COHOBATE_VIDEO_DECODER", "pyav")


@pytest.fixture(scope="session")
def clip() -> Pixels:
    """32 frames of 64 x 64 that all differ."""
    return draw_clip("train", 7)[0]


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    folder = tmp_path_factory.mktemp("encoding")

    def make(frames: Pixels, container: str = "mp4", encoder: str = "libx264", **options: Any) -> bytes:
        return encoded(folder, frames, container, encoder, **options)

    return make


@pytest.fixture(scope="session")
def videos(clip: Pixels, make_video: Callable[..., bytes]) -> dict[str, tuple[bytes, int]]:
    """Files that must be read, and how many frames they have."""
    vp9, mjpeg = (encode_clip(clip, codec) for codec in ("vp9", "mjpeg"))
    fast = make_video(clip, g="8", muxing={"movflags": "+faststart"})
    uneven = [index * 10 if index < 16 else 160 + (index - 16) * 40 for index in range(32)]
    return {
        "h264.mp4": (encode_clip(clip), 32),
        "vp9.webm": (vp9, 32),
        "mjpeg.avi": (mjpeg, 32),
        "no_extension": (encode_clip(clip), 32),
        "mp4_called.avi": (encode_clip(clip), 32),
        "webm_called.mp4": (vp9, 32),
        "open_gop.mkv": (make_video(clip, "matroska", bf="3", g="12", **{"x264-params": "open-gop=1"}), 32),
        "stream.ts": (make_video(clip, "mpegts", g="8"), 32),
        "mpeg4.avi": (make_video(clip, "avi", "mpeg4"), 32),
        "ten_bits.mp4": (make_video(clip, pixels="yuv420p10le"), 32),
        "full_colour.mp4": (make_video(clip, pixels="yuv444p"), 32),
        "uneven.mp4": (make_video(clip, times=uneven), 32),
        "uneven.mkv": (make_video(clip, "matroska", times=uneven), 32),
        "turned.mp4": (make_video(clip[:, :48], turn=90), 32),
        "one_frame.mp4": (make_video(clip[:1]), 1),
        "truncated.webm": (vp9[: len(vp9) // 2], 0),
        "truncated.avi": (mjpeg[: len(mjpeg) // 2], 0),
        "truncated_faststart.mp4": (fast[: len(fast) * 2 // 3], 0),
    }


@pytest.fixture(scope="session")
def no_videos(clip: Pixels, make_video: Callable[..., bytes], encode: Callable[..., bytes]) -> dict[str, Any]:
    """Files that must be left out, and the reason they must be left out for."""
    good = encode_clip(clip)
    return {
        "zero.mp4": (b"", "empty"),
        "page.mp4": (b"<html><body>404 Not Found</body></html>", "unknown"),
        "noise.mp4": (np.random.default_rng(3).bytes(4000), "unknown"),
        "notes": (b"some words about the videos\n" * 40, "unknown"),
        "no_index.mp4": (good[: len(good) // 2], "truncated"),
        "start_only.mp4": (good[:40], "truncated"),
        "sound.mp4": (sound(), "no_video"),
        "photo.mp4": (encode(clip[0]), "no_video"),
        "b_frames.avi": (make_video(clip, "avi", bf="2", g="8"), "unsupported"),
    }


@pytest.fixture(scope="session")
def small_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated sets ``vp9``, ``mjpeg`` and ``h264``, of 24 + 8 clips each."""
    root = tmp_path_factory.mktemp("generated-videos")
    for codec in ("vp9", "mjpeg", "h264"):
        data.make_videos(root / codec, train=24, test=8, codec=codec, processes=1)
    return root
