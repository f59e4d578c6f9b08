"""Video files through PyAV (FFmpeg): what one holds, and exactly the frames that are asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohobate.data.decode import Pixels
from cohobate.data.decode import upright as undo
from cohobate.data.headers import MAX_PIXELS, BadImage, sniff
from cohobate.errors import UserError

_TURNS = {0: 1, 90: 8, 180: 3, 270: 6}  # degrees counter-clockwise that undo what the file says -> EXIF orientation
_PLAIN_FORMATS = ("yuv420p", "yuvj420p")


@dataclass(frozen=True)
class VideoHeader:
    """What a manifest keeps of a video.

    ``frames``: how many can be asked for. ``rate``: of them, frames/s. ``height``, ``width``: upright. ``codec``:
    FFmpeg's name. ``plain``: constant frame rate, upright, 8-bit 4:2:0: every decoder counts and shows its frames
    alike. ``size``: bytes of the file.
    """

    frames: int
    rate: float
    height: int
    width: int
    codec: str
    plain: bool
    size: int


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a file are shown, and which of them can be decoded without others.

    ``times``: int64 [n] ascending, in ticks. ``keys``: (shown, decoded) times of the key frames. ``tick``: seconds.
    ``stream``: its number in the file.
    """

    times: NDArray[np.int64]
    keys: list[tuple[int, int]]
    tick: Fraction
    stream: int

    def shown(self, wanted: Sequence[int]) -> list[int]:
        """Places in ``times`` of the frames ``wanted``; ascending, and some twice where the rate varies.

        Frames are counted as they are shown. Where their rate varies, frame k is the one on the screen at k / (n - 1)
        of the time from the first to the last of n: a fixed stride then means an even pace.
        """
        if _steady(self.times):
            return list(wanted)
        grid = self.times[0] + np.asarray(wanted) * ((self.times[-1] - self.times[0]) / (len(self.times) - 1))
        found = np.searchsorted(self.times, np.floor(grid + 0.5).astype(np.int64), side="right") - 1
        return [int(place) for place in found]


def library() -> Any:
    """The ``av`` package.

    Raises:
        UserError: not installed, or too old.
    """
    try:
        import av
    except ImportError:
        raise UserError(
            "video: expected PyAV for video files, but it is not installed (pip install 'av>=18')"
        ) from None
    if int(av.__version__.split(".")[0]) < 18:  # older ones have only FFmpeg's quick conversion to RGB
        raise UserError(f"video: expected PyAV 18 or later, got {av.__version__} (pip install 'av>=18')")
    return av


def probe(path: str, max_pixels: int = MAX_PIXELS) -> VideoHeader:
    """Read the times of all frames and decode the first.

    Raises:
        BadImage: no video can be had from the file.
    """
    size = _file_size(path)
    with _opened(path) as (av, container, stream):
        times, _ = _times(av, container, stream)
        steady = _steady(times)
        if stream.codec_context.height * stream.codec_context.width > max_pixels:
            raise BadImage("too_large")
        container.seek(0)
        first = next((frame for frame in _frames(av, container, stream) if frame.pts in (None, times[0])), None)
        if first is None:
            raise BadImage("corrupt")
        if first.pts is None:
            raise BadImage("unsupported")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
        span = float((times[-1] - times[0]) * stream.time_base) if stream.time_base is not None else 0.0
        rate = (len(times) - 1) / span if span > 0 else float(stream.average_rate or 0)
        plain = steady and first.rotation % 360 == 0 and first.format.name in _PLAIN_FORMATS
        return VideoHeader(len(times), rate, height, width, stream.codec_context.codec.canonical_name, plain, size)


def frame_times(path: str, length: int) -> FrameTimes:
    """What the packets of a file say of its frames; nothing is decoded.

    Raises:
        BadImage: it cannot be read, or does not have ``length`` frames.
    """
    with _opened(path) as (av, container, stream):
        return _listed(av, container, stream, length)


def read(path: str, wanted: Sequence[int], length: int, channels: int = 3) -> Iterator[Pixels]:
    """Upright frames uint8 [H, W, channels], in the order of ``wanted``, see :meth:`FrameTimes.shown`.

    Args:
        wanted: ascending, none twice, below ``length``. length: frames the file is expected to have.

    Raises:
        BadImage: it cannot be decoded, or does not have ``length`` frames.
    """
    kind = "rgb24" if channels == 3 else "gray"
    convert = _conversion()
    with _opened(path) as (av, container, stream):
        index = _listed(av, container, stream, length)
        shown = index.times[index.shown(wanted)].tolist()
        # From the last key frame before the first that is wanted; from the start where that was not its entry point.
        for start in (_key_before(index.keys, shown[0]), None):
            container.seek(int(index.times[0]) - (1 << 20) if start is None else start, stream=stream, backward=True)
            found = _pick(av, container, stream, shown)
            image = next(found, None)
            if image is not None:
                break
        if image is None:
            raise BadImage("corrupt")
        count = 0
        while image is not None:
            pixels = image.to_ndarray(format=kind, interpolation=convert, threads=1)
            pixels = pixels if channels == 3 else pixels[..., None]
            turn = _TURNS.get(int(image.rotation) % 360, 1)
            for _ in range(shown.count(image.pts)):
                count += 1
                yield pixels if turn == 1 else np.ascontiguousarray(undo(pixels, turn))
            image = next(found, None)
        if count != len(shown):
            raise BadImage("corrupt")


def _listed(av: Any, container: Any, stream: Any, length: int) -> FrameTimes:
    times, keys = _times(av, container, stream)
    if len(times) != length:
        raise BadImage("changed")
    return FrameTimes(times, keys, stream.time_base or Fraction(0), stream.index)


@functools.cache
def _conversion() -> int:
    """FFmpeg's exact conversion to RGB, as DALI does it: its quick one is a level too dark and leaves chroma coarse."""
    from av.video.reformatter import Interpolation

    return int(Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND)


def _pick(av: Any, container: Any, stream: Any, shown: Sequence[int]) -> Iterator[Any]:
    """Decoded frames whose times are in ``shown``; none at all if decoding starts behind the first."""
    times, last, first = set(shown), shown[-1], True
    for frame in _frames(av, container, stream):
        if frame.pts is None or (first and frame.pts > shown[0]):
            return
        first = False
        if frame.pts in times:
            if frame.is_corrupt:
                raise BadImage("corrupt")
            yield frame
        if frame.pts >= last:
            return


def _packets(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """Whole packets to the end of the file or to the damage, whichever comes first."""
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_corrupt:
                yield packet
    except av.error.FFmpegError:
        return  # what came before can be used


def _frames(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    try:
        for packet in _packets(av, container, stream):
            yield from packet.decode()
        yield from stream.codec_context.decode(None)
    except av.error.FFmpegError:
        raise BadImage("corrupt") from None


def _times(av: Any, container: Any, stream: Any) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """When frames are shown, ascending, in ticks; and (shown, decoded) times of the key frames. Nothing is decoded."""
    times: list[int] = []
    keys: list[tuple[int, int]] = []
    for packet in _packets(av, container, stream):
        shown = packet.dts if packet.pts is None else packet.pts
        if shown is None or packet.is_discard:
            continue
        if packet.is_keyframe:
            keys.append((shown, shown if packet.dts is None else packet.dts))
        if keys:
            times.append(shown)
    if not keys:
        raise BadImage("truncated")
    found = np.unique(np.array(times, dtype=np.int64))
    return found[found >= keys[0][0]], sorted(keys)  # what is shown before the first key frame cannot be decoded


def _steady(times: NDArray[np.int64]) -> bool:
    """Whether all frames are within half an interval of an even grid."""
    if len(times) < 3:
        return True
    even = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - even).max() <= max(0.5 * (times[-1] - times[0]) / (len(times) - 1), 1))


def _key_before(keys: Sequence[tuple[int, int]], time: int) -> int | None:
    before = [decoded for shown, decoded in keys if shown <= time]
    return before[-1] if before else None


class _opened:
    """The file, its first video stream, one thread: batches are made by several processes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any, Any]:
        av = library()
        try:
            self.container = av.open(self.path, metadata_errors="ignore")
        except FileNotFoundError:
            raise BadImage("missing") from None
        except (IsADirectoryError, PermissionError):
            raise BadImage("unreadable") from None
        except (av.error.FFmpegError, OSError, ValueError):
            raise BadImage(_why_not(self.path)) from None
        if self.container.format.name.endswith("_pipe") or self.container.format.name == "image2":  # an image file
            self.container.close()
            raise BadImage("no_video")
        covers = av.stream.Disposition.attached_pic
        streams = [found for found in self.container.streams.video if not found.disposition & covers]
        if not streams:
            self.container.close()
            raise BadImage("no_video")
        context = streams[0].codec_context
        # AVI does not say when a frame is shown; with B-frames that is not when it is read.
        if context is None or (self.container.format.name == "avi" and context.has_b_frames):
            self.container.close()
            raise BadImage("unsupported")
        context.thread_count = 1
        return av, self.container, streams[0]

    def __exit__(self, *_: object) -> None:
        self.container.close()


def _file_size(path: str) -> int:
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise BadImage("missing") from None
    except OSError:
        raise BadImage("unreadable") from None
    if not size:
        raise BadImage("empty")
    return size


def _why_not(path: str) -> str:
    """A reason for a file that FFmpeg does not open."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return "unreadable"
    if not head:
        return "empty"
    known = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") or head.startswith(
        (b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"\0\0\1\xba", b"OggS")
    )
    return "truncated" if known and sniff(head) is None else "unknown"
