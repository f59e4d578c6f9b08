"""Whether the settings of a run can go together; every complaint names the key, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

from cohobate.config.conversion import assign
from cohobate.config.schema import Config
from cohobate.errors import UserError

STAGE_SECTIONS = ("model", "decoder", "mask", "dbot", "mae", "optimizer")


def for_stage(config: Config, index: int) -> Config:
    """The configuration as stage ``index`` sees it, its ``set`` applied."""
    for key, value in config.stages[index].set.items():
        config = assign(config, key, value)
    return config


def check(config: Config) -> Config:
    """Return ``config`` unchanged if its settings can go together.

    Raises:
        UserError: naming the key, what was expected and what came.
    """
    if not config.stages:
        raise UserError("stages: expected at least one stage, got none")
    names = [stage.name for stage in config.stages]
    for index, stage in enumerate(config.stages):
        where = f"stages.{index}"
        _expect(names.count(stage.name) == 1, f"{where}.name", "a name of its own", stage.name)
        plain = stage.name.replace("-", "").replace("_", "").replace(".", "")
        _expect(plain.isalnum(), f"{where}.name", "letters, digits, - and _", stage.name)
        if stage.steps is None:
            _expect(0 < stage.epochs < math.inf, f"{where}.epochs", "more than 0", stage.epochs)
        else:
            _expect(stage.steps > 0, f"{where}.steps", "more than 0", stage.steps)
        _check_sources(config, index, where)
        for key in stage.set:
            section = key.split(".")[0]
            _expect(section in STAGE_SECTIONS, f"{where}.set", f"keys of {', '.join(STAGE_SECTIONS)}", key)
        seen = for_stage(config, index)
        _check_sections(seen)
        one = stage.method != "mae" or seen.mask.masks == 1
        _expect(one, f"{where}.set.mask.masks", "1, for method mae has no teacher to share", seen.mask.masks)
    _check_sections(config)
    return config


def _check_sources(config: Config, index: int, where: str) -> None:
    stage, teacher, student = config.stages[index], config.stages[index].teacher, config.stages[index].student
    if stage.method == "mae":
        _expect(
            teacher.source == "none", f"{where}.teacher.source", "none, for method mae has no teacher", teacher.source
        )
    else:
        _expect(
            teacher.source != "none",
            f"{where}.teacher.source",
            "random, previous, file or model for method dbot",
            teacher.source,
        )
    if index == 0:
        _expect(
            teacher.source != "previous",
            f"{where}.teacher.source",
            "random, file or model in the first stage",
            teacher.source,
        )
        _expect(student.init != "previous", f"{where}.student.init", "fresh or file in the first stage", student.init)
    if teacher.source == "file":
        _expect(bool(teacher.path), f"{where}.teacher.path", "a path, for teacher.source is file", teacher.path)
    if teacher.source == "model":
        _expect(bool(teacher.spec), f"{where}.teacher.spec", "what to load, for teacher.source is model", teacher.spec)
    if student.init == "file":
        _expect(bool(student.path), f"{where}.student.path", "a path, for student.init is file", student.path)
    if teacher.depth is not None:
        _expect(teacher.depth >= 0, f"{where}.teacher.depth", "0 or more", teacher.depth)
    if teacher.layer is not None:
        _expect(teacher.layer >= 1, f"{where}.teacher.layer", "1 or more (depth=0 is the embedding)", teacher.layer)
        _expect(teacher.depth is None, f"{where}.teacher.layer", "null where teacher.depth is given", teacher.layer)
    if teacher.source in ("none", "random"):
        _expect(
            teacher.resize == "none",
            f"{where}.teacher.resize",
            f"none, for teacher.source is {teacher.source}",
            teacher.resize,
        )


def _check_sections(config: Config) -> None:
    model, data, mask, optimizer = config.model, config.data, config.mask, config.optimizer
    _expect(
        config.device == "auto" or config.device.split(":")[0] in ("cpu", "cuda"),
        "device",
        "auto, cpu or cuda",
        config.device,
    )
    sized = model.size is not None or None not in (model.width, model.depth, model.heads)
    _expect(sized, "model.size", "a named size, or model.width, model.depth and model.heads", model.size)
    _expect(model.patch > 0, "model.patch", "more than 0", model.patch)
    for side, name in zip(data.image_size, ("height", "width"), strict=True):
        divides = side > 0 and side % model.patch == 0
        _expect(divides, "data.image_size", f"a {name} that model.patch={model.patch} divides", side)
    _expect(data.channels > 0, "data.channels", "more than 0", data.channels)
    for key in ("mean", "std"):
        values = getattr(data, key)
        _expect(
            len(values) == data.channels,
            f"data.{key}",
            f"one number for each of {data.channels} channels",
            list(values),
        )
    _expect(min(data.std, default=1) > 0, "data.std", "numbers above 0", list(data.std))
    _expect(data.batch_size > 0, "data.batch_size", "more than 0", data.batch_size)
    _expect(data.workers >= 0, "data.workers", "0 or more", data.workers)
    _expect(0 < data.scale[0] <= data.scale[1] <= 1, "data.scale", "0 < low <= high <= 1", list(data.scale))
    _expect(0 < data.ratio[0] <= data.ratio[1], "data.ratio", "0 < low <= high", list(data.ratio))
    _expect(0 <= data.max_bad <= 1, "data.max_bad", "0 to 1", data.max_bad)
    _expect(0 <= data.flip <= 1, "data.flip", "0 to 1", data.flip)
    _expect(0 < mask.ratio < 1, "mask.ratio", "between 0 and 1", mask.ratio)
    tokens = (data.image_size[0] // model.patch) * (data.image_size[1] // model.patch)
    kept = int(tokens * (1 - mask.ratio)) if mask.rounding == "keep" else tokens - int(mask.ratio * tokens)
    _expect(
        0 < kept < tokens,
        "mask.ratio",
        f"a ratio that keeps 1 to {tokens - 1} of {tokens} tokens",
        f"{mask.ratio}, which keeps {kept}",
    )
    _expect(mask.masks > 0, "mask.masks", "more than 0", mask.masks)
    _expect(optimizer.accumulate > 0, "optimizer.accumulate", "more than 0", optimizer.accumulate)
    _expect(optimizer.clip is None or optimizer.clip > 0, "optimizer.clip", "null or more than 0", optimizer.clip)
    _expect(optimizer.max_bad_steps > 0, "optimizer.max_bad_steps", "more than 0", optimizer.max_bad_steps)
    _expect(config.log.every > 0, "log.every", "more than 0", config.log.every)
    _expect(config.checkpoint.keep > 0, "checkpoint.keep", "more than 0", config.checkpoint.keep)
    _expect(config.evaluate.k > 0, "evaluate.k", "more than 0", config.evaluate.k)


def _expect(fine: bool, key: str, expected: str, got: Any) -> None:
    if not fine:
        raise UserError(
            f"{key}: expected {expected}, got {got!r}"
            if not isinstance(got, str)
            else f"{key}: expected {expected}, got {got}"
        )
