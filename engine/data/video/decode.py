"""Frames of one video on the CPU, wherever they are: a container, a folder of images, a shard of JPEGs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cohobate.data.decode import Pixels, decode, read_file
from cohobate.data.headers import BadImage
from cohobate.data.video import pyav, torchcodec
from cohobate.data.video.manifest import SHARD, STILLS, VideoManifest, frame_names
from cohobate.data.video.shards import SEPARATOR, open_shard
from cohobate.errors import UserError

DECODERS = ("torchcodec", "pyav")  # of video files; the first that works here is taken


def why_not_decoder(name: str) -> str:
    """Why ``name`` (torchcodec, pyav) cannot read video files here; empty if it can."""
    try:
        pyav.library()
    except UserError as error:
        return str(error).removeprefix("video: ")  # torchcodec needs it too: it does not say when frames are shown
    return torchcodec.why_not() if name == "torchcodec" else ""


def video_decoder() -> str:
    """Which library decodes video files for the loader ``torch``: COHOBATE_VIDEO_DECODER, else the first that works.

    Raises:
        UserError: an unknown name, or one that cannot work here.
    """
    wanted = os.environ.get("COHOBATE_VIDEO_DECODER") or "auto"
    if wanted not in ("auto", *DECODERS):
        raise UserError(f"COHOBATE_VIDEO_DECODER: expected one of auto, {', '.join(DECODERS)}; got {wanted!r}")
    if wanted == "auto":
        return next((name for name in DECODERS if not why_not_decoder(name)), "pyav")
    reason = why_not_decoder(wanted)
    if reason:
        raise UserError(f"COHOBATE_VIDEO_DECODER: {wanted!r} cannot be used: {reason}")
    return wanted


def describe_decoder() -> str:
    """The decoder and its version, for what a run keeps about itself."""
    name = video_decoder()
    reason = why_not_decoder(name)
    if reason:
        return f"none: {reason}"
    return f"pyav {pyav.library().__version__}" if name == "pyav" else f"torchcodec {torchcodec.version()}"


def still_bytes(manifest: VideoManifest, video: int, wanted: Sequence[int]) -> list[bytes]:
    """Encoded images of the frames ``wanted`` of a frame folder or a shard's entry.

    Raises:
        BadImage: a frame cannot be read, or there are not as many of them any more.
    """
    path, length = manifest.paths[video], int(manifest.frames[video])
    if manifest.codec(video) == SHARD:
        name, _, entry = path.rpartition(SEPARATOR)
        shard = open_shard(name)
        if int(entry) >= len(shard) or shard.length(int(entry)) != length:
            raise BadImage("changed")
        return [shard.jpeg(int(entry), frame) for frame in wanted]
    names = frame_names(path)
    if len(names) != length:
        raise BadImage("changed")
    return [read_file(os.path.join(path, names[frame])) for frame in wanted]


def read_frames(
    manifest: VideoManifest, video: int, wanted: Sequence[int], channels: int = 3, decoder: str = "pyav"
) -> Iterator[Pixels]:
    """Upright frames uint8 [H, W, C] of a video, one after the other.

    Args:
        wanted: ascending frame numbers, none twice. decoder: of a file, one of :data:`DECODERS`; PyAV's colours are the
            exact ones, which DALI shows too.

    Raises:
        BadImage: it cannot be decoded, or is not the video it was.
    """
    size = (manifest.heights[video], manifest.widths[video])
    for frame in _frames(manifest, video, wanted, channels, decoder):
        if frame.shape[:2] != size:
            raise BadImage("changed")
        yield frame


def _frames(
    manifest: VideoManifest, video: int, wanted: Sequence[int], channels: int, decoder: str
) -> Iterator[Pixels]:
    path, length = manifest.paths[video], int(manifest.frames[video])
    if manifest.codec(video) in STILLS:
        orientation = int(manifest.orientations[video])
        return (decode(data, channels, orientation) for data in still_bytes(manifest, video, wanted))
    return (torchcodec if decoder == "torchcodec" else pyav).read(path, wanted, length, channels)


def render_clip(
    frames: Sequence[Pixels], box: tuple[int, int, int, int], flip: bool, size: tuple[int, int], interpolation: str
) -> Tensor:
    """:func:`cohobate.data.decode.render` of all frames alike: uint8 [T, height, width, C] of T x uint8 [H, W, C]."""
    top, left, height, width = box
    part = torch.from_numpy(np.stack([frame[top : top + height, left : left + width] for frame in frames]))
    if (height, width) != size:
        planes = part.permute(0, 3, 1, 2)  # channels-last, torch's fastest path
        planes = torch.nn.functional.interpolate(planes, size=size, mode=interpolation, antialias=True)
        part = planes.permute(0, 2, 3, 1)
    return part.flip(2) if flip else part
