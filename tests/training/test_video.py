"""Clips from the recipe to the export: VideoMAE makes the teacher, AMD the student, and a run that was cut goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cohobate import TokenGrid
from cohobate.config import Config, load
from cohobate.errors import UserError
from cohobate.masking import mask_plan
from cohobate.methods import AMD, MAE
from cohobate.models import Decoder, PixelDecoder
from cohobate.models.exports import load_decoder, load_encoder
from cohobate.report.run import read_run
from cohobate.training import train
from cohobate.training.distributed import Ranks
from cohobate.training.feed import Feed
from cohobate.training.stages import Stage, StageManager
from cohobate.training.step import Step

ALONE = Ranks(0, 1, torch.device("cpu"))
# 8 updates an epoch: 16 videos, 4 crops of each. The teacher is wider and deeper than the student.
SMALL = [
    "data.generate=null",
    "data.image_size=16",
    "data.frames=4",
    "data.batch_size=8",
    "data.repeats=4",
    "data.workers=0",
    "model={patch: 4, tubelet: 2, width: 24, depth: 2, heads: 2, cls_token: false}",
    "decoder={width: 16, depth: 1, heads: 2}",
    "amd={direct: [[1, 2], [2, 3]], generation: [[2, 3]], generator_depth: 1}",
    "optimizer.warmup_epochs=0.25",
    "evaluate.enabled=false",
    "evaluate.samples=2",
    "log.every=2",
    "log.tensorboard=false",
    "device=cpu",
    "stages=[{name: teacher, method: videomae, steps: 4, set: {model.width: 32, model.depth: 3, model.heads: 4}},"
    "{name: amd, method: amd, steps: 6, teacher: {source: previous}}]",
]
FROM_IMAGES = "random:vit_tiny?seed=4&image_size=16&patch=4&width=32&depth=3&heads=4"


def small(clips: Path, run: Path, *words: str) -> Config:
    return load("demo-video", [*SMALL, f"data.root={clips}", f"run={run}", *words])


def manager(config: Config) -> StageManager:
    return StageManager(config, ALONE, Path(config.run), batches_per_epoch=8)


def entered(config: Config, index: int = 0) -> Stage:
    return manager(config).enter(index)


@pytest.fixture(scope="session")
def taught(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages."""
    run = tmp_path_factory.mktemp("taught") / "run"
    assert train(small(clips, run))[1] == 0
    return run


def test_each_stage_leaves_what_the_next_one_needs(taught: Path) -> None:
    teacher, student = (load_encoder(taught / "exports" / name) for name in ("1-teacher", "2-amd"))
    grid = TokenGrid(4, 16, 16, (2, 4, 4))
    assert (teacher.grid, teacher.width, teacher.depth, teacher.heads, teacher.prefix) == (grid, 32, 3, 4, 0)
    assert (student.grid, student.width, student.depth) == (grid, 24, 2)
    decoder = load_decoder(taught / "exports" / "2-amd", student)
    assert isinstance(decoder, PixelDecoder) and decoder.out == grid.row_length
    rows = read_run(taught).metrics
    assert {row["stage"] for row in rows} == {1, 2}
    assert {"loss/pixels", "loss/direct", "loss/generation"} <= rows[-1].keys()
    assert all(row["bad_steps"] == 0 and row["grad_norm"] > 0 for row in rows)


def test_a_run_says_what_decoded_its_videos(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In environment.json; a resumed one says so if it is another. Its clips are counted as clips."""
    monkeypatch.setenv("COHOBATE_VIDEO_DECODER", "pyav")
    words = ["stages=[{name: teacher, method: videomae, steps: 4}]", "checkpoint.every_steps=2"]
    assert train(small(clips, tmp_path, *words))[1] == 0
    assert " clips/s  " in capsys.readouterr().err
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["video_decoder"] == f"pyav {av.__version__}"
    (tmp_path / "environment.json").write_text(json.dumps(environment | {"video_decoder": "torchcodec 0.13.0"}))
    assert train(small(clips, tmp_path, *words))[1] == 0
    said = capsys.readouterr().err
    assert f"videos were decoded by torchcodec 0.13.0, from here on by pyav {av.__version__}" in said


def test_the_report_shows_clips_and_both_masks(taught: Path) -> None:
    teacher, student = read_run(taught).samples
    assert teacher.images.shape == (2, 4, 16, 16, 3) and teacher.teacher_visible is None
    assert student.teacher_visible is not None and student.reconstruction is not None
    assert student.visible.shape == student.teacher_visible.shape == (2, 2, 4, 4)
    assert (student.visible & ~student.teacher_visible).sum() == 0
    assert (student.visible.sum(), student.teacher_visible.sum()) == (2 * 2 * 4, 2 * 2 * 8)  # 0.75 and 0.5 of 16
    assert np.array_equal(student.visible[:, 0], student.visible[:, 1])  # a tube
    shown = student.visible.repeat(2, axis=1).repeat(4, axis=2).repeat(4, axis=3)[..., None]
    assert np.array_equal(student.reconstruction * shown, student.images * shown)


class Cut(Exception):
    """The power went off."""


# Drop path, accumulation and a token that is no parameter have something to remember.
HARD = ["optimizer.accumulate=2", "model.drop_path=0.2", "checkpoint.every_steps=2", "compat.frozen_token=true"]


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(small(clips, run, *HARD))[1] == 0
    return run


@pytest.mark.parametrize("updates", [4, 7])
def test_a_cut_at_amd_goes_on_with_the_same_bits(
    clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    """Cut where AMD begins and inside it: student, decoder, projections, generators and Adam."""
    count, update = 0, Step.__call__

    def step(self: Step, *args: Any, **more: Any) -> None:
        nonlocal count
        if count == updates:
            raise Cut
        count += 1
        update(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        with pytest.raises(Cut):
            train(small(clips, tmp_path, *HARD))
    assert train(small(clips, tmp_path, *HARD))[1] == 0
    for name in ("1-teacher", "2-amd"):
        for file in ("model.safetensors", "decoder.safetensors"):
            first, second = (load_file(str(run / "exports" / name / file)) for run in (whole, tmp_path))
            assert first.keys() == second.keys() and len(first) > 10
            assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_the_masks_are_nested_tubes_and_every_crop_has_its_own(clips: Path, taught: Path, tmp_path: Path) -> None:
    config = small(clips, taught, "seed=3")
    stage, feed = entered(config, 1), Feed(config, ALONE)
    feed.open(0)
    batch, epoch = feed.next()
    feed.close()
    assert feed.batches_per_epoch == 8 and batch.pixels.shape == (8, 4, 16, 16, 3)
    assert len(set(batch.places.tolist())) == 2  # videos, four crops of each
    assert not torch.equal(batch.pixels[0], batch.pixels[1])
    plan = stage.plan(batch.sample_ids, epoch)
    words: dict[str, Any] = {"kind": "tube", "ratio": 0.75, "teacher_ratio": 0.5, "rounding": "mask"}
    grid = stage.method.student.grid
    expected = mask_plan(grid, batch.sample_ids, seed=3, stage=1, epoch=epoch, **words)
    assert torch.equal(plan.order, expected.order) and (plan.student, plan.teacher) == (8, 16)
    assert len({tuple(row.tolist()) for row in plan.visible}) > 4
    assert entered(config, 0).plan(batch.sample_ids, epoch).teacher == plan.tokens  # nobody watches the first stage


def test_what_a_clips_stage_is_made_of(clips: Path, taught: Path) -> None:
    first, second = (entered(small(clips, taught), index) for index in (0, 1))
    assert type(first.method) is MAE and isinstance(first.method.decoder, PixelDecoder)
    assert first.method.options.convention == "videomae" and first.trained.keys() == {"student", "decoder"}
    amd = second.method
    assert isinstance(amd, AMD) and isinstance(amd.decoder, PixelDecoder)
    assert amd.options.convention == "videomae" and tuple(amd.teacher.layers) == (2, 3)
    assert second.trained.keys() == {"student", "decoder", "alignment"} and second.teacher is not None
    trained = {id(p) for module in second.trained.values() for p in module.parameters() if p.requires_grad}
    assert trained == {id(p) for p in second.updater.parameters}
    tokens = {name for name, _ in amd.alignment.named_parameters() if name.endswith("mask_token")}
    assert tokens == {"generators.0.mask_token"} and second.flops > first.flops / 2
    frozen = entered(small(clips, taught, "compat.frozen_token=true"), 1).method
    assert isinstance(frozen, AMD) and "generators.0.mask_token" in frozen.alignment.state_dict()
    assert not any(name.endswith("mask_token") for name, _ in frozen.alignment.named_parameters())


def test_the_patch_kernel_of_a_clip_is_drawn_as_published(clips: Path, tmp_path: Path) -> None:
    """Uniform up to 1/sqrt(2 x 4 x 4 x 3) = 0.102, torch's default; Xavier's bound would be 0.22."""
    kernel = entered(small(clips, tmp_path)).method.student.patch_embed.proj.weight
    assert 0.09 < float(kernel.detach().abs().max()) <= 96**-0.5


def test_images(tiny: Any) -> None:
    """MAE's decoder and pixels; the class token is aligned, or not."""
    words = [f"stages=[{{name: amd, method: amd, steps: 9, teacher: {{source: model, spec: '{FROM_IMAGES}'}}}}]"]
    words += ["mask.teacher_ratio=0.5", "amd={direct: [[2, 3]], generation: [[1, 2]]}"]
    stage = entered(tiny.config("a", *words))
    amd = stage.method
    assert isinstance(amd, AMD) and type(amd.decoder) is Decoder and amd.options.convention == "mae"
    assert (amd.student.prefix, amd.options.align_cls) == (1, True)
    plan = stage.plan(torch.arange(3), 0)
    assert (plan.student, plan.teacher, plan.tokens) == (4, 8, 16)
    bare = [word.replace("heads=4", "heads=4&cls_token=false") for word in words]
    with pytest.raises(UserError, match=r"amd\.align_cls: expected a teacher with the student's 1 prefix tokens"):
        entered(tiny.config("b", *bare))
    entered(tiny.config("c", *bare, "amd.align_cls=false"))


def test_pairs_that_are_not_there_are_refused_before_anything_is_trained(clips: Path, tmp_path: Path) -> None:
    for word, message in {
        "amd.direct=[[3, 2]]": r"amd\.direct, generation: expected student blocks in \[1, 2\], got \[2, 3\]",
        "amd.direct=[[1, 4]]": r"stages\.1\.teacher\.layers: expected numbers in \[0, 3\], got \[3, 4\]",
    }.items():
        with pytest.raises(UserError, match=message):
            manager(small(clips, tmp_path, word))


def test_the_demo_gives_both_students_as_many_flops(tmp_path: Path) -> None:
    """The one with a teacher, and the one without: the teacher's forward, projections and generators included."""
    config = load("demo-video", [f"run={tmp_path}"])
    stages = StageManager(config, ALONE, tmp_path, batches_per_epoch=128)
    stages.leave(stages.enter(0), 1)
    amd, alone = stages.enter(1), stages.enter(2)
    assert isinstance(amd.method, AMD) and type(alone.method) is MAE
    assert amd.steps * amd.flops == pytest.approx(alone.steps * alone.flops, rel=1e-3)
    shapes = [{name: p.shape for name, p in stage.method.student.named_parameters()} for stage in (amd, alone)]
    assert shapes[0] == shapes[1] and amd.config.decoder == alone.config.decoder
