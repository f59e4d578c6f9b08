"""``cohobate bench quality``: every stage, label and metric of a run becomes a row, of clips as of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cohobate import data
from cohobate.benchmarks import quality, report

LABELS = ("texture", "motion")
# The shipped recipe, its three stages, in a few updates each.
FEW = ["data.batch_size=8", "data.workers=0", "evaluate.k=3", "evaluate.samples=2", "log.tensorboard=false"]
FEW += ["optimizer.warmup_epochs=0.1", *(f"stages.{stage}.steps=2" for stage in range(3))]


def test_the_video_demo_gives_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The untrained network, the teacher, its student, and the student alone; and the table of the documentation."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # networks this small lose by threads
    clips = data.make_videos(tmp_path / "clips", train=16, test=8, processes=1)
    file = tmp_path / "benchmarks" / "results" / "some-cpu-2026-01-02" / "quality-video.jsonl"
    assert quality.main(["demo-video", "--seeds", "3", "--data", str(clips), "--set", *FEW, "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    stages = {(0, "untrained"), (1, "teacher"), (2, "amd"), (3, "alone")}
    wanted = {(stage, label, metric) for stage in stages for label in LABELS for metric in ("knn", "linear")}
    assert len(rows) == 16 and {((r["stage"], r["stage_name"]), r["label"], r["metric"]) for r in rows} == wanted
    assert all(0 <= row["value"] <= 1 <= row["effective_rank"] and row["features"] == "mean" for row in rows)
    assert all((row["recipe"], row["seed"], row["settings"]) == ("demo-video", 3, FEW) for row in rows)
    assert all(row["env"]["commit"] and row["env"]["kind"] for row in rows)
    printed, rendered = capsys.readouterr().out, report.render(tmp_path, "quality-video")
    for label in LABELS:
        assert f"The {label}:" in printed and f"The {label}:" in rendered
    assert printed.count("| 3 alone |") == 2 * 2 and rendered.count("| 3 alone |") == 2


def test_what_goes_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality.sys, "executable", "/bin/true")
    assert quality.main(["demo", "--seeds", "0"]) == 2
    assert "demo, seed 0: expected evaluations, but the run made none" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho first\necho 'model.width: expected more' >&2\nexit 2\n")
    broken.chmod(0o755)
    monkeypatch.setattr(quality.sys, "executable", str(broken))
    assert quality.main(["demo", "--seeds", "0"]) == 2
    assert "demo, seed 0: model.width: expected more" in capsys.readouterr().err
