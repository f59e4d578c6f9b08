"""Replays of the frozen teacher: their bookkeeping on the CPU, with graphs that record what torch does; then CUDA."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate import models
from cohobate.errors import UserError
from cohobate.kernels import use_backend
from cohobate.models import Precision
from cohobate.teacher import FrozenTeacher, frozen, graphs
from cohobate.teacher.fp8 import quantise
from cohobate.teacher.graphs import Ahead, Replays, replayable

FP32 = Precision(torch.float32, torch.float32)


def teacher_of(**options: Any) -> FrozenTeacher:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": (32, 32), "patch": 8, "width": 64, "depth": 4, "heads": 4}
    return FrozenTeacher(models.build("tiny", **shape), (2, 4), **options)


def pixels_of(seed: int = 1, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 1, 32, 32, 3), dtype=torch.uint8, generator=generator)


def rows_of(*numbers: int, batch: int = 2) -> Tensor:
    return torch.tensor([numbers] * batch, dtype=torch.int32)


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def replayed(stub: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> FrozenTeacher:
    """A teacher that takes the CPU for a card whose graphs are tapes."""
    monkeypatch.setattr(frozen, "replayable", lambda pixels: True)
    teacher = teacher_of(**options)
    teacher._replays = Replays(required=True, cuda=stub)
    return teacher


def test_a_replay_is_the_eager_call_bit_for_bit(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, eager = replayed(stub, monkeypatch, precision=FP32), teacher_of(precision=FP32, cuda_graph=False)
    calls: list[dict[str, Any]] = [
        {},
        {"rows": rows_of(0, 2, 5)},
        {"rows": rows_of(0, 2, 5), "queries": rows_of(0, 1)},
        {"queries": rows_of(3, 4, 6)},
        {"norm": True},
    ]
    for _ in range(2):
        for number, call in enumerate(calls):
            pixels = pixels_of(number)
            assert same(teacher(pixels, **call), eager(pixels, **call))
    other = {"rows": rows_of(1, 3, 7), "queries": rows_of(0, 2)}  # the same shapes with other values
    assert same(teacher(pixels_of(9), **other), eager(pixels_of(9), **other))
    assert len(teacher._replays) == len(calls) == len(stub.graphs)
    assert [graph.replays for graph in stub.graphs] == [2, 2, 3, 2, 2]


def test_a_batch_of_another_size_has_its_own_graph(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = replayed(stub, monkeypatch)
    for batch in (2, 3, 2, 3):
        assert teacher(pixels_of(batch=batch))[0].shape[0] == batch
    assert len(stub.graphs) == 2
    with use_backend("reference"):  # other kernels than those captured
        teacher(pixels_of())
    assert len(stub.graphs) == 3


def test_results_are_the_callers_over_any_number_of_calls(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, eager = replayed(stub, monkeypatch), teacher_of(cuda_graph=False)
    inputs = [pixels_of(seed) for seed in range(4)]
    found = [teacher(pixels) for pixels in inputs]
    assert all(same(got, eager(pixels)) for got, pixels in zip(found, inputs, strict=True))
    found[0][0].zero_()
    assert same(teacher(inputs[0]), eager(inputs[0]))


def test_a_graph_keeps_no_hold_of_the_first_batch(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, pixels = replayed(stub, monkeypatch), pixels_of()
    expected = teacher(pixels)
    teacher(pixels_of(2))
    assert torch.equal(pixels, pixels_of())  # the second batch was not copied over the first
    assert same(teacher(pixels), expected)


def test_the_order_of_streams(stub: Any) -> None:
    replays, ran = Replays(cuda=stub), []

    def compute(pixels: Tensor, rows: Tensor | None, queries: Tensor | None, norm: bool) -> list[Tensor]:
        ran.append(stub.now.name)
        return [pixels + 1]

    inputs = (torch.zeros(2), None, None)
    assert same(replays(compute, inputs, False), [torch.ones(2)])
    assert ran == ["stream0", "stream0"]  # once to warm up, once recorded, both beside the current stream
    assert stub.log == [
        "synchronize",
        "pool",
        "stream0 waits for main",
        "main waits for stream0",
        "capture on stream0 in pool 1",
        "captured",
        "main waits for event",
        "main records event",
    ]
    stub.log.clear()
    with stub.stream(stub.Stream("side")):
        assert same(replays(compute, (torch.full((2,), 4.0), None, None), False), [torch.full((2,), 5.0)])
    assert len(ran) == 2
    assert stub.log == ["side waits for event", "side records event"]  # graphs share memory: one at a time
    replays(compute, (torch.zeros(3), None, None), False)
    assert stub.log.count("pool") == 0 and "capture on stream0 in pool 1" in stub.log


def test_the_shape_that_was_not_used_for_longest_goes(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    replays = Replays(cuda=stub)

    def call(size: int) -> None:
        replays(lambda pixels, *_: [pixels + 1], (torch.zeros(size), None, None), False)

    for size in (1, 2, 1, 3, 1):  # 3 displaces 2
        call(size)
    assert len(replays) == 2 and len(stub.graphs) == 3
    call(2)
    assert len(replays) == 2 and len(stub.graphs) == 4


def test_weights_that_move_or_change_are_captured_anew(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, pixels = replayed(stub, monkeypatch), pixels_of()
    teacher(pixels)
    stub.log.clear()
    teacher.to("cpu")
    assert len(teacher._replays) == 0 and stub.log == ["synchronize"]
    before = teacher(pixels)
    assert stub.log.count("pool") == 1  # the old one went with its graphs
    quantise(teacher, pixels)
    after = teacher(pixels)
    assert len(stub.graphs) == 3 and not same(after, before)
    plain = teacher_of(cuda_graph=False)
    quantise(plain, pixels)
    monkeypatch.undo()
    assert same(after, plain(pixels))


def test_nothing_in_the_capture_waits_for_the_device(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call checks that features are finite, which reads them: while warming up, not in the capture."""
    teacher = replayed(stub, monkeypatch)
    assert not teacher._checked
    teacher(pixels_of())  # the tape would raise
    assert teacher._checked and len(stub.graphs) == 1


def syncing(pixels: Tensor, rows: Tensor | None, queries: Tensor | None, norm: bool) -> list[Tensor]:
    return [pixels * float(pixels.sum())]


def test_a_capture_that_fails(stub: Any, caplog: pytest.LogCaptureFixture) -> None:
    inputs = (torch.ones(2), None, None)
    with pytest.raises(UserError, match=r"cuda_graph: the teacher's forward pass cannot be captured: operation not"):
        Replays(required=True, cuda=stub)(syncing, inputs, False)
    assert stub.now.name == "main"
    replays = Replays(cuda=stub)
    with caplog.at_level(logging.WARNING, "cohobate.teacher"):
        for _ in range(3):
            assert same(replays(syncing, inputs, False), [torch.full((2,), 2.0)])
    assert len(caplog.records) == 1 and "cuda_graph: off, the teacher's forward pass" in caplog.text
    assert replays.failed and len(replays) == 0


def test_what_an_eager_call_raises_is_raised(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = replayed(stub, monkeypatch)
    with pytest.raises(UserError, match="pixels: expected uint8"):
        teacher(pixels_of()[:, :, :16])
    assert not teacher._replays.failed and len(teacher._replays) == 0


def test_copies_have_no_graphs(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = replayed(stub, monkeypatch)
    teacher(pixels_of())
    assert len(copy.deepcopy(teacher)._replays) == 0 and len(teacher._replays) == 1
    found = pickle.loads(pickle.dumps(teacher._replays))
    assert isinstance(found, Replays) and found.required and len(found) == 0


def test_off_cuda_nothing_is_captured() -> None:
    teacher = teacher_of(cuda_graph=True)
    teacher(pixels_of())
    assert len(teacher._replays) == 0 and not replayable(pixels_of())


class OnCard:
    """A tensor that says it is on a card, and logs who uses it."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, name: str, stub: Any) -> None:
        self.record_stream = lambda stream: stub.log.append(f"{name} used on {stream.name}")


def test_ahead_lets_the_current_stream_go_on(stub: Any) -> None:
    out = OnCard("out", stub)

    def teacher(pixels: Any, rows: Any, *, queries: Any, norm: bool) -> list[Any]:
        stub.log.append(f"teacher on {stub.now.name}, norm {norm}")
        return [out]

    ahead = Ahead(teacher, stub.Stream("side"), stub)
    ahead.start(OnCard("pixels", stub), OnCard("rows", stub), norm=True)  # type: ignore[arg-type]
    stub.log.append("optimizer")
    assert ahead.take() == [out]
    assert stub.log == [
        "side waits for main",
        "teacher on side, norm True",
        "side records event",
        "pixels used on side",
        "rows used on side",
        "optimizer",
        "main waits for event",
        "out used on main",
    ]


def test_ahead_off_cuda() -> None:
    teacher = teacher_of()
    ahead = Ahead(teacher)
    rows = rows_of(1, 2, 3)
    ahead.start(pixels_of(), rows, norm=True)
    with pytest.raises(RuntimeError, match=r"start: expected take\(\)"):
        ahead.start(pixels_of())
    assert same(ahead.take(), teacher(pixels_of(), rows, norm=True))
    with pytest.raises(RuntimeError, match=r"take: expected start\(\)"):
        ahead.take()


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [FP32, Precision()])
def test_cuda_replays_are_the_eager_calls_bit_for_bit(precision: Precision) -> None:
    """Alternating shapes, each call with values of its own, results kept over all of them."""
    teacher = teacher_of(precision=precision, cuda_graph=True).cuda()
    eager = teacher_of(precision=precision, cuda_graph=False).cuda()
    calls: list[dict[str, Any]] = [{}, {"rows": rows_of(0, 2, 5).cuda(), "queries": rows_of(0, 3).cuda()}]
    found, expected = [], []
    for seed in range(8):
        pixels, call = pixels_of(seed).cuda(), calls[seed % 2]
        found.append(teacher(pixels, **call))
        expected.append(eager(pixels, **call))
        pixels.zero_()  # the caller may reuse its memory
    assert len(teacher._replays) == 2
    assert all(same(got, right) for got, right in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_cuda_replay_does_not_wait_for_the_device() -> None:
    teacher, pixels = teacher_of(cuda_graph=True).cuda(), pixels_of().cuda()
    teacher(pixels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_capture_inside_a_training_step() -> None:
    """The first step captures between a student's forward and backward pass; gradients are those without graphs."""

    def train(cuda_graph: bool) -> list[Tensor]:
        torch.manual_seed(0)
        teacher = teacher_of(precision=FP32, cuda_graph=cuda_graph).cuda()
        student = torch.nn.Linear(64, 64, device="cuda")
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        losses = []
        for seed in range(4):
            pixels = pixels_of(seed).cuda()
            hidden = student(torch.ones(2, 17, 64, device="cuda") * seed)
            target = teacher(pixels)[-1]
            loss = (hidden - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    assert same(train(True), train(False))


@pytest.mark.gpu
def test_cuda_teacher_inside_somebody_elses_capture() -> None:
    teacher, pixels = teacher_of(cuda_graph=True).cuda(), pixels_of().cuda()
    expected = teacher(pixels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = teacher(pixels)
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, expected)


@pytest.mark.gpu
def test_cuda_teacher_moved_is_captured_anew() -> None:
    teacher, pixels = teacher_of(cuda_graph=True).cuda(), pixels_of().cuda()
    expected = teacher(pixels)
    teacher.cpu()
    teacher.cuda()
    assert len(teacher._replays) == 0 and same(teacher(pixels), expected)


@pytest.mark.gpu
def test_cuda_ahead_beside_an_optimizer() -> None:
    teacher, eager = teacher_of(cuda_graph=True).cuda(), teacher_of(cuda_graph=False).cuda()
    ahead, weights = Ahead(teacher), torch.zeros(1 << 24, device="cuda")
    for seed in range(6):
        pixels = pixels_of(seed).cuda()
        expected = eager(pixels)
        ahead.start(pixels)
        del pixels  # its memory may be given to others only when the teacher has read it
        weights.add_(1.0)
        torch.full((2, 1, 32, 32, 3), 255, dtype=torch.uint8, device="cuda")
        assert same(ahead.take(), expected)
