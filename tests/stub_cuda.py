"""A stand-in for ``torch.cuda`` whose graphs are tapes: they record what torch does on the CPU, and do it again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records what torch is asked to do; reading a value, which no capture allows, raises as CUDA does."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, ...]] = []
        self.own: set[int] = set()
        self.others: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.own and id(x) not in self.others:
                self.others[id(x)] = x, x.detach().clone()
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, out))
        self.own.update(id(x) for x in tree_leaves(out) if isinstance(x, Tensor) and id(x) not in self.others)
        return out

    def undo(self) -> None:
        """Nothing has been computed yet: memory from outside is as it was."""
        with torch._C._AutoDispatchBelowAutograd():
            for x, before in self.others.values():
                x.copy_(before)
        self.others.clear()


class Graph:
    """Replays a tape into the memory that the recorded calls returned, as a CUDA graph does."""

    def __init__(self, log: list[str]) -> None:
        self.tape = Tape()
        self.replays = 0
        self.log = log
        self.generator: torch.Generator | None = None

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.log.append("generator registered")
        self.generator = generator

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        state = None if self.generator is None else self.generator.get_state()
        with self.tape:
            yield
        self.tape.undo()
        if self.generator is not None and state is not None:
            self.generator.set_state(state)

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():  # a replay is memory alone
            for func, args, kwargs, out in self.tape.entries:
                found = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stub:
    """What the package uses of ``torch.cuda`` for graphs and streams, with a log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = itertools.count()
        self.now: Any = self.Stream("main")
        self.graphs: list[Graph] = []

    def Stream(self, name: Any = None) -> Any:
        name = name if isinstance(name, str) else f"stream{next(self.names)}"
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.log.append(f"{name} waits for event"),
        )

    def Event(self) -> Any:
        return SimpleNamespace(record=lambda stream: self.log.append(f"{stream.name} records event"))

    def CUDAGraph(self) -> Graph:
        self.graphs.append(Graph(self.log))
        return self.graphs[-1]

    def graph_pool_handle(self) -> int:
        self.log.append("pool")
        return next(self.names)

    def current_stream(self, device: Any = None) -> Any:
        return self.now

    def synchronize(self, device: Any = None) -> None:
        self.log.append("synchronize")

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Any, mode: str) -> Iterator[None]:
        assert self.now is stream and mode == "thread_local"
        self.log.append(f"capture on {stream.name} in pool {pool}")
        with graph.recorded():
            yield
        self.log.append("captured")
