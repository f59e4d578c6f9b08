"""Is it slower than what was stored? Only rows of the same machine kind are compared, and only beyond their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cohobate.benchmarks import machine
from cohobate.benchmarks.harness import Row, read_rows
from cohobate.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """``slower``: rows that became slower by more than was allowed; ``text``: what was compared, in words."""

    slower: tuple[str, ...]
    compared: int
    text: str


def stored_rows(path: Path | None, stem: str, kind: str) -> list[Row]:
    """Rows of this kind of machine: of the file, or else of the newest results folder that holds ``STEM.jsonl`` of it.

    Read before anything is measured: rows of another kind of machine say nothing, and that is better said at once.

    Raises:
        UserError: there are none.
    """
    seen: set[str] = set()
    for file in machine.stored(machine.ROOT, stem) if path is None else [path]:
        rows = read_rows(file)
        own = [row for row in rows if row.env.get("kind") == kind]
        if own:
            return own
        seen |= {str(row.env.get("kind")) for row in rows}
    there = ", ".join(sorted(seen)) or "none"
    raise UserError(f"--against: expected stored rows of this kind of machine ({kind}), got {there}")


def key(row: Row) -> tuple[str, ...]:
    """What two rows must share to be the same measurement."""
    return row.name, row.provider, row.mode, row.device, row.dtype, row.shape


def compare(rows: Sequence[Row], stored: Sequence[Row], percent: float) -> Verdict:
    """Our own rows against stored ones of the same machine kind.

    A row is slower if its median grew by more than ``percent`` and by more than the spread of both measurements.
    """
    kinds = {row.env.get("kind") for row in rows}
    before = {key(row): row for row in stored if row.env.get("kind") in kinds and row.p50_ms is not None}
    slower: list[str] = []
    noisy: list[str] = []
    compared = 0
    for row in rows:
        old = before.get(key(row))
        if row.role != "ours" or row.p50_ms is None or old is None or old.p50_ms is None:
            continue
        compared += 1
        growth = row.p50_ms / old.p50_ms - 1
        if growth <= percent / 100:
            continue
        name = f"{row.name} {row.mode} {row.provider}"
        noise = max(row.spread or 0.0, old.spread or 0.0)
        what = f"{name}: {old.p50_ms:.3g} ms -> {row.p50_ms:.3g} ms (+{growth:.0%}, spread {noise:.0%})"
        (slower if growth > noise else noisy).append(what)
    if not compared:
        there = ", ".join(sorted({str(row.env.get("kind")) for row in stored})) or "none"
        here = ", ".join(sorted(str(kind) for kind in kinds))
        return Verdict((), 0, f"nothing to compare: stored rows are of {there}; this machine is {here}")
    lines = [f"compared {compared} rows with stored ones: {len(slower)} slower by more than {percent:g} %"]
    lines += [f"  slower: {text}" for text in slower]
    lines += [f"  not decided, spread too large: {text}" for text in noisy]
    return Verdict(tuple(slower), compared, "\n".join(lines))
