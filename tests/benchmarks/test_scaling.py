"""The points of every axis are what they say, planned as a run is planned, and told apart from what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate import config as configuration
from cohobate import planning
from cohobate.benchmarks import command, machine, report, scaling, timing
from cohobate.benchmarks.harness import QUICK, read_rows
from cohobate.benchmarks.scaling import AXES, PLANNED, QUICK_AXES, SMALL, TINY, Axis, Made, Point, pairs
from cohobate.methods import AMD
from cohobate.training.optimizer import Updater

ENVIRONMENT = {"kind": "a machine", "commit": "abc", "dirty": False, "torch": "2", "seed": 0, "date": "2026-01-01"}
CEILINGS = machine.Ceilings("cpu", ((2**28, 40.0),), {"bf16": 0.8, "fp32": 0.2})
SETTING = command.Setting("cpu", ENVIRONMENT, CEILINGS, QUICK)


def test_pairs_are_evenly_spaced_and_end_with_the_last_blocks() -> None:
    assert pairs(1) == [[12, 12]]
    assert pairs(3) == [[4, 4], [8, 8], [12, 12]]
    assert pairs(2, 2) == [[1, 6], [2, 12]]


@pytest.mark.parametrize("name", AXES)
def test_an_axis_changes_what_it_says(name: str) -> None:
    axis = AXES[name]
    values = (axis.measured[0], (*axis.measured, *axis.planned)[-1])
    for value in values:
        made = Made(axis, value, SMALL)
        method = made.stage.method
        student = method.student
        plan = made.stage.plan(torch.arange(1), 0)
        found: dict[str, float] = {
            "batch": made.batch,
            "tokens": student.grid.size,
            "width": student.width,
            "layers": len(method.alignment.direct) if isinstance(method, AMD) else 0,
            "mask": round(1 - plan.student / plan.tokens, 1),
            "world": value,
        }
        assert found[name] == pytest.approx(value, abs=0.06 if name == "mask" else 0)
        if name not in ("batch", "tokens", "layers"):
            assert (made.batch, student.grid.size) == (8, 49)
        if isinstance(method, AMD):
            assert len(method.alignment.generation) == value and method.teacher.layers[-1] == 12


def test_a_plan_is_the_plan_of_a_run() -> None:
    """The same parts, share and rates as ``cohobate plan``."""
    hardware = planning.load("cpu")
    config = configuration.load("dbot_vit_small", [*SMALL, "data.batch_size=32"])
    stage = planning.make_plan(config, hardware, images=scaling.SAMPLES).stages[0]
    share = hardware.shares("dbot", 384)[0][1]
    assert Made(AXES["batch"], 32, SMALL).seconds(hardware, share) == pytest.approx(stage.seconds[1], rel=1e-9)


class Scripted:
    """A timer whose samples are a function of what is run."""

    def __init__(self, times: Callable[[Any], float]) -> None:
        self.times = times

    def prepare(self, provider: Any) -> Callable[[], float]:
        return lambda: self.times(provider.function)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update takes 5 ms and 2 ms an image."""
    monkeypatch.setattr(Made, "step", lambda made, device: made)
    monkeypatch.setattr(timing, "CpuTimer", lambda: Scripted(lambda made: 5.0 + 2.0 * made.batch))


def test_measured_and_planned_points(scripted: None) -> None:
    points = scaling.run("batch", QUICK_AXES["batch"], SETTING, common=TINY)
    assert [point.value for point in points] == [1, 2, 4, 8]
    assert [point.p50_ms for point in points] == [7.0, 9.0, 13.0, None]
    assert points[1].planned_ms == pytest.approx(9.0, rel=1e-3)  # fitted to the middle one
    planned = [point.planned_ms or 0.0 for point in points]
    assert planned == sorted(planned) and planned[0] != 7.0
    assert points[3].note == PLANNED and points[3].env == ENVIRONMENT and points[3].samples is None
    assert re.match(r"linear: 5 ms \+ 2 ms x \w+, off by 0.0% at most", points[0].note)
    assert len({point.shape for point in points}) == 4 and {point.name for point in points} == {"scaling_batch"}


def test_a_disturbed_line_is_refused(scripted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        def cores(self) -> float:
            return 1.0

    monkeypatch.setattr(machine, "Others", Busy)
    points = scaling.run("batch", QUICK_AXES["batch"], SETTING, common=TINY)
    assert points[0].note.startswith("no line: other processes used 1.0 cores")
    assert "other processes used 1.0 cores" in scaling.table([dataclasses.asdict(point) for point in points])


def test_an_update_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Updater] = []
    monkeypatch.setattr(scaling, "Updater", lambda *a, **k: seen.append(Updater(*a, **k)) or seen[-1])
    for name in ("batch", "layers"):
        update = Made(QUICK_AXES[name], 2, TINY).step("cpu")
        before = [p.detach().clone() for p in seen[-1].parameters]
        update()
        moved = [not torch.equal(p, old) for p, old in zip(seen[-1].parameters, before, strict=True)]
        assert sum(moved) > 0.9 * len(moved) and float(seen[-1].skipped) == 0


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes want two cores")
def test_two_ranks_exchange_their_gradients() -> None:
    found = scaling.time_ranks("dbot_vit_small", 2, TINY, 1)
    assert len(found["ms"]) == 1 and found["ms"][0] > 0 and found["exchange_s"] > 0


def test_ranks_beyond_the_cores_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    asked: list[int] = []

    def ranks(recipe: str, world: int, common: Any, steps: int) -> dict[str, Any]:
        asked.append(world)
        return {"ms": [4.0 * world] * 3, "exchange_s": 0.003}

    monkeypatch.setattr(scaling, "time_ranks", ranks)
    axis = dataclasses.replace(AXES["world"], measured=(1, 2, 3), planned=(4,))
    points = scaling.run("world", axis, SETTING, common=TINY)
    assert asked == [1, 2] and [point.p50_ms for point in points] == [4.0, 8.0, None, None]
    # A ring's exchange: 2 (N - 1) / N of the gradients, 3 ms for two.
    assert [point.planned_ms for point in points] == pytest.approx([4.0, 7.0, 8.0, 8.5], rel=1e-3)
    assert points[2].note.startswith(PLANNED) and "not overlapped" in points[3].note
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert [point.p50_ms for point in scaling.run("world", axis, SETTING, common=TINY)] == [4.0, None, None, None]


def test_ranks_are_not_measured_on_a_card() -> None:
    points = scaling.run("world", AXES["world"], dataclasses.replace(SETTING, device="cuda"), common=TINY)
    assert {point.p50_ms for point in points} == {point.planned_ms for point in points} == {None}
    assert {point.note for point in points} == {"not measured: needs a process and a core a rank, on a CPU"}


def lines() -> list[dict[str, Any]]:
    """Points of two axes as a file holds them."""

    def point(axis: str, value: float, p50: float | None, note: str = "") -> Point:
        near: dict[str, Any] = {"p20_ms": 0.9 * p50, "p80_ms": 1.1 * p50, "peak_mb": 20.0} if p50 is not None else {}
        about = {"axis": axis, "value": value, "p50_ms": p50, "planned_ms": 1000.0 * value, "note": note} | near
        name = f"{axis} {value}"
        return Point("scaling", "engine bf16", "ours", "train", "cpu", "bf16", name, env=ENVIRONMENT, **about)

    found = [point("batch", 4, 400.0, "linear: 1 ms"), point("batch", 8, 1800.0, "linear: 1 ms")]
    found += [point("batch", 16, None, PLANNED), point("mask", 0.5, 300.0)]
    return [json.loads(json.dumps(dataclasses.asdict(each))) for each in found]


def test_table() -> None:
    rows = scaling.table(lines()).splitlines()
    assert rows[2] == "| 4 | 400 ms | 360 to 440 | 4.00 s | 20 |  |"
    assert rows[4] == f"| 16 | - | - | 16.00 s | - | {PLANNED} |"
    assert rows[6] == "Measured time: linear: 1 ms."
    assert rows[8].startswith("| mask ratio |") and rows[10].startswith("| 0.5 | 300 ms |")


def test_figure_tells_measured_from_planned() -> None:
    figure = scaling.scaling_figure(lines())
    batch, mask = (panel for panel in figure.axes if panel.axison)
    assert (batch.get_title(loc="left"), mask.get_title(loc="left")) == (AXES["batch"].title, "mask ratio")
    dashed, alone, measured = batch.get_lines()
    assert dashed.get_linestyle() == "--" and list(dashed.get_xdata()) == [4, 8, 16]
    assert (
        alone.get_markerfacecolor() == "white" and list(alone.get_xdata()) == [16] and list(alone.get_ydata()) == [16]
    )
    assert list(measured.get_xdata()) == [4, 8] and list(measured.get_ydata()) == [0.4, 1.8]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["planned", "planned alone"]


def test_command(tmp_path: Path, scripted: None, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    given = ["--quick", "--threads", "1", "--axis", "batch", "mask", "--json", str(file), "--picture", str(picture)]
    assert scaling.main(given) == 0
    found = [line for line in map(json.loads, file.read_text().splitlines()) if "axis" in line]
    assert [(line["axis"], line["value"]) for line in found] == [("batch", v) for v in (1, 2, 4, 8)] + [
        ("mask", 0.5), ("mask", 0.75)
    ]  # fmt: skip
    assert found[3]["p50_ms"] is None and found[3]["planned_ms"] > 0
    assert len(read_rows(file)) == 6 and picture.stat().st_size > 1000
    assert "measured time: linear" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scaling.main(["--axis", "depth"])


def test_every_axis_has_a_smoke_run() -> None:
    assert QUICK_AXES.keys() == AXES.keys()
    assert all(isinstance(axis, Axis) and axis.measured == tuple(sorted(axis.measured)) for axis in AXES.values())
    assert hasattr(report, "scaling")  # the documents' block is made from here
