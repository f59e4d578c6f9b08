"""The whole update as one graph: on the CPU with graphs that record what torch does, and its ops audited; then CUDA."""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cohobate.config import for_stage, load
from cohobate.errors import UserError
from cohobate.kernels import use_backend
from cohobate.masking import MaskPlan
from cohobate.methods import StepLoss
from cohobate.teacher import product
from cohobate.training.distributed import Ranks
from cohobate.training.graphs import WARM_UP, Outcome, Pixels, StepGraph, why_not
from cohobate.training.step import Step

HARD = ["model.drop_path=0.2", "optimizer.clip=1.0", "stages.0.steps=9", "optimizer.warmup_epochs=1"]
UPDATES = 9


def captured(step: Step, stub: Any, required: bool = True) -> Step:
    """The same step, taking the CPU for a card whose graphs are tapes."""
    step.graph = StepGraph(step._update, step._generator, required, stub)
    return step


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def run(step: Step, meter: Any, first: int = 0, stop: int = UPDATES) -> list[dict[str, float]]:
    """A row of metrics each update, signals in every third. With the plain ops: native ones may read values."""
    rows = []
    for number in range(first, stop):
        with use_backend("reference"):
            step(number, signals=number % 3 == 2)
        updater = step.stage.updater
        rows.append(meter.read() | {"norm": float(updater.norm), "bad": float(updater.bad)})
    return rows


def test_replays_are_the_eager_updates_bit_for_bit(
    tiny: Any, method: list[str], stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, capture and replays, with and without signals, at learning rates that change; other batches in turn."""
    monkeypatch.setattr(product, "_can_pack", lambda x: False)  # as on a card, weights are read where they lie
    config = tiny.config("run", *method, *HARD)
    stage, step, meter = tiny.prepared(config)
    expected = run(step, meter)
    twin, graphed, twins_meter = tiny.prepared(config)
    assert run(captured(graphed, stub), twins_meter) == expected
    assert [graph.replays for graph in stub.graphs] == [4, 2]  # 9 updates: 3 to warm up, 2 of the others with signals
    assert [set(row) >= {"target/std"} for row in expected] == [False, False, True] * 3
    assert len({row["loss/total"] for row in expected}) == UPDATES
    found, right = weights(twin.method), weights(stage.method)
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    state, twins_state = stage.updater.optimizer.state, twin.updater.optimizer.state
    for one, other in zip(stage.updater.parameters, twin.updater.parameters, strict=True):
        assert all(torch.equal(value, twins_state[other][key]) for key, value in state[one].items())
    kept = weakref.ref(stub.graphs.pop())
    graphed.close()
    assert graphed.graph is None and kept() is None  # its memory is free without a wait for the garbage collector


@pytest.mark.parametrize(
    "word", ["stages.0.set.mask.masks=3", "execution.checkpointing=operations", "execution.checkpointing=blocks"]
)
def test_several_masks_and_checkpointing_too(tiny: Any, stub: Any, word: str) -> None:
    words = ["stages.0.method=dbot", "stages.0.teacher={source: random}", word, *HARD]
    _, step, meter = tiny.prepared(tiny.config("run", *words))
    _, graphed, twins_meter = tiny.prepared(tiny.config("run", *words))
    assert run(captured(graphed, stub), twins_meter) == run(step, meter)


def test_a_bad_update_is_skipped_in_a_graph(tiny: Any, stub: Any) -> None:
    """The verdict is taken on the device: weights that are not finite go in at a replay, and stay what they are."""
    stage, step, meter = tiny.prepared(tiny.config("run", *HARD))
    run(captured(step, stub), meter, stop=5)
    before = weights(stage.method)["student.blocks.1.attn.proj.weight"].clone()
    bias = stage.method.student.norm.bias
    with torch.no_grad():
        bias.fill_(torch.nan)
    (row,) = run(step, meter, 5, 6)
    assert row["bad"] == 1 and float(stage.updater.skipped) == 1 and float(stage.updater.streak) == 1
    assert torch.equal(weights(stage.method)["student.blocks.1.attn.proj.weight"], before)
    with torch.no_grad():
        bias.zero_()
    (row,) = run(step, meter, 6, 7)
    assert row["bad"] == 0 and float(stage.updater.streak) == 0
    assert not torch.equal(weights(stage.method)["student.blocks.1.attn.proj.weight"], before)


def test_the_order_of_streams(stub: Any) -> None:
    ran = []

    def update(batch: Pixels, plan: MaskPlan, signals: bool) -> Any:
        ran.append((stub.now.name, signals))
        return outcome_of(batch.pixels + 1)

    def outcome_of(x: Tensor) -> Outcome:
        return Outcome(StepLoss(x, {}, {"s": x}), x, x)

    graph = StepGraph(update, torch.Generator(), True, stub)
    plan = MaskPlan(torch.arange(4, dtype=torch.int32).expand(2, -1).contiguous(), 1, 4)
    for number in range(WARM_UP):
        found = graph(torch.full((2,), float(number)), plan, False)
        assert found is not None and torch.equal(found.norm, torch.full((2,), number + 1.0)) and not found.loss.signals
    assert stub.log == ["stream0 waits for main", "main waits for stream0"] * WARM_UP
    assert ran == [("stream0", True)] * WARM_UP
    stub.log.clear()
    for number in (7.0, 8.0):
        found = graph(torch.full((2,), number), plan, number == 8)
        assert found is not None and torch.equal(found.norm, torch.full((2,), number + 1))
    assert stub.log == [
        "synchronize",
        "pool",
        "generator registered",
        "capture on stream0 in pool 1",
        "captured",
        "generator registered",
        "capture on stream0 in pool 1",
        "captured",
    ]
    assert ran[WARM_UP:] == [("stream0", False), ("stream0", True)]


def test_a_capture_that_fails(tiny: Any, stub: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The update runs as it is, on the batch and the numbers that it was to have; asked for by name, it raises."""

    def waits(step: Step) -> Step:
        whole = step._forward

        def forward(*args: Any) -> Any:
            result = whole(*args)
            assert float(result.total.detach()) > 0  # reads the device
            return result

        step._forward = forward  # type: ignore[method-assign]
        return step

    config = tiny.config("run", *HARD)
    _, step, meter = tiny.prepared(config)
    expected = run(step, meter)
    _, graphed, twins_meter = tiny.prepared(config)
    with caplog.at_level(logging.WARNING, "cohobate.training"):
        assert run(captured(waits(graphed), stub, False), twins_meter) == expected
    assert graphed.graph is None and stub.now.name == "main" and len(caplog.records) == 1
    assert "execution.cuda_graph: off, the step cannot be captured: operation not permitted" in caplog.text
    _, graphed, meter = tiny.prepared(config)
    with pytest.raises(UserError, match=r"execution\.cuda_graph: the step cannot be captured: operation not permitted"):
        run(captured(waits(graphed), stub), meter)


def test_where_an_update_cannot_be_a_graph() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    config = for_stage(load("demo"), 0)
    assert why_not(config, Ranks(0, 1, cuda)) is None
    assert why_not(config, Ranks(0, 1, cpu)) == "the device is cpu"
    assert why_not(config, Ranks(0, 8, cuda)) == "8 ranks exchange gradients"
    assert why_not(load("demo", ["optimizer.accumulate=4"]), Ranks(0, 1, cuda)) == "optimizer.accumulate is 4"
    assert why_not(load("demo", ["execution.ahead=true"]), Ranks(0, 1, cuda)) == "execution.ahead is true"


class Audit(TorchDispatchMode):
    """Fails on ops that a CUDA graph cannot hold. "waits": that read a value, or whose shape depends on values;
    "copies": that bring values from Python, a copy from the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
    COPIES = ("lift_fresh", "lift_fresh_copy")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.seen = kind, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        boolean = any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in indices)
        bad = name in self.COPIES if self.kind == "copies" else name in self.WAITS or boolean
        assert not bad, f"{func} cannot be captured"
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


# Native ops are on the CPU for good, where reading a value costs nothing, so it is the plain ones that are audited for
# waits; these copy mean and std from the host, which the fast ones keep on the device.
@pytest.mark.parametrize(("backend", "kind"), [("reference", "waits"), (None, "copies")])
def test_a_graph_can_hold_every_op_of_an_update(tiny: Any, method: list[str], backend: str | None, kind: str) -> None:
    """What is captured, forward to optimizer, without and with signals."""
    _, step, _ = tiny.prepared(tiny.config("run", *method, *HARD))
    batch, plan, _ = step._take()
    step._seed(0, 0)
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        step._update(Pixels(batch.pixels), plan, True)
        for signals in (False, True):
            with Audit(kind) as audit:
                step._update(Pixels(batch.pixels), MaskPlan(plan.order, plan.student, plan.teacher), signals)
            assert {"rand", "gather" if backend else "embed_patches"} <= audit.seen


def test_the_audit_finds_what_no_graph_can_hold() -> None:
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="cannot be captured"), Audit("copies"):
        torch.tensor(1.0)
    for wrong in (lambda: x[x > 0], lambda: x.sum().item(), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="cannot be captured"), Audit("waits"):
            wrong()
