"""The frozen teacher on CUDA without its launch costs: replay of a graph a shape, and a stream of its own.

A forward pass of L blocks is some 9 L launches; a replay is one, two or three copies into the graph's inputs and one
copy a layer out of its outputs. The copies out are the caller's own: features may be kept over any number of later
calls, as those of the eager path may. That is what double buffers are for, without their trap: of two captures in
one memory pool, either may put its temporaries where the other's outputs are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.kernels import registry
from cohobate.kernels.backends import attention

log = logging.getLogger("cohobate.teacher")

MOST = 8  # shapes that are kept; the one that was not used for longest goes first

Inputs = tuple[Tensor, Tensor | None, Tensor | None]  # pixels, rows, queries
Compute = Callable[[Tensor, Tensor | None, Tensor | None, bool], list[Tensor]]


class Captured(NamedTuple):
    """A graph, and the memory that it reads and writes."""

    graph: Any
    inputs: Inputs
    outputs: list[Tensor]


class Replays:
    """Calls of one function, each shape captured when it is first seen and replayed from then on.

    All graphs share one pool of memory, so replays wait for each other, on whatever stream they were asked for. A
    backend chosen by ``use_backend`` or ``use_attention`` has graphs of its own.

    Args:
        required: raise UserError if a capture fails; else say so once and compute eagerly.
        cuda: stands in for ``torch.cuda`` in tests.
    """

    def __init__(self, required: bool = False, cuda: Any = torch.cuda) -> None:
        self.required = required
        self.failed = False
        self._cuda = cuda
        self._captured: dict[Any, Captured] = {}  # by last use
        self._stream: Any = None
        self._pool: Any = None
        self._idle: Any = None

    def __len__(self) -> int:
        """Number of graphs that are kept."""
        return len(self._captured)

    def __reduce__(self) -> Any:
        """A copy, also one in another process, has no graphs yet."""
        return Replays, (self.required,)

    def __call__(self, compute: Compute, inputs: Inputs, norm: bool) -> list[Tensor]:
        """What ``compute(*inputs, norm)`` returns, in memory of its own."""
        if self.failed:
            return compute(*inputs, norm)
        with self._cuda.device(inputs[0].device):
            key = (tuple(_describe(x) for x in inputs), norm, _choices())
            captured = self._captured.pop(key, None) or self._capture(compute, inputs, norm)
            if captured is None:
                return compute(*inputs, norm)
            self._captured[key] = captured
            return self._replay(captured, inputs)

    def clear(self) -> None:
        """Forget every graph: weights have moved or changed."""
        for captured in self._captured.values():
            self._cuda.synchronize(captured.inputs[0].device)  # the last replay may still read what goes here
        self._captured.clear()
        self._stream = self._pool = self._idle = None  # a pool whose graphs are all gone cannot be used again
        self.failed = False

    def _replay(self, captured: Captured, inputs: Inputs) -> list[Tensor]:
        stream = self._cuda.current_stream()
        stream.wait_event(self._idle)
        for static, x in zip(captured.inputs, inputs, strict=True):
            if static is not None and x is not None:
                static.copy_(x)
        captured.graph.replay()
        found = [x.clone() for x in captured.outputs]
        self._idle.record(stream)
        return found

    def _capture(self, compute: Compute, inputs: Inputs, norm: bool) -> Captured | None:
        """None where the capture failed."""
        cuda = self._cuda
        cuda.synchronize()  # a capture waits for the device anyhow, and the graph dropped here may still run
        if len(self._captured) >= MOST:
            self._captured.pop(next(iter(self._captured)))
        if self._stream is None:
            self._stream, self._pool, self._idle = cuda.Stream(), cuda.graph_pool_handle(), cuda.Event()
        pixels, rows, queries = inputs
        static = pixels.clone(), None if rows is None else rows.clone(), None if queries is None else queries.clone()
        now, graph = cuda.current_stream(), cuda.CUDAGraph()
        self._stream.wait_stream(now)
        with cuda.stream(self._stream):
            compute(*static, norm)  # compiles, chooses backends, allocates workspaces, raises what an eager call raises
        now.wait_stream(self._stream)
        try:
            # The stream outside too: a graph that fails does not leave it. A loader's threads may allocate meanwhile.
            with cuda.stream(self._stream), cuda.graph(graph, self._pool, self._stream, "thread_local"):
                outputs = compute(*static, norm)
        except RuntimeError as error:
            self._fail(error)
            return None
        return Captured(graph, static, outputs)

    def _fail(self, error: RuntimeError) -> None:
        text = f"the teacher's forward pass cannot be captured: {error}"
        if self.required:
            raise UserError(f"cuda_graph: {text}") from error
        self.clear()
        self.failed = True
        log.warning("cuda_graph: off, %s", text)


def replayable(pixels: Tensor) -> bool:
    """Is this a call to capture: real tensors on CUDA, outside of a compiler's trace and of somebody else's capture?"""
    return (
        type(pixels) is Tensor
        and pixels.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def _describe(x: Tensor | None) -> Any:
    return None if x is None else (tuple(x.shape), x.dtype, x.device)


def _choices() -> tuple[str | None, ...]:
    """The backends asked for by name around this call: part of what was captured."""
    return registry.asked(), attention.asked()


class Ahead:
    """Features of the next batch, computed on a stream of its own beside what the current stream does meanwhile.

    ``start`` behind the backward pass and in front of the optimizer, ``take`` where the loss reads them. Off CUDA
    ``start`` computes at once. Memory for a second batch is needed.

    Args:
        teacher: what is called with the arguments of ``start``.
        stream: a ``torch.cuda.Stream``; None for a new one.
        cuda: stands in for ``torch.cuda`` in tests.
    """

    def __init__(self, teacher: Callable[..., list[Tensor]], stream: Any = None, cuda: Any = torch.cuda) -> None:
        self._teacher, self._stream, self._cuda = teacher, stream, cuda
        self._ready: Any = None
        self._found: list[Tensor] | None = None

    def start(
        self, pixels: Tensor, rows: Tensor | None = None, *, queries: Tensor | None = None, norm: bool = False
    ) -> None:
        """Begin, behind all that the current stream was given so far; arguments as of the teacher.

        Raises:
            RuntimeError: the features that were started before have not been taken.
        """
        if self._found is not None:
            raise RuntimeError("start: expected take() of the features started before")
        if not pixels.is_cuda:
            self._found = self._teacher(pixels, rows, queries=queries, norm=norm)
            return
        if self._stream is None:
            self._stream = self._cuda.Stream(pixels.device)
        self._stream.wait_stream(self._cuda.current_stream(pixels.device))
        with self._cuda.stream(self._stream):
            self._found = self._teacher(pixels, rows, queries=queries, norm=norm)
            self._ready = self._cuda.Event()
            self._ready.record(self._stream)
        for x in (pixels, rows, queries):
            if x is not None:
                x.record_stream(self._stream)  # not to be freed for others before the teacher has read it

    def take(self) -> list[Tensor]:
        """The features, for use on the current stream, which waits for them; the host does not.

        Raises:
            RuntimeError: nothing was started.
        """
        found, self._found = self._found, None
        if found is None:
            raise RuntimeError("take: expected start() before")
        if self._ready is not None:
            now = self._cuda.current_stream(found[0].device)
            now.wait_event(self._ready)
            for x in found:
                x.record_stream(now)
        return found
