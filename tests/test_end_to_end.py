"""The demo as a user runs it, at a tiny scale: images, two stages, evaluation, report, and a look at the weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cohobate.cli import main

SMALLER = [
    "data.batch_size=32",
    "data.workers=0",
    "stages.0.steps=12",
    "stages.1.steps=12",
    "optimizer.warmup_epochs=0.5",
    "evaluate.k=5",
    "log.every=4",
    "device=cpu",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "images"
    assert main(["data", "make", str(folder), "--train", "128", "--test", "64"]) == 0
    return folder


def test_demo(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["train", "demo", f"data.root={images}", f"run={run}", *SMALLER]
    assert main(words) == 0
    captured = capfd.readouterr()
    assert f"report: {run}" in captured.out and "img/s" in captured.err

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["stage"] for row in rows] == [1, 1, 1, 2, 2, 2]
    needed = {"epoch", "loss/total", "lr", "grad_norm", "perf/samples_s", "perf/data_wait", "target/std", "bad_steps"}
    assert all(needed <= row.keys() for row in rows)
    assert "loss/pixels" in rows[0] and "loss/align" in rows[-1]
    for stage in (rows[:3], rows[3:]):
        assert stage[-1]["loss/total"] < stage[0]["loss/total"]
        assert stage[0]["lr"] > stage[-1]["lr"] > 0

    results = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert len(results) == 3 * 2 * 2 * 2  # stages, features, label kinds, metrics
    assert {row["stage"]: row["stage_name"] for row in results} == {0: "untrained", 1: "mae", 2: "dbot"}
    assert all(0 <= row["value"] <= 1 and row["effective_rank"] > 1 for row in results)

    for stage in (1, 2):
        with np.load(run / f"samples-{stage}.npz") as samples:
            assert samples["images"].shape == (8, 32, 32, 3) and samples["images"].dtype == np.uint8
            assert samples["visible"].shape == (8, 8, 8) and samples["visible"].sum() == 8 * 16  # a quarter is seen
            for name in ("target_pca", "prediction_pca"):
                colours = samples[name]
                assert colours.shape == (8, 8, 8, 3) and 0 <= colours.min() < colours.max() <= 1
    timing = json.loads((run / "timing.json").read_text())
    assert {"data", "forward", "backward", "optimizer", "evaluation", "checkpoint"} <= timing["2 dbot"].keys()
    for name in ("config.yaml", "environment.json", "data_report.json", "report.html"):
        assert (run / name).stat().st_size > 100
    assert any((run / "tensorboard").iterdir())

    assert main(["eval", "knn", str(run), str(images), "--k", "5", "--workers", "0", "--device", "cpu"]) == 0
    knn = {(r["label"], r["features"]): r["value"] for r in results if r["stage"] == 2 and r["metric"] == "knn"}
    shown = capfd.readouterr().out
    for label in ("texture", "shape"):
        # The run computes in bf16, `eval` from the fp32 weights in bf16 too, so the numbers are the same.
        assert f"{label:<16}knn cls {knn[label, 'cls']:.3f}   knn mean {knn[label, 'mean']:.3f}" in shown

    assert main(words) == 0
    assert "is finished" in capfd.readouterr().err
    again = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert again == results


def test_a_resolved_configuration_is_a_recipe(images: Path, tmp_path: Path) -> None:
    words = [f"data.root={images}", *SMALLER, "evaluate.enabled=false", "log.tensorboard=false"]
    assert main(["train", "demo", *words, f"run={tmp_path / 'a'}"]) == 0
    assert main(["train", str(tmp_path / "a" / "config.yaml"), f"run={tmp_path / 'b'}"]) == 0
    a, b = ((tmp_path / name / "exports" / "2-dbot" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_demo_random_and_images_without_labels(images: Path, tmp_path: Path) -> None:
    """A flat folder has no labels and no test part: the effective rank is what is left."""
    words = [f"data.root={images / 'train'}", f"run={tmp_path}", *SMALLER, "log.tensorboard=false"]
    assert main(["train", "demo-random", *words]) == 0
    results = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert {row["metric"] for row in results} == {"effective_rank"} and len(results) == 6


@pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="needs DALI")
def test_demo_through_dali(images: Path, tmp_path: Path) -> None:
    words = [f"data.root={images}", *SMALLER, "evaluate.enabled=false", "log.tensorboard=false"]
    for loader in ("torch", "dali-cpu"):
        assert main(["train", "demo", *words, f"data.loader={loader}", f"run={tmp_path / loader}"]) == 0
    losses = []
    for loader in ("torch", "dali-cpu"):
        rows = [json.loads(line) for line in (tmp_path / loader / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss/total"] for row in rows])
    # The same plan; pixels differ by less than half a grey level on average, so the losses nearly agree.
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.03)
