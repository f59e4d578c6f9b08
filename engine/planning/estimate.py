"""From the parts of a step to its time, the memory of a rank, the hours of a run, and what the loader must deliver.

A part takes the longer of its products, at the share of the machine's rate that training steps were measured to reach,
and its bytes, at the rate of a plain copy; an update is the sum of its parts, or what the host takes to call a card's
kernels where that is more. The share is known within a range, and so is every time: (low, middle, high), where low is
the fast end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cohobate.config import Config, for_stage
from cohobate.errors import UserError
from cohobate.planning.hardware import Hardware, Range, facts
from cohobate.planning.parts import Part, copies_bytes, frozen_bytes, parameters, step_parts
from cohobate.planning.shapes import Shapes, frames_grid
from cohobate.training.stages import Stage

MEMORY_IN_USE = 0.95  # of a card, beyond which a batch is said not to fit
NARROW = 256  # channels; a narrower model waits for its calls, and no stored share speaks of one
NARROW_SHARE = 0.1  # of the low share: published small models reach a tenth of what large ones do


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank while gradients and activations are held together, which is the most that can be."""

    weights: int
    gradients: int
    moments: int
    teacher: int
    activations: int
    working: int
    pixels: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """What one stage costs.

    Attributes:
        parts: of the step of one image or clip. trained: values. batch: images or clips a rank's forward pass.
        accumulate: forward passes an update. samples: that an update of all ranks sees. steps: updates.
        part_seconds: of each part in one rank's update, middle. seconds: of an update (low, middle, high).
        host: of an update, the least that the host takes to call a card's kernels, middle; 0 on a CPU.
        floor: of an update, at the machine's own rate of a large product and of a copy.
        mfu: share of the machine's rate, middle. own_share: whether that was found for such a step.
        largest: most images or clips a forward pass that fit into the memory; None where that is not known.
    """

    name: str
    method: str
    parts: tuple[Part, ...]
    trained: int
    batch: int
    accumulate: int
    samples: int
    steps: int
    part_seconds: tuple[float, ...]
    seconds: Range
    host: float
    floor: float
    mfu: float
    own_share: bool
    memory: Memory
    largest: int | None

    @property
    def per_rank(self) -> int:
        """Images or clips of a rank's update."""
        return self.batch * self.accumulate

    @property
    def flops(self) -> int:
        """Of one image or clip."""
        return sum(part.flops for part in self.parts)

    @property
    def rate(self) -> Range:
        """Images or clips a second that all ranks take, from the slow end to the fast one."""
        low, middle, high = self.seconds
        return self.samples / high, self.samples / middle, self.samples / low

    @property
    def hours(self) -> Range:
        """Of the stage."""
        low, middle, high = (self.steps * value / 3600 for value in self.seconds)
        return low, middle, high


@dataclass(frozen=True)
class Plan:
    """What a run costs. ``assumed``: in words, what was not in the recipe."""

    recipe: str
    hardware: Hardware
    devices: int
    images: int
    input: str
    clips: bool
    repeats: int
    stages: tuple[StagePlan, ...]
    assumed: tuple[str, ...]

    @property
    def hours(self) -> Range:
        """Of all stages, evaluation and checkpoints not counted."""
        low, middle, high = (sum(stage.hours[i] for stage in self.stages) for i in range(3))
        return low, middle, high

    @property
    def decode(self) -> Range:
        """Files a second that the loader must deliver in the fastest stage, from the slow end to the fast one."""
        fastest = max(self.stages, key=lambda stage: stage.rate[1]).rate
        low, middle, high = (value / self.repeats for value in fastest)
        return low, middle, high

    def to_dict(self) -> dict[str, Any]:
        """As JSON: bytes, FLOPs, seconds; ranges are [low, middle, high]."""
        tree = asdict(self) | {"hours": self.hours, "decode_per_s": self.decode, "decode": decode_facts(self.clips)}
        for stage, told in zip(self.stages, tree["stages"], strict=True):
            told |= {"flops": stage.flops, "rate_per_s": stage.rate, "hours": stage.hours}
            told["memory"]["total"] = stage.memory.total
        tree["device_hours"] = [value * self.devices for value in self.hours]
        return tree


def make_plan(
    config: Config, hardware: Hardware, *, recipe: str = "", devices: int = 1, images: int | None = None
) -> Plan:
    """The plan of a run on ``devices`` of a machine, a rank each, with ``images`` files (None: the usual data set's).

    Raises:
        UserError: settings that cannot go together; a teacher whose shape nobody knows; a number below 1.
    """
    for name, value in (("--gpus", devices), ("--samples", images)):
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    assumed = []
    if images is None:
        images, called = usual_data(config, recipe)
        assumed.append(f"{images:,} files an epoch ({called}); --samples says another number")
    shapes = Shapes(config, images, devices)
    stages = tuple(stage_plan(shapes, index, hardware, devices) for index in range(len(config.stages)))
    assumed += list(dict.fromkeys(shapes.assumed))
    narrow = any(shapes.stage(index).method.student.width < NARROW for index in range(len(stages)))
    if narrow and hardware.name != "here":
        assumed.append(
            f"a student narrower than {NARROW} channels may be far slower: --hardware here --calibrate measures"
        )
    for stage, planned in zip(config.stages, stages, strict=True):
        if stage.teacher.momentum is not None:
            assumed.append(f"{planned.name}: the teacher's average is counted in the optimizer's bytes")
    kind = config.execution.checkpointing
    if kind != "none":
        twice = "; the blocks' products run twice, which the time knows, GFLOP and MFU do not" * (kind == "blocks")
        assumed.append(f"execution.checkpointing={kind}: by formula, not measured{twice}")
    if config.precision.teacher == "fp8" and any(stage.method != "mae" for stage in config.stages):
        assumed.append("precision.teacher=fp8 is counted as bf16: time and memory are a little less")
    for index, planned in enumerate(stages):
        masks = for_stage(config, index).mask.masks
        if masks > 1:
            assumed.append(f"{planned.name}: {masks} masks an image, all of them in its figures; the teacher runs once")
        if planned.host > sum(planned.part_seconds):
            assumed.append(
                f"{planned.name}: bound by the host's calls of kernels (an estimate); a larger batch is cheaper"
            )
        if planned.memory.total > MEMORY_IN_USE * (hardware.memory or float("inf")) * 1e9:
            fits = f"data.batch_size={planned.largest} would fit" if planned.largest else "no batch fits"
            assumed.append(
                f"{planned.name}: batches of {planned.batch} do not fit into {hardware.memory:g} GB; {fits} "
                "(with optimizer.accumulate raised, an update sees as many)"
            )
    clips = config.data.frames > 1
    grid = shapes.stage(0).method.student.grid
    return Plan(
        recipe, hardware, devices, images, frames_grid(grid), clips, config.data.repeats, stages, tuple(assumed)
    )


def stage_plan(shapes: Shapes, index: int, hardware: Hardware, devices: int) -> StagePlan:
    """One stage of a run."""
    stage = shapes.stage(index)
    teacher = shapes.teachers.get(index)
    parts, config = step_parts(stage, teacher), stage.config
    method = config.stages[index].method
    batch, accumulate, dtype = config.data.batch_size, config.optimizer.accumulate, config.precision.compute
    width = stage.method.student.width
    share, own = hardware.shares(method, width)
    if width < NARROW and hardware.name != "here":
        low = share[0] * NARROW_SHARE
        share, own = (low, (low * share[2]) ** 0.5, share[2]), False
    seconds = [part_seconds(parts, hardware, dtype, value, batch, accumulate) for value in reversed(share)]
    host = host_seconds(parts, hardware, accumulate)
    low, middle, high = (max(sum(times), least) for times, least in zip(seconds, host, strict=True))
    at_best = replace(hardware, peak={}, matmul={dtype: hardware.ceiling(dtype)})
    floor = sum(part_seconds(parts, at_best, dtype, 1.0, batch, accumulate))
    memory = rank_memory(stage, parts, frozen_bytes(stage, teacher, hardware.device), hardware.device)
    work = sum(part.flops for part in parts) * batch * accumulate
    return StagePlan(
        name=stage.name,
        method=method,
        parts=tuple(parts),
        trained=parameters(stage.method),
        batch=batch,
        accumulate=accumulate,
        samples=batch * accumulate * devices,
        steps=stage.steps,
        part_seconds=tuple(seconds[1]),
        seconds=(low, middle, high),
        host=host[1],
        floor=floor,
        mfu=work / middle / 1e12 / hardware.rate(dtype),
        own_share=own,
        memory=memory,
        largest=_largest(memory, config.data.batch_size, hardware.memory),
    )


def part_seconds(
    parts: Sequence[Part], hardware: Hardware, dtype: str, share: float, batch: int, accumulate: int
) -> list[float]:
    """Of every part in one rank's update: the longer of products and bytes."""
    times = []
    for part in parts:
        products = (part.flops + part.again) * batch * accumulate / (hardware.rate(dtype) * share * 1e12)
        moved = (part.bytes * batch + part.fixed) * accumulate + part.update
        times.append(max(products, moved / (hardware.copy * 1e9)))
    return times


def host_seconds(parts: Sequence[Part], hardware: Hardware, accumulate: int) -> Range:
    """Of one rank's update, in calls of kernels; 0 on a CPU, and where whole updates were measured."""
    if hardware.device == "cpu" or hardware.name == "here":
        return 0.0, 0.0, 0.0
    launch = facts()["launch"]
    calls = launch["block"] * sum(part.blocks for part in parts) * accumulate
    low, middle, high = (calls * value * 1e-6 for value in launch["microseconds"])
    return low, middle, high


def fit_share(
    parts: Sequence[Part], hardware: Hardware, dtype: str, seconds: float, batch: int, accumulate: int = 1
) -> float:
    """The share with which :func:`part_seconds` adds up to a measured update; between 0.001 and 1."""
    low, high = 1e-3, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        slower = sum(part_seconds(parts, hardware, dtype, middle, batch, accumulate)) > seconds
        low, high = (middle, high) if slower else (low, middle)
    return (low + high) / 2


def rank_memory(stage: Stage, parts: Sequence[Part], teacher: int, device: str) -> Memory:
    """Of one rank, by formula; ``teacher``: bytes of its weights."""
    trained, batch = parameters(stage.method), stage.config.data.batch_size
    values = sum(p.numel() for p in stage.method.parameters())  # position tables are not trained
    activations = batch * sum(part.kept for part in parts)
    pixels = 1
    for extent in stage.method.student.grid.pixel_shape:
        pixels *= extent
    spared = batch * sum(part.spared for part in parts)
    block = batch * max((part.spared // part.blocks for part in parts if part.blocks), default=0)  # made again at once
    working = round(facts()["working"]["share"] * (activations + spared)) + block
    weights = 4 * values + copies_bytes(stage, device)
    return Memory(weights, 4 * trained, 8 * trained, teacher, activations, working, 2 * batch * pixels)


def _largest(memory: Memory, batch: int, card: float | None) -> int | None:
    if card is None:
        return None
    each = (memory.activations + memory.working + memory.pixels) / batch
    fixed = memory.weights + memory.gradients + memory.moments + memory.teacher
    return max(0, int((MEMORY_IN_USE * card * 1e9 - fixed) / each))


def usual_data(config: Config, recipe: str = "") -> tuple[int, str]:
    """(files, name) of the data set that a recipe is for."""
    known = facts()["samples"]
    kind: str | None = config.data.generate
    if kind is None:
        ssv2 = "ssv2" in recipe or "ssv2" in config.run
        kind = "images" if config.data.frames == 1 else "ssv2" if ssv2 else "clips"
    count, name = known[kind]
    return int(count), str(name)


def decode_facts(clips: bool) -> dict[str, Any]:
    """What one core and one GPU decode a second."""
    found: dict[str, Any] = facts()["decode"]["clips" if clips else "images"]
    return found
