"""From committed JSON lines to tables and figures of the documents: ``python -m cohobate.benchmarks.report [--check]``.

A document holds blocks ``<!-- bench:NAME -->`` ... ``<!-- /bench -->``; what stands between is replaced. NAME is

- ``FILE-DEVICE``, the main table of ``FILE.jsonl`` for that device (``kernels-cpu``: one line an op),
- ``FILE-DEVICE-full``, every row,
- ``FILE-DEVICE-machine``, where it was measured,
- ``teacher``, the frozen teacher (``teacher.jsonl``), a table for each kind of machine,
- ``quality`` or ``quality-NAME``, what whole runs learnt (the file of that name), or
- ``study-PART``, a part of the study (``study.jsonl``).

The newest folder ``benchmarks/results/*-YYYY-MM-DD`` that holds such rows is used (of each machine, where a block shows
several); where there is none the block says "not measured". Figures go to ``docs/figures/FILE-DEVICE.png`` (the study's
to ``study-PART.png``, or ``study-PART-PART.png``) and carry the digest of their data: a stale one shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohobate.benchmarks import command, quality, study
from cohobate.benchmarks.harness import NOISY, Row, read_rows
from cohobate.benchmarks.machine import ROOT
from cohobate.errors import UserError

BLOCK = re.compile(r"(<!-- bench:([a-z0-9-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
FOLDER = re.compile(r".*-(\d{4}-\d{2}-\d{2})$")
DEVICES = ("cpu", "cuda")
BF16 = ("ours in bf16", "vs eager fp32")
AGAINST = ("vs eager", "vs compile", "vs best other")
MODES = ("step", "fwd+bwd", "fwd")  # the headline of a case is the first of these that it has


@dataclass(frozen=True)
class Results:
    """Rows of one file and device, in their order, and the ceilings measured beside them."""

    path: Path
    rows: list[Row]
    ceilings: list[str]

    @property
    def digest(self) -> str:
        """Of the file's text: what a figure was drawn from."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]


def find(root: Path, stem: str, device: str) -> Results | None:
    """The newest stored rows of ``stem`` on ``device``; None where there are none."""
    for path in stored(root, stem):
        rows = [row for row in read_rows(path) if row.device == device]
        if rows:
            return Results(path, rows, _ceilings(path))
    return None


def stored(root: Path, stem: str) -> list[Path]:
    """Every ``benchmarks/results/*-YYYY-MM-DD/STEM.jsonl``, newest first."""
    folders = [f for f in (root / "benchmarks" / "results").glob("*") if FOLDER.match(f.name)]
    folders.sort(key=lambda f: (f.name[-10:], f.name), reverse=True)
    return [folder / f"{stem}.jsonl" for folder in folders if (folder / f"{stem}.jsonl").is_file()]


def _ceilings(path: Path) -> list[str]:
    found = command.ceiling_rows(path)
    copies = [f"{row['gb_s']:.0f} GB/s at {row['bytes'] / 2**20:.0f} MB" for row in found if "gb_s" in row]
    products = [f"{row['tflop_s']:.3g} TFLOP/s {row['dtype']}" for row in found if "tflop_s" in row]
    return [f"copy {', '.join(copies)}"] * bool(copies) + [f"matrix product {', '.join(products)}"] * bool(products)


def render(root: Path, name: str) -> str:
    """Text of one block, ending with a newline.

    Raises:
        UserError: a name of none of these forms.
    """
    if name.startswith("quality"):
        return _quality(root, name)
    if name == "teacher":
        return _teacher(root)
    if name in {f"study-{part}" for part in study.PARTS}:
        return _study(root, name.removeprefix("study-"))
    match = re.fullmatch(rf"([a-z0-9_-]+?)-({'|'.join(DEVICES)})(-full|-machine)?", name)
    if match is None:
        raise UserError(f"bench block: expected FILE-DEVICE, FILE-DEVICE-full or FILE-DEVICE-machine, got {name!r}")
    stem, device, part = match.groups()
    results = find(root, stem, device)
    if results is None:
        how = "`make gpu-proof` on a machine with a GPU" if device == "cuda" else f"`cohobate bench {stem}`"
        return f"not measured ({how} measures it)\n"
    if part == "-machine":
        return machine(results, root)
    return headline(results) if part is None and stem.startswith("kernels") else full(results)


def _quality(root: Path, stem: str) -> str:
    """What whole runs learnt: not timings, so a table of its own for each label that they are about."""
    for path in stored(root, stem):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        commits = ", ".join(sorted({str(line["env"]["commit"]) for line in lines}))
        shown = [label for label in ("texture", "motion") if any(line["label"] == label for line in lines)]
        tables = "".join(f"The {label}:\n\n" * (len(shown) > 1) + f"{quality.table(lines, label)}\n" for label in shown)
        return f"{tables}Rows: `{path.relative_to(root)}`, commit {commits}.\n"
    return "not measured (`cohobate bench quality` measures it)\n"


def _study(root: Path, part: str) -> str:
    """A part of the study, and how much of it there is."""
    for path in stored(root, "study"):
        runs = study.read(path)
        env = runs[0]["env"]
        commits = ", ".join(sorted({f"{run['env']['commit']}{_changed(run['env'])}" for run in runs}))
        seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
        hours = sum(run["seconds"] for run in runs) / 3600
        about = f"{len(runs)} runs, seeds {seeds}, {hours:.1f} hours on {env['kind']}; commit {commits}"
        return f"{study.table(runs, part)}\nRows: `{path.relative_to(root)}`; {about}.\n"
    return "not measured (`cohobate bench study` measures it)\n"


def _changed(env: Mapping[str, Any]) -> str:
    return ", uncommitted changes" if env.get("dirty") else ""


def _teacher(root: Path) -> str:
    """The frozen teacher on every kind of machine that measured it, the newest rows of each, newest first."""
    newest: dict[str, Results] = {}
    for path in stored(root, "teacher"):
        rows = read_rows(path)
        for kind in dict.fromkeys(str(row.env.get("kind")) for row in rows):
            own = [row for row in rows if str(row.env.get("kind")) == kind]
            newest.setdefault(kind, Results(path, own, _ceilings(path)))
    if not newest:
        return "not measured (`cohobate bench teacher` measures it)\n"
    parts = []
    for kind, results in newest.items():
        env = results.rows[0].env
        parts += [
            f"**{kind}**, {env.get('date')}; torch {env.get('torch')}, commit {env.get('commit')}{_changed(env)}; "
            f"{'; '.join(results.ceilings[-1:])}; rows: `{results.path.relative_to(root)}`\n",
            teacher_table(results.rows),
        ]
    return "\n".join(parts)


def teacher_table(rows: Sequence[Row]) -> str:
    """One line a provider: time, work, share of the matrix products' rate, ratios, error beside what is allowed."""
    parts = []
    for shape in dict.fromkeys(row.shape for row in rows):
        against = ("vs eager fp32", "vs compile fp32", "vs best original")
        parts += [
            f"{shape}\n",
            _line("", "p50", "GFLOP", "% of matrix product", *against, "feature error", "allowed", "peak MB"),
            "|---" * 10 + "|",
        ]
        for row in (row for row in rows if row.shape == shape):
            best = ratio(row, "best other")
            parts.append(
                _line(
                    row.provider,
                    _ms(row),
                    "-" if row.flops is None else f"{row.flops / 1e9:.1f}",
                    _floor(row),
                    _bold(ratio(row, "eager")) if row.role == "ours" else ratio(row, "eager"),
                    ratio(row, "compile"),
                    f"{_bold(best)} ({row.best_other})" if row.ratio_vs_best_other is not None else best,
                    "-" if row.max_rel_err is None else f"{row.max_rel_err:.0e}",
                    "-" if row.tolerance is None else f"{row.tolerance:.0e}",
                    "-" if row.peak_mb is None else f"{row.peak_mb:.1f}",
                )
            )
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def machine(results: Results, root: Path) -> str:
    """Where, when and with what it was measured."""
    env = results.rows[0].env
    clean = "" if not env.get("dirty") else " with uncommitted changes"
    facts = [
        f"{env.get('kind')}, {env.get('date')}",
        f"torch {env.get('torch')}, triton {env.get('triton')}, Python {env.get('python')}, {env.get('system')}",
        f"driver {env.get('driver')}, {env.get('sm_mhz')} MHz" if env.get("driver") else "",
        f"native kernels: {env.get('native')}" if env.get("native") and results.rows[0].device == "cpu" else "",
        f"commit {env.get('commit')}{clean}, seed {env.get('seed')}",
        *(f"ceiling: {text}" for text in results.ceilings),
        f"rows: `{results.path.relative_to(root)}`",
    ]
    return "".join(f"- {fact}\n" for fact in facts if fact)


def headline(results: Results) -> str:
    """One line a case: both baselines, ours, the ratios, the share of the floor and the largest error."""
    lines = [
        _line(
            "", "literal eager", "torch.compile", "ours", "vs eager", "vs compile", "% of floor", *BF16, "largest error"
        ),
        "|---" * 10 + "|",
    ]
    for case in cases(results.rows):
        eager, compiled = _role(case, "eager"), _role(case, "compile")
        ours = [row for row in case if row.role == "ours"]
        plain = next((row for row in ours if row.dtype != "bf16"), None)
        half = next((row for row in ours if row.dtype == "bf16"), None)
        worst = [max(row.max_rel_err, row.grad_rel_err or 0.0) for row in ours if row.max_rel_err is not None]
        first = case[0]
        lines.append(
            _line(
                f"{first.name} ({first.mode})",
                _ms(eager),
                _ms(compiled),
                _ms(plain),
                _bold(ratio(plain, "eager")),
                ratio(plain, "compile"),
                _floor(plain),
                _ms(half),
                ratio(half, "eager"),
                " / ".join(f"{error:.0e}" for error in worst) or "-",
            )
        )
    return "\n".join(lines) + "\n"


def cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by case, each in its most complete mode."""
    names = dict.fromkeys((row.name, row.shape) for row in rows)
    found = []
    for key in names:
        own = [row for row in rows if (row.name, row.shape) == key]
        mode = min((row.mode for row in own), key=lambda m: MODES.index(m) if m in MODES else len(MODES))
        found.append([row for row in own if row.mode == mode])
    return found


def full(results: Results) -> str:
    """Every row, one table a case and mode."""
    parts = []
    for key in dict.fromkeys((row.name, row.shape, row.mode) for row in results.rows):
        own = [row for row in results.rows if (row.name, row.shape, row.mode) == key]
        parts += [
            f"**{key[0]}, {key[2]}**: {key[1]}\n",
            _line("provider", "p50", "p20 to p80, ms", "% of floor", *AGAINST, "error", "peak MB"),
            "|---" * 9 + "|",
        ]
        for row in own:
            worst = None if row.max_rel_err is None else max(row.max_rel_err, row.grad_rel_err or 0.0)
            best = ratio(row, "best other")
            parts.append(
                _line(
                    row.provider,
                    _ms(row),
                    "-" if row.p20_ms is None or row.p80_ms is None else f"{row.p20_ms:.3g} to {row.p80_ms:.3g}",
                    _floor(row),
                    ratio(row, "eager"),
                    ratio(row, "compile"),
                    f"{best} ({row.best_other})" if row.ratio_vs_best_other is not None else best,
                    "-" if worst is None else f"{worst:.0e}",
                    "-" if row.peak_mb is None else f"{row.peak_mb:.1f}",
                )
            )
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def ratio(row: Row | None, against: str) -> str:
    """A ratio, or in a few words why there is none."""
    if row is None:
        return "-"
    text = command.ratio_text(row, against)
    if text == "~":
        why = next((part for part in row.note.split("; ") if part.startswith(f"no ratio vs {against}:")), "")
        return "unsteady" if why.endswith(f"exceeds {NOISY:.0%}") else "within noise"
    if text != "-":
        return text
    for reason in ("numerics", "baseline missing"):
        if reason in row.note:
            return reason if reason != "numerics" else "numerics disagree"
    return "failed" if row.note.startswith("failed") else "-"


def _role(rows: Sequence[Row], role: str) -> Row | None:
    return next((row for row in rows if row.role == role), None)


def _ms(row: Row | None) -> str:
    if row is None or row.p50_ms is None:
        return "-"
    return f"{row.p50_ms:.3g} ms" if row.p50_ms < 1000 else f"{row.p50_ms / 1e3:.2f} s"


def _floor(row: Row | None) -> str:
    return "-" if row is None or row.pct_of_floor is None else f"{row.pct_of_floor:.0f}"


def _bold(text: str) -> str:
    return f"**{text}**" if text.endswith("x") else text


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rewrite(root: Path, text: str) -> str:
    """A document with every block replaced by what the stored results say now."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{render(root, m[2])}\n{m[4]}", text)  # Markdown wants the empty lines


def documents(root: Path) -> list[Path]:
    """The README and every page of the documentation that has a block."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in pages if page.is_file() and BLOCK.search(page.read_text(encoding="utf-8"))]


def draw(results: Results, path: Path) -> None:
    """Bars of how many times faster than literal eager each provider is; refused ratios have no bar but a word."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = cases(results.rows)
    wanted = list(dict.fromkeys(r.provider for case in groups for r in case if r.role in ("compile", "ours")))
    colours = dict(zip(wanted, ("#9aa5b1", "#c2571a", "#e8a87c", "#2f6f8f", "#7fb3c8")))
    height = 0.8 / max(len(wanted), 1)
    figure, axes = plt.subplots(figsize=(8, 0.45 + 0.62 * len(groups)), layout="constrained")
    for index, case in enumerate(groups):
        for place, provider in enumerate(wanted):
            row = next((r for r in case if r.provider == provider), None)
            if row is None:
                continue
            y = index + (place - (len(wanted) - 1) / 2) * height
            value = row.ratio_vs_eager
            if value is not None:
                axes.barh(y, value, height * 0.92, color=colours[provider])
            label = ratio(row, "eager")
            axes.annotate(
                label,
                (value or 0, y),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(groups)), [f"{case[0].name}\n{case[0].mode}" for case in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)  # a case without a bar has its room, too
    axes.margins(x=0.12)
    axes.set_xlabel("times as fast as the literal eager form in fp32 (dotted: 1)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[p]) for p in wanted]
    axes.legend(handles, wanted, fontsize=8, frameon=False, loc="best")
    env = results.rows[0].env
    axes.set_title(f"{env.get('kind')}, torch {env.get('torch')}, {env.get('date')}", fontsize=8, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Data": results.digest, "Software": None})
    plt.close(figure)


@dataclass(frozen=True)
class Study:
    """Parts of the study and the file they are drawn from."""

    path: Path
    parts: list[str]

    @property
    def digest(self) -> str:
        """Of the file's text."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def draw(self, path: Path) -> None:
        """Write the figure."""
        made = study.figure(study.read(self.path), self.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=130, metadata={"Data": self.digest, "Software": None})


def figures(root: Path) -> dict[Path, Results | Study]:
    """Every figure that the documents show and the results it is drawn from."""
    wanted: dict[Path, Results | Study] = {}
    for page in documents(root):
        text = page.read_text(encoding="utf-8")
        for stem, device in re.findall(rf"figures/([a-z0-9_]+)-({'|'.join(DEVICES)})\.png", text):
            results = find(root, stem, device)
            if results is not None:
                wanted[root / "docs" / "figures" / f"{stem}-{device}.png"] = results
        for parts in re.findall(rf"figures/study((?:-(?:{'|'.join(study.PARTS)}))+)\.png", text):
            for path in stored(root, "study")[:1]:
                wanted[root / "docs" / "figures" / f"study{parts}.png"] = Study(path, parts.split("-")[1:])
    return wanted


def stale(root: Path) -> list[str]:
    """Documents and figures that do not say what the stored results say."""
    from PIL import Image

    texts = {page: page.read_text(encoding="utf-8") for page in documents(root)}
    wrong = [str(page.relative_to(root)) for page, text in texts.items() if rewrite(root, text) != text]
    for path, results in figures(root).items():
        if not path.is_file():
            wrong.append(f"{path.relative_to(root)} (missing)")
            continue
        with Image.open(path) as image:
            if image.info.get("Data") != results.digest:
                wrong.append(f"{path.relative_to(root)} (drawn from other data)")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the documents and figures; with ``--check`` only say which would change (exit code 1 if any)."""
    parser = argparse.ArgumentParser(prog="python -m cohobate.benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is stale")
    args = parser.parse_args(argv)
    if args.check:
        wrong = stale(ROOT)
        print("\n".join(f"stale: {name}" for name in wrong) or "documents and figures match the stored results")
        return 1 if wrong else 0
    for page in documents(ROOT):
        page.write_text(rewrite(ROOT, page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
    for path, results in figures(ROOT).items():
        results.draw(path) if isinstance(results, Study) else draw(results, path)
        print(f"drew {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
