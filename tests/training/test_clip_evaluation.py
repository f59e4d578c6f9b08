"""Inside a run of clips: each stage is evaluated, watched for a collapse, and its nearest clips are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cohobate.config import load
from cohobate.training import train

SMALL = [
    "data.generate=null",
    "data.image_size=16",
    "data.frames=4",
    "data.batch_size=8",
    "data.repeats=2",
    "data.workers=0",
    "model={patch: 4, tubelet: 2, width: 24, depth: 2, heads: 2, cls_token: false}",
    "decoder={width: 16, depth: 1, heads: 2}",
    "optimizer.warmup_epochs=0.25",
    "stages=[{name: teacher, method: videomae, steps: 4}]",
    "evaluate.k=3",
    "evaluate.samples=2",
    "log.every=2",
    "log.tensorboard=false",
    "device=cpu",
]


def test_a_run_of_clips_is_evaluated(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(load("demo-video", [*SMALL, f"data.root={clips}", f"run={run}"]))[1] == 0
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    wanted = {(s, n, m) for s in (0, 1) for n in ("texture", "motion") for m in ("knn", "linear")}
    assert {(row["stage"], row["label"], row["metric"]) for row in rows} == wanted
    assert all(row["features"] == "mean" and 0 <= row["value"] <= 1 for row in rows)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["features/rank"] > 1 and metrics[-1]["features/spread"] > 0
    with np.load(run / "retrieval-1.npz") as found:
        assert found["queries"].shape == (6, 4, 16, 16, 3) and found["neighbours"].shape == (6, 7, 4, 16, 16, 3)
        assert found["same"].shape == (6, 7) and str(found["label"]) == "texture"
    assert "not evaluated" not in capsys.readouterr().out
