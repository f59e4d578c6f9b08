"""Shards: videos as JPEG frames behind each other in a few large files, which decode several times faster than H.264.

One file ``NNNNN.frames``, all numbers little-endian:

    bytes 0..63   magic "COHOFRM1", then uint64: begin of the index, its length, its CRC-32; the rest is zero
    frames        whole JPEG files, one behind the other
    index         a NumPy .npz of
                    first    int64 [V + 1]   video v has the frames first[v] .. first[v + 1] - 1
                    begins   int64 [F + 1]   frame f is the bytes begins[f] .. begins[f + 1] - 1 of the file
                    sums     uint32 [F]      CRC-32 of each frame
                    sizes    int32 [V, 2]    height, width
                    rates    float32 [V]     frames/s
                    labels   int64 [V, K]
                    meta     uint8           JSON: names [V], label_names [K], class_names, left_out [[path, reason]]

The index is at the end, so a file that was cut off has none; it is written aside and renamed, so a run that was
interrupted leaves only whole files.
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohobate.data.headers import BadImage

SUFFIX = ".frames"
SEPARATOR = "#"  # a manifest's path of an entry is FILE#NUMBER
_MAGIC = b"COHOFRM1"
_HEADER = struct.Struct("<8sQQQ32x")
_ARRAYS = ("first", "begins", "sums", "sizes", "rates", "labels")


@dataclass
class Shard:
    """One open file: a memory map and its index."""

    data: NDArray[np.uint8]
    first: NDArray[np.int64]
    begins: NDArray[np.int64]
    sums: NDArray[np.uint32]
    sizes: NDArray[np.int32]
    rates: NDArray[np.float32]
    labels: NDArray[np.int64]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.first) - 1

    def length(self, video: int) -> int:
        """Frames of a video."""
        return int(self.first[video + 1] - self.first[video])

    def jpeg(self, video: int, frame: int) -> bytes:
        """The bytes of a frame.

        Raises:
            BadImage: "corrupt", they are not what was written.
        """
        place = int(self.first[video]) + frame
        found = self.data[int(self.begins[place]) : int(self.begins[place + 1])].tobytes()
        if zlib.crc32(found) != int(self.sums[place]):
            raise BadImage("corrupt")
        return found


@functools.lru_cache(maxsize=256)
def open_shard(path: str) -> Shard:
    """Map a shard; it stays mapped in this process.

    Raises:
        BadImage: "missing", "unreadable", "unknown" (no shard), "truncated", or "corrupt" (the index).
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise BadImage("missing") from None
    except ValueError:
        raise BadImage("empty") from None
    except OSError:
        raise BadImage("unreadable") from None
    if len(data) < _HEADER.size:
        raise BadImage("truncated")
    magic, begin, length, checksum = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise BadImage("unknown")
    if begin + length > len(data):
        raise BadImage("truncated")
    index = data[begin : begin + length].tobytes()
    if zlib.crc32(index) != checksum:
        raise BadImage("corrupt")
    try:
        with np.load(io.BytesIO(index), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            meta = json.loads(stored["meta"].tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise BadImage("corrupt") from None
    return Shard(data, **arrays, meta=meta)


@dataclass
class ShardWriter:
    """Writes one shard, video after video; :meth:`close` makes the file appear."""

    path: Path
    label_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.parent / f".{self.path.name}.{os.getpid()}.partial"
        self._file = open(self._aside, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(bytes(_HEADER.size))
        self._first, self._begins = [0], [_HEADER.size]
        self._sums: list[int] = []
        self._videos: list[tuple[str, int, int, float, list[int]]] = []

    def add(
        self,
        name: str,
        frames: Iterable[bytes],
        *,
        size: tuple[int, int],
        rate: float,
        labels: list[int],
    ) -> None:
        """Append a video of encoded frames; one whose frames end in :class:`BadImage` is left out, with its reason."""
        begins, sums = len(self._begins), len(self._sums)
        try:
            for frame in frames:
                self._file.write(frame)
                self._begins.append(self._begins[-1] + len(frame))
                self._sums.append(zlib.crc32(frame))
        except BadImage as error:
            del self._begins[begins:], self._sums[sums:]
            self._file.seek(self._begins[-1])
            self._file.truncate()
            self.left_out.append((name, error.reason))
            return
        self._first.append(len(self._sums))
        self._videos.append((name, *size, rate, labels))

    def close(self) -> int:
        """Write the index; the number of videos. Without one there is no file."""
        if not self._videos:
            self.discard()
            return 0
        meta = {
            "names": [video[0] for video in self._videos],
            "label_names": self.label_names,
            "class_names": self.class_names,
            "left_out": self.left_out,
        }
        index = io.BytesIO()
        np.savez(
            index,
            first=np.array(self._first, dtype=np.int64),
            begins=np.array(self._begins, dtype=np.int64),
            sums=np.array(self._sums, dtype=np.uint32),
            sizes=np.array([video[1:3] for video in self._videos], dtype=np.int32),
            rates=np.array([video[3] for video in self._videos], dtype=np.float32),
            labels=np.array([video[4] for video in self._videos], dtype=np.int64).reshape(len(self._videos), -1),
            meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        )
        body = index.getvalue()
        self._file.write(body)
        self._file.seek(0)
        self._file.write(_HEADER.pack(_MAGIC, self._begins[-1], len(body), zlib.crc32(body)))
        self._file.close()
        os.replace(self._aside, self.path)
        return len(self._videos)

    def discard(self) -> None:
        """Leave no file, unless it was closed."""
        self._file.close()
        self._aside.unlink(missing_ok=True)
