"""The plan carried out by NVIDIA DALI: one graph, on a GPU or, for tests and by request, without one.

DALI is imported only when an executor is opened. It gets nothing it could stumble over: bytes are read and their
headers checked in Python first, and what DALI does not read like everybody else (anything but plain JPEGs) is decoded
by :mod:`cohobate.data.decode` and put into its place in the batch. Should a batch fail all the same, that batch is
decoded without DALI; DALI's dynamic executor goes on with the next one.
"""

from __future__ import annotations

import functools
import io
import logging
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cohobate.data.decode import Pixels, decode, render
from cohobate.data.reading import Reader, Rows, Task
from cohobate.data.video.encode import encode_clip

log = logging.getLogger(__name__)

_QUEUE = 2  # batches DALI works on ahead
_READ_AHEAD = 3  # more batches whose files are read
_GIVE_UP = 8  # batches that DALI may fail on in a row


def build_graph(
    source: Callable[[int], tuple[Any, ...]],
    *,
    device: int | None,
    batch_size: int,
    threads: int,
    size: tuple[int, int],
    interpolation: str,
    channels: int,
    crops: int = 1,
    video: bool = False,
) -> Any:
    """The pipeline; ``device`` is a GPU's number, or None for the very same graph on the CPU.

    ``source(iteration)`` gives, for a batch: encoded bytes uint8 [.]; of videos, the frames int32 [T] to decode; for
    each of ``crops`` crops top-left int32 [2], height-width int32 [2], flip int32; step int64. Outputs: for each crop
    uint8 [(T,) height, width, channels], and the steps.
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # its type stubs lack half of what is used here
    fn, types = dali.fn, dali.types
    kinds = [types.UINT8, *([types.INT32] * (video + 3 * crops)), types.INT64]

    @dali.pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=_QUEUE)
    def graph() -> Any:
        given = fn.external_source(source=source, num_outputs=len(kinds), batch=True, dtype=kinds)
        encoded, step, crop_data = given[0], given[-1], given[1 + video : -1]
        where = "cpu" if device is None else "mixed"
        if video:
            images = fn.decoders.video(encoded, device=where, frames=given[1], pad_mode="edge")
        else:
            # The whole frame is decoded: GPU decoding of a region crashes in nvImageCodec 0.9.0 (its issue 55).
            images = fn.decoders.image(
                encoded,
                device=where,
                output_type=types.RGB if channels == 3 else types.GRAY,
                jpeg_fancy_upsampling=True,
                adjust_orientation=True,
                hw_decoder_load=0.75,
            )
        interpolator = types.INTERP_CUBIC if interpolation == "bicubic" else types.INTERP_LINEAR
        made = []
        for corner, extent, flip in zip(crop_data[0::3], crop_data[1::3], crop_data[2::3]):
            part = fn.slice(images, start=corner, shape=extent, axis_names="HW")
            part = fn.resize(part, size=list(size), interp_type=interpolator, antialias=True)
            made.append(fn.flip(part, horizontal=flip))
        return (*made, step)

    pipeline = graph()
    pipeline.build()
    return pipeline


@dataclass
class _Prepared:
    """A step whose n files are read: what DALI gets of them, and the samples it does not make.

    ``encoded``: n x items pieces. ``boxes`` int32 [n, crops, 4]; ``flips`` int32 [n, crops]; ``frames`` int32
    [n, clips, T]; ``plain``: finished samples of a file, [views, ...].
    """

    step: int
    files: NDArray[np.int64]
    valid: NDArray[np.bool_]
    encoded: list[NDArray[np.uint8]]
    boxes: NDArray[np.int32]
    flips: NDArray[np.int32]
    frames: NDArray[np.int32]
    plain: dict[int, Tensor] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)


class DaliExecutor:
    """Steps in order, decoded by DALI.

    Args:
        start: first step. stop: step after the last, or None for no end.
        threads: of DALI, and as many that read files. device: the GPU, or None for the CPU.
    """

    def __init__(
        self, reader: Reader, *, start: int, stop: int | None, threads: int, device: torch.device | None
    ) -> None:
        self.reader, self.threads, self.stop = reader, threads, stop
        self.device = torch.device("cpu") if device is None else device
        self._gpu = (
            None if device is None else device.index if device.index is not None else torch.cuda.current_device()
        )
        self._step = start
        self._failures = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
        self._read: dict[int, Future[_Prepared]] = {}
        self._files = reader.batch_size // reader.plan.views
        self._build()

    def _build(self) -> None:
        """A pipeline that begins at the current step."""
        self._first = self._step
        self._given: deque[_Prepared] = deque()
        self._pipeline = build_graph(
            self._source,
            device=self._gpu,
            batch_size=self._files * self.reader.items,
            threads=self.threads,
            size=self.reader.plan.size,
            interpolation=self.reader.plan.interpolation,
            channels=self.reader.channels,
            crops=self.reader.plan.crops_per_clip,
            video=self.reader.dali_video,
        )

    def _source(self, iteration: int) -> tuple[Any, ...]:
        """DALI asks for a batch; called in the thread that runs the pipeline."""
        step = self._first + iteration
        if self.stop is not None and step >= self.stop:
            prepared = self._nothing(step)  # it asks ahead, beyond the end
        else:
            for ahead in range(step, step + _READ_AHEAD + 1):
                if ahead not in self._read and (self.stop is None or ahead < self.stop):
                    self._read[ahead] = self._pool.submit(self._prepare, ahead)
            prepared = self._read.pop(step).result()
        self._given.append(prepared)
        items = self.reader.items
        outputs: list[Any] = [prepared.encoded]
        if self.reader.dali_video:
            outputs.append(prepared.frames.reshape(self._files * items, -1))
        for crop in range(self.reader.plan.crops_per_clip):
            boxes, flips = (np.repeat(part[:, crop], items, axis=0) for part in (prepared.boxes, prepared.flips))
            outputs += [np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:]), flips]
        return (*outputs, np.full(self._files * items, step, dtype=np.int64))

    def _nothing(self, step: int) -> _Prepared:
        """Rows of the placeholder."""
        reader, count, crops = self.reader, self._files, self.reader.plan.crops_per_clip
        length = reader.shape[1] if reader.dali_video else 0
        placeholder = np.frombuffer(_clip_placeholder() if reader.dali_video else _placeholder(), dtype=np.uint8)
        return _Prepared(
            step=step,
            files=np.zeros(count, dtype=np.int64),
            valid=np.zeros(count, dtype=bool),
            encoded=[placeholder] * (count * reader.items),
            boxes=np.tile(np.array([0, 0, 8, 8], dtype=np.int32), (count, crops, 1)),
            flips=np.zeros((count, crops), dtype=np.int32),
            frames=np.zeros((count, reader.plan.clips, length), dtype=np.int32),
        )

    def _prepare(self, step: int) -> _Prepared:
        """Read a step's files and decide which go to DALI; called in a thread of the pool."""
        reader, items = self.reader, self.reader.items
        crops = reader.plan.crops_per_clip  # the first ones; other clips of a video have the same boxes
        task = reader.task(step)
        prepared = self._nothing(step)
        prepared.files[:], prepared.valid[:] = task.files, task.valid
        for row in range(self._files):
            file, found = reader.healthy(task, row, self._fetch, prepared.faults)
            prepared.valid[row] &= file == task.files[row] and found is not None
            prepared.files[row] = file
            if found is None:
                prepared.plain[row] = torch.zeros((reader.plan.views, *reader.shape[1:]), dtype=torch.uint8)
                continue
            made, own, place = found
            if isinstance(made, Tensor):
                prepared.plain[row] = made
                continue
            pieces = [np.frombuffer(data, dtype=np.uint8) for data in made]
            prepared.encoded[row * items : (row + 1) * items] = pieces
            prepared.boxes[row], prepared.flips[row] = own.boxes[place, :crops], own.flips[place, :crops]
            if reader.dali_video:
                assert own.frames is not None
                prepared.frames[row] = own.frames[place]
        return prepared

    def _fetch(self, task: Task, row: int) -> tuple[list[bytes] | Tensor, Task, int]:
        """What DALI gets or the finished samples, and the task and row that say how they are cropped.

        Raises:
            BadImage: it cannot be read.
        """
        return self.reader.encoded(task, row), task, row

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        if self.stop is not None and self._step >= self.stop:
            raise StopIteration
        try:
            rows = self._run()
            self._failures = 0
        except RuntimeError as error:
            rows = self._recover(error)
        self._step += 1
        return rows

    def _run(self) -> Rows:
        # On this stream the images are ready when it gets to them, and free when it is through with them.
        stream = torch.cuda.current_stream(self._gpu) if self._gpu is not None else None
        *crops, steps = self._pipeline.run(stream)
        prepared = self._given.popleft()
        if prepared.step != self._step or int(np.asarray(steps.as_tensor())[0]) != self._step:
            raise RuntimeError(f"DALI is at step {prepared.step}, expected {self._step}")
        pixels = torch.empty(self.reader.shape, dtype=torch.uint8, device=self.device)
        clips, inner = self.reader.plan.clips, self.reader.shape[1:]
        for crop, images in enumerate(crops):
            made = torch.from_dlpack(images.as_tensor()).view(self._files, clips, *inner)
            pixels.view(self._files, clips, len(crops), *inner)[:, :, crop].copy_(made)
        for row, samples in prepared.plain.items():
            pixels.unflatten(0, (self._files, -1))[row].copy_(samples)
        valid = np.repeat(prepared.valid, self.reader.plan.views)
        return Rows(pixels, self.reader.sample_ids(prepared.files), valid, prepared.faults)

    def _recover(self, error: RuntimeError) -> Rows:
        """The failed step without DALI; a fresh pipeline if this was not the first failure."""
        self._failures += 1
        # DALI's message is not to be trusted ("no longer valid"), and says little about the file.
        reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
        log.warning("data: DALI failed on step %d, decoded without it (%s)", self._step, reason)
        if self._failures >= _GIVE_UP:
            raise RuntimeError(f"DALI failed on {_GIVE_UP} batches in a row; try loader=torch. {error}") from error
        rows = self.reader.rows(self._step)
        rows.pixels = torch.as_tensor(rows.pixels).to(self.device)
        while self._given and self._given[0].step <= self._step:
            self._given.popleft()
        if self._failures > 1:
            self._read.clear()
            self._step += 1
            self._build()
            self._step -= 1
        return rows

    def close(self) -> None:
        """Stop the threads and free DALI's memory; iterating further ends at once."""
        self.stop = self._step
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pipeline = None


@functools.lru_cache(maxsize=1)
def _placeholder() -> bytes:
    """A JPEG of 8 x 8 pixels, for rows that DALI need not decode."""
    return _jpeg(np.full((8, 8, 3), 128, dtype=np.uint8))


@functools.lru_cache(maxsize=1)
def _clip_placeholder() -> bytes:
    """The same for videos: VP9, and no smaller than NVDEC takes it."""
    return encode_clip(np.full((2, 128, 128, 3), 128, dtype=np.uint8), "vp9")


def _jpeg(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@functools.lru_cache(maxsize=8)
def probe(gpu: int, video: bool = False) -> str:
    """Why DALI does not decode on this GPU; empty if it does. A process of its own tries, for it may crash."""
    code = f"from cohobate.data.dali_executor import self_test; self_test({gpu}, video={video})"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return f"DALI's test on GPU {gpu} did not end within 120 s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"DALI's test on GPU {gpu} failed with exit code {done.returncode} ({lines[-1] if lines else 'no message'})"


def self_test(gpu: int | None, video: bool = False) -> None:
    """Decode one image, or two frames of a video, with the graph and compare with the plain decoder.

    Raises:
        RuntimeError: it fails, or gives another picture.
    """
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    image = np.ascontiguousarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1, None]), axis=2))
    data, box = encode_clip(np.stack([image] * 2), "vp9") if video else _jpeg(image), (16, 32, 80, 64)

    def source(iteration: int) -> tuple[Any, ...]:
        corner, extent = (np.array([pair], dtype=np.int32) for pair in (box[:2], box[2:]))
        flips, steps = np.ones(1, dtype=np.int32), np.full(1, iteration, dtype=np.int64)
        frames = [np.array([[0, 1]], dtype=np.int32)] if video else []
        return [np.frombuffer(data, dtype=np.uint8)], *frames, corner, extent, flips, steps

    settings: dict[str, Any] = {"size": (24, 24), "interpolation": "bilinear", "channels": 3, "video": video}
    pipeline = build_graph(source, device=gpu, batch_size=1, threads=1, **settings)
    for _ in range(2):
        images, _ = pipeline.run()
    found = torch.from_dlpack(images.as_tensor())[0].cpu().float()
    expected = render(image if video else decode(data), box, True, (24, 24), "bilinear").float()
    difference = float((found - expected).abs().mean())
    if not difference < (6 if video else 2):  # of a video the original is compared, which the codec has changed
        raise RuntimeError(f"DALI's picture differs by {difference:.1f} on average")
