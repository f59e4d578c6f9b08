"""Means read in one go, seconds by activity, lines that survive a crash, and the progress line."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from cohobate.training.console import Console, duration
from cohobate.training.metrics import Clock, JsonLines, Meter, trim_lines

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


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with Console(False) as console:
        console.say("nothing")
        console.progress(ROW, stage="", step=1, steps=1, remaining=0)
    assert capfd.readouterr() == ("", "")
