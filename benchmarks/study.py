"""Does the method work? dBOT's stages from four first teachers, and two ablations, over seeds.

``cohobate bench study --json FILE`` trains every arm with every seed through the command line, each a run of the recipe
``demo-study`` that anybody can repeat alone: ``cohobate train demo-study seed=0 stages.0.teacher.depth=0``. One JSON
line is one run: ``arm, seed, settings, seconds, evaluations, env``. Runs that the file holds are not trained again, and
a run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cohobate.benchmarks import command, machine, quality
from cohobate.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trained = Mapping[str, Any]  # a line of the file: one finished run
Judge = tuple[str, str, str]  # label, features, metric
EVALUATION = ("stage", "stage_name", "features", "label", "metric", "value", "effective_rank")


@dataclass(frozen=True)
class Arm:
    """One way to train: what it is called in files and in tables, and how it differs from the recipe.

    ``teacher``: the arm whose network of the same seed is the first teacher; None where the settings name one.
    ``spans``: how many of the recipe's stages one of its stages is as long as.
    """

    name: str
    title: str
    settings: tuple[str, ...] = ()
    teacher: str | None = None
    spans: int = 1


RECIPE = "demo-study"
MAE = Arm("mae", "MAE", ("stages=[{name: mae, method: mae, epochs: 24}]",))
INDEPENDENT = Arm("independent", "random, drawn independently", ("stages.0.teacher.init=independent",))
COPIED = Arm("copied", "random, the student's copy (as published)")
DEPTH_0 = Arm("depth-0", "patch embedding and positions alone", ("stages.0.teacher.depth=0",))
PRETRAINED = Arm("pretrained", "pretrained by MAE", ("stages.0.teacher.source=file",), MAE.name)
MASK_75 = Arm("mask-0.75", "mask ratio 0.75", ("mask.ratio=0.75",))
MASK_90 = Arm("mask-0.9", "mask ratio 0.9", ("mask.ratio=0.9",))
CONTINUED = Arm(
    "continued",
    "student goes on from the stage before",
    ("stages.1.student.init=previous", "stages.2.student.init=previous"),
)
ONE_STAGE = Arm(
    "one-stage",
    "one stage, as long as three",
    ("stages=[{name: dbot-1, method: dbot, epochs: 72, teacher: {source: random, init: copy}}]",),
    spans=3,
)
LONG_MAE = Arm("long-mae", "MAE, as long as three stages", ("stages=[{name: mae, method: mae, epochs: 72}]",), spans=3)

# The untrained student is the first teacher of these.
COPIES = {arm.name for arm in (COPIED, MASK_75, MASK_90, CONTINUED, ONE_STAGE)}
# In the order of training: a teacher before those that need it.
ORDER = (MAE, COPIED, PRETRAINED, INDEPENDENT, DEPTH_0, MASK_75, MASK_90, CONTINUED, ONE_STAGE, LONG_MAE)
ARMS = {arm.name: arm for arm in ORDER}

# What is compared with what: name of the arm, and what it is called there.
PARTS: dict[str, dict[str, str]] = {
    "teachers": {arm.name: arm.title for arm in (INDEPENDENT, COPIED, DEPTH_0, PRETRAINED)},
    "mask": {COPIED.name: "mask ratio 0.5", MASK_75.name: MASK_75.title, MASK_90.name: MASK_90.title},
    "reset": {COPIED.name: "student drawn anew in every stage", CONTINUED.name: CONTINUED.title},
    "length": {COPIED.name: "three stages", ONE_STAGE.name: ONE_STAGE.title, LONG_MAE.name: LONG_MAE.title},
}
TITLES = {
    "teachers": "first teacher",
    "mask": "mask ratio",
    "reset": "start of the student",
    "length": "use of the epochs",
}

SCALES: dict[str, tuple[str, ...]] = {
    "small": (),  # minutes a run on one CPU core
    "large": (  # for a GPU
        "model={patch: 8, width: 384, depth: 6, heads: 6}",
        "decoder={width: 256, depth: 2, heads: 8}",
        "data.root=.cache/study-images",
        "data.generate=large",
        "data.image_size=96",
        "optimizer.lr=5e-4",
    ),
}

# How a network is judged, in the tables' order.
JUDGES: tuple[Judge, ...] = (
    ("texture", "mean", "knn"),
    ("texture", "mean", "linear"),
    ("texture", "cls", "knn"),
    ("texture", "cls", "linear"),
    ("shape", "mean", "linear"),
)
METRICS = {"knn": "kNN accuracy", "linear": "linear-probe accuracy"}


# -- training ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The runs that ``path`` holds; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def missing(arms: Sequence[Arm], seeds: Sequence[int], done: Sequence[Trained], folder: Path) -> list[tuple[Arm, int]]:
    """The runs still to be trained, a teacher before those that need it.

    A teacher that is written down, but whose weights are no longer in ``folder``, counts as missing if it is needed.
    """
    finished = {(run["arm"], run["seed"]) for run in done}
    todo = {(arm.name, seed) for seed in seeds for arm in arms} - finished
    for name, seed in tuple(todo):
        teacher = ARMS[name].teacher
        if teacher is not None and ((teacher, seed) not in finished or not run_folder(folder, teacher, seed).is_dir()):
            todo.add((teacher, seed))
    return [(arm, seed) for seed in seeds for arm in ARMS.values() if (arm.name, seed) in todo]


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Where a run is trained."""
    return folder / f"{arm}-{seed}"


def train(arm: Arm, seed: int, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train one arm, or go on with what is in its run folder: a line of the file, but for where it was trained.

    Raises:
        UserError: the run failed.
    """
    words = [*settings, *arm.settings]
    if arm.teacher is not None:
        words.append(f"stages.0.teacher.path={run_folder(folder, arm.teacher, seed)}")
    begin = time.perf_counter()
    found = quality.run(RECIPE, seed, words, run_folder(folder, arm.name, seed))
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": list(settings),
        "seconds": round(time.perf_counter() - begin),
        "evaluations": [{key: row[key] for key in EVALUATION} for row in found],
    }


def train_all(
    todo: Sequence[tuple[Arm, int]], settings: Sequence[str], folder: Path, jobs: int
) -> Iterator[dict[str, Any]]:
    """Train every run of ``todo``, ``jobs`` at a time; each as soon as it is finished.

    Raises:
        UserError: a run failed; those that had begun are finished first.
    """
    pool = ThreadPoolExecutor(jobs)
    begun: dict[tuple[str | None, int], Future[dict[str, Any] | None]] = {}
    stop = threading.Event()

    def task(arm: Arm, seed: int) -> dict[str, Any] | None:
        teacher = begun.get((arm.teacher, seed))  # begun before this one, so nobody waits for ever
        try:
            if teacher is not None:
                teacher.result()
            return None if stop.is_set() else train(arm, seed, settings, folder)
        except UserError:
            stop.set()
            raise

    try:
        for arm, seed in todo:
            begun[arm.name, seed] = pool.submit(task, arm, seed)
        for future in as_completed(begun.values()):
            if future.exception() is None and (run := future.result()) is not None:
                yield run
    finally:
        pool.shutdown(cancel_futures=True)
    for future in begun.values():
        future.result()  # raises what stopped the study


# -- tables ------------------------------------------------------------------------------------------------------------


def curve(runs: Sequence[Trained], arm: str, judge: Judge) -> dict[int, list[float]]:
    """Accuracies of the seeds after each stage; as stage 0 the first teacher's own, where the study knows it."""
    found = _scores(runs, arm, judge)
    untrained = found.pop(0, [])
    teacher = ARMS[arm].teacher
    if teacher is not None:
        own = _scores(runs, teacher, judge)
        return {0: own[max(own)], **found} if own else found
    return {0: untrained, **found} if arm in COPIES and untrained else found


def untrained(runs: Sequence[Trained], judge: Judge) -> list[float]:
    """Accuracy of the student before training, of every seed; it is the same in all arms."""
    return list({run["seed"]: value for run in runs for value in _scores([run], run["arm"], judge).get(0, [])}.values())


def _scores(runs: Sequence[Trained], arm: str, judge: Judge) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for run in sorted((run for run in runs if run["arm"] == arm), key=lambda run: int(run["seed"])):
        for row in run["evaluations"]:
            if (row["label"], row["features"], row["metric"]) == judge:
                found.setdefault(row["stage"] * ARMS[arm].spans, []).append(row["value"])
    return found


def table(runs: Sequence[Trained], part: str) -> str:
    """Markdown: mean and standard deviation over seeds, a line for each judge and arm of a part.

    The last line of each judge of "teachers" is the standard deviation over the arms' means: what the choice of the
    first teacher is still worth after so many stages.
    """
    names = PARTS[part]
    stages = sorted({stage for arm in names for stage in curve(runs, arm, JUDGES[0])} - {0})
    heads = ["judged by", TITLES[part], "the first teacher itself", *(f"after stage {stage}" for stage in stages)]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for judge in JUDGES:
        curves = {title: curve(runs, arm, judge) for arm, title in names.items()}
        curves = {title: found for title, found in curves.items() if found}
        label, features, metric = judge
        first = f"{label}: {metric}, {features}"
        for title, found in curves.items():
            lines.append(_line([first, title, *(quality.spread(found.get(stage, [])) for stage in (0, *stages))]))
            first = ""
        if part == "teachers" and len(curves) > 1:
            means = [[statistics.mean(found[stage]) for found in curves.values() if stage in found] for stage in stages]
            spread = [f"{statistics.stdev(values):.3f}" if len(values) > 1 else "" for values in means]
            lines.append(_line(["", "*deviation of the means*", "", *spread]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- figures -----------------------------------------------------------------------------------------------------------


def figure(runs: Sequence[Trained], parts: Sequence[str], label: str = "texture", features: str = "mean") -> Figure:
    """A row of panels for each part, kNN and linear probe beside each other: mean, deviation, and every seed."""
    from cohobate.report import plots

    return plots.styled(_figure)(runs, parts, label, features)


def _figure(runs: Sequence[Trained], parts: Sequence[str], label: str, features: str) -> Figure:
    from matplotlib.ticker import PercentFormatter

    from cohobate.report import plots

    made, axes = plots.figure(3.6 * len(parts), len(parts), len(METRICS), sharex=True, sharey=True)
    for line, part in zip(axes, parts):
        for ax, (metric, name) in zip(line, METRICS.items()):
            judge = (label, features, metric)
            ax.set_title(name if len(parts) == 1 else f"{TITLES[part]}: {name}")
            curves = [(title, curve(runs, arm, judge)) for arm, title in PARTS[part].items()]
            _curves(ax, [(title, found) for title, found in curves if found])
            if level := untrained(runs, judge):
                ax.axhline(statistics.mean(level), color=plots.GREY, linestyle=":", label="untrained", zorder=1)
        line[0].set_ylabel(f"{label}, from the {'class token' if features == 'cls' else 'mean of the patches'}")
        line[0].legend(loc="best")
    axes[0, 0].set_ylim(0, 1.08 * axes[0, 0].get_ylim()[1])  # shared: room for the legend above all data
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return made


def _curves(ax: Axes, curves: Sequence[tuple[str, Mapping[int, Sequence[float]]]]) -> None:
    """Lines that stand a little beside each other, so that error bars do not hide one another."""
    from cohobate.report import plots

    for place, (title, found) in enumerate(curves):
        x = [stage + 0.09 * (place - (len(curves) - 1) / 2) for stage in found]
        means = [statistics.mean(values) for values in found.values()]
        bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
        style: dict[str, Any] = {"color": plots.COLOURS[place], "marker": "os^D"[place]}
        ax.errorbar(x, means, bars, **style, markersize=5, linewidth=1.7, capsize=3, label=title)
        for at, values in zip(x, found.values()):
            ax.plot([at + 0.03] * len(values), values, ".", color=style["color"], alpha=0.35, markersize=6, zorder=1)
    last = max((stage for _, found in curves for stage in found), default=1)
    ax.set_xticks(range(last + 1), ["first\nteacher", *(f"stage {stage}" for stage in range(1, last + 1))])
    ax.set_xlim(-0.3, last + 0.3)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cohobate bench study``; 2 for a mistake of the user's."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    options = _options(argv)
    settings = [*SCALES[options.scale], *options.set]
    done = read(options.json) if options.json is not None else []
    for run in done:
        if run["settings"] != settings:
            raise UserError(
                f"--json: expected runs with the settings {settings}, got {run['settings']} in {options.json}"
            )
    arms = [ARMS[name] for part in options.only for name in PARTS[part]]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the runs
    torch.set_num_threads(threads)  # of this process, whose environment is written down
    todo = missing(arms, options.seeds, done, options.folder)
    print(f"{len(todo)} runs, {options.jobs} at a time with {threads} threads each, in {options.folder}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = machine.environment(device)
    known = {(run["arm"], run["seed"]) for run in done}
    for run in train_all(todo, settings, options.folder, options.jobs):
        print(f"{run['arm']}, seed {run['seed']}: {run['seconds']} s", flush=True)
        if (run["arm"], run["seed"]) in known:
            continue  # a teacher whose weights were gone
        done.append(run)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**run, "env": environment}) + "\n")
    for part in options.only:
        print(f"\n{table(done, part)}", end="")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cohobate bench study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default: 0 1 2)")
    parser.add_argument("--scale", choices=tuple(SCALES), default="small", help="large is for a GPU (default: small)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the runs (default: runs/study)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="add the runs; skip those it holds")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        raise UserError(f"--jobs: expected 1 or more, got {options.jobs}")
    return options
