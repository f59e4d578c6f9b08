"""``cohobate plan``: what a run costs on some hardware, before it is started."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cohobate.cli.parsing import Parser, parse

if TYPE_CHECKING:
    from cohobate.planning import Measured, Plan, StagePlan

WIDTH = 116  # of the tables, where the terminal does not say
BUSY = 0.25  # load a core, beyond which a CPU is not measured alone


def main(arguments: list[str]) -> int:
    """Plan a recipe and print the tables."""
    parser = Parser(
        prog="cohobate plan",
        usage="cohobate plan RECIPE [key=value ...] [options]",
        description="GFLOP, bytes, memory, hours and the decode rate needed of a recipe on some hardware.",
        epilog="Keys are those of `cohobate train RECIPE --help`.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--hardware", default="h200", metavar="NAME", help="h200, h100, a100, cpu, ... or here")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="cards, or CPUs, a rank each (default: 1)")
    parser.add_argument("--samples", type=int, default=None, metavar="N", help="images or videos in the data set")
    parser.add_argument(
        "--calibrate", action="store_true", help="with --hardware here: measure for 30 s, plan with that"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the plan as JSON, too")
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    options = parse(parser, [word for word in arguments if word not in overrides])
    if options is None:
        return 0
    from cohobate import config as configuration
    from cohobate import planning
    from cohobate.errors import UserError

    if options.calibrate and options.hardware != "here":
        raise UserError(f"--calibrate: expected --hardware here, the machine to measure; got {options.hardware}")
    config = configuration.load(options.recipe, overrides)
    recipe = Path(options.recipe).stem
    measured: list[Measured] = []
    if options.calibrate:
        samples = options.samples if options.samples is not None else planning.usual_data(config, recipe)[0]
        hardware, measured = planning.calibrate(config, samples)
    else:
        hardware = planning.load(options.hardware)
    plan = planning.make_plan(config, hardware, recipe=recipe, devices=options.gpus, images=options.samples)
    show(plan, measured)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0


def show(plan: Plan, measured: list[Measured]) -> None:
    """Print the tables and what they assume."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    unit = "clip" if plan.clips else "image"
    console.print(f"[bold]{plan.recipe}[/bold] on {plan.devices} x {plan.hardware.label}; {unit}s of {plan.input}")
    console.print()
    for numbers, stages in _alike(plan):
        console.print(_parts(plan, stages[0], numbers, unit))
        console.print()
    for table in (_memory(plan), _time(plan, unit), _loader(plan, unit)):
        console.print(table)
        console.print()
    for number, note in enumerate(notes(plan, measured), 1):
        console.print(f"[{number}] {note}", soft_wrap=False, markup=False)


def _alike(plan: Plan) -> list[tuple[str, list[StagePlan]]]:
    """Stages whose step is the same, with their names."""
    groups: dict[Any, list[StagePlan]] = {}
    for stage in plan.stages:
        groups.setdefault((stage.parts, stage.batch, stage.accumulate), []).append(stage)
    return [(", ".join(stage.name for stage in group), group) for group in groups.values()]


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _parts(plan: Plan, stage: StagePlan, names: str, unit: str) -> Any:
    table = _table(
        f"step of {names} ({stage.method}): {stage.per_rank} {unit}s a rank and update",
        "part", f"GFLOP/{unit} [1]", "%", f"MB/{unit} [2]", "TFLOP/update", "GB/update", "ms [3]", "% of time",
    )  # fmt: skip
    batch = stage.per_rank
    rows: list[tuple[str, float, float, float, float]] = []
    for part, seconds in zip(stage.parts, stage.part_seconds, strict=True):
        update = part.bytes * batch + part.update + part.fixed * stage.accumulate
        rows.append((part.name, part.flops, part.bytes, update, seconds))
    times = sum(stage.part_seconds)
    rows.append(("all", stage.flops, sum(row[2] for row in rows), sum(row[3] for row in rows), times))
    for name, work, each, moved, seconds in rows:
        if name == "all":
            table.add_section()
        table.add_row(
            name, _number(work / 1e9), f"{100 * work / stage.flops:.0f}", _number(each / 1e6),
            _number(work * batch / 1e12), _number(moved / 1e9), _number(seconds * 1e3), f"{100 * seconds / times:.0f}",
        )  # fmt: skip
    return table


def _memory(plan: Plan) -> Any:
    columns = ("weights", "gradients", "moments", "teacher", "activations", "working", "pixels")
    table = _table("memory of a rank, GB [4]", "stage", *columns, "all", "largest batch")
    for names, stages in _alike(plan):
        memory = stages[0].memory
        largest = "-" if stages[0].largest is None else f"{stages[0].largest:,}"
        cells = [_number(getattr(memory, column) / 1e9) for column in columns]
        table.add_row(names, *cells, _number(memory.total / 1e9), largest)
    return table


def _time(plan: Plan, unit: str) -> Any:
    hours = "core-hours" if plan.hardware.device == "cpu" else "GPU-hours"
    each = plan.hardware.cores or 1
    table = _table(
        "time: middle, and the range that it may lie in [5]",
        "stage", "updates", "ms/update", f"{unit}s/s", "ceiling [6]", "MFU %", "hours", hours,
    )  # fmt: skip
    for stage in plan.stages:
        low, middle, high = stage.seconds
        slow, usual, fast = stage.rate
        table.add_row(
            stage.name, f"{stage.steps:,}", _range(low * 1e3, middle * 1e3, high * 1e3), _range(slow, usual, fast),
            _number(stage.samples / stage.floor), f"{100 * stage.mfu:.0f}", _range(*stage.hours),
            _range(*(value * plan.devices * each for value in stage.hours)),
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "run", "", "", "", "", "", _range(*plan.hours), _range(*(v * plan.devices * each for v in plan.hours))
    )
    return table


def _loader(plan: Plan, unit: str) -> Any:
    from cohobate.planning import decode_facts

    facts = decode_facts(plan.clips)
    slow, usual, fast = plan.decode
    table = _table("loader: files to decode a second in the fastest stage [7]", "what", f"{unit}s/s", "to keep up")
    table.add_row("needed", _range(slow, usual, fast), "")
    decoders = [(f"a core: {facts['what']}", facts["core"], "cores")]
    if plan.clips:
        decoders.append(("a core: shards of JPEG frames", facts["shards"], "cores"))
    for what, each, name in [*decoders, ("a GPU that decodes (DALI)", facts["gpu"], "GPUs")]:
        if each is None:
            table.add_row(what, "not measured", "-")
        else:
            needed = (math.ceil(value / each) for value in (slow, usual, fast))
            table.add_row(what, _number(each), _range(*needed, name=name))
    return table


def notes(plan: Plan, measured: list[Measured]) -> list[str]:
    """The footnotes, in their order: what the figures are, and what they assume."""
    from cohobate.planning import decode_facts, facts

    hardware, working, decode = plan.hardware, facts()["working"], decode_facts(plan.clips)
    own = all(stage.own_share for stage in plan.stages)
    found = [
        "forward and backward, 2 FLOP a multiply-add; rows that the loss does not read are not computed, nor counted",
        "a floor: each tensor that a part makes is written and read once, where it is trained read once more, and its "
        "gradient written and read; the GB of an update hold the weights too",
        "the longer of products and bytes, each at its rate; the share of the rate that the products reach was "
        f"{'found for this method' if own else 'not found for all of this, hence the range'}: {hardware.provenance}",
        "of gradients and activations held together, by formula; working: "
        f"{working['share']:.0%} of the activations, {working['provenance']} (two ViT-B steps on CPUs), met "
        f"within {working['error']:.0%}; buffers of the ranks' exchange, of CUDA and of its graphs are not counted",
        f"the range is that of the share; MFU: of {'the peak' if hardware.peak else 'a large product'}; evaluation, "
        "checkpoints, waiting for data and the exchange of gradients between ranks are not counted",
        f"of the whole run's ranks, at the full rate of a large product {'' if hardware.matmul else '(the peak) '}"
        "and of a copy",
        f"a core: {decode['core_provenance']}; a GPU: {decode['gpu_provenance']}"
        + (f"; shards: {decode['shards_provenance']}" if plan.clips else "")
        + (f"; {plan.repeats} crops share a decode" if plan.repeats > 1 else ""),
        *plan.assumed,
    ]
    for item in measured:
        low, middle, high = (_number(value * 1e3) for value in item.seconds)
        busy = item.load is not None and hardware.cores is not None and item.load > BUSY * hardware.cores
        found.append(
            f"{item.stage}: {item.updates} updates of {item.batch} took {middle} ms each ({low} to {high})"
            + (f"; other processes wanted the CPU (load {item.load}), alone it is faster" if busy else "")
        )
    return found


def _range(low: float, middle: float, high: float, *, name: str = "") -> str:
    """The middle, and below it the ends where they differ."""
    ends = _number(low), _number(high)
    name = name.removesuffix("s") if middle == 1 else name
    return f"{_number(middle)}{name and ' ' + name}" + ("" if ends[0] == ends[1] else f"\n{' to '.join(ends)}")


def _number(value: float) -> str:
    """Three digits; no more are known."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{int(round(value / 10**digits) * 10**digits):,}"
    return f"{value:.3g}"
