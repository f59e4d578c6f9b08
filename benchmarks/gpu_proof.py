"""Everything that only a GPU can show, in one command: ``make gpu-proof``, or ``python benchmarks/gpu_proof.py``.

A list of parts (``--list``), the most important first, each a command of its own with a share of the time. While the
tests run, which time nothing, what the later parts compile is compiled beside them, into torch's and Triton's caches:
on a fresh machine compilers take more of the ten minutes than all measurements together. Everything that is timed runs
alone. It writes ``benchmarks/results/<card>-<date>/``: ``environment.json``, one JSON-lines file a benchmark, and
``proof.jsonl``, to which each part adds a line as it ends (what ran, for how long, how it ended), so that nothing is
lost if the command is stopped. Logs go to ``build/gpu-proof``.

Where one command may not take so long, ``--budget SECONDS`` and ``--only NAME,NAME`` cut it into pieces, or ``--rest``
goes on: only what has not passed yet with this commit. All pieces go into the same folder. A part that cannot run here
or no longer fits is skipped and says so. Exit code 0: everything that ran passed; 1: something failed; 2: no GPU.

As a script it also works in a checkout where the package is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 15.0  # a part with less than this left is not worth starting: torch and CUDA alone take half of it
LANES = 2  # warm-ups at a time, beside the tests
GRACE_SECONDS = 5.0  # between asking a part to end and ending it


@dataclass(frozen=True)
class Part:
    """One command of the proof.

    ``most`` seconds are its share at most; ``needs`` says why it cannot run here; ``warm``: it compiles so much that it
    is run once, for nothing but the compilers' caches, beside the tests.
    """

    name: str
    command: tuple[str, ...]
    most: float
    needs: str = ""
    warm: bool = False


def parts(folder: Path) -> list[Part]:
    """What is run, the most important first.

    Shares are estimates for one H200 and 16 cores where the warm-ups did not get to a part and it compiles everything
    itself; nobody has measured them. With warm caches a part is expected to take a third to a half of its share, which
    is what makes the first eight or so fit into ten minutes.
    """
    bench = (sys.executable, "-m")

    def run(name: str, module: str, most: float, *options: str, file: str, needs: str = "", warm: bool = False) -> Part:
        command = (*bench, f"cohobate.benchmarks.{module}", *options, "--json", str(folder / file))
        return Part(name, command, most, needs or _absent(f"cohobate.benchmarks.{module}"), warm)

    cuda = ("--device", "cuda")
    dbot = (*cuda, "--seconds", "4", "--variants", "main", "--size")
    amd = (*cuda, "--seconds", "4", "--variants", "main", "--recipe", "amd", "--size")
    teacher = (*cuda, "--seconds", "2", "--size")
    kernels = (*cuda, "--seconds", "0.4")
    attention = (*cuda, "--batch", "32", "--dtypes", "bf16", "--seconds", "0.3")
    photos = ("--cases", "photos", "--workers", "8", "--loaders", "literal,pillow,torch,dali-gpu")
    sanitizer = shutil.which("compute-sanitizer")
    watched = _tests("tests/gpu/test_ops.py", "-k", "test_against_float64 and odd and fp32")
    dali = _absent("nvidia.dali", "it decodes on the GPU, and its wheel is too large to bring along")
    return [
        Part("tests", _tests(), 160, _absent("pytest") or _absent("pytest_timeout") or _absent("hypothesis")),
        run("step", "step", 150, *dbot, "base", "--batch", "256", file="step.jsonl", warm=True),
        run("kernels", "kernels", 130, *kernels, "--batch", "256", file="kernels.jsonl", warm=True),
        run("teacher", "teacher", 75, *teacher, "base", "--batch", "256", file="teacher.jsonl", warm=True),
        run("attention", "attention", 45, *attention, file="attention.jsonl"),
        run("step-amd", "step", 150, *amd, "base", "--batch", "64", file="step-amd.jsonl", warm=True),
        run("profile", "step", 45, *dbot, "base", "--batch", "256", "--profile", file="profile.jsonl"),
        run("ablation", "ablation", 75, *cuda, "--batch", "256", "--seconds", "8", file="ablation.jsonl"),
        run("step-batch64", "step", 90, *dbot, "small", "--batch", "64", file="step-batch64.jsonl", warm=True),
        run("teacher-large", "teacher", 110, *teacher, "large", "--batch", "64", file="teacher-large.jsonl", warm=True),
        run("teacher-small", "teacher", 60, *teacher, "small", "--batch", "32", file="teacher-small.jsonl"),
        Part("sanitizer", (sanitizer or "compute-sanitizer", "--error-exitcode", "9", *watched), 60,
             "" if sanitizer else "compute-sanitizer is not on PATH"),
        run("step-small", "step", 110, *dbot, "small", "--batch", "256", file="step-small.jsonl"),
        run("step-large", "step", 200, *dbot, "large", "--batch", "128", file="step-large.jsonl"),
        run("kernels-clips", "kernels", 100, *kernels, "--clips", "--batch", "32", file="kernels-clips.jsonl"),
        run("scaling", "scaling", 90, *cuda, "--seconds", "1", file="scaling.jsonl"),
        run("data", "data", 60, *photos, file="data-gpu.jsonl", needs=dali),
    ]  # fmt: skip


def _tests(*chosen: str) -> tuple[str, ...]:
    """pytest over the files that hold GPU tests, side by side where pytest-xdist is: they wait for compilers mostly."""
    files = chosen or tuple(
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if _has_gpu_tests(path))
    )
    workers = min(8, (os.cpu_count() or 1) // 2)
    beside = ("-n", str(workers)) if not chosen and workers > 1 and importlib.util.find_spec("xdist") else ()
    # A file that cannot be imported here (a missing package) must not keep the others from running.
    return (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors",
            *beside, *files)  # fmt: skip


def _has_gpu_tests(path: Path) -> bool:
    return bool(re.search(r"marks?\.gpu", path.read_text(encoding="utf-8")))


def _absent(module: str, why: str = "") -> str:
    """Why a module cannot be used here; empty where it can."""
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec(module) is not None:
            return ""
    return f"{module} is not installed{f' ({why})' if why else ''}"


def prove(
    todo: Sequence[Part],
    seconds: float,
    environment: dict[str, str],
    logs: Path,
    record: Any = lambda line: None,
) -> list[dict[str, Any]]:
    """Run the parts in turn within ``seconds``; one line each, given to ``record`` as soon as it is known."""
    deadline = time.monotonic() + seconds
    lines = []
    for number, part in enumerate(todo):
        left = deadline - time.monotonic()
        note = part.needs or ("" if left >= LEAST_SECONDS else f"no time left; --only {part.name} runs it")
        if note:
            print(f"-- {part.name}: skipped, {note}", flush=True)
            line = {"part": part.name, "result": "skipped", "seconds": None, "note": note}
        else:
            print(f"-- {part.name}: {' '.join(part.command)}", flush=True)
            later = [p for p in todo[number + 1 :] if p.warm and not p.needs] if part.name == "tests" else []
            share = min(part.most, left)
            with _warming(later, time.monotonic() + share, environment, logs):
                line = _run(part, share, environment, logs)
            print(f"-- {part.name}: {line['result']} after {line['seconds']} s", flush=True)
        record(line)
        lines.append(line)
    return lines


def _run(part: Part, limit: float, environment: dict[str, str], logs: Path) -> dict[str, Any]:
    """Run one part with its output in a file that is shown as it grows."""
    start = time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{part.name}.log"
    with log.open("w") as output, log.open(errors="replace") as shown:
        process = _start(part.command, environment, output)
        while process.poll() is None and time.monotonic() - start < limit:
            print(shown.read(), end="", flush=True)
            time.sleep(0.05)
        stopped = process.poll() is None
        if stopped:
            _end(process)
        code = process.wait()
        print(shown.read(), end="", flush=True)
    return {
        "part": part.name,
        "result": "stopped" if stopped else "failed" if code else "passed",
        "seconds": round(time.monotonic() - start, 1),
        "note": _summary(log.read_text(errors="replace").splitlines()),
        "code": code,
    }


@contextmanager
def _warming(later: Sequence[Part], until: float, environment: dict[str, str], logs: Path) -> Iterator[None]:
    """Beside what is done here, and ``until`` then: run each part as briefly as it can be, its rows thrown away."""
    if not later:
        yield
        return
    runner = [sys.executable, str(Path(__file__).resolve()), "--warm"]
    commands = [[*part.command, "--seconds", "0.01", "--json", os.devnull] for part in later]
    logs.mkdir(parents=True, exist_ok=True)
    lanes = []
    with (logs / "warm-up.log").open("w") as output:
        for lane in range(LANES):
            mine = commands[lane::LANES]
            if mine:
                lanes.append(_start([*runner, json.dumps(mine)], environment, output))
        try:
            yield
        finally:
            for process in lanes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
            done = sum(process.poll() is not None for process in lanes)
            print(f"-- warm-ups: {done} of {len(lanes)} lanes ended by themselves", flush=True)
            for process in lanes:
                _end(process)


def _start(command: Sequence[str], environment: Mapping[str, str], output: Any) -> subprocess.Popen[Any]:
    """In a session of its own: compilers and loaders that it starts can be ended with it."""
    return subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdout=output, stderr=output, start_new_session=True
    )


def _end(process: subprocess.Popen[Any]) -> None:
    """Ask the whole group to end, then end it: a worker that lives on would hold the card and disturb what follows."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _summary(lines: Sequence[str]) -> str:
    """The last line that says something: pytest's count, a benchmark's file, an error."""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:200] if said else ""


def results_folder(card: str, date: str) -> Path:
    """``benchmarks/results/nvidia-h200-2026-01-31``."""
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}-{date}"


def passed(proof: Path, commit: Any) -> set[str]:
    """Parts whose last line in ``proof`` says that they passed, with this commit."""
    if not proof.is_file():
        return set()
    lines = [json.loads(line) for line in proof.read_text(encoding="utf-8").splitlines()]
    last = {line["part"]: line for line in lines}
    return {name for name, line in last.items() if line["result"] == "passed" and line["env"].get("commit") == commit}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof."""
    parser = argparse.ArgumentParser(
        prog="python -m cohobate.benchmarks.gpu_proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for all parts (default: 600)")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these parts alone, in the order of --list")
    parser.add_argument("--rest", action="store_true", help="only what has not passed yet with this commit")
    parser.add_argument("--list", action="store_true", help="name the parts, their shares and what they lack here")
    parser.add_argument("--into", type=Path, default=None, metavar="FOLDER", help="instead of <card>-<date>")
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.warm:  # a lane of warm-ups: one after the other, whatever becomes of them
        for command in json.loads(args.warm):
            subprocess.run(command, cwd=ROOT)
        return 0
    names = [part.name for part in parts(Path())]
    wanted = args.only.split(",") if args.only else names
    if not set(wanted) <= set(names):
        print(f"gpu-proof: --only: expected some of {', '.join(names)}; got {args.only!r}", file=sys.stderr)
        return 2
    if args.list:
        for part in parts(Path()):
            print(
                f"{part.name:>14}  {part.most:4.0f} s at most  {part.needs and f'skipped here: {part.needs}'}".rstrip()
            )
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-proof: expected a CUDA device, torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    from cohobate.benchmarks import machine

    facts = machine.environment("cuda", seed=0)
    folder = (args.into or results_folder(facts["card"], facts["date"])).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    proof = folder / "proof.jsonl"
    done = passed(proof, facts["commit"]) if args.rest else set()
    todo = [part for part in parts(folder) if part.name in wanted and part.name not in done]
    if args.only or args.rest:  # caches may be cold, and nobody waits behind: the budget alone is the limit
        todo = [replace(part, most=args.budget) for part in todo]

    def record(line: Mapping[str, Any]) -> None:
        with proof.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "env": facts}) + "\n")

    lines = prove(todo, args.budget, dict(os.environ), ROOT / "build" / "gpu-proof", record)
    for line in lines:
        print(f"{line['part']:>14}: {line['result']}  {line['note']}")
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 1 if any(line["result"] in ("failed", "stopped") for line in lines) else 0


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
