"""Recipes, dotted keys and what a user reads when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cohobate import config as configuration
from cohobate.config import Config, StageConfig, TeacherConfig, assign, check, dump, from_dict, load
from cohobate.errors import UserError

RECIPES = configuration.recipes()


def test_the_promised_recipes_are_shipped() -> None:
    sizes = {f"dbot_vit_{size}" for size in ("small", "base", "large", "huge")}
    assert {"demo", "demo-random", "mae_vit_base"} | sizes <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_dump_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(str(tmp_path / "config.yaml")) == config


def test_published_dbot_settings() -> None:
    """methods: dBOT's released commands for B, L and H differ in the first teacher, drop path and clipping."""
    base, large, huge = (load(f"dbot_vit_{size}") for size in ("base", "large", "huge"))
    assert [s.epochs for s in base.stages] == [800, 800] and base.optimizer.clip == 3.0
    assert [c.stages[0].teacher.depth for c in (base, large, huge)] == [None, 0, 0]
    assert [c.model.drop_path for c in (base, large, huge)] == [0.2, 0.2, 0.3]
    assert large.optimizer.clip is None and huge.model.patch == 14
    assert all(c.dbot.beta == 2.0 and c.dbot.standardise and not c.dbot.final_norm for c in (base, large, huge))


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
