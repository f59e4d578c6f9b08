"""What every benchmark command shares: its options, its preparation, its table, its files, its verdict."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from cohobate.benchmarks import machine, regression
from cohobate.benchmarks.harness import QUICK, Effort, Row, write_rows
from cohobate.errors import UserError


@dataclass(frozen=True)
class Setting:
    """The prepared machine: seeded, threads set, ceilings measured."""

    device: str
    environment: dict[str, Any]
    ceilings: machine.Ceilings
    effort: Effort


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that mean the same in every benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    parser.add_argument("--seconds", type=float, default=None, help="time for each case (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rounds, figures worth nothing")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows as JSON lines")
    parser.add_argument(
        "--fail-if-slower", type=float, default=None, metavar="PERCENT", help="exit code 1 if a row of ours became so"
    )
    parser.add_argument(
        "--against", type=Path, default=None, metavar="FILE", help="than these (default: the newest of this machine)"
    )
    parser.set_defaults(stem=parser.prog.split()[-1], stored=None)


def prepare(args: argparse.Namespace) -> Setting:
    """Seed, pin the threads, read the environment and measure the ceilings.

    Raises:
        UserError: an option that cannot be followed here; stored rows of another kind of machine.
    """
    if args.fail_if_slower is None and args.against is not None:
        raise UserError("--against: expected --fail-if-slower PERCENT beside it")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected a device of this machine, got 'cuda' (torch sees no CUDA device)")
    threads = args.threads if args.threads is not None else os.cpu_count() or 1
    if threads < 1:
        raise UserError(f"--threads: expected at least 1, got {threads}")
    if args.seconds is not None and args.seconds <= 0:
        raise UserError(f"--seconds: expected more than 0, got {args.seconds:g}")
    torch.set_num_threads(threads)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions: rows that say fp32 are to be fp32
    if args.fail_if_slower is not None:
        args.stored = regression.stored_rows(args.against, args.stem, machine.machine_kind(args.device))
    effort = QUICK if args.quick else Effort() if args.seconds is None else Effort(seconds=args.seconds)
    ceilings = machine.measure_ceilings(args.device, quick=args.quick)
    return Setting(args.device, machine.environment(args.device, seed=args.seed), ceilings, effort)


def finish(args: argparse.Namespace, setting: Setting, rows: Sequence[Row], console: Console | None = None) -> int:
    """Print the table, write the file, compare with stored rows; the exit code."""
    console = console if console is not None else wide_console()
    print_table(rows, setting, console)
    if args.quick:
        console.print("--quick: the checks are real, the times are not worth quoting", style="yellow")
    save(args, setting, rows)
    if args.json is not None:
        console.print(f"wrote {args.json} ({len(rows)} rows)")
    if args.stored is not None:
        verdict = regression.compare(rows, args.stored, args.fail_if_slower)
        console.print(verdict.text)
        return 1 if verdict.slower or not verdict.compared else 0
    return 0


def save(args: argparse.Namespace, setting: Setting, rows: Sequence[Row | Mapping[str, Any]]) -> None:
    """Write what there is so far, where a file was asked for: a run that is stopped keeps it."""
    if args.json is not None:
        write_rows(args.json, [*_ceiling_rows(setting), *rows])


def _ceiling_rows(setting: Setting) -> list[dict[str, Any]]:
    return [{**row, "device": setting.device, "env": setting.environment} for row in setting.ceilings.rows()]


def print_table(rows: Sequence[Row], setting: Setting, console: Console) -> None:
    """One line a row, grouped by case and mode. A ratio refused for spread is ``~``; a note says other reasons."""
    print_machine(setting, console)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op, mode: provider", no_wrap=True)
    whole_steps = any(row.mode == "train" for row in rows)
    titles = ["p50 ms", "spread", "% of floor", *["MFU"] * whole_steps]
    for title in (*titles, "vs eager", "vs compile", "vs best other", "error", "peak MB", "note"):
        table.add_column(title, justify="right")
    notes: dict[str, int] = {}
    group = ""
    for row in rows:
        heading = f"{row.name} {row.mode}"
        if heading != group:
            if group:
                table.add_section()
            table.add_row(heading, style="bold")
            group = heading
        text = "; ".join(part for part in row.note.split("; ") if ": spread " not in part)
        note = str(notes.setdefault(text, len(notes) + 1)) if text else ""
        table.add_row(f"  {row.provider}", *cells(row, whole_steps), note, style="green" if row.role == "ours" else "")
    console.print(table)
    if any(": spread " in row.note for row in rows):
        console.print(
            "  ~ no ratio: the spread exceeds the difference, or half of the time", markup=False, highlight=False
        )
    for text, number in notes.items():
        console.print(f"  {number}. {text}", markup=False, highlight=False)


def print_machine(setting: Setting, console: Console) -> None:
    """Where and with what it is measured, and what that machine reaches."""
    env = setting.environment
    commit = f"{env['commit']} + changes" if env["dirty"] else env["commit"]
    console.print(f"{env['kind']}; torch {env['torch']}, commit {commit}, seed {env['seed']}")
    copies = ", ".join(f"{rate:.0f} GB/s at {_size(size)}" for size, rate in setting.ceilings.copy)
    products = ", ".join(f"{rate:.3g} TFLOP/s {dtype}" for dtype, rate in setting.ceilings.matmul.items())
    console.print(f"ceilings: copy {copies}; matrix product {products}")


def cells(row: Row, mfu: bool = False) -> list[str]:
    """Figures of a row as text, in the order of the table; a dash for what was not measured or is refused."""
    worst = None if row.max_rel_err is None else max(row.max_rel_err, row.grad_rel_err or 0.0)
    return [
        _figure(row.p50_ms),
        "-" if row.spread is None else f"{row.spread:.0%}",
        "-" if row.pct_of_floor is None else f"{row.pct_of_floor:.0f}",
        *["-" if row.mfu is None else f"{row.mfu:.0%}"] * mfu,
        *(ratio_text(row, against) for against in ("eager", "compile", "best other")),
        "-" if worst is None else f"{worst:.0e}",
        _figure(row.peak_mb),
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def ratio_text(row: Row, against: str) -> str:
    """``6.20x``; ``~`` where the spread forbids a ratio; ``-`` where there is none for another reason."""
    value = {"eager": row.ratio_vs_eager, "compile": row.ratio_vs_compile, "best other": row.ratio_vs_best_other}[
        against
    ]
    if value is None:
        return "~" if f"no ratio vs {against}: spread " in row.note else "-"
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MB"


def wide_console() -> Console:
    """A console that never cuts the table: a narrow terminal wraps it instead."""
    console = Console()
    console.width = max(console.width, 112)
    return console


def run(main: Any, argv: Sequence[str] | None) -> int:
    """Call ``main(argv)``; a user's mistake is one line on stderr and exit code 2."""
    try:
        return int(main(argv))
    except UserError as error:
        Console(stderr=True).print(f"cohobate bench: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


def ceiling_rows(path: Path) -> list[dict[str, Any]]:
    """The ceilings that were written into a results file beside its rows."""
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [value for value in values if str(value.get("name", "")).startswith("ceiling.")]
