"""The harness on scripted providers: what it computes, and everything it must refuse to say."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cohobate.benchmarks import machine, timing
from cohobate.benchmarks.harness import (
    Case,
    Effort,
    Provider,
    Row,
    errors,
    measure,
    read_rows,
    relative_error,
    write_rows,
)
from cohobate.benchmarks.machine import Ceilings, Others, environment
from cohobate.benchmarks.regression import compare
from cohobate.errors import UserError
from cohobate.kernels import Cost

ANSWER = torch.linspace(1, 2, 64, dtype=torch.float64)
GRADIENT = torch.linspace(-1, 1, 64, dtype=torch.float64)
CASE = Case("op", "64", "cpu", {"out": ANSWER, "grad x": GRADIENT})
EFFORT = Effort(seconds=1e-9, least=5, repeats=2, memory=False)


class Script:
    """A timer whose milliseconds are written down, by provider name; nothing depends on this machine's clock."""

    def __init__(self, **times: list[float]) -> None:
        self.times = times

    def prepare(self, provider: Any) -> Callable[[], float]:
        turns: Iterator[float] = iter(self.times[provider.name] * 1000)
        return lambda: next(turns)


def provider(
    name: str, role: str, out: torch.Tensor = ANSWER, gradient: torch.Tensor = GRADIENT, **more: Any
) -> Provider:
    results = {"out": out.float(), "grad x": gradient.float()}
    return Provider(name, "fwd+bwd", lambda: results, role=role, **more)


EAGER, COMPILE, OURS = provider("eager", "eager"), provider("compile", "compile"), provider("ours", "ours")
STEADY = {"eager": [12.0], "compile": [6.0], "ours": [2.0]}


def rows_of(providers: list[Provider], times: dict[str, list[float]] = STEADY, **more: Any) -> dict[str, Row]:
    rows = measure(CASE, providers, timer=Script(**times), effort=EFFORT, **more)
    return {row.provider: row for row in rows}


def no_ratio(row: Row) -> bool:
    return row.ratio_vs_eager is None and row.ratio_vs_compile is None and row.ratio_vs_best_other is None


def test_ratios_of_steady_and_right_providers() -> None:
    rows = rows_of([EAGER, COMPILE, OURS])
    ours = rows["ours"]
    assert (ours.ratio_vs_eager, ours.ratio_vs_compile, ours.ratio_vs_best_other) == (6.0, 3.0, 3.0)
    assert ours.best_other == "compile" and ours.note == "" and ours.spread == 0.0 and ours.samples == 10
    assert rows["compile"].ratio_vs_eager == 2.0 and rows["compile"].ratio_vs_best_other is None
    assert no_ratio(rows["eager"])


def test_a_slower_one_of_ours_gets_its_ratio_below_one() -> None:
    ours = rows_of([EAGER, COMPILE, OURS], {**STEADY, "ours": [24.0]})["ours"]
    assert ours.ratio_vs_eager == 0.5 and ours.ratio_vs_best_other == 0.25


def test_the_best_other_may_be_neither_baseline() -> None:
    ours = rows_of([EAGER, COMPILE, provider("third", "other"), OURS], {**STEADY, "third": [3.0]})["ours"]
    assert ours.best_other == "third" and ours.ratio_vs_best_other == 1.5 and ours.ratio_vs_compile == 3.0


def test_a_half_precision_baseline_is_the_best_other_only_of_half_precision() -> None:
    half = provider("half", "other", dtype="bf16")
    times = {**STEADY, "half": [1.0], "ours bf16": [0.5]}
    rows = rows_of([EAGER, COMPILE, half, OURS, provider("ours bf16", "ours", dtype="bf16")], times)
    assert rows["ours"].best_other == "compile" and rows["ours"].ratio_vs_best_other == 3.0
    assert rows["ours bf16"].best_other == "half" and rows["ours bf16"].ratio_vs_best_other == 2.0


@pytest.mark.parametrize(
    ("wrong", "figure"),
    [({"out": ANSWER + 1e-3}, "output"), ({"gradient": -GRADIENT}, "gradient")],
    ids=["output", "gradient"],
)
def test_refuses_when_ours_is_wrong(wrong: dict[str, torch.Tensor], figure: str) -> None:
    ours = rows_of([EAGER, COMPILE, provider("ours", "ours", **wrong)])["ours"]
    assert no_ratio(ours) and "numerics disagree" in ours.note and figure in ours.note
    assert ours.p50_ms == 2.0, "the time itself is still reported"


def test_refuses_when_the_baseline_is_wrong() -> None:
    ours = rows_of([provider("eager", "eager", out=ANSWER * 1.01), COMPILE, OURS])["ours"]
    assert ours.ratio_vs_eager is None and "numerics of eager disagree" in ours.note
    assert ours.ratio_vs_compile == 3.0


def test_a_wrong_provider_is_nobodys_best_other() -> None:
    cheat = provider("cheat", "other", out=ANSWER * 0)
    ours = rows_of([EAGER, COMPILE, cheat, OURS], {**STEADY, "cheat": [0.1]})["ours"]
    assert ours.best_other == "compile"


@pytest.mark.parametrize("gone", ["eager", "compile"])
def test_refuses_when_a_baseline_is_missing(gone: str) -> None:
    ours = rows_of([p for p in (EAGER, COMPILE, OURS) if p.name != gone])["ours"]
    assert no_ratio(ours) and f"baseline missing ({gone})" in ours.note


def test_a_baseline_that_fails_is_missing_and_says_why() -> None:
    def fail() -> Any:
        raise RuntimeError("no compiler\nand a long story")

    rows = rows_of([EAGER, Provider("compile", "fwd+bwd", fail, role="compile"), OURS])
    assert rows["compile"].note == "failed: RuntimeError: no compiler" and rows["compile"].p50_ms is None
    assert no_ratio(rows["ours"]) and "baseline missing (compile)" in rows["ours"].note


def test_fewer_baselines_only_when_asked() -> None:
    ours = rows_of([EAGER, OURS], baselines=("eager",))["ours"]
    assert ours.ratio_vs_eager == 6.0 and ours.ratio_vs_compile is None


def test_refuses_when_the_spread_exceeds_the_gain() -> None:
    times = {"eager": [2.2], "compile": [6.0], "ours": [1.8, 1.9, 2.0, 2.1, 2.2]}
    ours = rows_of([EAGER, COMPILE, OURS], times)["ours"]
    assert ours.spread == pytest.approx(0.12)  # p20 1.88, p80 2.12, median 2.0
    assert ours.ratio_vs_eager is None and "spread 12% exceeds the difference 10%" in ours.note
    assert ours.ratio_vs_compile == 3.0


def test_refuses_any_ratio_of_a_time_that_varies_by_more_than_half() -> None:
    ours = rows_of([EAGER, COMPILE, OURS], {**STEADY, "eager": [10.0, 60.0, 100.0, 140.0, 200.0]})["ours"]
    assert ours.ratio_vs_eager is None and "spread 102% exceeds 50%" in ours.note  # p20 50, p50 100, p80 152
    assert ours.ratio_vs_compile == 3.0


class Busy:
    """A machine on which others use so many cores, look by look."""

    def __init__(self, *cores: float | None) -> None:
        self.looks = list(cores)

    def __call__(self) -> Busy:
        return self

    def cores(self) -> float | None:
        return self.looks.pop(0)


def test_refuses_when_other_processes_used_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Others", Busy(0.9, 0.9, 0.9))
    ours = rows_of([EAGER, COMPILE, OURS])["ours"]
    assert no_ratio(ours) and "other processes used 0.9 cores" in ours.note and ours.p50_ms == 2.0


def test_a_disturbed_case_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Others", Busy(0.9, 0.05))
    ours = rows_of([EAGER, COMPILE, OURS])["ours"]
    assert ours.ratio_vs_eager == 6.0 and ours.others_cores == 0.05 and ours.samples == 10


def test_what_other_processes_use_is_seen() -> None:
    others = Others()
    assert others.cores() is None, "too short a look"
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        time.sleep(0.3)
        others, end = Others(), time.perf_counter() + 1.0
        while time.perf_counter() < end:
            time.sleep(0.05)
        cores = others.cores()
        spinning.kill()
    assert cores is None or cores > 0.1, "a process that never rests"


def test_disagreement_between_repeats_is_spread() -> None:
    assert timing.spread([[1.0] * 9, [1.5] * 9]) >= 0.4


def test_modes_are_never_compared() -> None:
    forward = dataclasses.replace(EAGER, mode="fwd")
    rows = rows_of([forward, COMPILE, OURS])
    assert "baseline missing (eager)" in rows["ours"].note


def test_a_permutation_is_compared_its_own_way() -> None:
    case = Case("op", "64", "cpu", {}, compare=lambda got: (0.0 if len(got["out"]) == 64 else math.inf, None))
    row = measure(case, [OURS], timer=Script(ours=[1.0]), effort=EFFORT, baselines=())[0]
    assert row.max_rel_err == 0.0 and row.grad_rel_err is None and row.agrees


def test_floor_and_its_share() -> None:
    ceilings = Ceilings("cpu", ((1_000, 50.0), (1_000_000, 10.0)), {"fp32": 0.5})
    assert ceilings.floor_ms(Cost(1_000_000, 0), "fp32") == pytest.approx(0.1)  # 1 MB at 10 GB/s
    assert ceilings.floor_ms(Cost(1_000, 0), "fp32") == pytest.approx(2e-5)  # in the cache, at 50 GB/s
    assert ceilings.floor_ms(Cost(1_000, 10**9), "fp32") == pytest.approx(2.0)  # 1 GFLOP at 0.5 TFLOP/s
    assert ceilings.floor_ms(Cost(1_000, 10**9), "bf16") is None
    assert dataclasses.replace(ceilings, device="cuda").floor_ms(Cost(1_000, 0), "fp32") == pytest.approx(1e-4)
    costly = dataclasses.replace(OURS, cost=Cost(1_000_000, 0))
    ours = rows_of([EAGER, COMPILE, costly], ceilings=ceilings)["ours"]
    assert ours.pct_of_floor == pytest.approx(5.0) and ours.bytes == 1_000_000


def test_errors_see_one_wrong_value_in_a_million() -> None:
    right = torch.ones(1_000_000, dtype=torch.float64)
    wrong = right.clone()
    wrong[17] += 0.05  # a relative Frobenius error of 5e-5 only
    assert relative_error(wrong, right) == pytest.approx(0.05)


@pytest.mark.parametrize("bad", [torch.full((64,), math.nan), torch.full((64,), math.inf), torch.ones(63)])
def test_values_that_are_no_numbers_or_of_another_shape_never_agree(bad: torch.Tensor) -> None:
    assert relative_error(bad, ANSWER) == math.inf
    assert errors({"out": bad}, {"out": ANSWER}) == (math.inf, None)
    ours = rows_of([EAGER, COMPILE, provider("ours", "ours", out=bad)])["ours"]
    assert no_ratio(ours) and not ours.agrees


def test_a_missing_result_never_agrees() -> None:
    assert errors({"out": ANSWER}, CASE.expected) == (0.0, math.inf)


def test_the_tolerance_is_the_dtypes_unless_stated() -> None:
    close = ANSWER * (1 + 3e-3)
    assert not rows_of([provider("ours", "ours", out=close)])["ours"].agrees
    assert rows_of([provider("ours", "ours", out=close, dtype="bf16")])["ours"].agrees
    assert rows_of([provider("ours", "ours", out=close, tolerance=4e-3)])["ours"].agrees


def test_turns_rotate() -> None:
    seen: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        return lambda: float(len(seen)) if seen.append(name) is None else 0.0  # type: ignore[func-returns-value]

    times = timing.interleave([sampler("a"), sampler("b"), sampler("c")], 3)
    assert "".join(seen) == "abc" + "bca" + "cab"
    assert times == [[1.0, 6.0, 8.0], [2.0, 4.0, 9.0], [3.0, 5.0, 7.0]]


def test_quantiles_are_numpys() -> None:
    values = list(np.random.default_rng(0).random(37))
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert timing.quantile(values, q) == pytest.approx(float(np.quantile(values, q)))


class Clock:
    """A clock that moves only when something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_the_cpu_timer_times_the_function_and_not_the_reset() -> None:
    clock, order = Clock(), []

    def function() -> None:
        order.append("function")
        clock.spend(0.005)

    def reset() -> None:
        order.append("reset")
        clock.spend(3.0)

    sample = timing.CpuTimer(clock).prepare(Provider("x", "step", function, reset))
    del order[:]
    assert sample() == pytest.approx(5.0) and order == ["reset", "function"]


def test_a_very_short_call_is_repeated_inside_a_sample() -> None:
    clock, calls = Clock(), []
    sample = timing.CpuTimer(clock).prepare(Provider("x", "fwd", lambda: (calls.append(1), clock.spend(1e-5))))
    del calls[:]
    assert sample() == pytest.approx(0.01) and len(calls) == 50  # 0.5 ms of calls of 0.01 ms


@pytest.mark.skipif(not timing.CLEAR_REFS.exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_known_allocation() -> None:
    def function() -> torch.Tensor:
        first = torch.zeros(2**24)  # 64 MB
        second = first + 1  # 128 MB held
        del first
        return second.sum()

    peak = timing.peak_memory_mb(Provider("x", "fwd", function), "cpu")
    # The kernel counts pages in batches a thread, and a first call may load a library: a few MB either way.
    assert peak is not None and 124 < peak < 140


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = list(rows_of([EAGER, COMPILE, provider("ours", "ours", out=ANSWER * math.nan)]).values())
    path = tmp_path / "deep" / "rows.jsonl"
    write_rows(path, [{"name": "ceiling.copy", "gb_s": 40.0}, *rows])
    assert all(json.loads(line)["name"] for line in path.read_text().splitlines())
    back = read_rows(path)
    assert [row.provider for row in back] == ["eager", "compile", "ours"]
    assert back[0].max_rel_err == pytest.approx(rows[0].max_rel_err, rel=1e-4)  # five digits are written
    same = {"max_rel_err": None, "grad_rel_err": None}
    assert dataclasses.replace(back[0], **same) == dataclasses.replace(rows[0], **same)
    assert not back[2].agrees


@pytest.mark.parametrize("line", ["not json", '{"name": "x"}'])
def test_a_file_of_something_else_is_one_clear_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl line 1: expected"):
        read_rows(path)
    with pytest.raises(UserError, match="expected a file"):
        read_rows(tmp_path / "absent.jsonl")


def stored(p50: float, spread: float = 0.01, kind: str = "this", **more: Any) -> Row:
    row = Row("op", "native", "ours", "fwd", "cpu", "fp32", "64", p50_ms=p50, spread=spread, env={"kind": kind})
    return dataclasses.replace(row, **more)


def test_slower_than_stored_rows() -> None:
    verdict = compare([stored(1.2)], [stored(1.0)], 5)
    assert len(verdict.slower) == 1 and "1 ms -> 1.2 ms" in verdict.text
    assert not compare([stored(1.04)], [stored(1.0)], 5).slower
    assert not compare([stored(1.2)], [stored(1.0)], 25).slower


def test_slower_within_the_spread_is_not_decided() -> None:
    verdict = compare([stored(1.2, spread=0.3)], [stored(1.0)], 5)
    assert not verdict.slower and "not decided" in verdict.text


def test_another_machine_kind_is_never_compared() -> None:
    verdict = compare([stored(9.0)], [stored(1.0, kind="another")], 5)
    assert not verdict.slower and verdict.compared == 0 and "another" in verdict.text


def test_only_the_same_measurement_of_ours_is_compared() -> None:
    assert compare([stored(9.0, shape="65")], [stored(1.0)], 5).compared == 0
    assert compare([stored(9.0, role="eager")], [stored(1.0)], 5).compared == 0


def test_the_environment_names_what_a_timing_depends_on() -> None:
    facts = environment("cpu", seed=3)
    assert facts["seed"] == 3 and facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert str(facts["threads"]) in facts["kind"] and {"commit", "dirty", "python", "triton", "native"} <= set(facts)
    json.dumps(facts)


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(UserError, match="role: expected one of"):
        Provider("x", "fwd", lambda: None, role="best")
