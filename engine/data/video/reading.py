"""Carrying out a clip plan on the CPU: a video is decoded once, then cut into its views."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cohobate.data.decode import read_file
from cohobate.data.headers import is_plain_jpeg
from cohobate.data.reading import Reader, Task
from cohobate.data.video.decode import read_frames, render_clip, still_bytes, video_decoder
from cohobate.data.video.manifest import VideoManifest
from cohobate.data.video.plan import ClipPlan

# FFmpeg's names of what DALI 2.4 decodes: NVDEC on Hopper has no AV1, and the wheel little else on a CPU.
DALI_CPU = ("vp8", "vp9", "mjpeg")
DALI_GPU = (*DALI_CPU, "h264", "hevc", "mpeg4")


@dataclass(frozen=True)
class ClipReader(Reader):
    """A :class:`Reader` of clips."""

    manifest: VideoManifest
    plan: ClipPlan

    def __post_init__(self) -> None:
        if not self.manifest.stills:
            video_decoder()  # one that cannot be used is refused here, not in a worker

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, T, H, W, C] of a batch."""
        return (self.batch_size, self.plan.frames, *self.plan.size, self.channels)

    def task_at(self, epoch: int, places: NDArray[np.int64], valid: NDArray[np.bool_]) -> Task:
        """The videos at these places of an epoch, their frames and crops."""
        task = super().task_at(epoch, places, valid)
        lengths = self.manifest.frames[task.files].astype(np.int64)
        return dataclasses.replace(task, frames=self.plan.clip_frames(epoch, task.files, lengths))

    def render(self, task: Task, row: int, data: bytes | None = None) -> Tensor:
        """A video's finished samples, uint8 [views, T, height, width, C].

        Raises:
            BadImage: it cannot be read, or is not the video it was.
        """
        return self._render(task, row, "pyav" if self.manifest.stills else video_decoder())

    def _render(self, task: Task, row: int, decoder: str) -> Tensor:
        assert task.frames is not None
        plan, video = self.plan, int(task.files[row])
        wanted, where = np.unique(task.frames[row], return_inverse=True)
        where = where.reshape(task.frames[row].shape)  # of clip frame [clips, T] among those decoded
        decoded = list(read_frames(self.manifest, video, wanted.tolist(), self.channels, decoder))
        samples = []
        for view in range(plan.views):
            clip = [decoded[place] for place in where[view // plan.crops_per_clip]]
            flip = bool(task.flips[row, view])
            samples.append(render_clip(clip, task.box(row, view), flip, plan.size, plan.interpolation))
        return torch.stack(samples)

    @property
    def items(self) -> int:
        """Pieces DALI gets: a clip's frames one by one, or the video once for each clip."""
        return self.plan.clips * (1 if self.dali_video else self.plan.frames)

    @property
    def dali_video(self) -> bool:
        """Whether a piece is a video."""
        return not self.manifest.stills

    def why_not_dali(self, gpu: bool) -> list[str]:
        """Reasons why DALI cannot decode these videos: on a CPU it has hardly any codecs."""
        if self.manifest.stills:
            return []
        has = DALI_GPU if gpu else DALI_CPU
        missing = [name for name in self.manifest.codec_names if name not in has]
        reasons = ["it gives videos in colour only, but channels=1 was asked for"] if self.channels == 1 else []
        if missing and (not gpu or len(missing) == len(self.manifest.codec_names)):
            where = "on this GPU" if gpu else "on a CPU"
            reasons.append(
                f"DALI decodes no {', '.join(missing)} {where}, only {', '.join(has)}; use torch, or JPEG frames as "
                "`cohobate data shard` makes them"
            )
        return reasons

    def encoded(self, task: Task, row: int) -> list[bytes] | Tensor:
        """A video's pieces, see :meth:`Reader.encoded`.

        Raises:
            BadImage: it cannot be read.
        """
        assert task.frames is not None
        manifest, video = self.manifest, int(task.files[row])
        if self.dali_video:
            # A codec that the CPU has not is refused before.
            if manifest.plain_video[video] and manifest.codec(video) in DALI_GPU:
                data = read_file(manifest.paths[video])
                if len(data) == manifest.sizes[video]:
                    return [data] * self.plan.clips
        elif manifest.plain_jpeg[video]:
            size = (int(manifest.heights[video]), int(manifest.widths[video]))
            found = still_bytes(manifest, video, task.frames[row].reshape(-1).tolist())
            if all(is_plain_jpeg(data, size) for data in found):
                return found
        return self._render(task, row, "pyav")  # in the very colours of DALI, whose batch it goes into
