"""Times several implementations of the same thing side by side, and refuses to compare what may not be compared.

A :class:`Case` is what is computed, with its right answer; a :class:`Provider` is one way to compute it.
:func:`measure` checks every provider's results against the answer, times all of them in turns, and returns one
:class:`Row` each. A ratio is in a row only if

- every required baseline was measured (literal eager *and* ``torch.compile`` of it, unless the caller says otherwise),
- both sides' outputs and gradients agree with the answer within their stated tolerance, and
- the gain exceeds the spread of both sides' timings, and neither spread is above one half, and
- on a CPU, other processes left the machine alone meanwhile.

Otherwise the ratio is None and ``note`` says which it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cohobate.benchmarks import machine, timing
from cohobate.benchmarks.machine import Ceilings
from cohobate.errors import UserError
from cohobate.kernels import Cost

ROLES = ("eager", "compile", "other", "ours")
BASELINES = ("eager", "compile")
HALF = ("bf16", "fp16")
# Cores that others may use during a CPU timing. Beyond, threads wait for the scheduler, and do so steadily enough to
# look like a measurement without spread.
BUSY = 0.15
NOISY = 0.5  # a time that varies by more than half of itself is no measurement, whatever the gain
LINEAR = 0.1  # times that stray less than this from a straight line lie on it for all that matters
SLOW_MS = 2000.0  # a round that takes longer needs no second warm-up
# Caps on the relative error against float64: what rounding of that dtype may cost over a few thousand additions.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2, "int32": 0.0}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``function`` is timed, whole; ``reset`` runs before every call, untimed (a step restores its weights there).
    ``results`` turns what the function returned into named tensors, untimed; names that begin with ``grad`` are
    gradients, the rest outputs. ``role``: "eager" (the literal baseline), "compile" (``torch.compile`` of it), "ours",
    or "other". ``tolerance`` defaults to the dtype's. ``copies`` and ``capture`` matter on CUDA only, see
    :class:`cohobate.benchmarks.timing.CudaTimer`.
    """

    name: str
    mode: str
    function: Callable[[], Any]
    reset: Callable[[], None] | None = None
    _: KW_ONLY
    role: str = "ours"
    dtype: str = "fp32"
    results: Callable[[Any], Mapping[str, Tensor]] = dict
    tolerance: float | None = None
    cost: Cost | None = None
    copies: int = 1
    capture: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"role: expected one of {', '.join(ROLES)}, got {self.role!r}")

    @property
    def limit(self) -> float:
        """Largest relative error with which the results still count as the same."""
        return self.tolerance if self.tolerance is not None else TOLERANCE[self.dtype]


@dataclass(frozen=True)
class Case:
    """What all providers compute. ``expected`` is the answer, by name, in float64 (float32 where that is enough).

    ``compare`` replaces the usual errors where equal numbers are not what is asked (a random permutation): it gets the
    results and returns (output error, gradient error).
    """

    name: str
    shape: str
    device: str
    expected: Mapping[str, Tensor]
    compare: Callable[[Mapping[str, Tensor]], tuple[float, float | None]] | None = None


@dataclass
class Row:
    """One measured line. Milliseconds, bytes and FLOPs a call; a figure that was not measured is None."""

    name: str
    provider: str
    role: str
    mode: str
    device: str
    dtype: str
    shape: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    spread: float | None = None
    samples: int | None = None
    bytes: int | None = None
    flops: int | None = None
    floor_ms: float | None = None
    pct_of_floor: float | None = None
    mfu: float | None = None  # FLOPs a second over the measured rate of a matrix product of that dtype
    ratio_vs_eager: float | None = None
    ratio_vs_compile: float | None = None
    ratio_vs_best_other: float | None = None
    best_other: str | None = None
    max_rel_err: float | None = None
    grad_rel_err: float | None = None
    tolerance: float | None = None
    peak_mb: float | None = None
    others_cores: float | None = None
    note: str = ""
    env: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Outputs and gradients are right within the stated tolerance."""
        if self.max_rel_err is None or self.tolerance is None:
            return False
        worst = max(self.max_rel_err, self.grad_rel_err or 0.0)
        return worst <= self.tolerance  # false for NaN as well


@dataclass(frozen=True)
class Effort:
    """How long to measure: a case gets about ``seconds``, at least ``least`` rounds of every provider a repeat."""

    seconds: float = 2.0
    least: int = 7
    most: int = 200
    repeats: int = 2
    memory: bool = True
    again: int = 2  # times that a case is timed anew if other processes disturbed it


QUICK = Effort(seconds=0.05, least=3, most=5, repeats=1, memory=False, again=0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The larger of the relative errors in the Frobenius norm and in the maximum norm: a single wrong value shows, too.

    Infinite when shapes differ or a value is not finite.
    """
    if got.shape != expected.shape:
        return math.inf
    a, b = got.detach().double(), expected.detach().double().to(got.device)
    if not bool(a.isfinite().all()):
        return math.inf
    if not b.numel():
        return 0.0
    difference, tiny = a - b, torch.finfo(torch.float64).tiny
    frobenius = float(difference.norm() / b.norm().clamp_min(tiny))
    return max(frobenius, float(difference.abs().max() / b.abs().max().clamp_min(tiny)))


def errors(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float | None]:
    """(largest output error, largest gradient error or None); infinite where a result is missing."""
    outputs: list[float] = [0.0]
    gradients: list[float] = []
    for name, answer in expected.items():
        error = relative_error(results[name], answer) if name in results else math.inf
        (gradients if name.startswith("grad") else outputs).append(error)
    return max(outputs), max(gradients) if gradients else None


def measure(
    case: Case,
    providers: Sequence[Provider],
    *,
    ceilings: Ceilings | None = None,
    environment: Mapping[str, Any] | None = None,
    effort: Effort = Effort(),
    timer: timing.Timer | None = None,
    baselines: Sequence[str] = BASELINES,
) -> list[Row]:
    """Check and time every provider of one case; one row a provider, in their order.

    Providers of different modes are timed in the same turns but only compared within a mode. A provider that raises
    gets a row without figures, whose note is the error; the others are measured all the same.
    """
    if timer is None:
        timer = timing.CudaTimer() if case.device == "cuda" else timing.CpuTimer()
    rows = [_blank(case, provider, environment) for provider in providers]
    samplers: list[tuple[Row, Callable[[], float]]] = []
    for row, provider in zip(rows, providers):
        try:
            _check(case, provider, row)
            if effort.memory:
                row.peak_mb = timing.peak_memory_mb(provider, case.device)
            samplers.append((row, _sampler(timer, provider, row)))
        except Exception as error:  # whatever a provider raises is a finding about that provider
            row.max_rel_err = None
            row.note = _join(row.note, f"failed: {type(error).__name__}: {_first_line(error)}")
    if samplers:
        time_all(samplers, effort, case.device)
    for row, provider in zip(rows, providers):
        if provider.cost is not None and ceilings is not None:
            against_floor(row, provider.cost, ceilings)
    for mode in dict.fromkeys(row.mode for row in rows):
        judge([row for row in rows if row.mode == mode], baselines)
    return rows


def _blank(case: Case, provider: Provider, environment: Mapping[str, Any] | None) -> Row:
    row = Row(case.name, provider.name, provider.role, provider.mode, case.device, provider.dtype, case.shape)
    row.note, row.tolerance, row.env = provider.note, provider.limit, dict(environment or {})
    if provider.cost is not None:
        row.bytes, row.flops = provider.cost.bytes, provider.cost.flops
    return row


def _sampler(timer: timing.Timer, provider: Provider, row: Row) -> Callable[[], float]:
    """A sample of the provider; launched call by call, and said so, where CUDA cannot capture it."""
    try:
        return timer.prepare(provider)
    except RuntimeError as error:
        if row.device != "cuda" or not provider.capture:
            raise
        row.note = _join(row.note, f"launched call by call, cannot be captured: {_first_line(error)}")
        return timer.prepare(dataclasses.replace(provider, capture=False))


def _check(case: Case, provider: Provider, row: Row) -> None:
    if provider.reset is not None:
        provider.reset()
    results = provider.results(provider.function())
    compare = case.compare if case.compare is not None else lambda got: errors(got, case.expected)
    row.max_rel_err, row.grad_rel_err = compare(results)


def time_all(samplers: Sequence[tuple[Row, Callable[[], float]]], effort: Effort, device: str) -> None:
    """Fill in the times of rows, each from its sampler, in turns; again if other processes disturbed them."""
    for _ in range(1 + effort.again):
        others = machine.Others()
        _time(samplers, effort)
        cores = others.cores() if device == "cpu" else None
        if cores is None or cores <= BUSY:
            break
    for row, _ in samplers:
        row.others_cores = cores


def against_floor(row: Row, cost: Cost, ceilings: Ceilings) -> None:
    """Fill in what a row's time is worth beside what this machine reaches."""
    if row.p50_ms is None:
        return
    row.floor_ms = ceilings.floor_ms(cost, row.dtype)
    row.pct_of_floor = None if row.floor_ms is None else 100 * row.floor_ms / row.p50_ms
    if cost.flops and row.dtype in ceilings.matmul:
        row.mfu = cost.flops / (row.p50_ms * ceilings.matmul[row.dtype] * 1e9)


def _time(samplers: Sequence[tuple[Row, Callable[[], float]]], effort: Effort) -> None:
    run = [sampler for _, sampler in samplers]
    round_ms = sum(times[0] for times in timing.interleave(run, 1))
    if round_ms < SLOW_MS:  # short calls are still warming up
        round_ms = sum(times[0] for times in timing.interleave(run, 1))
    rounds = int(effort.seconds * 1e3 / effort.repeats / max(round_ms, 1e-6))
    rounds = max(effort.least, min(effort.most, rounds))
    repeats = [timing.interleave(run, rounds) for _ in range(effort.repeats)]
    for index, (row, _) in enumerate(samplers):
        own = [repeat[index] for repeat in repeats]
        pooled = [value for repeat in own for value in repeat]
        row.p20_ms, row.p50_ms, row.p80_ms = (timing.quantile(pooled, q) for q in (0.2, 0.5, 0.8))
        row.spread, row.samples = timing.spread(own), len(pooled)


def judge(rows: Sequence[Row], baselines: Sequence[str] = BASELINES) -> None:
    """Fill in the ratios of rows of one case and mode, or write into ``note`` why one may not be printed.

    Of several baselines of one role the fastest that agrees counts.
    """
    for row in rows:
        if row.role == "eager" or row.p50_ms is None:
            continue
        missing = [role for role in baselines if not any(r.role == role and r.p50_ms is not None for r in rows)]
        if row.role != "ours":
            missing = [role for role in missing if role == "eager"]
        if missing:
            row.note = _join(row.note, f"no ratio: baseline missing ({', '.join(missing)})")
            continue
        if not row.agrees:
            row.note = _join(row.note, f"no ratio: numerics disagree ({_error(row)})")
            continue
        if row.others_cores is not None and row.others_cores > BUSY:
            row.note = _join(row.note, f"no ratio: other processes used {row.others_cores:.1f} cores meanwhile")
            continue
        row.ratio_vs_eager = _ratio(row, _find(rows, "eager"), "eager")
        if row.role == "ours":
            row.ratio_vs_compile = _ratio(row, _find(rows, "compile"), "compile")
            exact = row.dtype not in HALF  # then a half-precision baseline does not do the same work
            others = [r for r in rows if r.role != "ours" and r.agrees and not (exact and r.dtype in HALF)]
            others = [r for r in others if r.p50_ms is not None]
            if others:
                best = min(others, key=lambda r: r.p50_ms or math.inf)
                row.best_other = best.provider
                row.ratio_vs_best_other = _ratio(row, best, "best other")


def _find(rows: Sequence[Row], role: str) -> Row | None:
    found = [row for row in rows if row.role == role and row.p50_ms is not None]
    return min(found, key=lambda row: (not row.agrees, row.p50_ms or math.inf), default=None)


def _ratio(row: Row, base: Row | None, label: str) -> float | None:
    """How many times faster ``row`` is than ``base`` (below 1: slower); None with a note where that may not be said."""
    if base is None or base.p50_ms is None or row.p50_ms is None:
        return None
    if not base.agrees:
        row.note = _join(row.note, f"no ratio vs {label}: numerics of {base.provider} disagree ({_error(base)})")
        return None
    ratio = base.p50_ms / row.p50_ms
    gain = max(ratio, 1 / ratio) - 1
    noise = max(row.spread or 0.0, base.spread or 0.0)
    if noise >= gain or noise > NOISY:
        limit = f"the difference {gain:.0%}" if noise >= gain else f"{NOISY:.0%}"
        row.note = _join(row.note, f"no ratio vs {label}: spread {noise:.0%} exceeds {limit}")
        return None
    return ratio


def straightness(rows: Sequence[Row], values: Sequence[float]) -> str:
    """Whether p50 = a + b * n over rows of growing n: the line with the smallest relative errors, and the largest."""
    busy, spread = max(row.others_cores or 0.0 for row in rows), max(row.spread or 0.0 for row in rows)
    if busy > BUSY:
        return f"no line: other processes used {busy:.1f} cores meanwhile"
    if spread > LINEAR:
        return f"no line: spread {spread:.0%} exceeds {LINEAR:.0%}"
    times = torch.tensor([row.p50_ms for row in rows], dtype=torch.float64)
    points = torch.tensor([[1.0, value] for value in values], dtype=torch.float64) / times[:, None]
    line = torch.linalg.lstsq(points, torch.ones_like(times)).solution
    off = (points @ line - 1).abs()
    worst = int(off.argmax())
    verdict = "linear" if off[worst] <= LINEAR else "not linear"
    found = f"{line[0]:.3g} ms + {line[1]:.3g} ms x n, off by {off[worst]:.1%} at most (n = {values[worst]})"
    return f"{verdict}: {found}, spread {spread:.1%}"


def _error(row: Row) -> str:
    gradient = "" if row.grad_rel_err is None else f", gradient {row.grad_rel_err:.1e}"
    output = "not checked" if row.max_rel_err is None else f"{row.max_rel_err:.1e}"
    return f"output error {output}{gradient}, tolerance {row.tolerance:.0e}"


def _join(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def write_rows(path: Path, rows: Sequence[Row | Mapping[str, Any]]) -> None:
    """One JSON object a line; figures rounded to five digits, which is more than any of them is worth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_rounded(dataclasses.asdict(row) if isinstance(row, Row) else dict(row))) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Timing rows of a file (its ceilings are left out).

    Raises:
        UserError: no such file, or a line that is no benchmark row.
    """
    if not path.is_file():
        raise UserError(f"results: expected a file of JSON lines, got {path}")
    known = {field.name for field in dataclasses.fields(Row)}
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"results: {path} line {number}: expected a JSON object, got {line[:60]!r}") from None
        if not str(values.get("name", "")).startswith("ceiling."):
            try:
                rows.append(Row(**{key: value for key, value in values.items() if key in known}))
            except TypeError as error:
                raise UserError(f"results: {path} line {number}: expected a benchmark row, got {error}") from None
    return rows


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else _finite(value)
        for key, value in values.items()
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: an infinite or NaN error is written as the largest number, which fails every check."""
    return 1.7e308 if isinstance(value, float) and not math.isfinite(value) else value
