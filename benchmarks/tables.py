"""Stored rows as Markdown: the tables that the documents show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohobate.benchmarks import command, profile
from cohobate.benchmarks.harness import NOISY, Row, read_rows
from cohobate.benchmarks.machine import stored

BF16 = ("ours in bf16", "vs eager fp32")
AGAINST = ("vs eager", "vs compile", "vs best other")
MODES = ("step", "fwd+bwd", "fwd")  # the headline of a case is the first of these that it has


@dataclass(frozen=True)
class Results:
    """Rows of one file and device, in their order, and the ceilings measured beside them."""

    path: Path
    rows: list[Row]
    ceilings: list[str]


def find(root: Path, stem: str, device: str) -> Results | None:
    """The newest stored rows of ``stem`` on ``device``; None where there are none."""
    for path in stored(root, stem):
        rows = [row for row in read_rows(path) if row.device == device]
        if rows:
            return Results(path, rows, ceilings(path))
    return None


def ceilings(path: Path) -> list[str]:
    """Copy bandwidths and product rates that were measured beside the rows, in words."""
    found = command.ceiling_rows(path)
    copies = [f"{row['gb_s']:.0f} GB/s at {row['bytes'] / 2**20:.0f} MB" for row in found if "gb_s" in row]
    products = [f"{row['tflop_s']:.3g} TFLOP/s {row['dtype']}" for row in found if "tflop_s" in row]
    return [f"copy {', '.join(copies)}"] * bool(copies) + [f"matrix product {', '.join(products)}"] * bool(products)


def teacher_table(rows: Sequence[Row]) -> str:
    """One line a provider: time, work, share of the matrix products' rate, ratios, error beside what is allowed."""
    parts = []
    for shape in dict.fromkeys(row.shape for row in rows):
        against = ("vs eager fp32", "vs compile fp32", "vs best original")
        parts += [
            f"{shape}\n",
            line("", "p50", "GFLOP", "% of matrix product", *against, "feature error", "allowed", "peak MB"),
            "|---" * 10 + "|",
        ]
        for row in (row for row in rows if row.shape == shape):
            best = ratio(row, "best other")
            parts.append(
                line(
                    row.provider,
                    ms(row),
                    "-" if row.flops is None else f"{row.flops / 1e9:.1f}",
                    floor(row),
                    bold(ratio(row, "eager")) if row.role == "ours" else ratio(row, "eager"),
                    ratio(row, "compile"),
                    f"{bold(best)} ({row.best_other})" if row.ratio_vs_best_other is not None else best,
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
        line(
            "", "literal eager", "torch.compile", "ours", "vs eager", "vs compile", "% of floor", *BF16, "largest error"
        ),
        "|---" * 10 + "|",
    ]
    for case in cases(results.rows):
        eager, compiled = of_role(case, "eager"), of_role(case, "compile")
        ours = [row for row in case if row.role == "ours"]
        plain = next((row for row in ours if row.dtype != "bf16"), None)
        half = next((row for row in ours if row.dtype == "bf16"), None)
        worst = [max(row.max_rel_err, row.grad_rel_err or 0.0) for row in ours if row.max_rel_err is not None]
        first = case[0]
        lines.append(
            line(
                f"{first.name} ({first.mode})",
                ms(eager),
                ms(compiled),
                ms(plain),
                bold(ratio(plain, "eager")),
                ratio(plain, "compile"),
                floor(plain),
                ms(half),
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
            line("provider", "p50", "p20 to p80, ms", "% of floor", *AGAINST, "error", "peak MB"),
            "|---" * 9 + "|",
        ]
        for row in own:
            worst = None if row.max_rel_err is None else max(row.max_rel_err, row.grad_rel_err or 0.0)
            best = ratio(row, "best other")
            parts.append(
                line(
                    row.provider,
                    ms(row),
                    "-" if row.p20_ms is None or row.p80_ms is None else f"{row.p20_ms:.3g} to {row.p80_ms:.3g}",
                    floor(row),
                    ratio(row, "eager"),
                    ratio(row, "compile"),
                    f"{best} ({row.best_other})" if row.ratio_vs_best_other is not None else best,
                    "-" if worst is None else f"{worst:.0e}",
                    "-" if row.peak_mb is None else f"{row.peak_mb:.1f}",
                )
            )
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def attention_table(rows: Sequence[Row]) -> str:
    """Milliseconds by backend, a line a sequence length, the fastest in bold; a table for each dtype, dim and mode."""
    parts = []
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        keys, heads = row.shape.split(", ", 1)
        groups.setdefault((row.dtype, heads, row.mode), {}).setdefault(keys, []).append(row)
    for (dtype, heads, mode), lengths in groups.items():
        names = list(dict.fromkeys(row.provider for own in lengths.values() for row in own))
        parts += [f"**{dtype}, {heads}, {mode}**, ms\n", line("", *names), "|---" * (1 + len(names)) + "|"]
        for keys, own in lengths.items():
            right = {row.provider: row for row in own if row.agrees and row.p50_ms is not None}
            best = min(right.values(), key=lambda row: row.p50_ms or 0.0, default=None)
            cells = [f"{right[name].p50_ms:.3g}" if name in right else "-" for name in names]
            cells = [f"**{cell}**" if best and name == best.provider else cell for cell, name in zip(cells, names)]
            parts.append(line(keys, *cells))
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def profile_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Where a step's milliseconds go, by part and by kind of operation: a column a provider, the first with shares."""
    found = profile.providers(lines)
    first, *others = found
    wall, rate = found[first][0]["step_ms"], found[first][0]["product_tflop_s"]
    parts = [f"{found[first][0]['shape']}; milliseconds\n"]
    for key in ("part", "kind"):
        sums = {name: profile.by(own, key) for name, own in found.items()}
        parts += [line(f"by {key}", first, "share", "% of product rate", *others), "|---" * (4 + len(others)) + "|"]
        for name in dict.fromkeys(name for own in sums.values() for name in own):
            own = sums[first].get(name, 0.0)
            flops = sum(row["flops"] or 0 for row in found[first] if row[key] == name)
            share = f"{flops / own / rate / 1e7:.0f}" if flops and own and rate else "-"
            rest = [f"{sums[other].get(name, 0.0):.1f}" for other in others]
            parts.append(line(name, f"{own:.1f}", f"{own / wall:.0%}", share, *rest))
        steps = [f"{found[other][0]['step_ms']:.1f}" for other in others]
        parts += [line("**the step, not profiled**", f"**{wall:.1f}**", "100%", "-", *steps), ""]
    notes = [f"{name}: {own[0]['note']}" for name, own in found.items() if own[0]["note"]]
    return "\n".join([*parts, *notes]).rstrip("\n") + "\n"


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


def of_role(rows: Sequence[Row], role: str) -> Row | None:
    """The first row of that role."""
    return next((row for row in rows if row.role == role), None)


def ms(row: Row | None) -> str:
    """Its median."""
    if row is None or row.p50_ms is None:
        return "-"
    return f"{row.p50_ms:.3g} ms" if row.p50_ms < 1000 else f"{row.p50_ms / 1e3:.2f} s"


def floor(row: Row | None) -> str:
    """Its share of the floor, percent."""
    return "-" if row is None or row.pct_of_floor is None else f"{row.pct_of_floor:.0f}"


def bold(text: str) -> str:
    """A ratio in bold, a word as it is."""
    return f"**{text}**" if text.endswith("x") else text


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
