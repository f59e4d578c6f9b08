"""From committed JSON lines to tables and figures of the documents: ``python -m cohobate.benchmarks.report [--check]``.

A document holds blocks ``<!-- bench:NAME -->`` ... ``<!-- /bench -->``; what stands between is replaced. NAME is

- ``summary-DEVICE``, everything at a glance (:mod:`cohobate.benchmarks.summary`),
- ``FILE-DEVICE``, the main table of ``FILE.jsonl`` for that device (``kernels-cpu``: one line an op),
- ``FILE-DEVICE-full``, every row,
- ``FILE-DEVICE-machine``, where it was measured,
- ``attention-DEVICE``, the backends of attention by sequence length,
- ``profile-DEVICE``, ``ablation-DEVICE`` and ``scaling-DEVICE``, where a step's time goes, what each of its switches is
  worth and how it grows,
- ``cuda``, what the GPU proof measured and no other page shows, a section each,
- ``teacher``, the frozen teacher (``teacher*.jsonl``), a table for each kind of machine,
- ``quality`` or ``quality-NAME``, what whole runs learnt (the file of that name), or
- ``study-PART``, a part of the study (``study.jsonl``).

The newest folder ``benchmarks/results/*-YYYY-MM-DD`` that holds such rows is used (of each machine, where a block shows
several); where there is none the block says "not measured". Figures go to ``docs/figures``: ``summary-DEVICE.png``,
``profile-DEVICE.png``, ``scaling-DEVICE.png``, and ``study-PART.png`` or ``study-PART-PART.png``. They carry the digest
of their data: a stale one shows. The same data and matplotlib give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cohobate.benchmarks import ablation, profile, quality, scaling, study, summary, tables
from cohobate.benchmarks.harness import read_rows
from cohobate.benchmarks.machine import ROOT, stored
from cohobate.benchmarks.tables import Results, find
from cohobate.benchmarks.twins import MAKERS
from cohobate.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = re.compile(r"(<!-- bench:([a-z0-9-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
DEVICES = ("cpu", "cuda")
DEVICE = f"({'|'.join(DEVICES)})"
# What the GPU proof measures and no other page shows, and the block that shows it.
PROOF = {
    "At a glance": "summary-cuda",
    "Machine": "kernels-cuda-machine",
    "Kernels": "kernels-cuda",
    "Kernels at the shapes of clips": "kernels-clips-cuda",
    "Attention by sequence length": "attention-cuda",
    "dBOT, ViT-B": "step-cuda-full",
    "dBOT, ViT-S": "step-small-cuda-full",
    "dBOT, ViT-S, a small batch": "step-batch64-cuda-full",
    "dBOT, ViT-L": "step-large-cuda-full",
    "AMD": "step-amd-cuda-full",
    "Where the time of a step goes": "profile-cuda",
    "Files to batches": "data-gpu-cpu",
}
# Files of lines that are no timings of providers: what the picture shows, the table and the picture.
LINES: dict[str, tuple[str, Callable[[Any], str], Callable[[Any], Any]]] = {
    "profile": ("A step by part and by kind of operation", tables.profile_table, profile.profile_figure),
    "scaling": ("How a step grows", scaling.table, scaling.scaling_figure),
}


def render(root: Path, name: str) -> str:
    """Text of one block, ending with a newline.

    Raises:
        UserError: a name of none of these forms.
    """
    if name.startswith("quality"):
        return _quality(root, name)
    if name == "teacher":
        return _teacher(root)
    if name == "cuda":
        return _cuda(root)
    if name in {f"study-{part}" for part in study.PARTS}:
        return _study(root, name.removeprefix("study-"))
    match = re.fullmatch(rf"([a-z0-9_-]+?)-{DEVICE}(-full|-machine)?", name)
    if match is None:
        raise UserError(f"bench block: expected FILE-DEVICE, FILE-DEVICE-full or FILE-DEVICE-machine, got {name!r}")
    stem, device, part = match.groups()
    if stem == "summary":
        return summary.table(root, device) or _not_measured("kernels", device)
    if stem in LINES:
        return _lines(root, stem, device)
    results = find(root, stem, device)
    if results is None:
        return _not_measured(stem, device)
    if part == "-machine":
        return tables.machine(results, root)
    if stem.startswith(("ablation", "attention")) and part is None:
        made = (ablation.table if stem.startswith("ablation") else tables.attention_table)(results.rows)
        return f"{made}\n{_source(results.path, results.rows[0].env, root)}"
    return tables.headline(results) if part is None and stem.startswith("kernels") else tables.full(results)


def _cuda(root: Path) -> str:
    """Sections of what was measured, and the names of the rest."""
    texts = {title: render(root, name) for title, name in PROOF.items()}
    measured = {title: text for title, text in texts.items() if not text.startswith("not measured")}
    if not measured:
        return _not_measured("", "cuda")
    missing = ", ".join(title for title in PROOF if title not in measured)
    parts = [f"### {title}\n\n{text}" for title, text in measured.items()]
    return "\n".join([*parts, f"Not measured: {missing}.\n"] if missing else parts)


def _not_measured(stem: str, device: str) -> str:
    benchmark, _, recipe = stem.partition("-")
    benchmark = "step --profile" if benchmark == "profile" else benchmark
    benchmark += f" --recipe {recipe}" if recipe in MAKERS else ""
    how = "`make gpu-proof` on a machine with a GPU" if device == "cuda" else f"`cohobate bench {benchmark}`"
    return f"not measured ({how} measures it)\n"


def lines_of(root: Path, stem: str, device: str) -> tuple[Path, list[dict[str, Any]]] | None:
    """The newest stored lines of a file whose rows are not timings of providers, without its ceilings."""
    for path in stored(root, stem):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line.get("device") == device and not line["name"].startswith("ceiling.")]
        if lines:
            return path, lines
    return None


def _lines(root: Path, stem: str, device: str) -> str:
    """A picture and a table of lines that are no timings of providers."""
    found = lines_of(root, stem, device)
    if found is None:
        return _not_measured(stem, device)
    caption, table, _ = LINES[stem]
    path, lines = found
    picture = f"![{caption}](figures/{stem}-{device}.png)"
    return f"{picture}\n\n{table(lines)}\n{_source(path, lines[0]['env'], root)}"


def _source(path: Path, env: Mapping[str, Any], root: Path) -> str:
    where = f"{env.get('kind')}, torch {env.get('torch')}, commit {env.get('commit')}{_changed(env)}"
    return f"{where}; rows: `{path.relative_to(root)}`\n"


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
    newest: dict[str, list[Results]] = {}
    for path in stored(root, "teacher"):
        rows = read_rows(path)
        for kind in dict.fromkeys(str(row.env.get("kind")) for row in rows):
            beside = sorted(path.parent.glob("teacher-*.jsonl"))
            found = [_of_kind(file, kind) for file in (path, *beside)]
            newest.setdefault(kind, [results for results in found if results.rows])
    if not newest:
        return "not measured (`cohobate bench teacher` measures it)\n"
    parts = []
    for kind, found in newest.items():
        env = found[0].rows[0].env
        files = ", ".join(f"`{results.path.relative_to(root)}`" for results in found)
        parts += [
            f"**{kind}**, {env.get('date')}; torch {env.get('torch')}, commit {env.get('commit')}{_changed(env)}; "
            f"{'; '.join(found[0].ceilings[-1:])}; rows: {files}\n",
            tables.teacher_table([row for results in found for row in results.rows]),
        ]
    return "\n".join(parts)


def _of_kind(path: Path, kind: str) -> Results:
    rows = [row for row in read_rows(path) if str(row.env.get("kind")) == kind]
    return Results(path, rows, tables.ceilings(path))


def rewrite(root: Path, text: str) -> str:
    """A document with every block replaced by what the stored results say now."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{render(root, m[2])}\n{m[4]}", text)  # Markdown wants the empty lines


def documents(root: Path) -> list[Path]:
    """The README and every page of the documentation that has a block."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in pages if page.is_file() and BLOCK.search(page.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Drawing:
    """A figure and the files it is drawn from."""

    sources: Sequence[Path]
    make: Callable[[], Figure]

    @property
    def digest(self) -> str:
        """Of the files' text: what the figure was drawn from."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.sources)).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Draw it. Nothing in the file depends on when, where or by which version it was drawn."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.make().savefig(path, dpi=130, metadata={"Data": self.digest, "Software": None})


def figures(root: Path) -> dict[Path, Drawing]:
    """Every figure that the documents show and that stored results exist for."""
    found: dict[Path, Drawing] = {}
    for page in documents(root):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"figures/([a-z0-9-]+)\.png", text):
            drawing = _drawing(root, name)
            if drawing is not None:
                found[root / "docs" / "figures" / f"{name}.png"] = drawing
    return found


def _drawing(root: Path, name: str) -> Drawing | None:
    """None for a picture that is not drawn from stored results, or whose results there are none."""
    match = re.fullmatch(rf"(summary|{'|'.join(LINES)})-{DEVICE}", name)
    if match is not None and match[1] == "summary":
        paths = summary.sources(root, match[2])
        return Drawing(paths, partial(summary.figure, root, match[2])) if paths else None
    if match is not None:
        lines = lines_of(root, match[1], match[2])
        return None if lines is None else Drawing([lines[0]], partial(LINES[match[1]][2], lines[1]))
    parts = re.fullmatch(rf"study((?:-(?:{'|'.join(study.PARTS)}))+)", name)
    newest = stored(root, "study")[:1]
    if parts is None or not newest:
        return None
    return Drawing(newest, lambda: study.figure(study.read(newest[0]), parts[1].split("-")[1:]))


def stale(root: Path) -> list[str]:
    """Documents and figures that do not say what the stored results say."""
    from PIL import Image

    texts = {page: page.read_text(encoding="utf-8") for page in documents(root)}
    wrong = [str(page.relative_to(root)) for page, text in texts.items() if rewrite(root, text) != text]
    for path, drawing in figures(root).items():
        if not path.is_file():
            wrong.append(f"{path.relative_to(root)} (missing)")
            continue
        with Image.open(path) as image:
            if image.info.get("Data") != drawing.digest:
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
    for path, drawing in figures(ROOT).items():
        drawing.write(path)
        print(f"drew {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
