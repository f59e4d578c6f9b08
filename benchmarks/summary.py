"""The whole story at a glance, from the stored rows: a table with a line for each thing, and one figure.

Of each thing: the literal form in fp32, its bf16 form, the fastest that ``torch.compile`` made of either, and ours.
What may not be compared (:mod:`cohobate.benchmarks.harness`) has a word instead of a ratio here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cohobate.benchmarks.harness import Row
from cohobate.benchmarks.tables import Results, bold, cases, find, line, ms, of_role, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# file -> what it is about; the files are those that `cohobate bench` and the GPU proof write.
THINGS = {
    "step": "dBOT step",
    "step-amd": "AMD step",
    "step-batch64": "dBOT step",
    "teacher": "frozen teacher",
    "features": "features",
    "data": "an image from its JPEG file",
}
KERNELS = "kernels"
INEXACT = "fp8"  # a provider with this in its name does not compute the same


@dataclass(frozen=True)
class Entry:
    """A line: rows of one case and what they are about; None for a form that was not measured."""

    title: str
    literal: Row
    half: Row | None
    compiled: Row | None
    ours: Row
    results: Results

    @property
    def shape(self) -> str:
        """What it was measured on, without what only a full table explains."""
        return self.ours.shape.split(";")[0]


def entries(root: Path, device: str) -> list[Entry]:
    """Every thing that was measured on this device, in the order of :data:`THINGS`."""
    found = []
    for stem, title in THINGS.items():
        results = find(root, stem, device)
        entry = None if results is None else _entry(title, results)
        if entry is not None:
            found.append(entry)
    return found


def _entry(title: str, results: Results) -> Entry | None:
    """Of the file's first case."""
    first = results.rows[0]
    rows = [r for r in results.rows if (r.name, r.shape) == (first.name, first.shape) and r.p50_ms is not None]
    literal = of_role(rows, "eager")
    ours = _fastest([row for row in rows if row.role == "ours" and INEXACT not in row.provider])
    if literal is None or ours is None:
        return None
    others = [row for row in rows if row.role in ("other", "compile")]
    compiled = _fastest([row for row in others if "compile" in row.provider and row.agrees])
    half = _fastest([row for row in others if "compile" not in row.provider and row.dtype == "bf16"])
    return Entry(title, literal, half, compiled, ours, results)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row.p50_ms or 0.0, default=None)


def table(root: Path, device: str) -> str:
    """Markdown; empty where nothing was measured."""
    found, kernels = entries(root, device), find(root, KERNELS, device)
    if not found and kernels is None:
        return ""
    titles = ("", "literal, fp32", "bf16, eager", "torch.compile", "Cohobate", "vs literal", "vs the best of them")
    lines = [line(*titles), "|---" * len(titles) + "|"]
    for entry in found:
        half = entry.half
        wrong = "" if half is None or half.agrees else " (numerics disagree)"
        lines.append(
            line(
                f"{entry.title}: {entry.shape}",
                ms(entry.literal),
                f"{ms(half)}{wrong}",
                ms(entry.compiled),
                ms(entry.ours),
                bold(ratio(entry.ours, "eager")),
                _best(entry.ours),
            )
        )
    if kernels is not None:
        ours = [row for case in cases(kernels.rows) for row in case if row.role == "ours" and row.dtype != "bf16"]
        title = f"{len(ours)} kernels in fp32, forward and backward"
        lines.append(line(title, "-", "-", "-", "-", _range(ours, "eager"), _range(ours, "best other")))
    kinds = dict.fromkeys(str(results.rows[0].env.get("kind")) for results in _results(found, kernels))
    return "\n".join(lines) + f"\n\n{'; '.join(kinds)}.\n"


def _results(found: Sequence[Entry], kernels: Results | None) -> list[Results]:
    return [*(entry.results for entry in found), *([] if kernels is None else [kernels])]


def sources(root: Path, device: str) -> list[Path]:
    """Files that table and figure are made from."""
    return [results.path for results in _results(entries(root, device), find(root, KERNELS, device))]


def _best(row: Row) -> str:
    text = ratio(row, "best other")
    return f"{text} ({row.best_other})" if row.ratio_vs_best_other is not None else text


def _range(rows: Sequence[Row], against: str) -> str:
    """Smallest to largest ratio, and how many were refused."""
    values = [row.ratio_vs_eager if against == "eager" else row.ratio_vs_best_other for row in rows]
    known = sorted((value, ratio(row, against)) for value, row in zip(values, rows) if value is not None)
    if not known:
        return "-"
    text = known[0][1] if len(known) == 1 else f"{known[0][1]} to {known[-1][1]}"
    return text if len(known) == len(rows) else f"{text}; {len(rows) - len(known)} refused as noise"


def figure(root: Path, device: str) -> Figure:
    """How many times as fast as the literal fp32 form: whole steps and the teacher, and every kernel."""
    from cohobate.report import plots

    return plots.styled(_figure)(entries(root, device), find(root, KERNELS, device))


def _figure(found: Sequence[Entry], kernels: Results | None) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from cohobate.report import plots

    colours = {
        "eager PyTorch, bf16": plots.GREY,
        "torch.compile": plots.SKY,
        "Cohobate, fp32": plots.YELLOW,
        "Cohobate, bf16": plots.RED,
    }
    eager, compiled, exact, half = colours
    panels: list[tuple[str, list[tuple[str, dict[str, Row | None]]]]] = [
        ("Whole steps, and the frozen teacher", [
            (_label(entry), {eager: entry.half, compiled: entry.compiled, half: entry.ours})
            for entry in found if entry.half is not None or entry.compiled is not None
        ]),
        ("Kernels", [
            (f"{case[0].name}\n{case[0].mode}", {compiled: of_role(case, "compile"), **_ours(case, exact, half)})
            for case in (cases(kernels.rows) if kernels is not None else [])
        ]),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel[1]]
    tallest = max(0.17 * sum(len(bars) for _, bars in groups) for _, groups in panels)
    made = Figure(figsize=(11, max(tallest, 3) + 1.2), layout="constrained", facecolor="white")
    for ax, (title, groups) in zip(made.subplots(1, len(panels), squeeze=False)[0], panels):
        _bars(ax, groups, colours)
        ax.set_title(title)
        ax.set_xlabel("times as fast as literal PyTorch in fp32 (dotted: 1)")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    made.legend(handles, list(colours), loc="outside lower center", ncols=len(colours))
    env = (found[0].results if found else kernels).rows[0].env  # type: ignore[union-attr]
    made.suptitle(f"{env.get('kind')}, torch {env.get('torch')}", x=0.01, ha="left", fontsize=8.5, color=plots.GREY)
    return made


def _label(entry: Entry) -> str:
    """What it is, and its shape on two lines."""
    words = entry.shape.split(", ")
    middle = (len(words) + 1) // 2
    return "\n".join((entry.title, ", ".join(words[:middle]), ", ".join(words[middle:])))


def _ours(case: Sequence[Row], exact: str, half: str) -> dict[str, Row | None]:
    ours = [row for row in case if row.role == "ours"]
    return {name: next((r for r in ours if (r.dtype == "bf16") == (name == half)), None) for name in (exact, half)}


def _bars(ax: Axes, groups: Sequence[tuple[str, Mapping[str, Row | None]]], colours: Mapping[str, str]) -> None:
    """A group of bars each; a ratio that is refused has a word where its bar would end."""
    for index, (_, bars) in enumerate(groups):
        rows = {name: row for name, row in bars.items() if row is not None}
        height = 0.84 / max(len(bars), 1)
        for place, (name, row) in enumerate(rows.items()):
            y, value = index + (place - (len(rows) - 1) / 2) * height, row.ratio_vs_eager
            if value is not None:
                ax.barh(y, value, height * 0.9, color=colours[name])
            strong = row.role == "ours" and value is not None
            ax.annotate(
                ratio(row, "eager"), (value or 0, y), (3, 0), textcoords="offset points", va="center", fontsize=8,
                fontweight="bold" if strong else "normal", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
    ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(groups)), [label for label, _ in groups], fontsize=8.5)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    ax.set_xlim(0)
