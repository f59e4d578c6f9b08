"""Being asked to stop: a flag that the loop reads between two updates."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_ASKED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While this context is open, the first SIGTERM or Ctrl-C asks the run to write a checkpoint and end.

    A second Ctrl-C interrupts at once. Outside the main thread nothing is caught.

    Attributes:
        code: exit code that the request stands for (128 + the signal's number); 0 without one.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _ASKED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number
