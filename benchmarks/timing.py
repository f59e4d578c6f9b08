"""How one call is timed on a CPU and on CUDA, and how several are interleaved."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cohobate.kernels import memory

SHORTEST_SAMPLE_MS = 0.5  # a shorter sample is mostly the clock and the interpreter: the call is repeated inside it
FLUSH_BYTES = 2**28  # written before every sample on CUDA: more than any card's L2, and long enough to hide a launch


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Timeable(Protocol):
    """What a timer needs of a provider."""

    @property
    def function(self) -> Callable[[], Any]: ...
    @property
    def reset(self) -> Callable[[], None] | None: ...
    @property
    def capture(self) -> bool: ...
    @property
    def copies(self) -> int: ...


class Timer(Protocol):
    """Turns a provider into a function that runs one sample and returns milliseconds a call."""

    def prepare(self, provider: Timeable) -> Callable[[], float]: ...


class CpuTimer:
    """Wall time of a call; calls without a ``reset`` that are very short are repeated inside a sample."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def prepare(self, provider: Timeable) -> Callable[[], float]:
        function, reset, clock = provider.function, provider.reset, self.clock

        def sample(calls: int) -> float:
            if reset is not None:
                reset()
            start = clock()
            for _ in range(calls):
                function()
            return (clock() - start) * 1e3 / calls

        once = sample(1)
        once = min(once, sample(1)) if once < 1000 else once  # the first call pays for caches and allocations
        calls = 1 if reset is not None else max(1, min(1000, round(SHORTEST_SAMPLE_MS / max(once, 1e-6))))
        return lambda: sample(calls)


class CudaTimer:
    """Device time of a call with a cold L2: a CUDA graph of ``copies`` calls, replayed after a flush, between events.

    A provider whose function walks through several input sets says how many (``copies``), so that together they exceed
    the L2 cache. One that cannot be captured (it syncs, or makes graphs itself) says ``capture=False`` and is launched
    eagerly between the same events.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.counter = itertools.count(1)

    def prepare(self, provider: Timeable) -> Callable[[], float]:
        function, reset, calls = provider.function, provider.reset, provider.copies
        gc.collect()  # nodes of older autograd graphs would run where they were made: outside of the capture
        # The warm-up on a side stream, as CUDA graphs ask; not without one, for a stream keeps the memory it was given.
        side = torch.cuda.Stream() if provider.capture else torch.cuda.current_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(3, calls)):
                if reset is not None:
                    reset()
                function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        run = function
        if provider.capture:
            graph = torch.cuda.CUDAGraph()
            # The stream outside too: a capture that fails does not leave it.
            with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
                for _ in range(calls):
                    function()
            run = graph.replay
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        launches = 1 if provider.capture else calls

        def sample() -> float:
            if reset is not None:
                reset()
            self.scratch.fill_(next(self.counter))
            begin.record()
            for _ in range(launches):
                run()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / calls

        return sample


def interleave(samplers: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """``rounds`` samples of each, in turns; who begins a round rotates, so nobody always follows the same one."""
    times: list[list[float]] = [[] for _ in samplers]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for offset in range(len(samplers)):
                which = (turn + offset) % len(samplers)
                times[which].append(samplers[which]())
    finally:
        if collecting:
            gc.enable()
    return times


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the sorted values."""
    if len(values) == 1:
        return values[0]
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(repeats: Sequence[Sequence[float]]) -> float:
    """How far apart honest answers are, as a fraction of the median: p20 to p80, or one repeat to another."""
    pooled = [value for repeat in repeats for value in repeat]
    middle = quantile(pooled, 0.5)
    medians = [statistics.median(repeat) for repeat in repeats]
    return max(quantile(pooled, 0.8) - quantile(pooled, 0.2), max(medians) - min(medians)) / middle


def peak_memory_mb(provider: Timeable, device: str) -> float | None:
    """Most memory that one call holds beyond what was there before it, in MB (2**20 bytes).

    CUDA: the caching allocator's count. CPU: the growth of the process's resident memory, whoever asked for it, after
    free memory was handed back to the system; None where Linux's /proc or glibc is missing.
    """
    if provider.reset is not None:
        provider.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = provider.function()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not _hand_back_free_memory():
        return None
    resident = _status_mb("VmRSS")
    CLEAR_REFS.write_text("5")  # the high-water mark starts again from here
    kept = provider.function()
    del kept
    return max(0.0, _status_mb("VmHWM") - resident)


def _hand_back_free_memory() -> bool:
    """glibc and our kernels keep freed blocks, which would hide a later allocation. False where this cannot be done."""
    if not CLEAR_REFS.exists():
        return False
    gc.collect()
    memory.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return trim is not None


def _status_mb(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024
