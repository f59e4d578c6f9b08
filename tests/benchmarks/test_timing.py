"""The CUDA timer's order of events, on a card that only writes down what it is asked to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cohobate.benchmarks import harness, timing
from cohobate.benchmarks.harness import Case, Provider


class Card:
    """Stands in for ``torch.cuda``: a clock that every call moves by a millisecond, and a diary."""

    def __init__(self, capturable: bool = True) -> None:
        self.diary: list[str] = []
        self.now, self.capturable, self.where, self.capturing = 0.0, capturable, "main", False

    def call(self) -> dict[str, torch.Tensor]:
        if self.capturing and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.diary.append("captured" if self.capturing else f"call on {self.where}")
        self.now += 0.0 if self.capturing else 1.0
        return {"out": torch.ones(1)}

    def Stream(self) -> Any:
        return SimpleNamespace(name="side", wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(name="main", wait_stream=lambda other: None)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.where = self.where, stream.name
        try:
            yield
        finally:
            self.where = before

    def synchronize(self) -> None:
        pass

    def CUDAGraph(self) -> Any:
        card = self

        class Graph:
            calls = 0

            def replay(self) -> None:
                card.diary.append(f"replay of {self.calls}")
                card.now += self.calls

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        before, outside = len(self.diary), self.where
        self.capturing, self.where = True, stream.name
        try:
            yield
        finally:
            self.capturing = False
        self.where = outside  # as in torch: behind an error the stream stays the capture's
        graph.calls = len(self.diary) - before

    def Event(self, enable_timing: bool) -> Any:
        card = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = card.now

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        return Event()


class Scratch:
    def __init__(self, card: Card) -> None:
        self.card = card

    def fill_(self, value: int) -> None:
        self.card.diary.append("flush")
        self.card.now += 100.0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return on(Card(), monkeypatch)


def on(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setattr(torch, "cuda", card)
    return card


def timer(card: Card) -> timing.CudaTimer:
    made = timing.CudaTimer.__new__(timing.CudaTimer)
    made.scratch, made.counter = Scratch(card), iter(range(1, 1000))  # type: ignore[assignment]
    return made


def test_a_graph_of_all_input_sets_is_replayed_behind_a_flush(card: Card) -> None:
    sample = timer(card).prepare(Provider("x", "fwd", card.call, copies=5))
    assert card.diary == ["call on side"] * 5 + ["captured"] * 5  # every input set is warm before the capture
    del card.diary[:]
    assert sample() == 1.0 and card.diary == ["flush", "replay of 5"]  # a call, not five; the flush is not in it


def test_what_makes_graphs_itself_is_launched_call_by_call(card: Card) -> None:
    reset = lambda: card.diary.append("reset")  # noqa: E731
    sample = timer(card).prepare(Provider("x", "fwd", card.call, reset, capture=False))
    assert card.diary == ["reset", "call on main"] * 3
    del card.diary[:]
    assert sample() == 1.0 and card.diary == ["reset", "flush", "call on main"]


def test_what_cannot_be_captured_is_timed_all_the_same_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    card = on(Card(capturable=False), monkeypatch)
    case = Case("op", "8 rows", "cuda", {"out": torch.ones(1)})
    effort = harness.Effort(seconds=0.0, least=2, repeats=1, memory=False)
    (row,) = harness.measure(case, [Provider("x", "fwd", card.call)], effort=effort, timer=timer(card), baselines=())
    assert row.p50_ms == 1.0 and card.where == "main"
    assert row.note == "launched call by call, cannot be captured: operation not permitted when stream is capturing"
