"""A teacher that follows its student, in a run: when it moves, what a cut keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.training import train
from cohobate.training.distributed import Ranks
from cohobate.training.feed import Feed
from cohobate.training.metrics import Clock, Meter
from cohobate.training.stages import Stage, StageManager
from cohobate.training.step import Step

ALONE = Ranks(0, 1, torch.device("cpu"))
RANDOM = ["stages.0.method=dbot", "stages.0.teacher={source: random, momentum: 0.5}"]


def trained(config: Config, updates: int) -> tuple[Stage, list[torch.Tensor]]:
    """A stage after some updates, and one weight of its student before each of them and at the end."""
    stage = StageManager(config, ALONE, Path(config.run), 4).enter(0)
    feed = Feed(config, ALONE)
    feed.open(0)
    step = Step(stage, ALONE, Clock(ALONE.device), Meter(), feed.next)
    seen = []
    for number in range(updates):
        seen.append(stage.method.student.blocks[0].attn.qkv.weight.detach().clone())
        step(number)
    feed.close()
    return stage, [*seen, stage.method.student.blocks[0].attn.qkv.weight.detach()]


@pytest.mark.parametrize("every", [1, 2])
def test_it_follows_every_so_many_updates(tiny: Any, every: int) -> None:
    stage, weights = trained(tiny.config("run", *RANDOM, f"stages.0.teacher.every={every}"), 4)
    expected = weights[0]
    for number in range(1, 5):
        if number % every == 0:
            expected = 0.5 * expected + 0.5 * weights[number]
    follower = stage.follower
    assert follower is not None and not torch.equal(weights[0], weights[4])
    found = follower.average.get_parameter("blocks.0.attn.qkv.weight")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # lerp rounds once less
    assert stage.trained["teacher"] is follower.average
    assert not any("average" in name or "teacher" in name for name, _ in stage.method.named_parameters())


def test_without_it_the_teacher_stands_still(tiny: Any) -> None:
    stage, _ = trained(tiny.config("run", "stages.0.method=dbot", "stages.0.teacher={source: random}"), 2)
    assert stage.follower is None and stage.trained.keys() == {"student", "decoder"}


class Cut(Exception):
    """The power went off."""


def test_a_cut_run_ends_in_the_same_bits(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut inside the first stage, between two steps of the teacher, and inside the second."""
    teachers = ["stages.0.teacher.every=2", "stages.1.teacher={source: previous, momentum: 0.9}"]
    words = [*RANDOM, *teachers, "checkpoint.every_steps=3"]
    train(tiny.config("whole", *words))
    whole, left = Step.__call__, iter([True] * 4 + [False] + [True] * 7 + [False])

    def step(self: Step, *args: Any, **options: Any) -> None:
        if not next(left):
            raise Cut
        whole(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        for _ in range(2):  # in the first stage after 4 updates; from 3 on again, in the second
            with pytest.raises(Cut):
                train(tiny.config("cut", *words))
    assert train(tiny.config("cut", *words))[1] == 0
    for stage in ("1-mae", "2-dbot"):
        files = [tiny.folder / run / "exports" / stage / "model.safetensors" for run in ("whole", "cut")]
        first, second = (load_file(str(file)) for file in files)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_teacher_of_another_shape_cannot_follow(tiny: Any) -> None:
    words = [*RANDOM, "stages.1.teacher={source: previous, momentum: 0.9}", "stages.0.set.model.width=48"]
    with pytest.raises(UserError, match=r"stages\.1\.teacher\.momentum: expected null where the stage before has an"):
        tiny.config("run", *words)
    tiny.config("run", *words, "stages.1.set.model.width=48", "stages.1.set.model.drop_path=0.1")
    deep = tiny.config("run", *RANDOM, "stages.0.teacher.depth=3")
    with pytest.raises(UserError, match=r"stages\.0\.teacher\.depth: expected at most the student's 2 blocks, got 3"):
        StageManager(deep, ALONE, tiny.folder / "run", 4).enter(0)


def test_the_first_blocks_of_a_random_teacher(tiny: Any) -> None:
    """dBOT's first teacher for ViT-L and ViT-H has no blocks; another draw has other weights."""
    copied, drawn = (
        StageManager(tiny.config("run", *RANDOM, *words), ALONE, tiny.folder / "run", 4).enter(0)
        for words in (["stages.0.teacher.depth=0"], ["stages.0.teacher.init=independent"])
    )
    assert copied.follower is not None and drawn.follower is not None
    weight = "patch_embed.proj.weight"
    assert (copied.follower.layers, drawn.follower.layers) == ((0,), (2,))
    assert torch.equal(copied.follower.average.get_parameter(weight), copied.method.student.get_parameter(weight))
    assert not torch.equal(drawn.follower.average.get_parameter(weight), drawn.method.student.get_parameter(weight))
