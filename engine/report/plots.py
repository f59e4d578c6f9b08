"""The plots of a run report. Each takes a :class:`Run` and returns a figure, or None where the run has nothing to show.

Colours are Okabe and Ito's, told apart by every kind of colour vision; lines differ in dash or marker too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from cohobate.report.run import Evaluation, Run

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
GREY, LIGHT, INK = "#8a8f98", "#e3e6ea", "#20242a"
METRIC_NAMES = {"knn": "kNN accuracy", "linear": "linear-probe accuracy"}
DASHES: dict[str, tuple[Any, str]] = {"cls": ("-", "o"), "mean": ("--", "s")}  # features: line and marker
WIDTH = 9.2  # inches; the page shows every plot at one width

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


P = ParamSpec("P")
R = TypeVar("R")


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Run a plot under :data:`STYLE` and leave matplotlib's own settings as they were."""

    @functools.wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(STYLE):
            return plot(*args, **kwargs)

    return run


def figure(height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, NDArray[Any]]:
    """A figure of the page's width and its axes as an array [rows, columns]."""
    made = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    return made, made.subplots(rows, columns, squeeze=False, **options)


def smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred running mean that leaves out what is not finite and narrows at both ends."""
    finite = np.isfinite(values)
    total = np.cumsum(np.insert(np.where(finite, values, 0.0), 0, 0.0))
    count = np.cumsum(np.insert(finite, 0, False))
    low = np.maximum(np.arange(len(values)) - window // 2, 0)
    high = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    number = count[high] - count[low]
    return np.where(finite & (number > 0), (total[high] - total[low]) / np.maximum(number, 1), np.nan)


@styled
def loss(run: Run) -> Figure | None:
    """One panel a stage, since methods' losses have scales of their own; places without a finite loss are marked."""
    stages = [stage for stage in run.stages if run.loss_keys(stage)]
    if not stages:
        return None
    columns = min(3, len(stages))
    rows = math.ceil(len(stages) / columns)
    made, axes = figure(2.9 * rows, rows, columns)
    for stage, ax in zip(stages, axes.flat):
        keys = run.loss_keys(stage)
        for colour, key in zip(COLOURS, keys[:1] if len(keys) == 2 else keys):  # one term is the total itself
            _loss_line(ax, *run.series(key, stage), key.removeprefix("loss/"), colour)
        ax.set_title(run.stage_name(stage))
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if len(ax.get_lines()) > 2:
            ax.legend()
    for ax in axes[:, 0]:
        ax.set_ylabel("loss")
    for ax in axes.flat[len(stages) :]:
        ax.set_axis_off()
    return made


def _loss_line(ax: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], name: str, colour: str) -> None:
    broken = ~np.isfinite(values)
    window = max(1, len(values) // 25) | 1
    if window > 1:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    marker = "" if len(steps) > 2 else "o"
    ax.plot(steps, smoothed(values, window), color=colour, linewidth=2, label=name, marker=marker)
    if broken.any():
        ax.plot(steps[broken], np.full(int(broken.sum()), 0.02), "x", color=RED, transform=ax.get_xaxis_transform())
        ax.text(0.98, 0.95, f"{int(broken.sum())} of {len(values)} not finite", color=RED, ha="right", va="top",
                transform=ax.transAxes)  # fmt: skip


@styled
def quality(run: Run) -> Figure | None:
    """kNN and linear probe after each stage, the untrained network first, and the effective rank of the features."""
    metrics = [metric for metric in METRIC_NAMES if any(found.metric == metric for found in run.evaluations)]
    ranks = [found for found in run.evaluations if math.isfinite(found.effective_rank)]
    if not metrics and not ranks:
        return None
    made, axes = figure(3.6, 1, len(metrics) + bool(ranks))
    labels = sorted({found.label for found in run.evaluations})
    for ax, metric in zip(axes[0], metrics):
        ax.set_title(METRIC_NAMES[metric])
        for colour, label in zip(COLOURS, labels):
            rows = [found for found in run.evaluations if (found.metric, found.label) == (metric, label)]
            _stage_lines(ax, [(found, found.value) for found in rows], colour)
        _from_zero(ax)
        _end_labels(ax, "{:.0%}")
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))  # ticks that whole percents do not round
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if ranks:
        axes[0, -1].set_title("effective rank of the features")
        _stage_lines(axes[0, -1], [(found, found.effective_rank) for found in ranks], INK)
        _from_zero(axes[0, -1])
        _end_labels(axes[0, -1], "{:.0f}")
    stages = sorted({found.stage for found in run.evaluations})
    for ax in axes[0]:
        ax.set_xticks(stages, [run.stage_name(stage).replace(" ", "\n", 1) for stage in stages])
        ax.set_xlim(stages[0] - 0.3, stages[-1] + 0.5)
    keys = [Line2D([], [], color=colour, linewidth=4, label=f"label: {name}") for colour, name in zip(COLOURS, labels)]
    for features in sorted({found.features for found in run.evaluations}):
        line, marker = DASHES.get(features, (":", "^"))
        keys.append(Line2D([], [], color=INK, linestyle=line, marker=marker, label=f"features: {features}"))
    made.legend(handles=keys, loc="outside lower center", ncols=len(keys), handlelength=3)
    return made


def _from_zero(ax: Axes, least: float = 0.0) -> None:
    """Let the axis begin at 0, with room above the data (up to ``least`` at the least)."""
    ax.set_ylim(0, max(least, 1.02 * ax.get_ylim()[1], np.finfo(float).tiny))


def _stage_lines(ax: Axes, found: Sequence[tuple[Evaluation, float]], colour: str) -> None:
    """A line over the stages for each kind of features."""
    for features in sorted({evaluation.features for evaluation, _ in found}):
        points = {evaluation.stage: value for evaluation, value in found if evaluation.features == features}
        stages = sorted(stage for stage in points if math.isfinite(points[stage]))
        line, marker = DASHES.get(features, (":", "^"))
        values = [points[stage] for stage in stages]
        ax.plot(stages, values, linestyle=line, marker=marker, color=colour, linewidth=2, markersize=5)


def _end_labels(ax: Axes, text: str) -> None:
    """Write each line's last value beside its end; where two would overlap, both give way."""
    lines = [line for line in ax.get_lines() if np.size(line.get_xydata())]
    ends = [(np.asarray(line.get_xydata())[-1], line.get_color()) for line in lines]
    ends.sort(key=lambda end: float(end[0][1]))
    heights = np.array([float(value) for (_, value), _ in ends])
    gap = 0.065 * float(np.ptp(ax.get_ylim()))
    for _ in range(50):  # neighbours push each other apart by what is missing
        missing = np.maximum(gap - np.diff(heights), 0) / 2
        heights[:-1] -= missing
        heights[1:] += missing
    for height, ((stage, value), colour) in zip(heights, ends):
        ax.annotate(text.format(value), (stage, height), (7, 0), textcoords="offset points", va="center",
                    color=colour, fontsize=8.5, annotation_clip=False)  # fmt: skip


SIGNALS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "target/std": "spread (std) of the targets",
    "features/rank": "effective rank of features",
    "features/spread": "relative spread of features",
}


@styled
def signals(run: Run) -> Figure | None:
    """Learning rate, gradient norm, and what tells of a collapse: targets or features that lose their spread."""
    present = {key: name for key, name in SIGNALS.items() if np.isfinite(run.series(key)[1]).any()}
    if not present:
        return None
    columns = min(3, len(present))
    rows = math.ceil(len(present) / columns)
    made, axes = figure(2.4 * rows, rows, columns)
    for ax, (key, name) in zip(axes.flat, present.items()):
        for stage in run.stages:
            steps, values = run.series(key, stage)
            ax.plot(steps, values, color=BLUE, linewidth=1.5, marker=_marker(steps), markersize=3)
        _from_zero(ax)
        ax.set_title(name)
        ax.set_xlabel("step of the run")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        _mark_stages(ax, run)
    for ax in axes.flat[len(present) :]:
        ax.set_axis_off()
    return made


@styled
def throughput(run: Run) -> Figure | None:
    """Samples a second along the run, and the share of the time spent waiting for data below it."""
    if not np.isfinite(run.series("perf/samples_s")[1]).any():
        return None
    made, axes = figure(3.4, 2, 1, sharex=True, height_ratios=[2, 1])
    top, low = axes[:, 0]
    for stage in run.stages:
        steps, rate = run.series("perf/samples_s", stage)
        top.plot(steps, rate, color=GREEN, linewidth=1, alpha=0.3)
        mean = smoothed(rate, max(1, len(rate) // 25) | 1)
        top.plot(steps, mean, color=GREEN, linewidth=2, marker=_marker(steps), markersize=4)
    _from_zero(top)
    top.set_ylabel("samples / s")
    steps, wait = run.series("perf/data_wait")
    low.fill_between(steps, wait, color=ORANGE, alpha=0.6, linewidth=0)
    _from_zero(low, least=0.1)
    low.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    low.yaxis.set_major_locator(MaxNLocator(3))
    low.set_ylabel("waiting\nfor data")
    low.set_xlabel("step of the run")
    low.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    low.set_xlim(left=0)
    for ax in (top, low):
        _mark_stages(ax, run, named=ax is top)
    return made


def _marker(steps: NDArray[np.float64]) -> str:
    """A dot for a few points, of which a line would show too little."""
    return "o" if len(steps) < 12 else ""


def _mark_stages(ax: Axes, run: Run, named: bool = False) -> None:
    """A dotted line where each later stage begins, and the stages' names above it where there is room."""
    for stage in run.stages:
        begin = _begin(run, stage)
        if stage != run.stages[0]:
            ax.axvline(begin, color=GREY, linestyle=":", linewidth=1)
        if named and len(run.stages) > 1:
            ax.annotate(run.stage_name(stage), (begin, 1), (3, 2), xycoords=("data", "axes fraction"),
                        textcoords="offset points", fontsize=8.5, color=GREY)  # fmt: skip


def _begin(run: Run, stage: int) -> float:
    """The last step that an earlier stage logged, or 0."""
    return max((float(row["step"]) for row in run.metrics if int(row.get("stage", 1)) < stage), default=0.0)


@styled
def time_spent(run: Run) -> Figure | None:
    """Where the time went: one bar a stage, its parts in the order in which they were written, small ones together."""
    timing = {stage: spent for stage, spent in run.timing.items() if sum(spent.values()) > 0}
    if not timing:
        return None
    timing = _small_together(timing)
    parts = [*dict.fromkeys(part for spent in timing.values() for part in spent if part != "other"), "other"]
    made, axes = figure(1.3 + 0.42 * len(timing), 1, 1)
    ax = axes[0, 0]
    colours = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
    position = np.arange(len(timing))
    left = np.zeros(len(timing))
    longest = max(sum(spent.values()) for spent in timing.values())
    digits = 0 if longest > 30 else 1
    for index, part in enumerate(parts):
        seconds = np.array([spent.get(part, 0.0) for spent in timing.values()])
        if not seconds.any():
            continue
        hatch = "" if index < len(colours) else "///"
        colour = GREY if part == "other" else colours[index % len(colours)]
        ax.barh(position, seconds, 0.62, left, color=colour, hatch=hatch, label=part, edgecolor="white", linewidth=0.8)
        for y, (x, width) in enumerate(zip(left, seconds)):
            if width > 0.06 * longest:
                ax.text(x + width / 2, y, f"{width:.{digits}f} s", ha="center", va="center", fontsize=8.5,
                        color="white" if index in (0, 5) else INK)  # fmt: skip
        left += seconds
    ax.set_yticks(position, [run.stage_name(int(name)) if name.isdigit() else name for name in timing])
    ax.invert_yaxis()
    ax.grid(False)
    ax.set_xlabel("seconds")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    made.legend(loc="outside upper left", ncols=min(len(parts), 8), handlelength=1, columnspacing=1.4)
    return made


def _small_together(timing: dict[str, dict[str, float]], share: float = 0.015) -> dict[str, dict[str, float]]:
    """The same seconds with every activity below ``share`` of the whole run counted as "other"."""
    whole = sum(sum(spent.values()) for spent in timing.values())
    total: dict[str, float] = {}
    for spent in timing.values():
        for part, seconds in spent.items():
            total[part] = total.get(part, 0.0) + seconds
    merged: dict[str, dict[str, float]] = {}
    for stage, spent in timing.items():
        merged[stage] = {}
        for part, seconds in spent.items():
            name = part if total[part] >= share * whole else "other"
            merged[stage][name] = merged[stage].get(name, 0.0) + seconds
    return merged
