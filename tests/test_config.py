"""Recipes, dotted keys and what a user reads when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cohobate import config as configuration
from cohobate.config import Config, StageConfig, TeacherConfig, assign, check, dump, from_dict, load
from cohobate.errors import UserError

RECIPES = configuration.recipes()
NEED_A_TEACHER = ("_from_large", "_from_huge", "_ssv2")  # only its owner knows where it is


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_dump_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    needs_teacher = name.endswith(NEED_A_TEACHER)
    config = load(name, ["stages.0.teacher.spec=runs/larger"] if needs_teacher else [])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(NEED_A_TEACHER)])
def test_a_recipe_that_needs_a_teacher_says_so(name: str) -> None:
    with pytest.raises(UserError, match=r"stages\.0\.teacher\.spec: expected what to load .*, got None"):
        load(name)


def test_one_word_for_all_published_defects(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: demo\ncompat: upstream\n")
    every = configuration.CompatConfig(True, True, True, True)
    assert load(str(path)).compat == load("demo", ["compat=upstream"]).compat == every
    documented = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`compat.{flag}`" in documented for flag in configuration.to_dict(every))
    assert load("demo").compat == load(str(path), ["compat=none"]).compat == configuration.CompatConfig()
    but = load("demo", ["compat=upstream", "compat.keep_optimizer=false"]).compat
    assert (but.unsynchronised_reset, but.keep_optimizer, but.keep_patch_bias) == (True, False, True)


def test_overrides_are_typed_and_ordered() -> None:
    overrides = [
        "optimizer.blr=1e-3",
        "stages.1.epochs=5",
        "data.image_size=64",
        "run=runs/x",
        "optimizer.clip=null",
        "seed=3",
        "seed=4",
    ]
    config = load("demo", overrides)
    assert config.optimizer.blr == 1e-3 and config.stages[1].epochs == 5.0 and config.data.image_size == (64, 64)
    assert config.run == "runs/x" and config.optimizer.clip is None and config.seed == 4


def test_on_and_off_are_words_and_a_resume_point_does_not_mind(tmp_path: Path) -> None:
    """YAML reads them as true and false; a dump quotes them."""
    path = tmp_path / "mine.yaml"
    path.write_text("base: demo\nexecution: {cuda_graph: off, ahead: on}\n")
    config = load(str(path))
    assert (config.execution.cuda_graph, config.execution.ahead) == ("off", True)
    assert load("demo", ["execution.cuda_graph=on"]).execution.cuda_graph == "on"
    path.write_text(dump(config))
    assert load(str(path)) == config
    assert configuration.bound(config) == configuration.bound(load("demo"))
    assert configuration.bound(load("demo", ["precision.teacher=fp8"])) != configuration.bound(config)


def test_a_list_of_stages_can_be_replaced_whole() -> None:
    config = load("demo", ["stages=[{name: only, method: mae, steps: 3}]"])
    assert config.stages == (StageConfig(name="only", method="mae", steps=3),)


def test_a_stage_may_differ_in_any_key_of_its_sections() -> None:
    config = load("demo", ["stages.1.set.optimizer.blr=1e-2", "stages.0.set={mask: {ratio: 0.5}}"])
    assert configuration.for_stage(config, 1).optimizer.blr == 1e-2
    assert configuration.for_stage(config, 0).mask.ratio == 0.5 and config.mask.ratio == 0.75


WRONG = {
    "optimzer.blr=1": ["optimzer.blr: unknown key", "did you mean 'optimizer.blr'"],
    "optimizer.blrr=1": ["did you mean 'optimizer.blr'"],
    "stages.7.epochs=1": ["stages.7.epochs", "index from 0 to 1", "'7'"],
    "stages.0.epoch=1": ["did you mean 'stages.0.epochs'"],
    "seed=one": ["seed: expected a whole number, got 'one'"],
    "seed=1.5": ["seed: expected a whole number, got 1.5"],
    "optimizer.blr=fast": ["optimizer.blr: expected a number, got 'fast'"],
    "data.loader=dali": ["data.loader: expected one of auto, torch, dali-cpu, dali-gpu; got 'dali'", "did you mean"],
    "data.image_size=[1,2,3]": ["data.image_size: expected a list of 2, got [1, 2, 3]"],
    "data.image_size=30": ["data.image_size", "model.patch=4", "30"],
    "mask.ratio=0.999": ["mask.ratio", "keeps 1 to 63 of 64 tokens", "0.999", "keeps 0"],
    "mask.ratio=1": ["mask.ratio: expected between 0 and 1, got 1.0"],
    "data.std=[0,1,1]": ["data.std", "above 0"],
    "data.channels=1": ["data.mean: expected one number for each of 1 channels"],
    "model.cls_token=perhaps": ["model.cls_token: expected true or false, got 'perhaps'"],
    "stages.0.teacher.source=random": ["stages.0.teacher.source", "none", "mae has no teacher"],
    "stages.1.teacher.source=none": ["stages.1.teacher.source: expected random, previous, file or model"],
    "stages.1.teacher.source=model": ["stages.1.teacher.spec: expected what to load"],
    "stages.1.teacher.layer=0": ["stages.1.teacher.layer: expected 1 or more"],
    "stages.1.teacher={source: previous, layer: 2, depth: 1}": ["teacher.layer: expected null where teacher.depth"],
    "stages.1.teacher={source: random, resize: pixels}": ["stages.1.teacher.resize: expected none", "got pixels"],
    "mask.kind=blocks": ["mask.kind: expected one of random, block, inverse_block, tube; got 'blocks'", "'block'"],
    "mask.count=64": ["mask.count: expected 1 to 63 of 64 tokens, got 64"],
    "mask.block_min=0": ["mask.block_min: expected more than 0, got 0"],
    "mask.block_aspect=2": ["mask.block_aspect: expected more than 0 and at most 1, got 2.0"],
    "model.layer_scale=0": ["model.layer_scale: expected null or more than 0, got 0.0"],
    "dbot.student=symmetric": ["stages.0.set.dbot.student: expected asymmetric, for method mae has a decoder"],
    "stages.1.teacher.momentum=1": ["stages.1.teacher.momentum: expected null or 0 <= momentum < 1, got 1.0"],
    "stages.1.teacher.every=0": ["stages.1.teacher.every: expected more than 0, got 0"],
    "stages.1.teacher={source: file, path: x, momentum: 0.9}": ["teacher.momentum: expected null, for only", "got 0.9"],
    "stages.1.teacher={source: model, spec: x, momentum: 0.9}": ["momentum: expected null, for only a teacher with"],
    "compat=upstraem": ["compat: expected upstream, none or a section of keys, got 'upstraem'"],
    "mask.masks=0": ["mask.masks: expected more than 0, got 0"],
    "mask.masks=2": ["stages.0.set.mask.masks: expected 1, for method mae has no teacher to share, got 2"],
    "stages.1.teacher.source=file": ["stages.1.teacher.path: expected a path"],
    "stages.1.name=mae": ["stages.0.name: expected a name of its own, got mae"],
    "stages.1.set={data.root: x}": ["stages.1.set: expected keys of model"],
    "stages.1.set={optimizer.blrr: 1}": ["optimizer.blrr: unknown key", "did you mean 'optimizer.blr'"],
    "stages=[]": ["stages: expected at least one stage"],
    "device=tpu": ["device: expected auto, cpu or cuda, got tpu"],
    "nonsense": ["expected key=value, got 'nonsense'"],
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_clear_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load("demo", [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in WRONG[override]:
        assert part in message


CLIPS = [
    "data.frames=8",
    "data.repeats=4",
    "data.crop=multi_scale",
    "data.generate=video",
    "model.patch=8",
    "model.tubelet=2",
    "mask={kind: tube, ratio: 0.9, teacher_ratio: 0.75, rounding: mask}",
    "amd={direct: [[1, 2]], generation: [[1, 2]]}",
    "stages=[{name: teacher, method: videomae}, {name: amd, method: amd, teacher: {source: previous}}]",
]
# 16 places a frame: the student sees 2 of them, the teacher 4.
WRONG_CLIPS = {
    "data.frames=7": ["data.frames: expected a multiple of model.tubelet=2, such as 6, got 7"],
    "model.tubelet=0": ["model.tubelet: expected more than 0, got 0"],
    "model.tubelet=3": ["data.frames: expected a multiple of model.tubelet=3, such as 6, got 8"],
    "data.stride=0": ["data.stride: expected more than 0"],
    "data.repeats=3": ["data.batch_size: expected a multiple of data.repeats=3, got 64"],
    "data.generate=small": ["data.generate: expected video for clips, got small"],
    "mask.ratio=0": ["mask.ratio: expected between 0 and 1, got 0.0"],
    "mask.ratio=0.05": ["mask.ratio: expected a ratio that keeps 1 to 15 of 16 tokens, got 0.05, which keeps 16"],
    "mask.teacher_ratio=null": ["mask.teacher_ratio: expected more than 0 and less than the student's 0.9", "got None"],
    "mask.teacher_ratio=0": ["mask.teacher_ratio: expected more than 0 and less than the student's 0.9", "got 0.0"],
    "mask.teacher_ratio=0.95": ["expected more than 0 and less than the student's 0.9 (mask.ratio)", "got 0.95"],
    "mask.teacher_ratio=0.89": ["shows the teacher 3 to 15 of 16 tokens", "which shows 2 and leaves 0 to generate"],
    "mask.teacher_ratio=0.03": ["shows the teacher 3 to 15 of 16 tokens", "got 0.03, which shows 16"],
    "mask.masks=2": ["stages.0.set.mask.masks: expected 1, for method videomae has no teacher to share, got 2"],
    "stages.0.teacher.source=random": ["stages.0.teacher.source: expected none, for method videomae has no teacher"],
    "stages.1.teacher.source=random": ["stages.1.teacher.source: expected previous, file or model for method amd"],
    "stages.1.teacher.source=none": ["stages.1.teacher.source: expected previous, file or model for method amd"],
    "stages.1.teacher.layer=2": ["stages.1.teacher.layer: expected null, for amd.direct and amd.generation name"],
    "stages.1.teacher.momentum=0.9": ["stages.1.teacher.momentum: expected null for method amd, got 0.9"],
    "stages=[{name: amd, method: amd, teacher: {source: previous}}]": [
        "expected file or model for method amd in the f"
    ],
    "amd.direct=[[0, 1]]": ["amd.direct: expected pairs of blocks from 1, got [[0, 1]]"],
    "amd.generation=[]": ["amd.generation: expected at least one pair, or amd.generation_weight=0, got []"],
    "amd.direct=[[1, 2, 3]]": ["amd.direct.0: expected a list of 2, got [1, 2, 3]"],
    "amd.pixel_weight=0": ["amd.pixel_weight: expected more than 0"],
    "amd={direct_weight: 0, generation_weight: 0}": ["expected one above 0 (else it is videomae)"],
    "amd.loss=mse": ["amd.loss: expected one of l2, l1, smooth_l1; got 'mse'"],
}


@pytest.mark.parametrize("override", WRONG_CLIPS)
def test_what_clips_and_two_masks_cannot_be(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load("demo", [*CLIPS, override])
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in WRONG_CLIPS[override]), message


@pytest.mark.parametrize("override", ["data.repeats=2", "data.crop=multi_scale", "data.generate=video"])
def test_what_only_clips_can_be(override: str) -> None:
    with pytest.raises(UserError, match=r"data\.\w+: expected .* for images"):
        load("demo", [override])


def test_a_ratio_is_of_what_one_mask_covers() -> None:
    """Tubes share a frame's 16 places; a random mask of the whole clip has 64, so more ratios are possible."""
    with pytest.raises(UserError, match=r"mask\.ratio: expected a ratio that keeps 1 to 15 of 16 tokens"):
        load("demo", [*CLIPS, "mask.rounding=keep", "mask.ratio=0.95"])
    load("demo", [*CLIPS, "mask.rounding=keep", "mask.ratio=0.95", "mask.kind=random"])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"recipe: expected one of .*got 'dmo'; did you mean 'demo'\?"):
        load("dmo")


def test_a_yaml_file_with_an_unknown_key_or_bad_syntax(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: demo\nmodle: {patch: 8}\n")
    with pytest.raises(UserError, match=r"modle: unknown key; did you mean 'model'\?"):
        load(str(path))
    path.write_text("a: [1,\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load(str(path))
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping of keys"):
        load(str(path))


def test_a_base_may_not_lead_back_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(UserError, match="base: expected the name of another recipe"):
        load(str(path))


def test_what_a_checkpoint_is_tied_to() -> None:
    config = load("demo")
    same = [
        assign(config, key, value)
        for key, value in (("run", "elsewhere"), ("data.workers", 7), ("log.every", 3), ("evaluate.k", 5))
    ]
    print_of = [configuration.fingerprint(c, "hash", 1) for c in (config, *same)]
    assert len(set(print_of)) == 1
    changed = [assign(config, "seed", 1), assign(config, "stages.0.epochs", 2), assign(config, "mask.ratio", 0.5)]
    others = [configuration.fingerprint(c, "hash", 1) for c in changed]
    others += [configuration.fingerprint(config, "other", 1), configuration.fingerprint(config, "hash", 2)]
    assert len({print_of[0], *others}) == 6


def test_dataclasses_work_without_yaml() -> None:
    config = Config(
        stages=(StageConfig(name="a", teacher=TeacherConfig(source="random")),),
        model=configuration.ModelConfig(size="base"),
    )
    assert check(config) is config
    assert from_dict(configuration.to_dict(config)) == config
