"""Where each millisecond of a training step goes: by part of the step, and by kind of operation.

``cohobate bench step --profile``. torch.profiler sees every operation; the part comes from the range it was called in
(backward: from the forward operation that it differentiates), the kind from its name, else from what called it. On a
CPU the time of an operation is its own on the main thread, which waits for the workers, so the cells add up to the
step; on CUDA it is that of the kernels it launched. What is missing to the step's time without the profiler is a row of
its own.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from cohobate.benchmarks import machine
from cohobate.benchmarks.harness import BUSY
from cohobate.masking import MaskPlan
from cohobate.methods import AMD, DBOT
from cohobate.models.layers import Attention, Block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cohobate.benchmarks.command import Setting

NAME = "step_profile"
SEEN = 0.02  # of a step: smaller parts share a bar of the picture
ALLOWED = 0.1  # of the step's time may be missing before the table says that it does not add up
MODULES = ("teacher", "student", "decoder", "alignment")
PARTS = (
    "teacher",
    *(f"{name} forward" for name in ("student", "decoder", "alignment", "loss")),
    *(f"{name} backward" for name in ("loss", "alignment", "decoder", "student")),
    "gradient norm",
    "AdamW",
    "rest",
)
MISSING = "not attributed"
# The first pattern that an operation's name contains is its kind; one without, such as a view, is of its caller's kind.
KINDS = {
    "products": r"linear|addmm|Addmm|::mm$|MmBackward|::matmul$|_Linear|_Product",
    "attention": r"attention|_Attention|bmm|Bmm|softmax|Softmax|kind:attention",
    "norm": r"layer_norm|LayerNorm|add_norm|_AddNorm",
    "GELU": r"gelu|Gelu",
    "tokens": r"embed_patches|gather|Gather|scatter|assemble|::take|::put|::index|Index|sort|nonzero"
    r"|masked_|::cat$|CatBackward|repeat|convolution|Convolution|_Embed|_Assemble|_Take|_Put",
    "loss": r"_loss|Loss|_Align|_Pixel",
    "copies": r"::copy_|_to_copy|ToCopy|::clone|Clone|::add_?$|AddBackward|::sum$|AccumulateGrad"
    r"|::fill_|::zero_",
    "optimizer": r"(?!)",  # whatever the update does
    "rest": r"(?!)",
}
TITLES = {
    "products": "matrix products",
    "tokens": "patches, gathering, assembling",
    "copies": "casts, copies, sums",
    "rest": "rest: views, interpreter",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
Cells = dict[tuple[str, str], float]  # (part, kind): a figure


class Watchable(Protocol):
    """A step: its loss and its update, called in this order with a backward pass between them."""

    loss: Callable[[], Tensor]
    update: Callable[[], object]

    def __call__(self) -> Tensor: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class Subject:
    """A step to look into; ``module`` holds the networks that its loss runs, under the names :data:`MODULES`."""

    name: str
    step: Watchable
    module: nn.Module
    dtype: str


def run(
    case: str, shape: str, subjects: Sequence[Subject], work: Mapping[tuple[str, str], int], setting: Setting,
    repeats: int = 3,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every step: one a part and kind, and one of what is missing. Of ``repeats`` steps the middle one counts.

    ``work``: FLOPs that a part and kind needs (:func:`work`), whatever else a provider computes. ``product_tflop_s`` of
    a row is the measured rate of a large matrix product of that dtype, which those may be compared with.
    """
    plain: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    found: dict[str, list[Cells]] = {subject.name: [] for subject in subjects}
    for subject in subjects:
        _timed(subject.step, setting.device)
    others = machine.Others()
    for _ in range(repeats):
        for subject in subjects:
            plain[subject.name].append(_timed(subject.step, setting.device))
            found[subject.name].append(_profiled(subject, setting.device))
    cores = others.cores() if setting.device == "cpu" else None
    rows = []
    for subject in subjects:
        cells = dict(sorted(found[subject.name], key=lambda one: sum(one.values()))[repeats // 2])
        wall = statistics.median(plain[subject.name])
        missing = wall - sum(cells.values())
        cells[(MISSING, "rest")] = missing
        note = f"other processes used {cores:.1f} cores meanwhile" if cores is not None and cores > BUSY else ""
        if abs(missing) > ALLOWED * wall:
            note = f"does not add up: {missing:.0f} of {wall:.0f} ms are {MISSING}" + (f"; {note}" if note else "")
        rate = setting.ceilings.matmul.get(subject.dtype)
        common = {"name": NAME, "case": case, "provider": subject.name, "device": setting.device}
        common |= {"dtype": subject.dtype, "shape": shape}
        for (part, kind), ms in sorted(cells.items(), key=_place):
            rows.append(
                {**common, "part": part, "kind": kind, "ms": ms, "share": ms / wall, "step_ms": wall,
                 "flops": work.get((part, kind)), "product_tflop_s": rate, "note": note,
                 "env": dict(setting.environment)}
            )  # fmt: skip
    return rows


def _place(item: tuple[tuple[str, str], float]) -> tuple[int, int]:
    part, kind = item[0]
    return (*PARTS, MISSING).index(part), tuple(KINDS).index(kind)


def _timed(step: Watchable, device: str) -> float:
    """Milliseconds of one step without the profiler."""
    step.reset()
    _finish(device)
    start = time.perf_counter()
    step()
    _finish(device)
    return (time.perf_counter() - start) * 1e3


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _profiled(subject: Subject, device: str) -> Cells:
    """Milliseconds of one step by part and kind."""
    subject.step.reset()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with _watched(subject), profile(activities=activities) as recorded:
        with record_function("part:rest"):
            subject.step()
        _finish(device)
    return attribute(recorded.events(), device)


# -- which part, which kind --------------------------------------------------------------------------------------------


@contextmanager
def _watched(subject: Subject) -> Iterator[None]:
    """Every call of the step's parts runs in a range with its name."""
    with ExitStack() as undo:
        undo.enter_context(_replaced(subject.step, "loss", _ranged(subject.step.loss, "part:loss")))
        undo.enter_context(_replaced(subject.step, "update", _ranged(subject.step.update, "part:update")))
        for name in MODULES:
            module = getattr(subject.module, name, None)
            if module is None:
                continue
            for owner, attribute_name in _entries(module):
                ranged = _ranged(getattr(owner, attribute_name), f"part:{name}")
                undo.enter_context(_replaced(owner, attribute_name, ranged))
            for inner in module.modules():  # ours has its kernels' names, and a block that is watched is not one call
                if "Attention" in type(inner).__name__ and not isinstance(inner, Attention):
                    undo.enter_context(_replaced(inner, "forward", _ranged(inner.forward, "kind:attention")))
        yield


def _entries(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What may be called from outside: the methods of a model's own class, and the members of its lists."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for name, value in vars(kind).items():
            if callable(value) and not name.startswith("_") and not isinstance(value, (type, staticmethod)):
                yield module, name
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((member, "forward") for member in child)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def attribute(events: Sequence[Any], device: str) -> Cells:
    """Milliseconds by part and kind, from the profiler's ``FunctionEvent`` of one step."""
    ordered = sorted((e for e in events if "CPU" in str(e.device_type)), key=lambda e: e.time_range.start)
    backward = {id(e) for e in ordered if "evaluate_function" in e.name}
    # An autograd node has the number of the last operation that began before the node was made.
    forward = {e.sequence_nr: e for e in ordered if e.sequence_nr >= 0 and not _inside(e, backward)}
    cells: Cells = defaultdict(float)
    part = "loss backward"
    for event in ordered:
        chain = _chain(event)
        node = next((e for e in chain if id(e) in backward), None)
        origin: list[Any] = []
        if node is not None:
            made_by = forward.get(node.sequence_nr)
            if made_by is not None:  # a gradient that is only added up belongs to the node before it
                origin = _chain(made_by)
                part = f"{_range(origin)} backward"
            place = part
        else:
            place = _range(chain)
            if place == "update":
                place = "AdamW" if any(re.search(r"(?i)adamw", e.name) for e in chain) else "gradient norm"
            elif place in MODULES[1:] or place == "loss":
                place = f"{place} forward"
        if device == "cuda":
            ms = sum(kernel.duration for kernel in event.kernels) / 1e3
        else:
            ms = event.self_cpu_time_total / 1e3
        if ms:
            cells[(place if place in PARTS else "rest", _kind(place, chain, origin))] += ms
    return dict(cells)


def _chain(event: Any) -> list[Any]:
    """An event and all that it was called in, from the inside."""
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found


def _inside(event: Any, nodes: set[int]) -> bool:
    return any(id(e) in nodes for e in _chain(event))


def _range(chain: Sequence[Any]) -> str:
    return next((e.name.removeprefix("part:") for e in chain if e.name.startswith("part:")), "rest")


def _kind(place: str, chain: Sequence[Any], origin: Sequence[Any]) -> str:
    if place in ("AdamW", "gradient norm"):
        return "optimizer"
    for event in (*chain, *origin):
        for kind, pattern in _KINDS.items():
            if pattern.search(event.name):
                return kind
    return "loss" if place.startswith("loss") else "rest"


# -- what must be computed ---------------------------------------------------------------------------------------------


def work(method: Any, plan: MaskPlan, batch: int) -> dict[tuple[str, str], int]:
    """FLOPs of a step by part and kind, by formula: multiply-adds x 2 that are needed; together ``method.flops``."""
    counted = plan.tokens - plan.student + int(isinstance(method, DBOT) and method.options.cls)
    student, decoder, prefix = method.student, method.decoder, method.student.prefix
    found: dict[tuple[str, str], int] = {}

    def add(part: str, total: int, attention: int, embed: int, backward: bool = True) -> None:
        for kind, flops in (
            ("products", total - attention - embed),
            ("attention", attention),
            ("tokens", embed),
        ):
            if flops:
                found[(f"{part} forward" if backward else part, kind)] = batch * flops
                if backward:  # pixels need no gradient
                    found[(f"{part} backward", kind)] = batch * flops * (1 if kind == "tokens" else 2)

    teacher = getattr(method, "teacher", None)
    if teacher is not None:
        patches = plan.teacher
        queries = counted if isinstance(method, DBOT) else None
        rows = patches + teacher.prefix
        attention = _attention(teacher.depth, teacher.width, rows, rows if queries is None else queries)
        embed = 2 * patches * teacher.grid.row_length * teacher.width
        add("teacher", teacher.flops(queries, patches), attention, embed, backward=False)
    rows = plan.student + prefix
    embed = 2 * plan.student * student.grid.row_length * student.width
    add("student", student.flops(plan.student), _attention_of(student.blocks, rows, rows), embed)
    attention = _attention_of(decoder.blocks, plan.tokens + prefix, counted)
    add("decoder", decoder.flops(plan.student, counted), attention, 0)
    if isinstance(method, AMD):
        attention = sum(
            _attention_of(generator.blocks, plan.teacher + prefix, plan.teacher - plan.student)
            for generator in method.alignment.generators
        )
        add("alignment", method.alignment.flops(plan.student, plan.teacher), attention, 0)
    return found


def _attention(depth: int, width: int, rows: int, queries: int) -> int:
    """Scores and their product with the values, in the last block for ``queries`` rows."""
    return 4 * width * rows * ((depth - 1) * rows + queries) if depth else 0


def _attention_of(blocks: Any, rows: int, queries: int) -> int:
    first: Block | None = next(iter(blocks), None)
    return 0 if first is None else _attention(len(blocks), first.mlp.fc1.in_features, rows, queries)


# -- what a reader sees ------------------------------------------------------------------------------------------------


def providers(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by provider, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("name") == NAME:
            found.setdefault(row["provider"], []).append(row)
    return found


def by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Milliseconds added up over one of "part" and "kind", without what is missing."""
    found: dict[str, float] = {}
    for row in rows:
        if row["part"] != MISSING:
            found[row[key]] = found.get(row[key], 0.0) + row["ms"]
    order = PARTS if key == "part" else tuple(KINDS)
    return {name: found[name] for name in order if name in found}


def print_tables(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One table a provider: parts down, kinds across, milliseconds in the cells."""
    for name, own in providers(rows).items():
        wall = own[0]["step_ms"]
        console.print(f"[bold]{name}[/bold], {own[0]['shape']}: {wall:.0f} ms a step")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column("ms", no_wrap=True)
        kinds = by(own, "kind")
        for title in ("all", "share", "% of rate", *kinds):
            table.add_column(title, justify="right", no_wrap=True)
        for part, total in by(own, "part").items():
            cells = {row["kind"]: row for row in own if row["part"] == part}
            table.add_row(
                part,
                *_sums(own, part, total, wall),
                *(_ms(cells[kind]["ms"]) if kind in cells else "" for kind in kinds),
            )
        missing = next(row["ms"] for row in own if row["part"] == MISSING)
        table.add_row(MISSING, _ms(missing), f"{missing / wall:.1%}")
        table.add_section()
        table.add_row("all", _ms(wall), "100%", _rate(own, wall), *map(_ms, kinds.values()))
        table.add_row("share", "", "", "", *(f"{ms / wall:.1%}" for ms in kinds.values()))
        # An embedding's product stands among the products of one provider and in the patches of another.
        products = [
            _rate([row for row in own if row["kind"] == kind], ms) if kind in ("products", "attention") else ""
            for kind, ms in kinds.items()
        ]
        table.add_row("% of rate", "", "", "", *products)
        console.print(table)
        if own[0]["note"]:
            console.print(f"  {own[0]['note']}", style="red")


def _sums(rows: Sequence[Mapping[str, Any]], part: str, ms: float, wall: float) -> tuple[str, str, str]:
    return _ms(ms), f"{ms / wall:.1%}", _rate([row for row in rows if row["part"] == part], ms)


def _rate(rows: Sequence[Mapping[str, Any]], ms: float) -> str:
    """FLOPs a second that some rows need in ``ms``, as a percentage of the measured product rate."""
    flops = sum(row["flops"] or 0 for row in rows)
    rate = rows[0]["product_tflop_s"] if rows else None
    return f"{flops / ms / rate / 1e7:.0f}" if flops and rate else ""


def _ms(ms: float) -> str:
    return "" if abs(ms) < 0.05 else f"{ms:.1f}" if abs(ms) < 1000 else f"{ms:.0f}"


def profile_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Stacked bars by kind: above, the whole step of every provider; below, each of its parts."""
    from cohobate.report import plots

    return plots.styled(_figure)(rows)


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from cohobate.report import plots

    colours = dict(
        zip(KINDS, (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PINK, plots.SKY, plots.YELLOW, plots.GREY, plots.RED))
    )
    colours["rest"] = plots.LIGHT
    found = providers(rows)
    steps = {name: by(own, "part") for name, own in found.items()}
    # Parts that nobody would see stand together.
    parts = [p for p in PARTS if any(ms.get(p, 0) >= SEEN * sum(ms.values()) for ms in steps.values()) and p != "rest"]
    groups = {part: (part,) for part in parts} | {"everything else": tuple(p for p in PARTS if p not in parts)}
    heights = (0.4 * len(found) + 0.3, (0.19 * len(found) + 0.1) * len(groups) + 0.3)
    made = Figure(figsize=(plots.WIDTH, sum(heights) + 1.3), layout="constrained", facecolor="white")
    whole, split = made.subplots(2, 1, height_ratios=heights)
    longest = max(sum(ms.values()) for ms in steps.values())
    for place, own in enumerate(found.values()):
        _bar(whole, place, 0.8, by(own, "kind"), colours, labels=0.035 * longest)
    whole.set_yticks(range(len(found)), list(found))
    whole.set_ylim(len(found) - 0.5, -0.5)
    whole.set_title("A whole step, milliseconds")
    height = 0.84 / len(found)
    for index, members in enumerate(groups.values()):
        for place, (name, own) in enumerate(found.items()):
            y = index + (place - (len(found) - 1) / 2) * height
            end = _bar(split, y, height * 0.88, by([row for row in own if row["part"] in members], "kind"), colours)
            label = f"{end:.0f}  {name}" if index == 0 else f"{end:.0f}"
            split.annotate(label, (end, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    split.set_yticks(range(len(groups)), list(groups))
    split.set_ylim(len(groups) - 0.5, -0.5)
    split.set_title("Its parts, milliseconds")
    for ax, room in ((whole, 1.08), (split, 1.25)):
        ax.grid(axis="x")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(0, room * max(patch.get_x() + patch.get_width() for patch in ax.patches))
    shown = [kind for kind in KINDS if any(by(own, "kind").get(kind, 0) >= 0.5 for own in found.values())]
    keys = [Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in shown]
    made.legend(keys, [TITLES.get(kind, kind) for kind in shown], loc="outside lower center", ncols=5)
    first = next(iter(found.values()))[0]
    env = first["env"]
    made.suptitle(f"{first['shape']}; {env.get('kind')}, torch {env.get('torch')}, {env.get('date')}", x=0.01,
                  ha="left", fontsize=8.5, color=plots.GREY)  # fmt: skip
    return made


def _bar(
    ax: Axes,
    y: float,
    height: float,
    cells: Mapping[str, float],
    colours: Mapping[str, str],
    labels: float | None = None,
) -> float:
    """One stacked bar, segments of at least ``labels`` with their figure; where it ends."""
    left = 0.0
    for kind, ms in cells.items():
        ax.barh(y, ms, height, left, color=colours[kind], edgecolor="white", linewidth=0.5)
        if labels is not None and ms >= labels:
            dark = kind in ("products", "optimizer", "norm", "copies")
            ax.text(left + ms / 2, y, f"{ms:.0f}", ha="center", va="center", fontsize=8.5,
                    color="white" if dark else None)  # fmt: skip
        left += ms
    if labels is not None:
        ax.annotate(f"{left:.0f}", (left, y), (4, 0), textcoords="offset points", va="center", fontweight="bold")
    return left
