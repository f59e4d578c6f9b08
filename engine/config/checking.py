"""Whether the settings of a run can go together; every complaint names the key, what was expected and what came."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cohobate.config.conversion import assign
from cohobate.config.schema import Config
from cohobate.errors import UserError

STAGE_SECTIONS = ("model", "decoder", "mask", "dbot", "mae", "amd", "optimizer")
SOURCES = {
    "mae": ("none",),
    "videomae": ("none",),
    "dbot": ("random", "previous", "file", "model"),
    "amd": ("previous", "file", "model"),
}


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
        symmetric = seen.dbot.student == "symmetric"
        _expect(
            stage.method == "dbot" or not symmetric,
            f"{where}.set.dbot.student",
            f"asymmetric, for method {stage.method} has a decoder",
            seen.dbot.student,
        )
        if stage.method != "dbot":
            why = "shows the teacher what a mask leaves" if stage.method == "amd" else "has no teacher to share"
            _expect(
                seen.mask.masks == 1, f"{where}.set.mask.masks", f"1, for method {stage.method} {why}", seen.mask.masks
            )
        if stage.method == "amd":
            _check_amd(seen)
    _check_sections(config)
    _check_execution(config)
    return config


def _check_execution(config: Config) -> None:
    """What a teacher that changes, or runs beside the step, rules out."""
    execution = config.execution
    for index, stage in enumerate(config.stages):
        if stage.teacher.momentum is not None:
            where = f"for stages.{index}.teacher.momentum is given: that teacher changes"
            _expect(not execution.ahead, "execution.ahead", f"false, {where} in the optimizer's step", True)
            _expect(config.precision.teacher != "fp8", "precision.teacher", f"bf16 or fp32, {where}", "fp8")


def _check_sources(config: Config, index: int, where: str) -> None:
    stage, teacher, student = config.stages[index], config.stages[index].teacher, config.stages[index].student
    sources = [source for source in SOURCES[stage.method] if index or source != "previous"]
    listed = " or ".join(filter(None, [", ".join(sources[:-1]), sources[-1]]))
    place = "" if index else " in the first stage"
    why = (
        f"{listed}, for method {stage.method} has no teacher"
        if sources == ["none"]
        else (f"{listed} for method {stage.method}{place}")
    )
    _expect(teacher.source in sources, f"{where}.teacher.source", why, teacher.source)
    if index == 0:
        _expect(student.init != "previous", f"{where}.student.init", "fresh or file in the first stage", student.init)
    if teacher.source == "file":
        _expect(bool(teacher.path), f"{where}.teacher.path", "a path, for teacher.source is file", teacher.path)
    if teacher.source == "model":
        what = "what to load (timm:NAME, hf:FOLDER_OR_ID, or a folder with exports), for teacher.source is model"
        _expect(bool(teacher.spec), f"{where}.teacher.spec", what, teacher.spec)
    if student.init == "file":
        _expect(bool(student.path), f"{where}.student.path", "a path, for student.init is file", student.path)
    if teacher.depth is not None:
        _expect(teacher.depth >= 0, f"{where}.teacher.depth", "0 or more", teacher.depth)
    if teacher.layer is not None:
        _expect(teacher.layer >= 1, f"{where}.teacher.layer", "1 or more (depth=0 is the embedding)", teacher.layer)
        _expect(teacher.depth is None, f"{where}.teacher.layer", "null where teacher.depth is given", teacher.layer)
    if stage.method == "amd":
        for key in ("depth", "layer"):
            _expect(
                getattr(teacher, key) is None,
                f"{where}.teacher.{key}",
                "null, for amd.direct and amd.generation name the teacher's blocks",
                getattr(teacher, key),
            )
        _expect(teacher.momentum is None, f"{where}.teacher.momentum", "null for method amd", teacher.momentum)
    if teacher.momentum is not None:
        _check_momentum(config, index, where, teacher.momentum)
    _expect(teacher.every > 0, f"{where}.teacher.every", "more than 0", teacher.every)
    if teacher.source in ("none", "random"):
        _expect(
            teacher.resize == "none",
            f"{where}.teacher.resize",
            f"none, for teacher.source is {teacher.source}",
            teacher.resize,
        )


def _check_sections(config: Config) -> None:
    model, data, optimizer = config.model, config.data, config.optimizer
    _expect(
        config.device == "auto" or config.device.split(":")[0] in ("cpu", "cuda"),
        "device",
        "auto, cpu or cuda",
        config.device,
    )
    sized = model.size is not None or None not in (model.width, model.depth, model.heads)
    _expect(sized, "model.size", "a named size, or model.width, model.depth and model.heads", model.size)
    _expect(model.patch > 0, "model.patch", "more than 0", model.patch)
    _expect(model.tubelet > 0, "model.tubelet", "more than 0", model.tubelet)
    _expect(
        model.layer_scale is None or model.layer_scale > 0,
        "model.layer_scale",
        "null or more than 0",
        model.layer_scale,
    )
    for side, name in zip(data.image_size, ("height", "width"), strict=True):
        divides = side > 0 and side % model.patch == 0
        _expect(divides, "data.image_size", f"a {name} that model.patch={model.patch} divides", side)
    _check_clips(config)
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
    _check_mask(config)
    _expect(optimizer.accumulate > 0, "optimizer.accumulate", "more than 0", optimizer.accumulate)
    _expect(optimizer.clip is None or optimizer.clip > 0, "optimizer.clip", "null or more than 0", optimizer.clip)
    _expect(optimizer.max_bad_steps > 0, "optimizer.max_bad_steps", "more than 0", optimizer.max_bad_steps)
    _expect(config.log.every > 0, "log.every", "more than 0", config.log.every)
    _expect(config.checkpoint.keep > 0, "checkpoint.keep", "more than 0", config.checkpoint.keep)
    _expect(config.evaluate.k > 0, "evaluate.k", "more than 0", config.evaluate.k)


def _check_momentum(config: Config, index: int, where: str, momentum: float) -> None:
    """A teacher that follows is the student's shape, for its weights are averaged with the student's."""
    teacher, student = config.stages[index].teacher, for_stage(config, index).model
    key = f"{where}.teacher.momentum"
    follows = teacher.source in ("random", "previous")
    expected = "null, for only a teacher with source random or previous can follow the student"
    _expect(follows, key, expected, momentum)
    _expect(0 <= momentum < 1, key, "null or 0 <= momentum < 1", momentum)
    before = student if index == 0 or teacher.source == "random" else for_stage(config, index - 1).model
    alike = replace(before, drop_path=0.0) == replace(student, drop_path=0.0)
    _expect(alike, key, "null where the stage before has another model", momentum)


def _check_clips(config: Config) -> None:
    data, tubelet = config.data, config.model.tubelet
    _expect(data.frames > 0, "data.frames", "1 for images, or more", data.frames)
    multiple = f"a multiple of model.tubelet={tubelet}, such as {max(data.frames // tubelet, 1) * tubelet}"
    _expect(data.frames % tubelet == 0, "data.frames", multiple, data.frames)
    _expect(data.stride > 0, "data.stride", "more than 0", data.stride)
    _expect(data.repeats > 0, "data.repeats", "more than 0", data.repeats)
    if data.frames == 1:
        _expect(data.repeats == 1, "data.repeats", "1 for images (clips have data.frames > 1)", data.repeats)
        _expect(data.crop == "random_resized", "data.crop", "random_resized for images", data.crop)
    _expect(
        (data.generate == "video") <= (data.frames > 1), "data.generate", "small or large for images", data.generate
    )
    _expect(data.frames == 1 or data.generate in (None, "video"), "data.generate", "video for clips", data.generate)
    shared = f"a multiple of data.repeats={data.repeats}"
    _expect(data.batch_size % data.repeats == 0, "data.batch_size", shared, data.batch_size)


def _places(config: Config) -> int:
    """Tokens that a mask is drawn over: a frame's, where all frames of a clip share it."""
    (height, width), patch = config.data.image_size, config.model.patch
    slots = config.data.frames // config.model.tubelet if config.mask.kind == "random" else 1
    return slots * (height // patch) * (width // patch)


def _kept(tokens: int, ratio: float, rounding: str) -> int:
    return int(tokens * (1 - ratio)) if rounding == "keep" else tokens - int(ratio * tokens)


def _check_mask(config: Config) -> None:
    mask, tokens = config.mask, _places(config)
    _expect(0 < mask.ratio < 1, "mask.ratio", "between 0 and 1", mask.ratio)
    if mask.count is None:
        kept = _kept(tokens, mask.ratio, mask.rounding)
        expected = f"a ratio that keeps 1 to {tokens - 1} of {tokens} tokens"
        _expect(0 < kept < tokens, "mask.ratio", expected, f"{mask.ratio}, which keeps {kept}")
    else:
        _expect(0 < mask.count < tokens, "mask.count", f"1 to {tokens - 1} of {tokens} tokens", mask.count)
    _expect(mask.masks > 0, "mask.masks", "more than 0", mask.masks)
    _expect(mask.block_min > 0, "mask.block_min", "more than 0", mask.block_min)
    _expect(0 < mask.block_aspect <= 1, "mask.block_aspect", "more than 0 and at most 1", mask.block_aspect)


def _check_amd(config: Config) -> None:
    """What student and teacher see, and what is compared."""
    amd, mask, tokens = config.amd, config.mask, _places(config)
    hidden = tokens - _kept(tokens, mask.ratio, mask.rounding) if mask.count is None else mask.count
    share = mask.ratio if mask.count is None else hidden / tokens
    below = f"more than 0 and less than the student's {share:g} (mask.ratio)"
    ratio = mask.teacher_ratio
    _expect(ratio is not None and 0 < ratio < share, "mask.teacher_ratio", f"{below}, for method amd", ratio)
    assert ratio is not None
    kept = _kept(tokens, ratio, mask.rounding)
    seen = f"a ratio that shows the teacher {tokens - hidden + 1} to {tokens - 1} of {tokens} tokens (the student sees "
    _expect(
        tokens - hidden < kept < tokens,
        "mask.teacher_ratio",
        f"{seen}{tokens - hidden})",
        f"{ratio}, which shows {kept} and leaves {kept - tokens + hidden} to generate",
    )
    _expect(amd.pixel_weight > 0, "amd.pixel_weight", "more than 0", amd.pixel_weight)
    for name in ("direct", "generation"):
        weight, pairs = getattr(amd, f"{name}_weight"), getattr(amd, name)
        _expect(weight >= 0, f"amd.{name}_weight", "0 or more", weight)
        _expect(bool(pairs) or weight == 0, f"amd.{name}", f"at least one pair, or amd.{name}_weight=0", list(pairs))
        blocks = all(block >= 1 for pair in pairs for block in pair)
        _expect(blocks, f"amd.{name}", "pairs of blocks from 1", [list(pair) for pair in pairs])
    both = amd.direct_weight + amd.generation_weight
    _expect(both > 0, "amd.direct_weight, amd.generation_weight", "one above 0 (else it is videomae)", both)
    _expect(amd.generator_depth > 0, "amd.generator_depth", "more than 0", amd.generator_depth)


def _expect(fine: bool, key: str, expected: str, got: Any) -> None:
    if not fine:
        raise UserError(
            f"{key}: expected {expected}, got {got!r}"
            if not isinstance(got, str)
            else f"{key}: expected {expected}, got {got}"
        )
