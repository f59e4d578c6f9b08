"""What a stage starts from: students, teachers, and the published code's defects on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate import TokenGrid
from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.masking import mask_plan
from cohobate.methods import DBOT, SymmetricDBOT
from cohobate.models import VisionTransformer
from cohobate.models.exports import load_encoder
from cohobate.teacher import FrozenTeacher, ResizedTeacher
from cohobate.training.distributed import Ranks
from cohobate.training.stages import Stage, StageManager, stage_steps

ALONE = Ranks(0, 1, torch.device("cpu"))
RANDOM = "{source: random, init: copy}"


def manager(config: Config, ranks: Ranks = ALONE) -> StageManager:
    return StageManager(config, ranks, Path(config.run), batches_per_epoch=4)


def two_random(tiny: Any, run: str, *overrides: str) -> Config:
    """Two dBOT stages, the first with a random teacher."""
    return tiny.config(run, "stages.0.method=dbot", f"stages.0.teacher={RANDOM}", *overrides)


def disturb(stage: Stage) -> None:
    """Stand in for training: every weight moves, and Adam has something to remember."""
    for parameter in stage.updater.parameters:
        parameter.grad = torch.ones_like(parameter)
    stage.updater.gradient_norm()
    stage.updater.step(0.1, torch.zeros(()))
    stage.updater.zero()


def same(first: VisionTransformer, second: VisionTransformer) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def teaches(stage: Stage, model: VisionTransformer, layer: int | None = None) -> bool:
    """Whether the stage's teacher has this model's weights."""
    assert isinstance(stage.method, DBOT)
    expected = FrozenTeacher(model, None if layer is None else (layer,))
    return stage.method.teacher.fingerprint() == expected.fingerprint()


FP32 = ["precision.teacher=fp32", "precision.compute=fp32"]


def test_the_random_teacher_is_a_copy_of_the_students_first_weights(tiny: Any) -> None:
    stage = manager(two_random(tiny, "a", *FP32)).enter(0)
    assert teaches(stage, stage.method.student) and stage.method.teacher.precision.compute == torch.float32
    disturb(stage)
    assert not teaches(stage, stage.method.student)
    assert manager(two_random(tiny, "b")).enter(0).method.teacher.precision.compute == torch.bfloat16


def test_or_drawn_on_its_own_or_without_blocks(tiny: Any) -> None:
    stage = manager(two_random(tiny, "a", *FP32, "stages.0.teacher.init=independent")).enter(0)
    assert stage.method.teacher.depth == stage.method.student.depth
    assert not teaches(stage, stage.method.student)
    stage = manager(two_random(tiny, "b", *FP32, "stages.0.teacher.depth=0")).enter(0)
    assert stage.method.teacher.layers == (0,) and teaches(stage, stage.method.student, 0)


def test_the_next_teacher_is_the_student_and_the_next_student_is_new(tiny: Any) -> None:
    stages = manager(two_random(tiny, "a", *FP32))
    first = stages.enter(0)
    start = {key: value.clone() for key, value in first.method.student.state_dict().items()}
    disturb(first)
    stages.leave(first, 6)
    second = stages.enter(1, first)
    assert teaches(second, first.method.student)
    for key, value in second.method.student.state_dict().items():
        fixed = key == "pos_embed" or "norm" in key or ("blocks" in key and key.endswith("bias"))
        assert fixed or not (
            torch.equal(value, start[key]) or torch.equal(value, first.method.student.state_dict()[key])
        ), key
    assert not second.updater.optimizer.state  # Adam starts anew
    assert second.schedule.rate(0) == 0.0  # and so does the warm-up


def test_students_do_not_depend_on_the_rank_nor_on_what_was_drawn_before(tiny: Any) -> None:
    config = two_random(tiny, "a")
    torch.manual_seed(1)
    first = manager(config).initial_student(0)
    torch.manual_seed(2)
    assert same(first, manager(config, Ranks(1, 2, torch.device("cpu"))).initial_student(0))
    assert not same(first, manager(two_random(tiny, "a", "seed=1")).initial_student(0))


def test_published_defects_on_request(tiny: Any) -> None:
    words = ["compat.keep_optimizer=true", "compat.keep_patch_bias=true"]
    stages = manager(two_random(tiny, "a", *words))
    first = stages.enter(0)
    disturb(first)
    stages.leave(first, 6)
    second = stages.enter(1, first)
    bias = second.method.student.patch_embed.proj.bias
    assert torch.equal(bias, first.method.student.patch_embed.proj.bias)
    moments = second.updater.optimizer.state[second.method.student.patch_embed.proj.weight]
    assert moments["step"] == 1 and moments["exp_avg"].abs().sum() > 0
    other = manager(two_random(tiny, "b", "compat.unsynchronised_reset=true"), Ranks(1, 2, torch.device("cpu")))
    synchronised = manager(two_random(tiny, "b"), Ranks(1, 2, torch.device("cpu")))
    assert same(
        other.initial_student(0), synchronised.initial_student(0)
    )  # the first stage is synchronised upstream too
    assert not same(other.initial_student(1), synchronised.initial_student(1))


def test_a_teacher_or_a_student_from_a_file(tiny: Any, tmp_path: Path) -> None:
    donor = manager(two_random(tiny, "donor", "seed=9"))
    stage = donor.enter(0)
    disturb(stage)
    path = donor.leave(stage, 1)
    words = [f"stages.0.teacher={{source: file, path: {path}}}", f"stages.0.student={{init: file, path: {path}}}"]
    loaded = manager(tiny.config("a", "stages.0.method=dbot", *words, *FP32)).enter(0)
    assert teaches(loaded, stage.method.student) and same(loaded.method.student, stage.method.student)
    with pytest.raises(UserError, match=r"stages\.0\.student: expected weights of this model's shape, got another"):
        manager(tiny.config("b", "stages.0.method=dbot", *words, "model.width=32")).enter(0)
    bigger = ["stages.0.method=dbot", words[0], "data.image_size=20", "data.batch_size=2"]
    with pytest.raises(UserError, match=r"stages\.0\.teacher\.resize: the teacher takes 16 x 16 px .* say resize="):
        manager(tiny.config("c", *bigger)).enter(0)
    resized = manager(tiny.config("d", *bigger, "stages.0.teacher.resize=positions")).enter(0).method.teacher
    assert resized.grid == TokenGrid.image(20, 4)


SPEC = "random:vit_tiny?seed=4&image_size=16&patch=4&width=48&depth=3&heads=4"


def test_a_teacher_of_any_source(tiny: Any) -> None:
    """Wider and deeper than the student, a layer in the middle, and pixels of its own where it is asked for."""
    words = ["stages.0.method=dbot", f"stages.0.teacher={{source: model, spec: '{SPEC}', layer: 2}}"]
    stage = manager(tiny.config("a", *words)).enter(0)
    assert stage.method.teacher.layers == (2,) and stage.method.decoder.out == 48
    other = manager(tiny.config("b", *words, f"stages.0.teacher.spec={SPEC.replace('seed=4', 'seed=5')}")).enter(0)
    assert stage.method.teacher.fingerprint() != other.method.teacher.fingerprint()
    patch = SPEC.replace("patch=4", "patch=8").replace("image_size=16", "image_size=32")
    words = [*words, f"stages.0.teacher.spec={patch}"]
    fed = manager(tiny.config("c", *words, "stages.0.teacher.resize=pixels")).enter(0).method.teacher
    assert isinstance(fed, ResizedTeacher) and fed.grid == TokenGrid.image(16, 4)
    with pytest.raises(UserError, match=r"stages\.0\.teacher\.resize: the teacher takes 32 x 32 px"):
        manager(tiny.config("d", *words)).enter(0)
    with pytest.raises(UserError, match=r"stages\.0\.teacher\.layers: expected numbers in \[0, 3\], got \[4\]"):
        manager(tiny.config("e", *words, "stages.0.teacher.layer=4", "stages.0.teacher.resize=pixels")).enter(0)


def test_a_later_stages_teacher_is_tried_before_the_first_stage(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"stages\.1\.teacher\.weights: expected a run folder or an export"):
        manager(tiny.config("a", "stages.1.teacher={source: model, spec: /nowhere}"))
    words = [f"stages.1.teacher={{source: model, spec: '{SPEC}&cls_token=false'}}"]
    with pytest.raises(UserError, match="cls: expected a teacher with a cls token"):
        manager(tiny.config("b", *words))
    manager(tiny.config("c", *words, "stages.1.set.dbot.cls=false"))


def test_a_larger_teacher_teaches_a_smaller_student(tiny: Any) -> None:
    """The head takes the teacher's width."""
    words = ["stages.0.set.model.width=48", "stages.0.set.model.depth=3"]
    stages = manager(two_random(tiny, "a", *words))
    first = stages.enter(0)
    stages.leave(first, 6)
    second = stages.enter(1, first)
    assert (first.method.student.width, second.method.student.width) == (48, 24)
    assert second.method.decoder.out == 48


def test_a_student_that_goes_on(tiny: Any) -> None:
    stages = manager(two_random(tiny, "a", *FP32, "stages.1.student.init=previous"))
    first = stages.enter(0)
    disturb(first)
    stages.leave(first, 6)
    assert same(stages.enter(1, first).method.student, load_encoder(stages.export_folder(0)))


def test_the_masks_are_the_configured_ones(tiny: Any) -> None:
    words = ["mask.kind=inverse_block", "mask.count=10", "mask.block_min=2", "mask.block_aspect=0.5", "seed=7"]
    stage, ids = manager(two_random(tiny, "a", *words)).enter(0), torch.tensor([3, 9])
    expected = mask_plan(
        TokenGrid.image(16, 4), ids, kind="inverse_block", count=10, block_min=2, block_aspect=0.5, ratio=0.75,
        seed=7, stage=0, epoch=4,
    )  # fmt: skip
    assert torch.equal(stage.plan(ids, 4).order, expected.order) and stage.plan(ids, 4).student == 6
    assert stage.plan(ids, 5).order.tolist() != expected.order.tolist()
    several = manager(two_random(tiny, "b", "mask.masks=3", *words)).enter(0)
    assert len(several.plan(ids, 0).order) == 6 and len(several.plan(ids, 0, masks=1).order) == 2


SYMMETRIC = [
    "dbot={student: symmetric, loss: cosine, standardise: false, final_norm: true, cls: false}",
    "model={size: null, patch: 4, width: 24, depth: 2, heads: 2, positions: none, layer_scale: 0.1, "
    "relative_positions: true}",
]


def test_a_symmetric_student(tiny: Any) -> None:
    """No decoder: mask tokens in the encoder and a head of the teacher's width; its export is the encoder alone."""
    words = ["stages.0.method=dbot", f"stages.0.teacher={{source: model, spec: '{SPEC}'}}"]
    stages = manager(tiny.config("a", *words, "stages.1.teacher={source: random}", *SYMMETRIC))
    stage = stages.enter(0)
    assert isinstance(stage.method, SymmetricDBOT) and stage.method.head.out == 48
    student = stage.method.student
    assert student.pos_embed is None and student.rel_pos_bias is not None
    assert float(student.state_dict()["blocks.1.ls2.gamma"].unique()) == pytest.approx(0.1)
    assert stage.trained.keys() == {"student", "decoder"} and stage.flops > 0
    assert same(
        manager(tiny.config("b", *words, "stages.1.teacher={source: random}", *SYMMETRIC)).enter(0).method.student,
        student,
    )
    folder = stages.leave(stage, 1)
    assert not (folder / "decoder.safetensors").exists()


def test_steps_come_from_epochs_or_are_given(tiny: Any) -> None:
    config = tiny.config("a", "stages.0.steps=null", "stages.0.epochs=2.5", "stages.1.steps=7")
    assert stage_steps(config, 4) == [10, 7]
    slower = tiny.config("b", "stages.0.steps=null", "stages.0.epochs=2.5", "stages.0.set={optimizer: {accumulate: 2}}")
    assert stage_steps(slower, 4)[0] == 5  # of two batches each
    with pytest.raises(UserError, match=r"stages\.0\.epochs: expected at least one update of 4 an epoch, got 0\.1"):
        stage_steps(tiny.config("a", "stages.0.steps=null", "stages.0.epochs=0.1"), 4)


def test_the_rate_follows_batch_accumulation_and_ranks(tiny: Any) -> None:
    words = ["optimizer.lr=null", "optimizer.blr=1e-3", "optimizer.accumulate=2", "optimizer.warmup_epochs=0"]
    stage = manager(tiny.config("a", *words), Ranks(0, 1, torch.device("cpu"))).enter(0)
    assert stage.schedule.peak == pytest.approx(1e-3 * 16 * 2 / 256)
    four = manager(tiny.config("a", *words), Ranks(0, 4, torch.device("cpu")))
    assert four.schedule(0).peak == pytest.approx(1e-3 * 16 * 2 * 4 / 256)
