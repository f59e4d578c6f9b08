"""A run that was cut anywhere ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cohobate.errors import UserError
from cohobate.training import loop, train
from cohobate.training.step import Step


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every exported tensor of a run, by file and key."""
    files = sorted(run.glob("exports/*/*.safetensors"))
    return {f"{f.parent.name}/{f.name}/{key}": tensor for f in files for key, tensor in load_file(str(f)).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and len(a) > 50
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:5]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


class Cut(Exception):
    """The power went off."""


def cut_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Make the run die after so many updates."""
    count = 0
    whole = Step.__call__

    def step(self: Step, *args: Any, **words: Any) -> None:
        nonlocal count
        if count == updates:
            raise Cut
        count += 1
        whole(self, *args, **words)

    monkeypatch.setattr(Step, "__call__", step)


# Drop path, accumulation and clipping all have something to remember.
HARD = [
    "model.drop_path=0.3",
    "optimizer.accumulate=2",
    "optimizer.clip=0.5",
    "data.batch_size=8",
    "checkpoint.every_steps=2",
]


@pytest.mark.parametrize("updates", [3, 6, 7, 9])
def test_n_steps_equal_k_and_the_rest(tiny: Any, monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Cut inside the first stage, exactly at its end, just behind it, and inside the second."""
    folder = tiny.folder
    assert train(tiny.config("whole", *HARD))[1] == 0
    with monkeypatch.context() as patch:
        cut_after(patch, updates)
        with pytest.raises(Cut):
            train(tiny.config("cut", *HARD))
    assert train(tiny.config("cut", *HARD))[1] == 0
    assert_same_bits(folder / "whole", folder / "cut")
    steps = [row["step"] for row in lines(folder / "cut")]
    assert steps == [row["step"] for row in lines(folder / "whole")]


@pytest.mark.parametrize("updates", [4, 6, 9])
def test_stages_that_accumulate_different_numbers(tiny: Any, monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """A resumed run takes the batches that were not seen yet, however many each stage's updates took."""
    words = [*HARD, "stages.0.set={optimizer.accumulate: 3}", "stages.1.set={optimizer.accumulate: 1}"]
    train(tiny.config("whole", *words))
    with monkeypatch.context() as patch:
        cut_after(patch, updates)
        with pytest.raises(Cut):
            train(tiny.config("cut", *words))
    train(tiny.config("cut", *words))
    assert_same_bits(tiny.folder / "whole", tiny.folder / "cut")
    rows = lines(tiny.folder / "cut")
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in lines(tiny.folder / "whole")]
    assert rows[-1]["epoch"] == (6 * 3 + 6) / 8  # 8 batches of 8 images an epoch


def test_the_optimizer_can_survive_a_stage_and_a_cut(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """compat.keep_optimizer: the moments cross the boundary, also when the run is cut right at it."""
    words = [*HARD, "compat.keep_optimizer=true", "compat.keep_patch_bias=true"]
    train(tiny.config("whole", *words))
    with monkeypatch.context() as patch:
        cut_after(patch, 6)
        with pytest.raises(Cut):
            train(tiny.config("cut", *words))
    train(tiny.config("cut", *words))
    assert_same_bits(tiny.folder / "whole", tiny.folder / "cut")


def test_a_run_that_is_cut_while_it_evaluates(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evaluate.enabled=true", "evaluate.k=5"]
    train(tiny.config("whole", *words))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_evaluate", _dies_at_stage_one(loop.Run._evaluate))
        with pytest.raises(Cut):
            train(tiny.config("cut", *words))
    train(tiny.config("cut", *words))
    whole, cut = (lines(tiny.folder / name, "evaluations.jsonl") for name in ("whole", "cut"))
    assert whole == cut and {row["stage"] for row in whole} == {0, 1, 2}


def _dies_at_stage_one(whole: Any) -> Any:
    def evaluate(self: loop.Run, student: torch.nn.Module, stage: int, name: str) -> None:
        if stage == 1:
            raise Cut
        whole(self, student, stage, name)

    return evaluate


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_ends(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = Step.__call__

    def step(self: Step, update: int, **words: Any) -> None:
        whole(self, update, **words)
        if self.stage.index == 0 and update == 2:  # not an update at which the metrics are read
            os.kill(os.getpid(), number)

    train(tiny.config("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        assert train(tiny.config("cut")) == (None, code)
    assert (tiny.folder / "cut" / "checkpoints" / "step_000000003").is_dir()
    assert "stopped; go on with the same command" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(tiny.config("cut"))[1] == 0
    assert_same_bits(tiny.folder / "whole", tiny.folder / "cut")


def test_a_finished_run_says_so_and_changes_nothing(tiny: Any) -> None:
    train(tiny.config("run"))
    before = weights(tiny.folder / "run")
    train(tiny.config("run"))
    after = weights(tiny.folder / "run")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_configuration_is_refused_by_name(tiny: Any) -> None:
    train(tiny.config("run"))
    for word, expected in {
        "seed=5": "seed=5 instead of 0",
        "mask.ratio=0.5": "mask.ratio=0.5 instead of 0.75",
        "stages.1.steps=9": "stages.1.steps=9 instead of 6",
    }.items():
        with pytest.raises(UserError, match=f"resume: expected the settings .*{expected}"):
            train(tiny.config("run", word))
    with pytest.raises(UserError, match="run: expected a new folder, for resume is never"):
        train(tiny.config("run", "resume=never"))
    with pytest.raises(UserError, match="resume: expected a checkpoint directory"):
        train(tiny.config("run", "resume=/nowhere"))


def test_a_teacher_of_any_source_and_several_masks_go_on(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = "random:vit_tiny?seed=4&image_size=32&patch=8&width=48&depth=2&heads=4"
    teacher = f"{{source: model, spec: '{spec}', resize: pixels, layer: 1}}"
    words = [*HARD, f"stages.1.teacher={teacher}", "stages.1.set.mask.masks=2"]
    train(tiny.config("whole", *words))
    with monkeypatch.context() as patch:
        cut_after(patch, 9)
        with pytest.raises(Cut):
            train(tiny.config("cut", *words))
    train(tiny.config("cut", *words))
    assert_same_bits(tiny.folder / "whole", tiny.folder / "cut")


def test_another_teacher_is_refused_by_its_fingerprint(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous stage's export, which is the teacher, is exchanged while the run lies still."""
    words = ["stages.1.teacher={source: previous}", "checkpoint.every_steps=2"]
    with monkeypatch.context() as patch:
        cut_after(patch, 9)
        with pytest.raises(Cut):
            train(tiny.config("run", *words))
    run = tiny.folder / "run"
    noted = [json.loads((point / "progress.json").read_text()) for point in sorted((run / "checkpoints").iterdir())]
    assert [(p["stage"], p["teacher"] is None) for p in noted] == [(0, True), (1, False)]  # the first stage is mae
    (export,) = run.glob("exports/1-*/model.safetensors")
    good, weights = export.read_bytes(), load_file(str(export))
    save_file({key: tensor * 1.01 for key, tensor in weights.items()}, str(export))
    expected = rf"resume: stages\.1 \(dbot\): expected the teacher {noted[1]['teacher']} that .*step_000000008 was made"
    with pytest.raises(UserError, match=expected):
        train(tiny.config("run", *words))
    export.write_bytes(good)
    assert train(tiny.config("run", *words))[1] == 0


def test_going_on_from_a_checkpoint_given_by_path(tiny: Any) -> None:
    train(tiny.config("whole"))
    point = tiny.folder / "whole" / "checkpoints" / "step_000000006"
    train(tiny.config("whole", f"resume={point}"))
    assert [row["step"] for row in lines(tiny.folder / "whole")] == [2, 4, 6, 8, 10, 12]


def test_a_signal_to_the_whole_process_group_spares_the_workers(tiny: Any) -> None:
    """Schedulers signal every process of a job; the run still writes its checkpoint and ends with one line."""
    run = tiny.folder / "run"
    words = tiny.words("run", "data.workers=2", "stages.0.steps=100000", "log.every=1")
    command = [sys.executable, "-m", "cohobate", "train", "demo", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").is_file() and lines(run)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("stopped; go on with the same command")
    assert len(list((run / "checkpoints").glob("step_*/progress.json"))) == 1
