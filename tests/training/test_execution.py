"""The switches of a step: what they change in it, and that they change nothing in what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cohobate.config import bound, load
from cohobate.errors import UserError
from cohobate.methods import AMD, DBOT
from cohobate.models.layers import Block
from cohobate.teacher import FrozenTeacher
from cohobate.training import loop, train
from cohobate.training.stages import quantise_teacher
from cohobate.training.step import Step

DBOT_RUN = ["stages.0.method=dbot", "stages.0.teacher={source: random}"]
DEEP = "random:vit_tiny?image_size=16&patch=4&width=48&depth=4&heads=3"
SECOND = f"{{name: second, steps: 3, teacher: {{source: model, spec: '{DEEP}'}}}}"
FP8 = [f"stages=[{{name: first, method: mae, steps: 3}}, {SECOND}]"]
FP8_AMD = [
    f"stages=[{{name: amd, method: amd, steps: 3, teacher: {{source: model, spec: '{DEEP}'}}}}]",
    "amd={direct: [[1, 3]], generation: [[2, 4]]}",
    "mask.teacher_ratio=0.5",
]


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------------------- ahead


def test_features_computed_ahead_change_no_bit(tiny: Any, method: list[str]) -> None:
    if "momentum" in " ".join(method):
        pytest.skip("that teacher cannot be asked ahead")
    hard = ["model.drop_path=0.2", "optimizer.accumulate=2", "data.batch_size=8", "stages.0.steps=5"]
    found = []
    for ahead in ("false", "true"):
        stage, step, meter = tiny.prepared(tiny.config(ahead, *method, *hard, f"execution.ahead={ahead}"))
        rows, asked = [], []
        if isinstance(stage.method, (AMD, DBOT)):
            stage.method.teacher.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        for number in range(5):
            step(number, signals=True)
            rows.append(meter.read())
        found.append((rows, weights(stage.method)))
        assert len(asked) in (0, 10) and bool(asked) == isinstance(stage.method, (AMD, DBOT))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])


def test_several_masks_ahead(tiny: Any) -> None:
    found = []
    for ahead in ("false", "true"):
        words = [*DBOT_RUN, "stages.0.set.mask.masks=3", f"execution.ahead={ahead}"]
        stage, step, _ = tiny.prepared(tiny.config(ahead, *words))
        for number in range(3):
            step(number)
        found.append(weights(stage.method))
    assert same(*found)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_runs_beside_the_optimizer(tiny: Any, accumulate: int) -> None:
    """Behind the backward pass, in front of the update; at a stage's end nothing is fetched that nobody would use."""
    size = [f"optimizer.accumulate={accumulate}", "data.batch_size=8", "stages.0.steps=3"]
    stage, step, _ = tiny.prepared(tiny.config("run", *DBOT_RUN, *size, "execution.ahead=true"))
    assert isinstance(stage.method, DBOT)
    did: list[str] = []

    def told(name: str, function: Any) -> Any:
        def tell(*args: Any, **options: Any) -> Any:
            did.append(name)
            return function(*args, **options)

        return tell

    stage.method.teacher.register_forward_pre_hook(lambda *_: did.append("teacher"))
    step.clock.mark = lambda name: did.append(name) if name == "backward" else None  # type: ignore[method-assign]
    stage.updater.step = told("update", stage.updater.step)  # type: ignore[method-assign]
    step.next_batch = told("batch", step.next_batch)
    for number in range(3):
        step(number)
    micro = ["backward", "batch", "teacher"]
    between = micro * (accumulate - 1)
    last = [*["backward", "batch", "teacher"] * (accumulate - 1), "backward", "update"]
    assert did == ["batch", "teacher", *[*between, *micro, "update"] * 2, *last]


def test_a_teacher_that_follows_cannot_be_asked_ahead_nor_in_fp8(tiny: Any) -> None:
    momentum = ["stages.0.method=dbot", "stages.0.teacher={source: random, momentum: 0.9}"]
    with pytest.raises(UserError, match=r"execution\.ahead: expected false, for stages\.0\.teacher\.momentum is given"):
        tiny.config("run", *momentum, "execution.ahead=true")
    with pytest.raises(UserError, match=r"precision\.teacher: expected bf16 or fp32, for stages\.0\.teacher\.momentum"):
        tiny.config("run", *momentum, "precision.teacher=fp8")


# ------------------------------------------------------------------------------------------------- a run as a whole


class Cut(Exception):
    """The power went off."""


def cut_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    whole, left = Step.__call__, iter(range(updates))

    def step(self: Step, *args: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise Cut
        whole(self, *args, **options)

    monkeypatch.setattr(Step, "__call__", step)


def exported(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("exports/*/*.safetensors"))
    return {f"{file.parent.name}/{key}": tensor for file in files for key, tensor in load_file(str(file)).items()}


def test_a_resume_point_is_not_tied_to_the_switches(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead until it is cut inside the second stage, with a batch fetched and not trained on; then checkpointed."""
    words = ["model.drop_path=0.3", "optimizer.accumulate=2", "data.batch_size=8", "checkpoint.every_steps=2"]
    train(tiny.config("whole", *words))
    with monkeypatch.context() as patch:
        cut_after(patch, 9)
        with pytest.raises(Cut):
            train(tiny.config("cut", *words, "execution.ahead=true"))
    others = ["execution.checkpointing=blocks", "execution.shadow=false", "execution.cuda_graph=off"]
    assert train(tiny.config("cut", *words, *others))[1] == 0
    whole, cut = exported(tiny.folder / "whole"), exported(tiny.folder / "cut")
    assert len(whole) > 50 and same(list(whole.values()), [cut[key] for key in whole])
    assert not any(key.startswith("execution") for key in bound(load("demo")))


def test_the_switches_reach_the_blocks(tiny: Any) -> None:
    words = ["execution.checkpointing=operations", "execution.compile=true"]
    stage, _, _ = tiny.prepared(tiny.config("run", *words))
    blocks = [module for module in stage.method.modules() if isinstance(module, Block)]
    assert blocks and all(block.checkpointing == "operations" for block in blocks)
    assert all(block._compiled_call_impl is not None for block in blocks)
    stage, _, _ = tiny.prepared(tiny.config("run"))
    blocks = [module for module in stage.method.modules() if isinstance(module, Block)]
    assert all(block.checkpointing == "none" and block._compiled_call_impl is None for block in blocks)


def test_what_this_device_cannot_do_is_refused(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"execution\.cuda_graph: expected auto or off, for the device is cpu, got on"):
        train(tiny.config("run", "execution.cuda_graph=on"))
    with pytest.raises(UserError, match=r"precision\.teacher: expected bf16 or fp32, for the device is cpu, got fp8"):
        train(tiny.config("run", "precision.teacher=fp8"))
    assert not (tiny.folder / "run").exists()


# --------------------------------------------------------------------------------------------------------------- fp8


@pytest.mark.parametrize("words", [FP8, FP8_AMD], ids=["dbot", "amd"])
def test_a_run_with_an_fp8_teacher(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Its numbers are those of a card, computed in fp32; a run that was cut is calibrated on the same images again."""
    monkeypatch.setattr(loop, "_check_device", lambda *_: None)
    updates = 2 if words == FP8_AMD else 5
    words = [*words, "precision.teacher=fp8", "checkpoint.every_steps=1"]
    train(tiny.config("whole", *words))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "teacher in fp8" in line]
    (file,) = (tiny.folder / "whole").glob("teacher-fp8-*.json")
    rows = json.loads(file.read_text())
    kinds = [row["precision"] for row in rows if row["part"] == "block"]
    assert len(kinds) == 4 and kinds[0] == kinds[3] == "bf16" and "fp8" in kinds
    cosine = min(row["cosine"] for row in rows if row["part"] == "features")
    assert f"teacher in fp8 in {kinds.count('fp8')} of 4 blocks; features against bf16: cosine {cosine:.6f}" in line
    assert cosine > 0.999 and line.endswith(file.name)
    with monkeypatch.context() as patch:
        cut_after(patch, updates)
        with pytest.raises(Cut):
            train(tiny.config("cut", *words))
    train(tiny.config("cut", *words))
    whole, cut = exported(tiny.folder / "whole"), exported(tiny.folder / "cut")
    assert same(list(whole.values()), [cut[key] for key in whole])
    bf16 = [word for word in words if not word.startswith("precision")]
    train(tiny.config("bf16", *bf16))
    other = exported(tiny.folder / "bf16")
    assert not same(list(whole.values()), [other[key] for key in whole])


def test_a_teacher_of_another_size_is_calibrated_on_its_own_pixels(tiny: Any) -> None:
    larger = "random:vit_tiny?image_size=32&patch=8&width=48&depth=4&heads=3"
    teacher = f"stages.0.teacher={{source: model, spec: '{larger}', resize: pixels}}"
    stage, step, _ = tiny.prepared(tiny.config("run", "stages.0.method=dbot", teacher))
    batch, plan, _ = step._take()
    assert isinstance(stage.method, DBOT)
    seen = []
    runtime = stage.method.teacher.teacher  # type: ignore[union-attr]
    features = runtime._features
    runtime._features = lambda pixels, *rest: (seen.append(pixels.shape[2:4]), features(pixels, *rest))[1]
    report = quantise_teacher(stage, batch.pixels, plan)
    assert set(seen) == {(32, 32)} and batch.pixels.shape[2:4] == (16, 16)
    assert report.quantised and runtime.precision_name == f"emulated fp8 in {report.quantised} of 4 blocks, bfloat16"


def test_a_teacher_is_calibrated_on_the_patches_that_it_will_see(tiny: Any) -> None:
    stage, step, _ = tiny.prepared(tiny.config("run", *FP8_AMD))
    batch, plan, _ = step._take()
    assert isinstance(stage.method, AMD) and isinstance(stage.method.teacher, FrozenTeacher)
    seen, features = [], stage.method.teacher._features
    stage.method.teacher._features = (  # type: ignore[method-assign]
        lambda pixels, rows, *rest: (seen.append(rows), features(pixels, rows, *rest))[1]
    )
    quantise_teacher(stage, batch.pixels, plan)
    assert len(seen) > 3 and all(rows is not None and torch.equal(rows, plan.teacher_rows) for rows in seen)


def test_teachers_that_have_no_fp8(tiny: Any) -> None:
    stage, step, _ = tiny.prepared(tiny.config("run", *DBOT_RUN))
    batch, plan, _ = step._take()
    with pytest.raises(UserError, match=r"stages\.0\.teacher: fp8 .* so it needs 3, got 2"):
        quantise_teacher(stage, batch.pixels, plan)
    stage.method.teacher = torch.nn.Identity()  # type: ignore[union-attr, assignment]
    stage.method.teacher.name = "somebody's"  # type: ignore[union-attr, assignment]
    with pytest.raises(UserError, match=r"stages\.0\.teacher: fp8 expected one that can be rebuilt; somebody's runs"):
        quantise_teacher(stage, batch.pixels, plan)


def test_a_run_is_not_lost_to_a_teacher_that_has_no_fp8(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "_check_device", lambda *_: None)
    assert train(tiny.config("fp8", "precision.teacher=fp8"))[1] == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "stays in bf16" in line]
    assert line.startswith("stage 2 dbot: the teacher stays in bf16: stages.1.teacher: fp8 leaves") and "got 2" in line
    assert not list((tiny.folder / "fp8").glob("teacher-fp8*"))
    train(tiny.config("bf16"))
    one, other = exported(tiny.folder / "fp8"), exported(tiny.folder / "bf16")
    assert same(list(one.values()), [other[key] for key in one])
