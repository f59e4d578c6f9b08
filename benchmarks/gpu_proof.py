"""Everything that only a GPU can show, in one command: ``make gpu-proof``, or ``python benchmarks/gpu_proof.py``.

It runs the tests marked ``gpu``, the kernel benchmarks on CUDA (with the card's ceilings measured first), the step
and teacher benchmarks, and NVIDIA's compute-sanitizer over the smallest tests where that tool is on PATH. It writes
``benchmarks/results/<card>-<date>/`` with ``environment.json``, one JSON-lines file a benchmark and ``proof.jsonl``
(one object a part: what ran, for how long, how it ended). All of it fits into ten minutes: a part that no longer fits
is skipped and says so. Exit code 0: everything that ran passed; 1: something failed; 2: no GPU.

As a script it also works in a checkout where the package is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 20.0  # a part with less than this left is not worth starting


@dataclass(frozen=True)
class Part:
    """One command of the proof; ``most`` seconds are its share at most, ``needs`` says why it cannot run here."""

    name: str
    command: tuple[str, ...]
    most: float
    needs: str = ""


def parts(folder: Path) -> list[Part]:
    """What is run, the most important first."""
    python = sys.executable
    missing_pytest = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    missing_step = "" if importlib.util.find_spec("cohobate.benchmarks.step") else "there is no step benchmark"
    tests = (python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
    sanitizer = shutil.which("compute-sanitizer")
    watched = (*tests, "tests/gpu/test_ops.py", "-k", "test_against_float64 and odd and fp32")
    kernels = (python, "-m", "cohobate.benchmarks.kernels", "--device", "cuda", "--seconds", "0.4")
    step = (python, "-m", "cohobate.benchmarks.step", "--device", "cuda")
    teacher = (python, "-m", "cohobate.benchmarks.teacher", "--device", "cuda")
    return [
        Part("tests", (*tests, "tests"), 300, missing_pytest),
        Part("kernels", (*kernels, "--batch", "256", "--json", str(folder / "kernels.jsonl")), 120),
        Part("step", (*step, "--json", str(folder / "step.jsonl")), 150, missing_step),
        Part(
            "teacher",
            (*teacher, "--size", "large", "--batch", "256", "--seconds", "5", "--json", str(folder / "teacher.jsonl")),
            150,
        ),
        Part(
            "teacher of a small batch",
            (*teacher, "--batch", "16", "--seconds", "2", "--json", str(folder / "teacher-batch16.jsonl")),
            90,
        ),
        Part(
            "kernels of a small batch",
            (*kernels, "--batch", "32", "--json", str(folder / "kernels_small.jsonl")),
            90,
        ),
        Part(
            "sanitizer",
            (sanitizer or "compute-sanitizer", "--error-exitcode", "9", *watched),
            120,
            missing_pytest if sanitizer else "compute-sanitizer is not on PATH",
        ),
    ]


def prove(todo: Sequence[Part], seconds: float, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run the parts in turn within ``seconds``; one record each."""
    deadline = time.monotonic() + seconds
    records = []
    for part in todo:
        left = deadline - time.monotonic()
        note = part.needs or ("" if left >= LEAST_SECONDS else "no time left")
        if note:
            print(f"-- {part.name}: skipped, {note}", flush=True)
            records.append({"part": part.name, "result": "skipped", "seconds": None, "note": note})
            continue
        print(f"-- {part.name}: {' '.join(part.command)}", flush=True)
        records.append(_run(part, min(part.most, left), environment))
        print(f"-- {part.name}: {records[-1]['result']} after {records[-1]['seconds']} s", flush=True)
    return records


def _run(part: Part, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run one part with its output in a file that is shown as it grows."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with (
            log.open("w") as output,
            log.open(errors="replace") as shown,
            subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process,
        ):
            while process.poll() is None and time.monotonic() - start < limit:
                print(shown.read(), end="", flush=True)
                time.sleep(0.05)
            stopped = process.poll() is None
            if stopped:
                process.kill()
            code = process.wait()
            print(shown.read(), end="", flush=True)
        lines = log.read_text(errors="replace").splitlines()
    result = "stopped" if stopped else "failed" if code else "passed"
    seconds = round(time.monotonic() - start, 1)
    return {"part": part.name, "result": result, "seconds": seconds, "note": _summary(lines), "code": code}


def _summary(lines: Sequence[str]) -> str:
    """The last line that says something: pytest's count, a benchmark's file, an error."""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:200] if said else ""


def results_folder(card: str, date: str) -> Path:
    """``benchmarks/results/nvidia-h200-2026-01-31``."""
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}-{date}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof."""
    parser = argparse.ArgumentParser(prog="python -m cohobate.benchmarks.gpu_proof", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="all parts together take at most this long")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-proof: expected a CUDA device, torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    from cohobate.benchmarks import machine

    facts = machine.environment("cuda", seed=0)
    folder = results_folder(facts["card"], facts["date"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    records = prove(parts(folder), args.minutes * 60, dict(os.environ))
    text = "".join(json.dumps({**record, "env": facts}) + "\n" for record in records)
    (folder / "proof.jsonl").write_text(text, encoding="utf-8")
    for record in records:
        print(f"{record['part']:>26}: {record['result']}  {record['note']}")
    print(f"wrote {folder.relative_to(ROOT)}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 1 if any(record["result"] in ("failed", "stopped") for record in records) else 0


def _make_importable() -> None:
    """In a bare checkout: links that spell the installed names, on this process's path and on its children's."""
    if importlib.util.find_spec("cohobate") is not None:
        return
    package = Path(tempfile.mkdtemp(prefix="cohobate-")) / "cohobate"
    package.mkdir()
    for path in (ROOT / "engine").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "benchmarks"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(package.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    _make_importable()
    raise SystemExit(main())
