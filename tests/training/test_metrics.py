"""Means read in one go, seconds by activity, lines that survive a crash, and the progress line."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate.models import build
from cohobate.training import train
from cohobate.training.console import Console, duration
from cohobate.training.metrics import Clock, CollapseWatch, JsonLines, Meter, trim_lines

ROW = {"loss/total": 0.5, "lr": 1e-3, "perf/samples_s": 1234.5, "perf/data_wait": 0.25}


def test_a_meter_gives_means_of_losses_and_the_latest_of_the_rest() -> None:
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss/total": torch.tensor(value), "loss/align": torch.tensor(-value, dtype=torch.bfloat16)})
        meter.latest({"grad_norm": torch.tensor(value)})
    assert meter.read() == {"loss/total": 3.0, "loss/align": -3.0, "grad_norm": 6.0}
    assert meter.read() == {}
    meter.add({"loss/pixels": torch.tensor(4.0, requires_grad=True)})  # a new stage has other names
    assert meter.read(lambda vector: vector * 2) == {"loss/pixels": 8.0}


def test_a_clock_knows_what_the_time_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for name in ("data", "forward", "data"):
        clock.mark(name)
    assert clock.flush() == {"data": 1.5, "forward": 2.0}
    clock.mark("evaluation")
    assert clock.flush() == {"evaluation": 6.5}
    assert clock.take() == {"data": 1.5, "forward": 2.0, "evaluation": 6.5} and clock.take() == {}


def test_lines_are_json_and_can_be_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as file:
        file.write({"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5})
    with path.open("a") as cut:
        cut.write('{"step": 3, "lo')  # the power went off here
    trim_lines(path, lambda row: row["step"] <= 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": None}]
    trim_lines(tmp_path / "none.jsonl", lambda row: True)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.6, "1 m 00 s"), (3725, "1 h 02 m"), (200_000, "2 d 7 h"), (-1, "0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_progress_line(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    with Console(True, plain_seconds=1000) as console:
        for step in (1, 2, 3):
            console.progress(ROW | {"perf/mfu": 0.4}, stage="stage 1/2 mae", step=step, steps=3, remaining=75)
        console.say("stage 1 mae: exported to [runs]/demo")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "stage 1 mae: exported to [runs]/demo" in shown  # brackets are no markup
    if stream is io.StringIO:
        # The first and the last, for the rest came too soon.
        assert [line.split("  ")[0] for line in shown.splitlines()[:2]] == ["stage 1/2 mae 1/3", "stage 1/2 mae 3/3"]
        assert "loss 0.5000  lr 1.00e-03  1234 img/s  MFU 40%  data 25%  1 m 15 s left" in shown


def test_clips_are_counted_as_clips(capfd: pytest.CaptureFixture[str]) -> None:
    with Console(True, unit="clips") as console:
        console.progress(ROW, stage="stage 1/1 amd", step=1, steps=1, remaining=0)
    assert "  1234 clips/s  " in capfd.readouterr().err


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with Console(False) as console:
        console.say("nothing")
        console.progress(ROW, stage="", step=1, steps=1, remaining=0)
    assert capfd.readouterr() == ("", "")


def test_a_healthy_student_raises_no_alarm_and_a_collapsed_one_does() -> None:
    torch.manual_seed(0)
    student = build(image_size=16, patch=4, width=24, depth=2, heads=2, drop_path=0.5).train()
    images = torch.randint(0, 256, (32, 1, 16, 16, 3), dtype=torch.uint8)
    images //= torch.randint(1, 9, (32, 1, 1, 1, 3), dtype=torch.uint8)  # of different colours
    watch = CollapseWatch(student, images)
    row = watch.look()
    assert watch.alarm(row) is None and row["features/rank"] > 3 and student.training
    assert watch.look() == row  # without drop path
    with torch.no_grad():
        student.patch_embed.proj.weight.zero_()  # what is left is a function of the position alone
    row = watch.look()
    assert row["features/rank"] == pytest.approx(1.0, abs=0.01) and row["features/spread"] < 1e-3
    assert "all samples nearly one feature: effective rank 1, below 1.5" in str(watch.alarm(row))


@pytest.mark.parametrize(
    "row, words",
    [
        ({"features/rank": 9.0, "features/spread": 0.3, "target/std": 0.5}, None),
        ({"features/rank": 9.0, "features/spread": 0.001}, "relative spread 0.001, below 0.02"),
        ({"target/std": 1e-5}, "the targets are nearly the same for all tokens: standard deviation 1e-05, below 0.001"),
        ({"features/rank": math.nan}, "effective rank nan"),
        ({}, None),
    ],
)
def test_what_counts_as_a_collapse(row: dict[str, float], words: str | None) -> None:
    alarm = CollapseWatch.alarm(row)
    assert alarm is None if words is None else words in str(alarm)


def test_a_run_says_once_a_stage_that_it_has_collapsed(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every network is a collapsed one to a limit that no rank reaches; the run goes on all the same."""
    monkeypatch.setattr(CollapseWatch, "RANK", 1e3)
    _, code = train(tiny.config("collapsed"))
    rows = [json.loads(line) for line in (tiny.folder / "collapsed" / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and [row["step"] for row in rows if "features/rank" in row] == [2, 6, 8, 12]  # first and last
    assert [row["step"] for row in rows if "alarm" in row] == [2, 6, 8, 12]
    said = [line for line in capsys.readouterr().err.splitlines() if "collapse: " in line]
    assert [line.split(":")[0] for line in said] == ["stage 1 mae, update 2", "stage 2 dbot, update 2"]
