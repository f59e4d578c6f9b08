"""The machine a number was measured on: its fingerprint, and the two ceilings that every floor is drawn from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cohobate.kernels import Cost, native

ROOT = Path(__file__).resolve().parents[1]
FOLDER = re.compile(r".*-(\d{4}-\d{2}-\d{2})$")  # of results: machine and date
CODE = ("kernels", "engine", "benchmarks", "setup.py", "CMakeLists.txt", ":!benchmarks/results")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "int32": torch.int32,
}


def environment(device: str, *, seed: int | None = None) -> dict[str, Any]:
    """Everything that a timing depends on and that can be read here; what cannot be read is None.

    ``kind`` names the machine kind: rows of different kinds are never compared.
    """
    commit, dirty = _commit()
    common: dict[str, Any] = {
        "kind": machine_kind(device),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "native": native.instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit,
        "dirty": dirty,
        "seed": seed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return {**common, **(_card() if device == "cuda" else {"cpu_mhz": _cpu_mhz()})}


def machine_kind(device: str) -> str:
    """``NVIDIA H200`` or ``AMD EPYC 9005, 2 threads``: what two measurements must share to be comparable."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, Any] = {
        "card": properties.name,
        "sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "l2_mb": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "driver": None,
        "sm_mhz": None,
        "memory_mhz": None,
        "power_limit_w": None,
    }
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
            "--format=csv,noheader,nounits",
        ]
        answer = subprocess.run(query, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip():
            values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
            facts.update(zip(("driver", "sm_mhz", "memory_mhz", "power_limit_w"), values))
    return facts


def _cpu_fields() -> dict[str, str]:
    """First processor's lines of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def _cpu_name() -> str:
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:  # virtual machines hide the model's name, not its family
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def _cpu_mhz() -> float | None:
    value = _cpu_fields().get("cpu MHz")
    return None if value is None else round(float(value))


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether the code differs from it); (None, None) where neither git nor COHOBATE_COMMIT knows.

    Who copies a clean tree without its history to another machine names it: ``COHOBATE_COMMIT=abc123``.
    """
    told = os.environ.get("COHOBATE_COMMIT")
    if told:
        return told[:12], False
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None, None
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None, None
    status = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", *CODE], capture_output=True, text=True
    )
    return head.stdout.strip(), bool(status.stdout.strip())


def stored(root: Path, stem: str) -> list[Path]:
    """Every ``benchmarks/results/*-YYYY-MM-DD/STEM.jsonl``, newest first."""
    folders = [f for f in (root / "benchmarks" / "results").glob("*") if FOLDER.match(f.name)]
    folders.sort(key=lambda f: (f.name[-10:], f.name), reverse=True)
    return [folder / f"{stem}.jsonl" for folder in folders if (folder / f"{stem}.jsonl").is_file()]


class Others:
    """How much of the CPU other processes use, from the moment this is made."""

    SHORTEST_S = 0.5  # the system counts in hundredths of a second: a shorter look says nothing

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), _busy_seconds()

    def cores(self) -> float | None:
        """Cores' worth of time that others used so far; None where it cannot be known (not Linux, too short a time)."""
        now, passed = _busy_seconds(), time.perf_counter() - self.start
        if now is None or self.before is None or passed < self.SHORTEST_S:
            return None
        return max(0.0, (now - self.before) / passed)


def _busy_seconds() -> float | None:
    """CPU seconds of the whole machine less our own."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    ours = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - ours.user - ours.system


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: copy bandwidth by working set, and the rate of a large matrix product by dtype.

    ``copy`` holds (bytes moved, GB/s), bytes read and bytes written both counted. On a CPU a small working set sits in
    the cache, so the bandwidth of the nearest measured size is used; timings on CUDA start with a cold cache, so there
    it is the largest one.
    """

    device: str
    copy: tuple[tuple[int, float], ...]
    matmul: dict[str, float]

    def bandwidth(self, moved: int) -> float:
        """GB/s of a plain copy that moves ``moved`` bytes."""
        if self.device == "cuda":
            return self.copy[-1][1]
        return min(self.copy, key=lambda point: abs(point[0] / max(moved, 1) - 1) + abs(max(moved, 1) / point[0] - 1))[
            1
        ]

    def floor_ms(self, cost: Cost, dtype: str) -> float | None:
        """The larger of moving ``cost.bytes`` and computing ``cost.flops``; None if that dtype's rate is not known."""
        moving = cost.bytes / self.bandwidth(cost.bytes) / 1e6
        if not cost.flops:
            return moving
        if dtype not in self.matmul:
            return None
        return max(moving, cost.flops / self.matmul[dtype] / 1e9)

    def rows(self) -> list[dict[str, Any]]:
        """As JSON lines."""
        copies = [{"name": "ceiling.copy", "bytes": size, "gb_s": round(rate, 1)} for size, rate in self.copy]
        products = [
            {"name": "ceiling.matmul", "dtype": dtype, "tflop_s": round(rate, 3)} for dtype, rate in self.matmul.items()
        ]
        return [*copies, *products]


def measure_ceilings(device: str, *, quick: bool = False, seconds: float = 0.3) -> Ceilings:
    """Time copies of growing size and one large matrix product a dtype, on random data (zeros run faster).

    ``seconds`` go to each of them.
    """
    if device == "cuda":
        sizes, order, dtypes = [2**26, 2**30], 8192, ["fp32", "bf16", "fp16"]
    else:
        sizes, order, dtypes = [2**20, 2**22, 2**24, 2**26, 2**28], 1024, ["fp32", "bf16"]
    if quick:
        sizes, order, seconds = sizes[:3], order // 4, 0.02
    copies = []
    for size in sizes:
        source = torch.randn(size // 8, device=device)
        target = torch.empty_like(source)
        best = _best(partial(target.copy_, source), device, seconds)
        copies.append((size, size / best / 1e9))
    products = {}
    for dtype in dtypes:
        a = torch.randn(order, order, device=device).to(DTYPES[dtype])
        b = torch.randn(order, order, device=device).to(DTYPES[dtype])
        best = _best(partial(torch.mm, a, b, out=torch.empty_like(a)), device, seconds)
        products[dtype] = 2 * order**3 / best / 1e12
    return Ceilings(device, tuple(copies), products)


def _best(function: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of one call: the best millisecond's average, because a ceiling is what can be reached."""

    def average(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    average(2)
    calls = max(1, min(1000, int((1e-2 if device == "cuda" else 1e-3) / max(average(1), 1e-7))))
    end = time.perf_counter() + seconds
    best = average(calls)
    while time.perf_counter() < end:
        best = min(best, average(calls))
    return best
