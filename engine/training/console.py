"""The progress line: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``2 h 05 m``, ``3 m 20 s`` or ``12 s``."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600, whole // 60
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} m"
    return f"{minutes} m {whole % 60:02d} s" if minutes else f"{whole} s"


class Console:
    """Says what the run is doing; silent on every rank but the first. Use as a context manager.

    Args:
        enabled: False for the other ranks.
        plain_seconds: least time between two plain lines.
        unit: what a sample is, "img" or "clips".
    """

    def __init__(self, enabled: bool, plain_seconds: float = 5.0, unit: str = "img") -> None:
        self._enabled, self._unit = enabled, unit
        self._plain_seconds = plain_seconds
        self._spoken = -1e9
        self._last = ""
        self._status: Any = None
        self._rich: Any = None

    def __enter__(self) -> Console:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console as Rich

            self._rich = Rich(stderr=True, highlight=False)
            self._status = self._rich.status("starting", refresh_per_second=4)
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._enabled:
            return
        if self._rich is not None:
            self._rich.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, row: dict[str, Any], *, stage: str, step: int, steps: int, remaining: float) -> None:
        """One line about the update just logged; ``row`` is the line of metrics.jsonl, ``remaining`` in seconds."""
        if not self._enabled:
            return
        parts = [f"{stage} {step}/{steps}", f"loss {row['loss/total']:.4f}", f"lr {row['lr']:.2e}"]
        parts.append(f"{row['perf/samples_s']:.0f} {self._unit}/s")
        if row.get("perf/mfu") is not None:
            parts.append(f"MFU {row['perf/mfu']:.0%}")
        parts += [f"data {row['perf/data_wait']:.0%}", f"{duration(remaining)} left"]
        line = "  ".join(parts)
        if self._status is not None:
            self._status.update(line)
        elif time.monotonic() - self._spoken >= self._plain_seconds or step == steps:
            self._spoken = time.monotonic()
            print(line, file=sys.stderr, flush=True)
