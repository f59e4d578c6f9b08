"""The update: what it computes, what it skips, and that it never waits for the device."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cohobate.data import Batch
from cohobate.errors import UserError
from cohobate.kernels import use_backend
from cohobate.masking import random_plan
from cohobate.methods import DBOT, StepLoss
from cohobate.training import train
from cohobate.training.step import Step

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class NoWaiting(TorchDispatchMode):
    """Fails on every op that would make the host wait for a GPU: reading a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        assert name not in WAITS and not boolean, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing(tiny: Any, method: list[str]) -> None:
    hard = ["model.drop_path=0.2", "optimizer.clip=1.0", "optimizer.accumulate=2", "data.batch_size=8"]
    _, step, _ = tiny.prepared(tiny.config("run", *method, *hard))
    with use_backend("reference"):  # native ops are on the CPU for good, where reading a value costs nothing
        step(0)
        with NoWaiting():
            step(1)
            step(2, signals=True)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.zeros(()).item()


def test_accumulation_is_the_mean_over_the_micro_batches(tiny: Any) -> None:
    """Two micro-batches of 8, or one of 16 with the same images: the same gradient norm, up to the order of sums."""
    fp32 = ["precision.compute=fp32"]
    two, two_step, _ = tiny.prepared(tiny.config("a", *fp32, "optimizer.accumulate=2", "data.batch_size=8"))
    one, one_step, _ = tiny.prepared(tiny.config("b", *fp32))
    halves = [two_step.next_batch()[0] for _ in range(2)]
    whole = Batch(*(torch.cat([getattr(half, key) for half in halves]) for key in ("pixels", "sample_ids", "valid")))
    one_step.next_batch = lambda: (whole, 0)
    one_step(0)
    two_step(0)
    torch.testing.assert_close(one.updater.norm, two.updater.norm, rtol=1e-4, atol=0)


def test_the_losses_fall(tiny: Any) -> None:
    for words in ([], ["stages.0.method=dbot", "stages.0.teacher={source: random}"]):
        _, step, meter = tiny.prepared(tiny.config("run", *words, "stages.0.steps=100", "optimizer.lr=3e-3"))
        losses = []
        for number in range(60):
            step(number)
            losses.append(meter.read()["loss/total"])
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_several_masks_of_a_batch(tiny: Any) -> None:
    """The teacher sees the 16 images once, the student three views of each; speed and FLOPs are those of 16 images."""
    words = ["stages.0.method=dbot", "stages.0.teacher={source: random}", "model.drop_path=0.2"]
    stage, step, meter = tiny.prepared(tiny.config("run", *words, "stages.0.set.mask.masks=3"))
    seen: dict[str, list[int]] = {"teacher": [], "student": []}
    for name, sizes in seen.items():
        getattr(stage.method, name).register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
    step(0)
    assert seen == {"teacher": [16], "student": [48]} and meter.read()["loss/total"] > 0
    assert isinstance(stage.method, DBOT)
    one = random_plan(stage.method.student.grid, torch.zeros(1).long(), seed=0, stage=0, epoch=0, ratio=0.75)
    assert stage.flops == stage.method.flops(one, 3) > 2.5 * (stage.method.flops(one) - stage.method.teacher.flops())


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: set[int], what: str) -> None:
    """Make the loss of some updates infinite, or their gradient NaN, each alone."""
    whole, call, now = Step._forward, Step.__call__, -1

    def step(self: Step, number: int, **options: Any) -> None:
        nonlocal now
        now = number
        call(self, number, **options)

    def forward(self: Step, *args: Any) -> StepLoss:
        result = whole(self, *args)
        if now in bad and what == "loss":
            return result._replace(total=result.total + math.inf)
        if now in bad:
            result.total.register_hook(lambda gradient: gradient * math.nan)
        return result

    monkeypatch.setattr(Step, "__call__", step)
    monkeypatch.setattr(Step, "_forward", forward)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_updates_are_skipped_and_counted(tiny: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    poisoned(monkeypatch, {2}, what)
    config = tiny.config("run", "stages=[{name: mae, method: mae, steps: 6}]", "log.every=1")
    assert train(config)[1] == 0
    rows = [json.loads(line) for line in (tiny.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert (rows[2]["loss/total"] is None) == (what == "loss")
    assert (rows[2]["grad_norm"] is None) == (what == "gradient")
    assert all(row["loss/total"] > 0 and row["grad_norm"] > 0 for row in rows[3:])


def test_too_many_bad_updates_end_the_run_with_a_reason(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, set(range(2, 100)), "gradient")
    config = tiny.config("run", "optimizer.max_bad_steps=3", "stages.0.steps=20", "checkpoint.every_steps=2")
    with pytest.raises(UserError, match=r"stages\.0: the gradient was not finite in 4 updates in a row"):
        train(config)
    assert (tiny.folder / "run" / "checkpoints" / "step_000000004").is_dir()  # what was good is kept
