"""One way to open a data set: the same batches from whichever executor carries out the plan."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from cohobate.data.batch import Batch
from cohobate.data.manifest import Manifest
from cohobate.data.plan import SamplePlan
from cohobate.data.reading import Reader, Rows
from cohobate.data.torch_executor import TorchExecutor
from cohobate.data.video.manifest import VideoManifest
from cohobate.data.video.plan import ClipPlan
from cohobate.data.video.reading import ClipReader
from cohobate.errors import UserError

log = logging.getLogger(__name__)

LOADERS = ("auto", "torch", "dali-cpu", "dali-gpu")
_FORGIVEN = 8  # this many bad files never end a run, however small the data set


class Executor(Protocol):
    """Yields the rows of one step after the other."""

    device: torch.device  # where its pixels are

    def __iter__(self) -> Iterator[Rows]: ...
    def __next__(self) -> Rows: ...
    def close(self) -> None: ...


class Loader:
    """Iterates over the :class:`Batch` es of one rank on the step's device; made by :func:`open_loader`.

    Attributes:
        name: the executor, "torch", "dali-cpu" or "dali-gpu". why: why it was chosen.
        steps_per_epoch: batches of an epoch. step: the next one, counted from the first epoch's first.
        counters: batches and samples handed out; ``substituted`` files; and a count a reason for files that could
            not be read (each time it was tried).
        data_wait_s: seconds spent waiting for a batch, in all.
    """

    def __init__(
        self,
        executor: Executor,
        manifest: Manifest,
        plan: SamplePlan,
        *,
        global_batch: int,
        device: torch.device,
        start: int,
        max_bad: float,
        name: str,
        why: str,
    ) -> None:
        self.name, self.why, self.step = name, why, start
        self._unit = manifest.UNIT
        self.steps_per_epoch = plan.steps_per_epoch(global_batch)
        self.counters: Counter[str] = Counter(batches=0, samples=0, substituted=0)
        self.data_wait_s = 0.0
        self._executor, self._manifest, self._plan = executor, manifest, plan
        self._global_batch, self._device = global_batch, device
        self._bad: dict[int, str] = {}
        self._limit = max(_FORGIVEN, int(max_bad * plan.count)) if max_bad < 1 else plan.count
        self._max_bad = max_bad
        self._labels = None if manifest.labels is None else torch.from_numpy(manifest.labels)
        # On a GPU the next batch is copied on a stream of its own while the current one is worked on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: tuple[Batch, Rows] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch, rows = self._fetch() if self._ready is None else self._ready
        if self._stream is not None:
            self._arrive(batch, self._stream)
            try:
                self._ready = self._fetch()
            except StopIteration:
                self._ready = None
        self.data_wait_s += time.perf_counter() - began
        self.step += 1
        self._count(rows)
        return batch

    def _fetch(self) -> tuple[Batch, Rows]:
        rows = next(self._executor)
        ids = torch.from_numpy(rows.ids)
        pixels = torch.as_tensor(rows.pixels)
        pixels = pixels if pixels.ndim == 5 else pixels.unsqueeze(1)
        batch = Batch(pixels, ids, torch.from_numpy(rows.valid), views=self._plan.views)
        batch.labels = None if self._labels is None else self._labels[batch.places]
        if self._stream is not None:
            batch.sample_ids, batch.valid = batch.sample_ids.pin_memory(), batch.valid.pin_memory()
            batch.labels = None if batch.labels is None else batch.labels.pin_memory()
            with torch.cuda.stream(self._stream):
                batch = batch.to(self._device, non_blocking=True)
        return batch, rows

    def _arrive(self, batch: Batch, copies: torch.cuda.Stream) -> None:
        """Make the current stream wait for the copy, and the memory for the current stream."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(copies)
        for tensor in (batch.pixels, batch.sample_ids, batch.valid, batch.labels):
            if tensor is not None:
                tensor.record_stream(current)

    def _count(self, rows: Rows) -> None:
        self.counters["batches"] += 1
        self.counters["samples"] += len(rows.ids)
        if not rows.faults:
            return
        failed = {sample for sample, _ in rows.faults}
        self.counters["substituted"] += len(failed)
        for sample, reason in rows.faults:
            self.counters[reason] += 1
            if sample not in self._bad:
                self._bad[sample] = reason
                log.warning("data: %s left out: %s", self._manifest.paths[sample], reason)
        if len(self._bad) > self._limit:
            share = len(self._bad) / self._plan.count
            raise UserError(
                f"max_bad: {len(self._bad)} of {self._plan.count} {self._unit}s ({share:.1%}) could not be read, more "
                f"than max_bad={self._max_bad:g} allows; {self._examples()}"
            )
        if failed.issuperset((rows.ids // self._plan.views).tolist()):
            raise UserError(f"data: not one {self._unit} of step {self.step - 1} could be read; {self._examples()}")

    def _examples(self) -> str:
        return "such as " + ", ".join(f"{path} ({reason})" for path, reason in self.bad_files()[:3])

    def bad_files(self) -> list[tuple[str, str]]:
        """(path, reason) of every image that could not be read so far."""
        return [(self._manifest.paths[sample], reason) for sample, reason in self._bad.items()]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: batches handed out, and of what. Give it to :func:`resume_step`."""
        return {
            "version": 1,
            "step": self.step,
            "global_batch": self._global_batch,
            "manifest": self._manifest.hash,
            "plan": self._plan.hash,
            "counters": dict(self.counters),
        }

    def report(self) -> dict[str, Any]:
        """For ``data_report.json``: loader, counters, and which files were left out and why."""
        left_out = Counter(reason for _, reason in self._manifest.quarantine)
        return {
            "loader": self.name,
            "why": self.why,
            f"{self._unit}s": len(self._manifest),
            "left_out": dict(left_out),
            "counters": dict(self.counters),
            "data_wait_s": round(self.data_wait_s, 3),
            "bad_files": [*self._manifest.quarantine[:50], *self.bad_files()[:50]],
        }

    def close(self) -> None:
        """Stop the workers; iterating further ends at once."""
        self._ready = None
        self._executor.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resume_step(state: dict[str, Any], manifest: Manifest, plan: SamplePlan, *, global_batch: int) -> int:
    """``start`` for :func:`open_loader` of a run that goes on from :meth:`Loader.state`.

    Raises:
        UserError: the data, the plan or the batch size is not the same, so the batches would not be either.
    """
    now = {"manifest": manifest.hash, "plan": plan.hash, "global_batch": global_batch}
    for name, value in now.items():
        if state.get(name) != value:
            raise UserError(f"resume: the {name.replace('_', ' ')} was {state.get(name)}, now it is {value}")
    return int(state["step"])


def open_loader(
    manifest: Manifest,
    plan: SamplePlan,
    *,
    batch_size: int,
    loader: str = "auto",
    device: str | torch.device = "cpu",
    workers: int = 2,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    channels: int = 3,
    max_bad: float = 0.01,
) -> Loader:
    """Open a data set for one rank.

    A plan with ``train=True`` gives batches without end, epoch after epoch; otherwise one pass, the last batch filled
    up with rows that are not ``valid``.

    Args:
        manifest, plan: a ``Manifest`` with a ``SamplePlan`` (images), or a ``VideoManifest`` with a ``ClipPlan``.
        batch_size: samples a rank takes at a step, counting every view of a video; a step has
            ``batch_size * world_size`` of them, and which they are does not depend on the number of ranks, workers, or
            the executor.
        loader: "torch"; "dali-gpu" (decodes on the GPU); "dali-cpu" (the same DALI graph without one); "auto": dali-gpu
            if ``device`` is a GPU and DALI works there, else torch.
        workers: processes ("torch"; 0: decode in this one) or threads (DALI).
        start: first step, see :func:`resume_step`.
        channels: 3 (RGB) or 1 (grey).
        max_bad: end with an error once a larger share of the images could not be read (and more than 8).

    Raises:
        UserError: an argument out of its range, a loader that cannot work here, or too few images for a batch.
    """
    device = torch.device(device)
    checks = {
        "loader": (loader in LOADERS, f"one of {', '.join(LOADERS)}", loader),
        "channels": (channels in (1, 3), "3 or 1 (image files have no other number)", channels),
        "batch_size": (batch_size >= 1, "at least 1", batch_size),
        "workers": (workers >= 0, "0 or more", workers),
        "rank": (0 <= rank < world_size, f"0 to world_size - 1 = {world_size - 1}", rank),
        "start": (start >= 0, "0 or more", start),
        "max_bad": (0 <= max_bad <= 1, "0 to 1", max_bad),
    }
    for name, (right, expected, got) in checks.items():
        if not right:
            raise UserError(f"{name}: expected {expected}, got {got!r}")
    unit, views = manifest.UNIT, plan.views
    if plan.count != len(manifest):
        raise UserError(f"plan: expected one of the manifest's {len(manifest)} {unit}s, got count={plan.count}")
    if batch_size % views:
        raise UserError(f"batch_size: expected a multiple of the plan's {views} views of a {unit}, got {batch_size}")
    global_batch = batch_size * world_size
    if plan.train and global_batch > plan.count * views:
        many = f"{plan.count} {unit}s" if views == 1 else f"{plan.count} {unit}s x {views} views"
        raise UserError(f"batch_size: expected at most {many} a step, as many as there are, got {global_batch}")
    reader = _reader(manifest, plan, batch_size, rank, world_size, channels)
    name, why = choose(loader, device, reader)
    stop = None if plan.train else plan.steps_per_epoch(global_batch)
    executor: Executor
    if name == "torch":
        executor = TorchExecutor(reader, start=start, stop=stop, workers=workers, pin=device.type == "cuda")
    else:
        from cohobate.data.dali_executor import DaliExecutor

        executor = DaliExecutor(
            reader, start=start, stop=stop, threads=max(1, workers), device=device if name == "dali-gpu" else None
        )
    return Loader(
        executor,
        manifest,
        plan,
        global_batch=global_batch,
        device=device,
        start=start,
        max_bad=max_bad,
        name=name,
        why=why,
    )


def load_all(
    manifest: Manifest,
    plan: SamplePlan,
    *,
    workers: int = 2,
    channels: int = 3,
    batch_size: int = 64,
    max_bad: float = 0.01,
) -> Batch:
    """Everything at once, in the manifest's order, on the CPU: for evaluation on sets that fit into memory.

    Args:
        plan: with ``train=False``.

    Returns:
        A batch of all N samples (of videos, N times the plan's views); one that could not be read is not ``valid``.

    Raises:
        UserError: as :func:`open_loader`, or a plan with random crops.
    """
    if plan.train:
        raise UserError("plan: expected train=False (every image once, no random crops), got train=True")
    views = plan.views
    batch_size = max(batch_size // views, 1) * views
    parts: list[Batch] = []
    with open_loader(
        manifest, plan, batch_size=batch_size, loader="torch", workers=workers, channels=channels, max_bad=max_bad
    ) as loader:
        parts.extend(loader)
    count = len(manifest) * views
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(
        torch.cat([part.pixels for part in parts])[:count],
        torch.cat([part.sample_ids for part in parts])[:count],
        torch.cat([part.valid for part in parts])[:count],
        torch.cat(labels)[:count] if labels else None,
        views,
    )


def _reader(manifest: Manifest, plan: SamplePlan, batch_size: int, rank: int, world_size: int, channels: int) -> Reader:
    """The reader for this kind of manifest."""
    if isinstance(manifest, VideoManifest) and isinstance(plan, ClipPlan):
        return ClipReader(manifest, plan, batch_size, rank, world_size, channels)
    if isinstance(manifest, VideoManifest) or isinstance(plan, ClipPlan):
        expected = "ClipPlan, for the manifest is of videos" if manifest.UNIT == "video" else "SamplePlan, for images"
        raise UserError(f"plan: expected a {expected}, got a {type(plan).__name__}")
    return Reader(manifest, plan, batch_size, rank, world_size, channels)


def choose(loader: str, device: torch.device, reader: Reader | None = None) -> tuple[str, str]:
    """(executor, why) for a request.

    Raises:
        UserError: asked for by name, but it cannot work here.
    """
    if loader != "auto":
        reasons = why_not(loader, device, reader)
        if reasons:
            raise UserError(f"loader: {loader!r} cannot be used: {'; '.join(reasons)}")
        return loader, "asked for"
    if device.type != "cuda":
        why = "no GPU: DALI's CPU operators are slower than simplejpeg and torch"
        log.debug("loader: torch (%s)", why)
        return "torch", why
    reasons = why_not("dali-gpu", device, reader)
    name = "torch" if reasons else "dali-gpu"
    why = "; ".join(reasons) if reasons else "DALI decodes on this GPU"
    log.info("loader: %s (%s)", name, why)
    return name, why


def why_not(loader: str, device: torch.device, reader: Reader | None = None) -> list[str]:
    """Reasons why an executor cannot serve a device, or what a reader reads; none if it can."""
    if loader == "torch":
        return []
    reasons = [] if _dali_installed() else ["DALI is not installed (pip install nvidia-dali-cuda130)"]
    if reader is not None:
        reasons += reader.why_not_dali(gpu=loader == "dali-gpu")
    if loader == "dali-gpu":
        if device.type != "cuda":
            reasons.append(f"it decodes on a GPU, but the device is {device}")
        elif not torch.cuda.is_available():
            reasons.append("torch sees no CUDA device")
        if not reasons:
            from cohobate.data.dali_executor import probe

            failure = probe(device.index or 0, video=reader is not None and reader.dali_video)
            reasons = [failure] if failure else []
    return reasons


def why_not_loaders() -> dict[str, Sequence[str]]:
    """For every executor, the reasons why it cannot be used on this machine's best device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: why_not(name, device) for name in LOADERS if name != "auto"}


def _dali_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
