"""Video files through torchcodec: PyAV says which frames there are and when, torchcodec decodes those asked for.

The frames are PyAV's to the bit, but their conversion to RGB is FFmpeg's quick one and cannot be changed: it leaves
4:2:0 colours in blocks of 2 x 2 and is a level darker. torchcodec brings no FFmpeg, it takes the system's.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cohobate.data.decode import Pixels
from cohobate.data.video import pyav

_OLDEST = (0, 13)  # what the tests have been run with


@functools.cache
def why_not() -> str:
    """Why torchcodec cannot decode here, in one line; empty if it can. It may import well and find no FFmpeg."""
    try:
        import torchcodec

        if tuple(int(part) for part in re.findall(r"\d+", torchcodec.__version__)[:2]) < _OLDEST:
            return f"torchcodec {torchcodec.__version__} is older than {'.'.join(map(str, _OLDEST))}"
        return _self_test()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # RuntimeError, OSError, ImportError, ...: whatever a broken install raises
        return _cause(str(error)) or f"torchcodec does not work ({type(error).__name__}: {str(error)[:120]})"


def version() -> str:
    """Of the package that works here."""
    import torchcodec

    return str(torchcodec.__version__)


def read(path: str, wanted: Sequence[int], length: int, channels: int = 3) -> Iterator[Pixels]:
    """As :func:`cohobate.data.video.pyav.read`, all frames at once.

    What torchcodec does not decode, or takes from another time than asked for (it does so in MPEG transport streams),
    PyAV reads instead, and grey frames too. What FFmpeg decoded but marked as damaged is not told apart, as PyAV does.

    Raises:
        BadImage: as PyAV's.
    """
    frames = _decoded(path, wanted, length) if channels == 3 else None
    yield from pyav.read(path, wanted, length, channels) if frames is None else frames


def _decoded(path: str, wanted: Sequence[int], length: int) -> Pixels | None:
    """uint8 [n, H, W, 3], or None if torchcodec does not give the very frames asked for."""
    index = pyav.frame_times(path, length)
    places = index.shown(wanted)
    try:
        decoder = _open(path, stream_index=index.stream, custom_frame_mappings=_mapping(index))
        found = decoder.get_frames_at(places)
    except (RuntimeError, ValueError, IndexError):  # what it raises for damage, unknown codecs, frames it misses
        return None
    asked = index.times[places] * float(index.tick)
    if np.abs(found.pts_seconds.numpy() - asked).max() > 0.5 * float(index.tick):
        return None
    pixels: Pixels = found.data.numpy()
    return pixels


def _open(source: str | bytes, **options: Any) -> Any:
    from torchcodec.decoders import VideoDecoder

    # One thread: batches are made by several processes.
    return VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu", **options)


def _mapping(index: pyav.FrameTimes) -> str:
    """The frames' times in torchcodec's words; with them it does not go through the file by itself."""
    keys = {shown for shown, _ in index.keys}
    times = index.times.tolist()
    ends = [*times[1:], times[-1] + 1]
    frames = [{"pts": a, "duration": b - a, "key_frame": int(a in keys)} for a, b in zip(times, ends)]
    return json.dumps({"frames": frames})


def _self_test() -> str:
    """Decode two of three flat grey frames of 16 x 16, limited range: 30 becomes 16 and 150 becomes 156."""
    frames = (b"FRAME\n" + bytes([luma]) * 256 + bytes([128]) * 512 for luma in (30, 90, 150))
    found = _open(b"YUV4MPEG2 W16 H16 F30:1 C444\n" + b"".join(frames)).get_frames_at([0, 2]).data.numpy()
    levels = found.reshape(2, -1)[:, 0].tolist() if found.shape == (2, 16, 16, 3) else []
    return "" if levels == [16, 156] else f"torchcodec decodes wrongly: expected levels [16, 156], got {levels}"


def _cause(message: str) -> str:
    """Which library is missing or wrong, out of the page that torchcodec writes about it."""
    lines = [line for line in re.findall(r"OSError: (.*)", message) if not line.startswith("Could not load this")]
    missing = [line.split(":")[0] for line in lines if "cannot open shared object file" in line]
    if len(missing) < len(lines):  # the libraries of an FFmpeg are there, so this is what is wrong with them
        found = next(line for line in lines if "cannot open shared object file" not in line)
        return f"torchcodec was built for another torch or FFmpeg (...{found[-100:]})"
    return f"torchcodec finds no FFmpeg library ({', '.join(dict.fromkeys(missing))})" if missing else ""
