"""What a run writes while it trains: JSON lines, TensorBoard, and where the time went."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cohobate.evaluation import effective_rank
from cohobate.models import VisionTransformer

# Dense bf16 peak of devices whose data sheet we know, FLOP/s.
_PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "V100": 125e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, FLOP/s; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name.replace("-", " ").split()), None)


class JsonLines:
    """A file of one JSON object a line, flushed line by line so that a crash loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, *rows: dict[str, Any]) -> None:
        """Append ``rows`` in one write; numbers that are not finite become null."""
        self._file.write("".join(json.dumps(_plain(row)) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def trim_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the lines that ``keep`` wants, and no half-written one: a resumed run says nothing twice."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if keep(row):
            kept.append(line + "\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class Board:
    """TensorBoard, or nothing where it is switched off. Its import takes a second, so it happens here."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self._writer: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Plot every number of ``row`` at ``step``."""
        if self._writer is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Meter:
    """Running means of 0-d tensors that stay on the device until they are read, once every few updates."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0
        self._latest: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, terms: dict[str, Tensor]) -> None:
        """Add one micro-batch's values; the names must stay the same between two reads."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        if self._sum is None:
            self._names, self._sum = tuple(terms), values
        else:
            self._sum += values
        self._count += 1

    def latest(self, values: dict[str, Tensor]) -> None:
        """Set values of which only the latest counts."""
        self._latest.update(values)

    @torch.no_grad()
    def read(self, reduce: Callable[[Tensor], Tensor] = lambda vector: vector) -> dict[str, float]:
        """The means since the last read and the latest values, in one wait for the device.

        ``reduce`` may turn the vector of all of them, fp32, into its mean over ranks.
        """
        means = [] if self._sum is None else [self._sum / self._count]
        others = [value.detach().float().view(1) for value in self._latest.values()]
        names = [*self._names, *self._latest]
        values = reduce(torch.cat(means + others)).tolist() if names else []
        self._names, self._sum, self._count, self._latest = (), None, 0, {}
        return dict(zip(names, values))


class CollapseWatch:
    """Looks now and then at what the student makes of a few images that stay the same, and says when it is nothing.

    Healthy networks, trained or not, are far from these limits: rank 5 and more, spread 0.3 and more on the demo.

    Args:
        student: being trained. images: [n, T, H, W, C] uint8 on its device; 64 are enough for limits this low.
    """

    RANK = 1.5  # effective rank of the images' features below which they are all but one
    SPREAD = 0.02  # their standard deviation over images, as a share of their root mean square
    TARGET = 1e-3  # standard deviation of the raw target over tokens

    def __init__(self, student: VisionTransformer, images: Tensor) -> None:
        self.student, self.images = student, images

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """``features/rank`` and ``features/spread`` of the mean patch token; waits for the device."""
        training = self.student.training
        self.student.eval()
        features = torch.cat([self.student.features(part).mean for part in self.images.split(16)])
        self.student.train(training)
        spread = features.var(dim=0, correction=0).mean().sqrt() / features.square().mean().sqrt().clamp_min(1e-12)
        if not bool(features.isfinite().all()):
            return {"features/rank": math.nan, "features/spread": math.nan}
        return {"features/rank": effective_rank(features), "features/spread": float(spread)}

    @classmethod
    def alarm(cls, row: dict[str, Any]) -> str | None:
        """What is wrong with a row of metrics, in words; None if nothing is."""
        limits = {
            "features/rank": (cls.RANK, "the student gives all samples nearly one feature: effective rank"),
            "features/spread": (cls.SPREAD, "the student gives all samples nearly one feature: relative spread"),
            "target/std": (cls.TARGET, "the targets are nearly the same for all tokens: standard deviation"),
        }
        for key, (limit, what) in limits.items():
            value = row.get(key)
            if value is not None and not value >= limit:  # NaN is one, too
                return f"collapse: {what} {value:.2g}, below {limit:g}"
        return None


class Clock:
    """Seconds by activity. ``mark(name)`` says what the time since the last mark was spent on.

    On CUDA the marks are events of the stream, read in :meth:`flush` when the device has been waited for anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._since: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any]] = []
        self._last = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name: str) -> None:
        """The time since the last mark was ``name``."""
        now = self._now()
        if self._cuda:
            self._events.append((name, self._last))
        else:
            self._since[name] += now - self._last
        self._last = now

    def flush(self) -> dict[str, float]:
        """Seconds by activity since the last flush, added to what :meth:`take` gives."""
        if self._cuda and self._events:
            self._last.synchronize()
            ends = [event for _, event in self._events[1:]] + [self._last]
            for (name, begin), end in zip(self._events, ends):
                self._since[name] += begin.elapsed_time(end) / 1e3
            self._events.clear()
        spent = dict(self._since)
        for name, seconds in spent.items():
            self._total[name] += seconds
        self._since.clear()
        return spent

    def take(self) -> dict[str, float]:
        """Seconds by activity since the last take."""
        self.flush()
        taken = dict(self._total)
        self._total.clear()
        return taken
