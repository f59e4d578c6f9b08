"""The report page: one HTML file with its pictures inside, and the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cohobate.report import pictures, plots
from cohobate.report.run import Evaluation, Run, Samples, read_run

DPI = 150
FILES_SHOWN = 20
QUALITY_NOTE = (
    "Accuracy of simple classifiers on the frozen features of held-out {unit}s: nearest neighbours (kNN) and one "
    "linear layer. Stage 0 is the network before any training: what a stage does not add to it, it did not learn. "
    "In the table, the change from stage 0 is in percentage points."
)
SAMPLES_NOTE = (
    "Light grey is what was hidden. The reconstruction shows the student's prediction where it saw nothing, and the "
    "{unit} itself where it did. Where the loss standardises each patch, a predicted patch has the true patch's own "
    "brightness and contrast, and only the rest is the student's work. Features are drawn as their first three "
    "principal components in red, green and blue, fitted to the targets of all these {unit}s: equal colours mean "
    "similar features. The target is the teacher's, the prediction what the student makes of it from what it sees."
)
ATTENTION_NOTE = (
    "How much the last block of the student, shown whole {unit}s, attends to each patch: from its class token, or from "
    "the patches on average where it has none. The scale counts in shares of an even spread and is the same for all "
    "pictures of a stage; what is missing from the whole goes to the class token itself."
)
RETRIEVAL_NOTE = (
    "The {unit}s whose features (mean over patches) lie nearest to a query's by cosine similarity, the nearest first; "
    "the query itself is left out."
)


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` and ``report/*.png`` into a run folder; returns the page's path.

    Works on what is there: a run of one stage, without evaluations, unfinished, or with losses that are not finite.
    Raises :class:`cohobate.errors.UserError` if the folder holds no run.
    """
    run = read_run(folder)
    files = _Pictures(run.folder / "report")
    body = "\n".join(part for part in _sections(run, files) if part)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    title = escape(f"Cohobate run: {run.folder.resolve().name}")
    page = run.folder / "report.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return page


class _Pictures:
    """Saves figures as PNG and gives the HTML that holds the same bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def html(self, name: str, figure: Figure | None, alternative: str) -> str:
        if figure is None:
            return ""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        (self.folder / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<figure><img alt="{escape(alternative)}" src="data:image/png;base64,{data}"></figure>'


def _sections(run: Run, files: _Pictures) -> Iterator[str]:
    samples, unit = [pictures.few(found) for found in run.samples], run.unit
    yield f"<h1>{escape(run.folder.resolve().name)}</h1>"
    yield f'<p class="lead">{escape(_lead(run))}</p>'
    yield _facts(run)
    yield _warning(run)
    yield _section(
        "What the features are worth",
        files.html("quality", plots.quality(run), "kNN and linear probe accuracy after each stage"),
        _quality_table(run.evaluations),
        note=QUALITY_NOTE.format(unit=unit),
    )
    yield _section("Loss", files.html("loss", plots.loss(run), "loss of each stage"))
    yield _section(
        "What a stage sees and asks for",
        *(
            f"<h3>{escape(found.stage)}</h3>"
            + files.html(f"samples-{index}", pictures.samples(found), f"{unit}s, masks and features of {found.stage}")
            for index, found in enumerate(samples, 1)
        ),
        note=SAMPLES_NOTE.format(unit=unit),
    )
    yield _section(
        "Where the student looks",
        *(
            f"<h3>{escape(found.stage)}</h3>"
            + files.html(f"attention-{index}", _attention(found), f"attention maps of {found.stage}")
            for index, found in enumerate(samples, 1)
            if found.attention is not None
        ),
        note=ATTENTION_NOTE.format(unit=unit),
    )
    yield _section(
        f"Nearest {unit}s",
        *(
            f"<h3>{escape(found.stage)}</h3>"
            + files.html(f"retrieval-{index}", pictures.retrieval(found), f"nearest {unit}s of {found.stage}")
            for index, found in enumerate(run.retrieval, 1)
        ),
        note=RETRIEVAL_NOTE.format(unit=unit),
    )
    yield _section(
        "Speed",
        files.html("throughput", plots.throughput(run), "samples a second and share of time waiting for data"),
        files.html("time", plots.time_spent(run), "where the time went"),
    )
    yield _section("Signals", files.html("signals", plots.signals(run), "learning rate, gradient norm, targets"))
    yield _section("Data", _table(_flat(run.data_report)))
    yield _section("Environment", _table(_flat(run.environment)))
    yield _section("Configuration", f"<pre>{escape(run.config)}</pre>" if run.config else "")
    yield "<footer>Written by cohobate from the files of this run folder.</footer>"


def _section(title: str, *parts: str, note: str = "") -> str:
    """A heading and its parts; nothing at all when there are none."""
    present = [part for part in parts if part]
    if not present:
        return ""
    return "\n".join([f"<h2>{escape(title)}</h2>", f'<p class="note">{escape(note)}</p>' if note else "", *present])


def _lead(run: Run) -> str:
    stages = ", then ".join(run.stage_name(stage) for stage in run.stages)
    return f"{len(run.stages)} {'stage' if len(run.stages) == 1 else 'stages'} of training: {stages}."


def _facts(run: Run) -> str:
    """The figures to read first, as boxes: gain over the untrained network, speed, waiting, steps, bad files."""
    boxes = []
    for metric, name in plots.METRIC_NAMES.items():
        best = _largest_gain([found for found in run.evaluations if found.metric == metric])
        if best is not None:
            first, last = best
            what = ", ".join(part for part in (last.label, last.features) if part)
            text = f"{name} ({what}), untrained → last stage"
            boxes.append((f"{first.value:.1%} → {last.value:.1%}", text))
    rate = run.series("perf/samples_s")[1]
    if np.isfinite(rate).any():
        boxes.append((f"{np.nanmedian(rate):,.0f}", "samples a second, median"))
    wait = run.series("perf/data_wait")[1]
    if np.isfinite(wait).any():
        boxes.append((f"{np.nanmean(wait):.1%}", "of the time waiting for data"))
    boxes.append((f"{int(max(row['step'] for row in run.metrics)):,}", "optimizer steps"))
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(text)}</span></li>" for value, text in boxes)
    return f'<ul class="facts">{items}</ul>'


def _largest_gain(found: list[Evaluation]) -> tuple[Evaluation, Evaluation] | None:
    """(untrained, last stage) of the label and features whose last value is the highest; None without both ends."""
    if not found:
        return None
    end = max(evaluation.stage for evaluation in found)
    first = {(evaluation.label, evaluation.features): evaluation for evaluation in found if evaluation.stage == 0}
    pairs = [
        (first[key], evaluation)
        for evaluation in found
        if evaluation.stage == end > 0 and (key := (evaluation.label, evaluation.features)) in first
    ]
    finite = [pair for pair in pairs if math.isfinite(pair[0].value) and math.isfinite(pair[1].value)]
    return max(finite, key=lambda pair: pair[1].value, default=None)


def _warning(run: Run) -> str:
    """A box with the alarms of the run, and with every loss that was not finite: its stage and first step."""
    alarms: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for stage, step, text in run.alarms:  # what differs in the number at its end alone is told once
        alarms.setdefault((stage, text.rpartition(":")[0] or text), []).append((step, text))
    lines = [
        f"{run.stage_name(stage)}: {found[0][1]} (at step {found[0][0]}"
        + (f", and on {len(found) - 1} later log lines)." if len(found) > 1 else ").")
        for (stage, _), found in alarms.items()
    ]
    for stage in run.stages:
        for key in run.loss_keys(stage):
            steps, values = run.series(key, stage)
            broken = steps[~np.isfinite(values)]
            if len(broken):
                where = f"{len(broken)} of {len(steps)} log lines, first at step {broken[0]:.0f}"
                lines.append(f"{run.stage_name(stage)}: {key} was not finite on {where}.")
    return f'<div class="warning">{"<br>".join(escape(line) for line in lines)}</div>' if lines else ""


def _attention(found: Samples) -> Figure | None:
    if found.attention is None:
        return None
    heads = [] if found.attention_heads is None else found.attention_heads.tolist()
    return pictures.attention(found.images, found.attention, heads)


def _quality_table(evaluations: list[Evaluation]) -> str:
    """A row for each metric, label and kind of features; a column a stage, with the change from stage 0."""
    stages = {found.stage: found.stage_name for found in sorted(evaluations, key=lambda found: found.stage)}
    values = {(found.metric, found.label, found.features, found.stage): found.value for found in evaluations}
    head = "".join(f'<th class="number">{stage} {escape(name)}</th>' for stage, name in stages.items())
    lines = []
    for row in sorted({key[:3] for key in values}):
        first = values.get((*row, 0), math.nan)
        cells = []
        for stage in stages:
            value = values.get((*row, stage), math.nan)
            gain = f" <span>{100 * (value - first):+.1f}</span>" if stage and math.isfinite(value - first) else ""
            cells.append(f"{value:.1%}{gain}" if math.isfinite(value) else "")
        lines.append(
            "<tr>" + "".join(f"<td>{escape(part)}</td>" for part in row)
            + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"
        )  # fmt: skip
    names = "<th>metric</th><th>label</th><th>features</th>"
    return f"<table><tr>{names}{head}</tr>{''.join(lines)}</table>" if lines else ""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested dictionaries as (dotted name, text) rows; long lists are cut and say how much is left."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        shown = [": ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value[:FILES_SHOWN]]
        more = [f"and {len(value) - FILES_SHOWN} more"] if len(value) > FILES_SHOWN else []
        short = all(isinstance(item, (str, int, float)) for item in value) and len(" ".join(shown)) < 100
        yield name, (" " if short else "\n").join(shown + more) or "none"
    elif isinstance(value, dict):
        yield from [(name, "none")] if name else []
    else:
        yield name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(text).replace(chr(10), '<br>')}</td></tr>" for name, text in rows
    )
    return f"<table>{lines}</table>" if lines else ""
