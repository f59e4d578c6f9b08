"""Which videos a data set has: containers, folders of frames, or shards of JPEG frames."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cohobate.data.headers import MAX_PIXELS, BadImage
from cohobate.data.manifest import EXTENSIONS, Inspected, Manifest, Paths, files_below, find, inspect_all, inspect_image
from cohobate.data.video import pyav
from cohobate.data.video.shards import SEPARATOR, SUFFIX, open_shard
from cohobate.errors import UserError

VIDEO_EXTENSIONS = frozenset(
    ("mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "m2ts", "flv", "wmv", "3gp", "ogv", "mts", "vob")
)
FRAME_FOLDER, SHARD = "frames", "shard"  # beside the names of codecs
STILLS = (FRAME_FOLDER, SHARD)  # an image file a frame


@dataclass(frozen=True)
class VideoManifest(Manifest):
    """The usable videos of a data set, in a fixed order.

    A path is a file, a folder of frames, or ``SHARD#ENTRY``. ``plain_jpeg`` is about the frames of the last two.

    Attributes:
        frames: int32 [N], frames that can be asked for. rates: float32 [N], frames/s, 0 where nobody knows.
        codecs: uint8 [N], places in ``codec_names``: FFmpeg's names, and "frames" and "shard".
        sizes: int64 [N], bytes of the file, 0 for frames and shards.
        plain_video: bool [N], files that every decoder counts and shows alike: constant frame rate, upright, 8 bits,
            4:2:0.
    """

    UNIT: ClassVar[str] = "video"
    ARRAYS: ClassVar[dict[str, Any]] = Manifest.ARRAYS | {
        "frames": np.int32,
        "rates": np.float32,
        "codecs": np.uint8,
        "sizes": np.int64,
        "plain_video": np.bool_,
    }
    HASHED: ClassVar[tuple[str, ...]] = (*Manifest.HASHED, "frames")
    TEXTS: ClassVar[tuple[str, ...]] = (*Manifest.TEXTS, "codec_names")

    frames: NDArray[np.int32] = field(kw_only=True)
    rates: NDArray[np.float32] = field(kw_only=True)
    codecs: NDArray[np.uint8] = field(kw_only=True)
    sizes: NDArray[np.int64] = field(kw_only=True)
    plain_video: NDArray[np.bool_] = field(kw_only=True)
    codec_names: tuple[str, ...] = field(kw_only=True)

    def codec(self, video: int) -> str:
        """Name of a video's codec, "frames" or "shard"."""
        return self.codec_names[int(self.codecs[video])]

    @property
    def stills(self) -> bool:
        """Whether all videos are stored as an image file a frame."""
        return all(self.codec_names[place] in STILLS for place in np.unique(self.codecs))

    @classmethod
    def columns(cls, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Arrays of what was found in each video."""
        names = sorted({row["codecs"] for row in rows})
        return super().columns([{**row, "codecs": names.index(row["codecs"])} for row in rows]) | {
            "codec_names": tuple(names)
        }

    def details(self) -> list[str]:
        """Lines of :func:`cohobate.data.describe`."""
        low, middle, high = (int(value) for value in np.quantile(self.frames, (0, 0.5, 1)))
        lines = [f"frames      {low} to {high} (median {middle})"]
        known = self.rates[self.rates > 0]
        if len(known):
            lines.append(f"frames/s    {known.min():.4g} to {known.max():.4g}")
        for place, name in enumerate(self.codec_names):
            lines.append(f"stored as   {name}: {int((self.codecs == place).sum())}")
        return lines


def build_video_manifest(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    verify: bool = False,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
) -> VideoManifest:
    """Find the videos of a data set; read the times of their frames and decode the first of each.

    ``source`` is a folder, flat or nested, of video files and folders of frames (a folder with images in it is a
    video); a text file with lines ``path [label ...]``; or a folder of shards, or one shard. Labels as in
    :func:`cohobate.data.build_manifest`, where a video is ``CLASS/FILE`` or ``CLASS/FOLDER``. ``verify=True`` decodes
    every frame. The other arguments, too, are as there; ``max_pixels`` is of a frame.

    Raises:
        UserError: nothing there, no usable video in it, or video files without PyAV.
    """
    found = find(source, split, _walk, "video")
    shards = [name for name in found.names if name.endswith(SUFFIX)]
    if shards:
        if len(shards) < len(found.names):
            raise UserError(f"source: expected only shards or only videos, got {len(shards)} shards among others")
        return _of_shards(found.root, shards, verify)
    return inspect_all(
        found,
        VideoManifest,
        lambda name: _inspect(os.path.join(found.root, name), verify, max_pixels),
        cache=cache,
        asked=f"video {verify} {max_pixels}",
        threads=threads or min(8, os.cpu_count() or 1),
    )


def frame_names(folder: str) -> list[str]:
    """Image files of a folder, by the last number in their names: ``img_2.jpg`` comes before ``img_10.jpg``.

    Raises:
        BadImage: "missing", "unreadable", or "no_frames".
    """
    try:
        found = os.listdir(folder)
    except FileNotFoundError:
        raise BadImage("missing") from None
    except OSError:
        raise BadImage("unreadable") from None
    names = [name for name in found if _is_image(name)]
    if not names:
        raise BadImage("no_frames")
    return sorted(names, key=_number)


def _number(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", os.path.splitext(name)[0])
    return int(digits[-1]) if digits else -1, name


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1][1:].lower() in EXTENSIONS


def _walk(root: Path) -> tuple[list[str], int]:
    """Relative paths of video files, folders with images, and shards, sorted; and how many other files there are."""
    names: set[str] = set()
    ignored = 0
    for inside, file in files_below(root):
        extension = os.path.splitext(file)[1][1:].lower()
        if not extension or extension in VIDEO_EXTENSIONS or file.endswith(SUFFIX):
            names.add(os.path.join(inside, file))
        elif inside and extension in EXTENSIONS:
            names.add(inside)
        else:
            ignored += 1
    return sorted(names), ignored


def _inspect(path: str, verify: bool, max_pixels: int) -> Inspected:
    """A manifest's numbers for a usable video, or the reason why it is not."""
    try:
        if os.path.isdir(path):
            return _inspect_folder(path, verify, max_pixels)
        header = pyav.probe(path, max_pixels)
        if verify:
            for _ in pyav.read(path, range(header.frames), header.frames):
                pass
    except BadImage as error:
        return error.reason
    return {
        "heights": header.height,
        "widths": header.width,
        "orientations": 1,
        "plain_jpeg": False,
        "frames": header.frames,
        "rates": header.rate,
        "codecs": header.codec,
        "sizes": header.size,
        "plain_video": header.plain,
    }


def _inspect_folder(path: str, verify: bool, max_pixels: int) -> Inspected:
    names = frame_names(path)
    first = inspect_image(path, names[0], verify, max_pixels)
    if isinstance(first, str):
        return first
    for name in names[1:] if verify else ():
        other = inspect_image(path, name, True, max_pixels)
        if other != first:
            return other if isinstance(other, str) else "changed"
    return {**first, "frames": len(names), "rates": 0.0, "codecs": FRAME_FOLDER, "sizes": 0, "plain_video": False}


def _of_shards(root: Path, names: Sequence[str], verify: bool) -> VideoManifest:
    paths: list[str] = []
    quarantine: list[tuple[str, str]] = []
    parts: list[list[NDArray[Any]]] = [[], [], [], []]  # sizes, frames, rates, labels
    kinds: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    for name in names:
        path = os.path.join(root, name)
        try:
            shard = open_shard(path)
        except BadImage as error:
            quarantine.append((path, error.reason))
            continue
        quarantine += [(str(where), str(reason)) for where, reason in shard.meta["left_out"]]
        good = []
        for video in range(len(shard)):
            try:
                for frame in range(shard.length(video)) if verify else ():
                    shard.jpeg(video, frame)
                good.append(video)
            except BadImage as error:
                quarantine.append((f"{path}{SEPARATOR}{video}", error.reason))
        paths += [f"{name}{SEPARATOR}{video}" for video in good]
        columns: list[NDArray[Any]] = [shard.sizes, np.diff(shard.first), shard.rates, shard.labels]
        for part, column in zip(parts, columns):
            part.append(column[good])
        kinds.add((tuple(shard.meta["label_names"]), tuple(shard.meta["class_names"])))
    if not paths:
        raise UserError(f"source: no usable shard in {root} (first: {quarantine[0][0]}: {quarantine[0][1]})")
    if len(kinds) > 1:
        raise UserError(f"source: expected shards of one data set in {root}, but their kinds of label differ")
    sizes, frames, rates, labels = (np.concatenate(part) for part in parts)
    (label_names, class_names), count = kinds.pop(), len(paths)
    return VideoManifest(
        Paths(str(root), paths),
        sizes[:, 0].astype(np.int32),
        sizes[:, 1].astype(np.int32),
        np.ones(count, dtype=np.uint8),
        np.ones(count, dtype=bool),
        labels.astype(np.int64) if label_names else None,
        label_names,
        class_names,
        tuple(quarantine),
        frames=frames.astype(np.int32),
        rates=rates.astype(np.float32),
        codecs=np.zeros(count, dtype=np.uint8),
        sizes=np.zeros(count, dtype=np.int64),
        plain_video=np.zeros(count, dtype=bool),
        codec_names=(SHARD,),
    )
