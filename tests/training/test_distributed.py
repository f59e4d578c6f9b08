"""Two processes (gloo): the same weights on both ranks at every moment, and what one process computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cohobate.config import dump
from cohobate.training import train

# Runs each recipe given as an argument, and notes a digest of this rank's student when a stage begins and ends.
SCRIPT = """
import hashlib, json, os, sys
import torch
from cohobate.config import load
from cohobate.training import loop, stages, train

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
notes = []

def digest(stage):
    bits = [tensor.detach().numpy().tobytes() for tensor in stage.method.student.state_dict().values()]
    return hashlib.sha256(b"".join(bits)).hexdigest()

def enter(self, index, before=None, whole=stages.StageManager.enter):
    stage = whole(self, index, before)
    notes.append(digest(stage))
    return stage

def leave(self, stage, step, whole=stages.StageManager.leave):
    notes.append(digest(stage))
    return whole(self, stage, step)

stages.StageManager.enter, stages.StageManager.leave = enter, leave
for recipe in sys.argv[2:]:
    notes.clear()
    folder, code = train(load(recipe))
    assert code == 0 and (folder is None) == (os.environ["RANK"] != "0")
    name = os.path.basename(recipe).removesuffix(".yaml")
    with open(f"{sys.argv[1]}/{name}-{os.environ['RANK']}.json", "w") as file:
        json.dump(notes, file)
torch.distributed.destroy_process_group()
"""
FP32 = ["precision.compute=fp32", "precision.teacher=fp32", "optimizer.clip=0.5"]
HALF = ["data.batch_size=8", *FP32]


def two_ranks(folder: Path, *recipes: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "script.py")]
    done = subprocess.run(
        [sys.executable, *words, str(folder), *map(str, recipes)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def exported(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("exports/*/model.safetensors"))
    return {f"{f.parent.name}/{key}": tensor for f in files for key, tensor in load_file(str(f)).items()}


def test_two_ranks(tiny: Any, tmp_path: Path) -> None:
    random = ["stages.0.method=dbot", "stages.0.teacher={source: random}"]
    runs = {
        "plain": [*HALF],
        "accumulated": [*HALF, "data.batch_size=4", "optimizer.accumulate=2"],
        "upstream": [*HALF, *random, "compat.unsynchronised_reset=true"],
    }
    recipes = []
    for name, words in runs.items():
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(dump(tiny.config(name, *words)))
    two_ranks(tmp_path, *recipes)
    notes = {name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in runs}

    # Begin and end of both stages: the same bits on both ranks, and not the same ones all the time.
    for name in ("plain", "accumulated"):
        first, second = notes[name]
        assert first == second and len(set(first)) == 4

    # Upstream's reset: together in the first stage, apart from the second one's first update to its last.
    first, second = notes["upstream"]
    assert [a == b for a, b in zip(first, second)] == [True, True, False, False]

    # One rank with the whole batch. Sums in another order, then 12 Adam updates of at most 2e-3 each: what rounding
    # turns over is far below one such update; a lost or doubled gradient is far above.
    train(tiny.config("one", *FP32))
    one, two, many = (exported(tmp_path / name) for name in ("one", "plain", "accumulated"))
    assert one.keys() == two.keys() == many.keys()
    start = {key: tensor for key, tensor in one.items() if key.startswith("2-")}
    for other in (two, many):
        distance = max(float((one[key] - other[key]).abs().max()) for key in start)
        assert distance < 2e-4, distance


def test_two_ranks_go_on_where_they_were_stopped(tiny: Any, tmp_path: Path) -> None:
    """Rank 0 is asked to stop; both write one checkpoint; the next launch ends in the bits of an unbroken run."""
    script = """
import os, signal, sys
import torch
from cohobate.config import load
from cohobate.training import train
from cohobate.training.step import Step
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
whole = Step.__call__
def step(self, update, **words):
    whole(self, update, **words)
    if stop and self.stage.index == 1 and update == 2 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
Step.__call__ = step
for recipe, stop, expected in ((sys.argv[1], False, 0), (sys.argv[2], True, 143), (sys.argv[2], False, 0)):
    code = train(load(recipe))[1]
    assert code == expected, (recipe, code)
torch.distributed.destroy_process_group()
"""
    for name in ("whole", "cut"):
        (tmp_path / f"{name}.yaml").write_text(dump(tiny.config(name, "data.batch_size=8", "model.drop_path=0.2")))
    (tmp_path / "script.py").write_text(script)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    done = subprocess.run(
        [sys.executable, *words, *(str(tmp_path / f"{name}.yaml") for name in ("whole", "cut"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole, cut = exported(tmp_path / "whole"), exported(tmp_path / "cut")
    assert len(whole) > 20 and all(torch.equal(whole[key], cut[key]) for key in whole)
