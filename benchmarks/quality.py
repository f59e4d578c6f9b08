"""Does a recipe learn? Whole runs over seeds, and the quality of the frozen features after each stage.

``cohobate bench quality demo demo-random --seeds 0 1 2 --json FILE`` trains every recipe with every seed through the
command line, as a user would, and keeps the evaluations. One JSON line is one evaluation of one run:
``recipe, seed, settings, stage, stage_name, features, label, metric, value, effective_rank, env``.

Clips are read from shards: ``make demo-video`` makes them, then
``cohobate bench quality demo-video --data .cache/demo-shards --seeds 0 1 2 --json FILE``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cohobate.benchmarks import command, machine
from cohobate.errors import UserError

Row = Mapping[str, Any]
COLUMNS = tuple((features, metric) for features in ("cls", "mean") for metric in ("knn", "linear"))


def run(recipe: str, seed: int, settings: Sequence[str], folder: Path, data: str | None = None) -> list[dict[str, Any]]:
    """Train ``recipe`` into ``folder`` and return its evaluations.

    Args:
        data: where the data set lies, if not where the recipe has it; no setting that a row names.

    Raises:
        UserError: the run failed, its last line says why; or it made no evaluations.
    """
    train = [sys.executable, "-m", "cohobate", "train", recipe, f"seed={seed}", f"run={folder}", *settings]
    train += [] if data is None else [f"data.root={data}"]
    done = subprocess.run(train, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{recipe}, seed {seed}: {(done.stdout.strip().splitlines() or ['no output'])[-1]}")
    written = folder / "evaluations.jsonl"
    if not written.is_file():
        raise UserError(
            f"{recipe}, seed {seed}: expected evaluations, but the run made none (evaluate.enabled, labels)"
        )
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    keep = ("stage", "stage_name", "features", "label", "metric", "value", "effective_rank")
    return [{"recipe": recipe, "seed": seed, "settings": list(settings), **{k: row[k] for k in keep}} for row in rows]


def table(rows: Iterable[Row], label: str = "texture") -> str:
    """Markdown: mean and spread (standard deviation over seeds) of each stage's kNN and linear probe on ``label``."""
    values: dict[tuple[str, int, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["label"] == label:
            stage = (_title(row), row["stage"], row["stage_name"])
            values[stage][row["features"], row["metric"]].append(row["value"])
    shown = [column for column in COLUMNS if any(column in found for found in values.values())]  # a clip has no cls
    titles = " | ".join(f"{'kNN' if metric == 'knn' else metric}, {features}" for features, metric in shown)
    lines = [f"| recipe | after stage | {titles} | seeds |", f"|---|---|{'---|' * len(shown)}---|"]
    for (recipe, index, name), found in values.items():
        cells = [spread(found[column]) for column in shown]
        lines.append(f"| {recipe} | {index} {name} | {' | '.join(cells)} | {max(map(len, found.values()))} |")
    return "\n".join(lines) + "\n"


def tables(rows: Sequence[Row]) -> str:
    """A :func:`table` a kind of label."""
    labels = dict.fromkeys(row["label"] for row in rows)
    return "\n".join(f"The {label}:\n\n{table(rows, label)}" for label in labels)


def _title(row: Row) -> str:
    return " ".join([row["recipe"], *row["settings"]])


def spread(values: Sequence[float]) -> str:
    """``0.612 ± 0.034``, mean and standard deviation."""
    if not values:
        return "not measured"
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cohobate bench quality``; 2 for a mistake of the user's."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="shipped names or YAML files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default: 0 1 2)")
    parser.add_argument("--data", default=None, metavar="FOLDER", help="the data set, if not where the recipe has it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="add the evaluations as JSON lines")
    options = parser.parse_args(argv)
    environment = machine.environment("cpu")
    rows: list[dict[str, Any]] = []
    for recipe in options.recipes:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                found = run(recipe, seed, options.set, Path(folder) / "run", options.data)
            rows += found
            print(tables(found), flush=True)
            if options.json is not None:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                with options.json.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**row, "env": environment}) + "\n" for row in found)
    print(tables(rows))
    return 0
