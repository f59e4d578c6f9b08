"""``cohobate bench scaling``: what the engine's step costs as one thing grows, all else being equal.

An axis is a setting of a recipe: the batch, the tokens of an image, the width of student and teacher, the layers that
AMD aligns, the mask ratio, the number of ranks. Its points are built by the code that plans a run
(:mod:`cohobate.planning`), with the recipe's method and its own teacher on random weights and pixels, and timed in
turns. Every point is planned as well, by the parts of its step; the share of the machine's rate that the plan needs is
fitted to the middle one of the measured points, so the others tell how good the plan is. What is too large to be
measured here is planned alone and says so.

Of the batch it is said whether time is a straight line in it. More ranks mean more images an update: a process a rank,
a thread each, gradients exchanged by gloo. Nothing is compared with anybody else's step here; ``bench step`` does that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from cohobate import config as configuration
from cohobate.benchmarks import command, machine, regression, timing
from cohobate.benchmarks.harness import BUSY, Provider, Row, against_floor, straightness, time_all
from cohobate.benchmarks.twins import Batch
from cohobate.kernels import Cost
from cohobate.planning import Hardware, Part, Shapes, fit_share, step_parts
from cohobate.planning.estimate import part_seconds
from cohobate.training.optimizer import Updater

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES = 2**20  # in an epoch; only schedules read it
LEAST = 4  # rounds a repeat
RANK_STEPS = 8  # of every rank
PLANNED = "planned, not measured"
RATE = 1e-4  # the weights are trained on, so it must not make them explode


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        title: with its unit. recipe: where everything else comes from. settings: of a value.
        measured, planned: values, ascending.
    """

    title: str
    recipe: str
    settings: Callable[[float], list[str]]
    measured: tuple[float, ...]
    planned: tuple[float, ...] = ()


@dataclass
class Point(Row):
    """A row of an axis. ``planned_ms``: by :mod:`cohobate.planning`; of a value that is planned alone p50 is None."""

    axis: str = ""
    value: float = 0.0
    planned_ms: float | None = None


def _side(tokens: float, patch: int = 16) -> int:
    return patch * math.isqrt(int(tokens))


def pairs(count: int, student: int = 12, teacher: int = 12) -> list[list[int]]:
    """``count`` pairs of blocks, evenly spaced, the last ones among them."""
    return [[round(student * i / count), round(teacher * i / count)] for i in range(1, count + 1)]


def _aligned(found: list[list[int]], teacher: str) -> list[str]:
    return [f"amd.direct={found}", f"amd.generation={found}", f"stages.0.teacher.spec=random:{teacher}"]


SMALL = ("model.drop_path=0", "data.image_size=112", "data.batch_size=8")
AXES = {
    "batch": Axis(
        "images an update", "dbot_vit_small", lambda v: [f"data.batch_size={v:g}"], (4, 8, 16, 32, 64), (96, 128)
    ),
    "tokens": Axis(
        "patches of an image", "dbot_vit_small", lambda v: [f"data.image_size={_side(v)}"],
        (36, 64, 100, 144, 196), (256, 324),
    ),
    "width": Axis(
        "width of student and teacher", "dbot_vit_small", lambda v: [f"model.width={v:g}", f"model.heads={v // 64:g}"],
        (192, 384, 576, 768), (1024,),
    ),
    "layers": Axis(
        "layers aligned (AMD, from a ViT-B)", "amd_vit_small", lambda v: _aligned(pairs(int(v)), "vit_base"),
        (1, 2, 3, 4), (6,),
    ),
    "mask": Axis("mask ratio", "dbot_vit_small", lambda v: [f"mask.ratio={v:g}"], (0.4, 0.5, 0.6, 0.75, 0.9)),
    "world": Axis("ranks, 8 images each", "dbot_vit_small", lambda v: [], (1, 2), (4, 8)),
}  # fmt: skip
# A smoke run: the same axes of next to nothing.
TINY = ("model.drop_path=0", "model.patch=8", "model.width=64", "model.depth=2", "model.heads=1", "decoder.width=32",
        "decoder.depth=1", "decoder.heads=1", "data.image_size=32", "data.batch_size=2")  # fmt: skip
QUICK_AXES = {
    "batch": dataclasses.replace(AXES["batch"], measured=(1, 2, 4), planned=(8,)),
    "tokens": dataclasses.replace(
        AXES["tokens"], settings=lambda v: [f"data.image_size={_side(v, 8)}"], measured=(16, 36), planned=(64,)
    ),
    "width": dataclasses.replace(AXES["width"], measured=(64, 128), planned=(192,)),
    "layers": dataclasses.replace(
        AXES["layers"], settings=lambda v: _aligned(pairs(int(v), 2), "vit_tiny_patch8"), measured=(1, 2), planned=(),
    ),
    "mask": dataclasses.replace(AXES["mask"], measured=(0.5, 0.75)),
    "world": dataclasses.replace(AXES["world"], measured=(1,), planned=(2,)),
}  # fmt: skip


class Made:
    """A point of an axis: its step without weights, for the plan; and with them, to be run."""

    def __init__(self, axis: Axis, value: float, common: Sequence[str], world: int = 1) -> None:
        config = configuration.load(axis.recipe, [*common, *axis.settings(value)])
        self.shapes = Shapes(config, SAMPLES, world)
        self.stage = self.shapes.stage(0)
        self.parts: list[Part] = step_parts(self.stage, self.shapes.teachers.get(0))
        self.batch, self.dtype = config.data.batch_size, config.precision.compute

    @property
    def flops(self) -> int:
        """Of an update of one rank."""
        return self.batch * self.stage.flops

    def __str__(self) -> str:
        student, plan = self.stage.method.student, self.stage.plan(torch.zeros(1, dtype=torch.int64), 0, masks=1)
        size = f"width {student.width}, {student.depth} blocks, {student.grid.height} px, batch {self.batch}"
        return f"{size}, {plan.student} of {plan.tokens} patches seen"

    def seconds(self, hardware: Hardware, share: float) -> float:
        """What the plan says of an update."""
        return sum(part_seconds(self.parts, hardware, self.dtype, share, self.batch, 1))

    def step(self, device: str, wrap: Callable[[Any], Any] = lambda method: method) -> Callable[[], None]:
        """An update on random weights, pixels and masks; the weights are trained on. ``wrap``: for many ranks."""
        shape = self.shapes.stage(0, "cpu")
        method = shape.method.to(device).train()
        module, settings = wrap(method), shape.config.optimizer
        updater = Updater(
            method, weight_decay=settings.weight_decay, betas=settings.betas, eps=settings.eps, clip=settings.clip
        )
        pixels = torch.randint(0, 256, (self.batch, *method.student.grid.pixel_shape), dtype=torch.uint8)
        images, plan = Batch(pixels.to(device)), shape.plan(torch.arange(self.batch, device=device), 0)

        def update() -> None:
            module(images, plan).total.backward()
            norm = updater.gradient_norm()
            updater.step(RATE, 1.0 - norm.isfinite().float())
            updater.zero()

        return update


def run(
    name: str, axis: Axis, setting: command.Setting, *, common: Sequence[str] = SMALL, seed: int = 0
) -> list[Point]:
    """Measure and plan the points of an axis."""
    torch.manual_seed(seed)
    cores = os.cpu_count() or 1
    ranks = name == "world"
    values = [v for v in axis.measured if not ranks or (setting.device == "cpu" and v <= cores)]
    known = {v: Made(axis, v, common, int(v) if ranks else 1) for v in (*axis.measured, *axis.planned)}
    points = {v: _point(name, axis, v, made, setting) for v, made in known.items()}
    hardware = _hardware(setting, 1 if ranks else torch.get_num_threads())
    exchange = 0.0
    if ranks:
        exchange = _time_ranks(axis, [points[v] for v in values], common, setting)
    else:
        _time([(points[v], known[v]) for v in values], setting)
    if values:
        middle = values[0 if ranks else len(values) // 2]
        measured = points[middle].p50_ms
        assert measured is not None
        share = fit_share(known[middle].parts, hardware, known[middle].dtype, measured / 1e3, known[middle].batch)
        for v, point in points.items():
            more = 2 * (v - 1) / v * exchange if ranks else 0.0
            point.planned_ms = 1e3 * (known[v].seconds(hardware, share) + more)
    for v in points.keys() - set(values):
        points[v].note = PLANNED if values else "not measured: needs a process and a core a rank, on a CPU"
    if ranks and exchange:
        for v in points.keys() - set(values):
            points[v].note += "; the exchange at the rate that 2 processes of this machine reach, not overlapped"
    found = list(points.values())
    if name == "batch" and len(values) > 2:
        measured_points = [points[v] for v in values]
        line = straightness(measured_points, [int(v) for v in values])
        for point in measured_points:
            point.note = f"{line}; {point.note}" if point.note else line
    return found


def _point(name: str, axis: Axis, value: float, made: Made, setting: command.Setting) -> Point:
    provider = "engine bf16" if made.dtype == "bf16" else f"engine {made.dtype}"
    shape = f"{axis.recipe}, {made}" + (f", {value:g} ranks" if name == "world" else "")
    if name == "layers":
        shape += f", {value:g} layers aligned"
    point = Point(f"scaling_{name}", provider, "ours", "train", setting.device, made.dtype, shape, axis=name,
                  value=value, flops=made.flops)  # fmt: skip
    point.env = dict(setting.environment)
    return point


def _time(points: Sequence[tuple[Point, Made]], setting: command.Setting) -> None:
    """One process: all points in turns."""
    timer = timing.CudaTimer() if setting.device == "cuda" else timing.CpuTimer()
    samplers: list[tuple[Row, Callable[[], float]]] = []
    for point, made in points:
        provider = Provider(point.provider, point.mode, made.step(setting.device))
        if setting.effort.memory:
            provider.function()  # moments, workspaces: not this point's alone
            point.peak_mb = timing.peak_memory_mb(provider, setting.device)
        try:
            samplers.append((point, timer.prepare(provider)))
        except RuntimeError as error:
            if setting.device == "cpu":
                raise
            point.note = f"launched call by call, cannot be captured: {str(error).splitlines()[0][:200]}"
            samplers.append((point, timer.prepare(dataclasses.replace(provider, capture=False))))
    time_all(samplers, dataclasses.replace(setting.effort, least=min(setting.effort.least, LEAST)), setting.device)
    for point, _ in points:
        against_floor(point, Cost(bytes=0, flops=point.flops or 0), setting.ceilings)


def _hardware(setting: command.Setting, threads: int) -> Hardware:
    """This machine, by its measured ceilings; those of a product shared among the threads."""
    share = threads / torch.get_num_threads() if setting.device == "cpu" else 1.0
    matmul = {dtype: rate * share for dtype, rate in setting.ceilings.matmul.items()}
    kind = str(setting.environment["kind"])
    return Hardware("here", kind, setting.device, setting.ceilings.copy[-1][1], {}, "measured", matmul, {})


# -- ranks -------------------------------------------------------------------------------------------------------------


def _time_ranks(axis: Axis, points: Sequence[Point], common: Sequence[str], setting: command.Setting) -> float:
    """A run of processes for every point, one after the other. Seconds of one exchange between two; 0 if unknown."""
    exchange = 0.0
    for point in points:
        before, others = os.times(), machine.Others()
        started = time.perf_counter()
        steps = RANK_STEPS if setting.effort.repeats > 1 else 2
        found = time_ranks(axis.recipe, int(point.value), common, steps)
        cores, after, passed = others.cores(), os.times(), time.perf_counter() - started
        children = after.children_user + after.children_system - before.children_user - before.children_system
        point.others_cores = None if cores is None else max(0.0, cores - children / passed)
        point.p20_ms, point.p50_ms, point.p80_ms = (timing.quantile(found["ms"], q) for q in (0.2, 0.5, 0.8))
        point.spread, point.samples = timing.spread([found["ms"]]), len(found["ms"])
        if point.value == 2:
            exchange = found["exchange_s"]
    return exchange


def time_ranks(recipe: str, world: int, common: Sequence[str], steps: int) -> dict[str, Any]:
    """``world`` processes with a thread each: "ms" of every update, "exchange_s" of all gradients alone (0 for one)."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(world, Path(folder), recipe, list(common), steps), nprocs=world)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _rank(rank: int, world: int, folder: Path, recipe: str, common: list[str], steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    wrap = DistributedDataParallel if world > 1 else (lambda method: method)
    made = Made(Axis("", recipe, lambda _: [], ()), world, common, world)
    update, times = made.step("cpu", wrap), []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        update()
        times.append(1e3 * (time.perf_counter() - start))
    trained = sum(p.numel() for p in made.stage.method.parameters() if p.requires_grad)
    gradients, exchanges = torch.randn(trained), []
    for _ in range(3 if world > 1 else 0):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        exchanges.append(time.perf_counter() - start)
    if rank == 0:
        exchange = statistics.median(exchanges) if exchanges else 0.0
        (folder / "found.json").write_text(json.dumps({"ms": times[1:], "exchange_s": exchange}))
    dist.destroy_process_group()
    # gloo's threads outlive the group, and one that still drops a tensor while the interpreter ends aborts the process.
    os._exit(0)


# -- table and figure --------------------------------------------------------------------------------------------------

Lines = Sequence[Mapping[str, Any]]  # points as stored


def table(lines: Lines) -> str:
    """Markdown, a table for each axis: what was measured beside what is planned."""
    parts = []
    for name, own in _by_axis(lines):
        titles = (AXES[name].title, "measured", "p20 to p80, ms", "planned", "peak MB", "note")
        parts += [_line(*titles), "|---" * len(titles) + "|", *(_line(*_cells(line)) for line in own)]
        if verdict := _verdict(own):
            parts += ["", f"Measured time: {verdict}."]
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def _by_axis(lines: Lines) -> list[tuple[str, list[Mapping[str, Any]]]]:
    names = [name for name in AXES if any(line.get("axis") == name for line in lines)]
    return [(name, [line for line in lines if line.get("axis") == name]) for name in names]


def _cells(line: Mapping[str, Any]) -> list[str]:
    low, high = line["p20_ms"], line["p80_ms"]
    note = line["note"]
    if line["axis"] == "batch" and line["p50_ms"] is not None:
        note = ""  # said once, below
    busy = line["others_cores"] or 0.0
    if busy > BUSY:
        note = f"{note}; " * bool(note) + f"other processes used {busy:.1f} cores meanwhile"
    return [
        f"{line['value']:g}",
        _ms(line["p50_ms"]),
        "-" if low is None else f"{low:.3g} to {high:.3g}",
        _ms(line["planned_ms"]),
        "-" if line["peak_mb"] is None else f"{line['peak_mb']:.0f}",
        note,
    ]


def _verdict(own: Lines) -> str:
    """Whether time is a straight line in the batch; empty on other axes."""
    return next((line["note"] for line in own if line["axis"] == "batch" and line["p50_ms"] is not None), "")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms" if value < 1000 else f"{value / 1e3:.2f} s"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def scaling_figure(lines: Lines) -> Figure:
    """A panel an axis: measured points with p20 to p80; dashed what is planned, open circles where that is all."""
    from cohobate.report import plots

    return plots.styled(_figure)(_by_axis(lines))


def _figure(axes: Sequence[tuple[str, Lines]]) -> Figure:
    from cohobate.report import plots

    columns = min(3, len(axes))
    rows = math.ceil(len(axes) / columns)
    made, panels = plots.figure(2.9 * rows + 0.3, rows, columns)
    for (name, own), panel in zip(axes, panels.flat):
        _panel(panel, name, own)
    for panel in panels[:, 0]:
        panel.set_ylabel("an update, s")
    for panel in panels.flat[len(axes) :]:
        panel.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3)
    return made


def _panel(panel: Axes, name: str, own: Lines) -> None:
    from cohobate.report import plots

    measured = [line for line in own if line["p50_ms"] is not None]
    planned = [line for line in own if line["planned_ms"] is not None]
    alone = [line for line in planned if line["p50_ms"] is None]
    x = [line["value"] for line in measured]
    seconds = {key: [line[f"{key}_ms"] / 1e3 for line in measured] for key in ("p20", "p50", "p80")}
    panel.plot([line["value"] for line in planned], [line["planned_ms"] / 1e3 for line in planned], "--",
               color=plots.ORANGE, linewidth=1.4, label="planned", zorder=1)  # fmt: skip
    panel.plot([line["value"] for line in alone], [line["planned_ms"] / 1e3 for line in alone], "o", markersize=6,
               markerfacecolor="white", markeredgecolor=plots.ORANGE, label="planned alone")  # fmt: skip
    panel.vlines(x, seconds["p20"], seconds["p80"], color=plots.BLUE, linewidth=2.2, alpha=0.5)
    panel.plot(x, seconds["p50"], "o", color=plots.BLUE, markersize=6, label="measured (bar: p20 to p80)")
    panel.set_title(AXES[name].title)
    panel.set_ylim(0, 1.08 * max([*seconds["p80"], *(line["planned_ms"] / 1e3 for line in planned)], default=1.0))
    panel.set_xticks([line["value"] for line in own if name not in ("batch",) or line["value"] >= 16])
    panel.margins(x=0.08)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench scaling", description=__doc__)
    command.add_options(parser)
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=list(AXES), help="(default: all)")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE", help="draw it")
    args = parser.parse_args(argv)
    setting = command.prepare(args)
    console = command.wide_console()
    command.print_machine(setting, console)
    points: list[Point] = []
    for name in dict.fromkeys(args.axis):
        axes, common = (QUICK_AXES, TINY) if args.quick else (AXES, SMALL)
        found = run(name, axes[name], setting, common=common, seed=args.seed)
        points += found
        command.save(args, setting, points)
        show(found, console)
    if args.quick:
        console.print("--quick: the times are not worth quoting", style="yellow")
    if args.json is not None:
        console.print(f"wrote {args.json} ({len(points)} rows)")
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        scaling_figure([dataclasses.asdict(point) for point in points]).savefig(args.picture, dpi=130)
        console.print(f"wrote {args.picture}")
    if args.stored is not None:
        verdict = regression.compare(points, args.stored, args.fail_if_slower)
        console.print(verdict.text)
        return 1 if verdict.slower or not verdict.compared else 0
    return 0


def show(points: Sequence[Point], console: Console) -> None:
    """Print the table of one axis."""
    lines = [dataclasses.asdict(point) for point in points]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate((AXES[points[0].axis].title, "measured", "p20 to p80, ms", "planned", "peak MB", "")):
        made.add_column(title, justify="left" if place == 5 else "right")
    for line in lines:
        made.add_row(*_cells(line))
    console.print(made)
    if verdict := _verdict(lines):
        console.print(f"measured time: {verdict}", markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
