"""``cohobate bench step``: the command, its verdicts, and that a wrong gradient gets no ratio."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate.benchmarks import command, machine, step
from cohobate.benchmarks.harness import LINEAR, QUICK, Row, judge, read_rows, straightness
from cohobate.benchmarks.twins import MAKERS, Shape, make
from cohobate.errors import UserError

objective = importlib.import_module("cohobate.methods.objective")  # a function of that name hides it
SMALL = Shape("dbot", "tiny", image=32, batch=2)


@pytest.fixture
def setting() -> command.Setting:
    ceilings = machine.Ceilings("cpu", ((1024, 1.0),), {"fp32": 0.1, "bf16": 0.4})
    return command.Setting("cpu", machine.environment("cpu"), ceilings, QUICK)


def scaled_gradient(factor: float, dtype: torch.dtype) -> Callable[..., Any]:
    """The alignment loss, right but for the gradient of predictions of that dtype."""
    right = objective.align_loss

    def wrong(predictions: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        for prediction in predictions:
            if prediction.requires_grad and prediction.dtype == dtype:
                prediction.register_hook(lambda gradient: gradient * factor)
        return right(predictions, *args, **kwargs)

    return wrong


def test_a_gradient_that_is_wrong_by_a_hundredth_stops_the_benchmark(
    setting: command.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "align_loss", scaled_gradient(1.01, torch.float32))
    with pytest.raises(UserError, match=r"dbot_step: the engine in fp32 disagrees .* gradient 1\.\de-02"):
        step.run(SMALL, setting, compiled=False)


def test_a_wrong_bf16_kernel_gets_no_ratio(setting: command.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "align_loss", scaled_gradient(-1.0, torch.bfloat16))
    rows = step.run(SMALL, setting, compiled=False)
    (ours,) = (row for row in rows if row.provider == "engine bf16")
    assert not ours.agrees and "numerics disagree" in ours.note
    assert ours.ratio_vs_eager is None and ours.ratio_vs_best_other is None and ours.best_other is None
    assert next(row for row in rows if row.provider == "engine fp32").agrees


def test_the_command_writes_every_figure_of_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, threads = tmp_path / "out.jsonl", torch.get_num_threads()
    try:
        assert step.main(["--quick", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "MFU" in printed and "dbot_step train" in printed
    exact, *rows = read_rows(path)
    assert exact.provider == "engine fp32" and exact.agrees and exact.p50_ms is None
    assert [row.provider for row in rows] == ["literal fp32", "literal bf16 autocast", "eager bf16", "engine bf16"]
    for row in rows:
        assert row.agrees and row.grad_rel_err is not None and row.bytes and row.flops and row.p50_ms
        assert row.floor_ms and row.pct_of_floor == pytest.approx(100 * row.floor_ms / row.p50_ms, rel=1e-3)
        rate = next(r["tflop_s"] for r in command.ceiling_rows(path) if r.get("dtype") == row.dtype)
        assert row.mfu == pytest.approx(row.flops / row.p50_ms / rate / 1e9, rel=1e-2)


def test_the_variants_that_are_compared_with() -> None:
    twins = make(SMALL, "cpu", seed=0)
    main, everything = (step.baselines(twins, "cpu", which) for which in ("main", "all"))
    assert [v.name for v in main] == [v.name for v in everything if "max-autotune" not in v.name]
    assert len(everything) > len(main) and {v.role for v in main} == {"eager", "other", "compile"}
    assert all(v.role != "compile" for v in step.baselines(twins, "cpu", compiled=False))


@pytest.mark.parametrize("recipe", MAKERS)
def test_the_cost_of_a_step_by_hand(recipe: str) -> None:
    twins = make(Shape(recipe, "tiny", image=64, batch=2, frames=4), "cpu", seed=0)
    trained = sum(p.numel() for name, p in twins.literal.named_parameters() if p.requires_grad)
    frozen = sum(p.numel() for name, p in twins.literal.named_parameters() if name.startswith("teacher.blocks"))
    # fp32: read forward and backward, gradient out and in, weight and two averages in and out.
    weights = 4 * trained + 4 * trained + 2 * 4 * trained + 2 * 3 * 4 * trained
    pixels = 2 * (4 if recipe in ("videomae", "amd") else 1) * 64 * 64 * 3
    assert step.cost(twins, "fp32").bytes == weights + 4 * frozen + pixels
    half = step.cost(twins, "bf16")
    assert half.bytes == weights - 4 * trained + 2 * frozen + pixels
    assert half.flops == 2 * twins.method.flops(twins.plan) > 0


def test_steps_of_one_module_share_its_weights_and_start_from_them() -> None:
    found = step.baselines(make(SMALL, "cpu", seed=0), "cpu")
    steps = step.variant_steps(found)
    literal, half, eager = (steps[name] for name in ("literal fp32", "literal bf16 autocast", "eager bf16"))
    assert literal.parameters is half.parameters and literal.parameters is not eager.parameters
    before = {name: p.detach().clone() for name, p in literal.parameters.items()}
    first, second = literal(), literal()
    assert not torch.equal(first, second)
    literal.reset()
    assert all(torch.equal(p, before[name]) for name, p in literal.parameters.items())
    assert torch.equal(literal(), first)


def row(provider: str, role: str, p50: float, **more: Any) -> Row:
    made = Row("s", provider, role, "train", "cpu", "bf16", "x", p50_ms=p50, spread=0.01, max_rel_err=0.0, **more)
    made.tolerance = made.tolerance if made.tolerance is not None else 1e-2
    return made


def test_the_fastest_compiled_step_that_agrees_is_the_one_to_beat() -> None:
    ours = row("ours", "ours", 10.0)
    fast_but_wrong = row("compiled c", "compile", 12.0)
    fast_but_wrong.max_rel_err = 1.0
    rows = [row("eager", "eager", 90.0), row("compiled a", "compile", 30.0), row("compiled b", "compile", 20.0)]
    judge([*rows, fast_but_wrong, ours])
    assert ours.ratio_vs_compile == ours.ratio_vs_best_other == 2.0 and ours.best_other == "compiled b"


def timed(times: list[float], spread: float = 0.02, others: float = 0.0) -> list[Row]:
    rows = [row("engine bf16", "ours", ms) for ms in times]
    for one in rows:
        one.spread, one.others_cores = spread, others
    return rows


BATCHES = [4, 8, 16, 32, 64]


def test_times_on_a_line_are_called_linear() -> None:
    text = straightness(timed([7.0 + 3.0 * n for n in BATCHES]), BATCHES)
    assert text.startswith("linear: 7 ms + 3 ms x n, off by 0.0% at most") and text.endswith("spread 2.0%")


def test_times_off_the_line_are_not() -> None:
    text = straightness(timed([0.1 * n**2 for n in BATCHES]), BATCHES)
    assert text.startswith("not linear: ") and float(text.split("off by ")[1].split("%")[0]) > 100 * LINEAR


@pytest.mark.parametrize(
    ("more", "why"),
    [({"spread": 0.3}, "no line: spread 30% exceeds 10%"), ({"others": 0.5}, "no line: other processes used 0.5")],
)
def test_times_that_waver_say_nothing(more: dict[str, float], why: str) -> None:
    assert straightness(timed([7.0 + 3.0 * n for n in BATCHES], **more), BATCHES).startswith(why)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--picture", "x.png"], "--picture: expected --profile with it"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(arguments) == 2
    assert message in capsys.readouterr().err
