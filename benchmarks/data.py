"""Images or clips a second from files to a batch in memory: our loaders beside a Pillow or PyAV DataLoader.

"literal" hands over normalised fp32 as published codes do; "pillow" and "pyav" are the same without that, and give the
uint8 pixels that ours give.

Every loader is a process of its own with the same number of workers. One runs at a time: the others are stopped by
signals, and slices of a second or two are given out in turns, so that a slow minute of the machine hits all of them.
The first part of a slice is not counted, for stopped workers wake up with full queues. A ratio is the median of the
ratios within a round. That all loaders make the same picture of the same crop is checked first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cohobate import data
from cohobate.benchmarks import clips, command, harness, timing
from cohobate.benchmarks.reference import loader
from cohobate.errors import UserError

LOADERS = ("literal", "pillow", "torch", "dali-cpu", "dali-gpu")
CLIP_LOADERS = ("literal", "pyav", "torch", "torch-shards")  # of video files; the last one of shards of their frames
BASELINES = ("literal", "pillow", "pyav")
_WARM_S = 0.5  # of every slice, not counted
_TOLERANCE = 0.01  # mean difference of pixels over their mean: about one level, which rounding twice explains


@dataclass(frozen=True)
class Case:
    """Files and what is asked of them."""

    name: str
    batch_size: int
    size: int
    frames: int = 1

    @property
    def shape(self) -> str:
        """As it is printed."""
        size, kernel = (f"{self.frames} x {self.size}", "bilinear") if self.frames > 1 else (self.size, "bicubic")
        return f"{self.batch_size} {self.unit}s -> {size} px, {kernel}"

    @property
    def unit(self) -> str:
        """What is counted."""
        return "clip" if self.frames > 1 else "image"


CASES = {
    "photos": Case("data.photos", 64, 224),  # 500 x 375, quality 90: about an ImageNet file
    "tiny": Case("data.tiny", 128, 32),  # the generated set of the demo, 40 x 40
    "clips": Case("data.clips", 8, 224, clips.FRAMES),  # H.264, 340 x 256, ten seconds: about a Kinetics file
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def make_photos(folder: Path, count: int, seed: int) -> Path:
    """JPEG files of 500 x 375, quality 90, about 50 KB: smooth random pictures with grain."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        total: NDArray[np.float32] = np.zeros((375, 500, 3), dtype=np.float32)
        for cells, share in ((4, 0.45), (16, 0.3), (64, 0.25)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32) * share
        total += rng.normal(0, 5, (375, 500, 1))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(total, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        (folder / f"{index:05d}.jpg").write_bytes(buffer.getvalue())
    return folder


def plan_for(manifest: data.Manifest, case: Case) -> data.SamplePlan:
    """Crops of scale 0.2 to 1, bicubic, flipped half of the time."""
    return data.SamplePlan(len(manifest), seed=0, image_size=case.size)


def difference(manifest: data.Manifest, case: Case, name: str) -> float:
    """Mean difference to Pillow over the mean, of one batch with the plan's crops."""
    plan = plan_for(manifest, case)
    options: dict[str, Any] = {"batch_size": case.batch_size, "loader": name, "workers": 1, "device": _device(name)}
    with data.open_loader(manifest, plan, **options) as batches:
        batch = next(batches).to("cpu")
    ids = batch.sample_ids.numpy()
    boxes, flips = plan.crops(0, ids, manifest.heights[ids], manifest.widths[ids])
    total = error = 0.0
    for row, sample in enumerate(ids.tolist()):
        top, left, height, width = boxes[row].tolist()
        expected = loader.image(manifest.paths[sample], (top, left, height, width), bool(flips[row]), case.size)
        error += float(np.abs(batch.pixels[row, 0].numpy().astype(int) - expected).mean())
        total += float(expected.mean())
    return error / total


class Runner:
    """One loader in a process group of its own that can be stopped and resumed."""

    def __init__(self, name: str, source: Path, case: Case, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.count: Any = context.RawValue("q", 0)
        self.process = context.Process(target=_consume, args=(name, source, case, workers, self.count))
        self.process.start()

    def wait(self, timeout_s: float = 120) -> None:
        """Until it has made its first batches; then stop it.

        Raises:
            UserError: it ended, or made nothing in time.
        """
        deadline = time.monotonic() + timeout_s
        while self.count.value == 0:
            if not self.process.is_alive() or time.monotonic() > deadline:
                raise UserError(f"loaders: {self.name} made no batch (its error is above)")
            time.sleep(0.05)
        self._signal(signal.SIGSTOP)

    def slice(self, seconds: float) -> float:
        """Run for so long; milliseconds an image."""
        self._signal(signal.SIGCONT)
        time.sleep(_WARM_S)
        count, began = self.count.value, time.perf_counter()
        time.sleep(seconds)
        done, took = self.count.value - count, time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        return took * 1e3 / max(done, 1)

    def memory_mb(self) -> float | None:
        """Memory of the whole group, shared pages divided among those who share them."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.process.pid:
                    rollup = (stat.parent / "smaps_rollup").read_text()
                    total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return total / 1024 if total else None

    def close(self) -> None:
        """End the group."""
        self._signal(signal.SIGKILL)
        self.process.join(10)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, number)


def _consume(name: str, source: Path, case: Case, workers: int, count: Any) -> None:
    """The child: take batches for ever and count images."""
    os.setsid()
    torch.set_num_threads(1)
    batches: Iterator[Any]
    if case.frames > 1:
        batches = clips.batches(name, source, case.batch_size, case.size, workers)
    elif name in BASELINES:
        images = loader.Images(list(data.build_manifest(source).paths), case.size, floats=name == "literal")
        batches = loader.batches(images, case.batch_size, workers)
    else:
        manifest = data.build_manifest(source)
        options: dict[str, Any] = {"batch_size": case.batch_size, "loader": name, "workers": workers}
        options["device"] = _device(name)
        batches = iter(data.open_loader(manifest, plan_for(manifest, case), **options))
    for _ in batches:
        if name == "dali-gpu":
            torch.cuda.synchronize()  # a batch counts when it is there
        count.value += case.batch_size


def _device(name: str) -> str:
    """Where a loader's batches end."""
    return "cuda" if name == "dali-gpu" else "cpu"


def measure(
    case: Case,
    source: Path,
    *,
    loaders: Sequence[str] = LOADERS,
    workers: int = 2,
    seconds: float = 1.5,
    rounds: int = 9,
    environment: Mapping[str, Any] | None = None,
) -> list[harness.Row]:
    """One row a loader; times are milliseconds an image or a clip."""
    rows = []
    for name in loaders:
        ours = name.startswith("torch") or name == "dali-gpu"
        role = "eager" if name == "literal" else "ours" if ours else "other"
        row = harness.Row(case.name, name, role, f"{workers} workers", "cpu", "uint8", case.shape)
        row.env, row.tolerance = dict(environment or {}), clips.TOLERANCE if case.frames > 1 else _TOLERANCE
        if name in BASELINES:
            row.max_rel_err = 0.0
        elif case.frames > 1:
            row.max_rel_err = clips.difference(source, name, case.size)
        else:
            row.max_rel_err = difference(data.build_manifest(source), case, name)
        rows.append(row)
    runners: list[Runner] = []
    times: list[list[float]] = [[] for _ in loaders]
    try:
        for name in loaders:
            runners.append(Runner(name, source, case, workers))
            runners[-1].wait()
        order = list(range(len(runners)))
        for turn in range(rounds + 1):
            for index in order if turn % 2 else reversed(order):
                took = runners[index].slice(seconds)
                if turn:  # the first round warms caches
                    times[index].append(took)
        for row, runner in zip(rows, runners):
            row.peak_mb = runner.memory_mb()
    finally:
        for runner in runners:
            runner.close()
    for row, own in zip(rows, times):
        row.p20_ms, row.p50_ms, row.p80_ms = (timing.quantile(own, q) for q in (0.2, 0.5, 0.8))
        row.spread, row.samples = timing.spread([own]), len(own)
        row.note = f"ms a{'n' if case.unit == 'image' else ''} {case.unit}; {1e3 / row.p50_ms:.0f} {case.unit}s/s"
    _compare(rows, times)
    return rows


def _compare(rows: Sequence[harness.Row], times: Sequence[Sequence[float]]) -> None:
    """Ratios to the literal loader, and of ours to the fastest that is not ours."""
    literal = next((index for index, row in enumerate(rows) if row.role == "eager"), None)
    others = [index for index, row in enumerate(rows) if row.role != "ours" and row.agrees]
    best = min(others, key=lambda index: rows[index].p50_ms or math.inf, default=None)
    for row, own in zip(rows, times):
        if not row.agrees:
            continue
        if literal is not None and row.role != "eager":
            row.ratio_vs_eager = _ratio(row, own, rows[literal], times[literal])
        if best is not None and row.role == "ours":
            row.best_other = rows[best].provider
            same = best == literal
            row.ratio_vs_best_other = row.ratio_vs_eager if same else _ratio(row, own, rows[best], times[best])


def _ratio(row: harness.Row, own: Sequence[float], base: harness.Row, theirs: Sequence[float]) -> float | None:
    """Median of the ratios within a round; None if they scatter widely, or about 1. The note says how they lie."""
    ratios = [slow / fast for slow, fast in zip(theirs, own)]
    low, middle, high = (timing.quantile(ratios, q) for q in (0.2, 0.5, 0.8))
    row.note += f"; ratio to {base.provider} within a round {low:.2f} to {high:.2f} (p20, p80), median {middle:.2f}"
    steady = high - low <= harness.NOISY * middle
    return middle if steady and (low > 1 or high < 1) else None


def run(
    *,
    cases: Sequence[str] = ("photos", "tiny"),
    loaders: Sequence[str] = LOADERS,
    workers: int = 2,
    seconds: float = 1.5,
    rounds: int = 9,
    photos: int = 400,
    clips_count: int = 24,
    seed: int = 0,
    environment: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Make the files in a temporary folder, measure, and return the rows as dictionaries.

    Args:
        seconds: of a slice. rounds: slices of each loader.

    Raises:
        UserError: an unknown case or loader, or one that cannot work here.
    """
    known_loaders = tuple(dict.fromkeys((*LOADERS, *CLIP_LOADERS)))
    for name, values, known in (("cases", cases, tuple(CASES)), ("loaders", loaders, known_loaders)):
        for value in values:
            if value not in known:
                raise UserError(f"{name}: expected some of {', '.join(known)}; got {value!r}")
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory(prefix="cohobate-bench-") as folder:
        for name in cases:
            fitting = CLIP_LOADERS if name == "clips" else LOADERS
            if name == "clips":
                source = clips.make(Path(folder) / name, clips_count, seed)
            elif name == "photos":
                source = make_photos(Path(folder) / name, photos, seed)
            else:
                source = data.make_images(Path(folder) / name, train=2048, test=64, seed=seed) / "train.txt"
            rows += measure(
                CASES[name],
                source,
                loaders=[loader for loader in loaders if loader in fitting],
                workers=workers,
                seconds=seconds,
                rounds=rounds,
                environment=environment,
            )
    return [dataclasses.asdict(row) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench data", description=__doc__)
    command.add_options(parser)
    parser.add_argument("--kind", choices=("image", "video"), default="image")
    parser.add_argument("--cases", default=None, help=f"some of {', '.join(CASES)} (default: all of the kind)")
    parser.add_argument(
        "--loaders", default=None, help="some of literal, pillow, pyav, torch, ... (default: all that work here)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of each loader (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="slices of each loader (default: 9)")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.rounds < 2:
        raise UserError(f"--workers, --rounds: expected at least 1 and 2, got {args.workers} and {args.rounds}")
    reasons = data.why_not_loaders()
    known = CLIP_LOADERS if args.kind == "video" else LOADERS
    loaders = args.loaders.split(",") if args.loaders else [name for name in known if not reasons.get(name)]
    cases = (
        args.cases.split(",")
        if args.cases
        else [n for n, c in CASES.items() if (c.frames > 1) == (args.kind == "video")]
    )
    setting = command.prepare(args)
    rows = run(
        cases=cases,
        loaders=loaders,
        workers=args.workers,
        seconds=0.3 if args.quick else args.seconds or 1.5,
        rounds=2 if args.quick else args.rounds,
        photos=100 if args.quick else 400,
        clips_count=8 if args.quick else 24,
        seed=args.seed,
        environment=setting.environment,
    )
    return command.finish(args, setting, [harness.Row(**row) for row in rows])


if __name__ == "__main__":
    raise SystemExit(main())
