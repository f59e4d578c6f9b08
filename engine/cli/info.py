"""``cohobate info``: versions, devices, which implementation serves which op, attention, loaders, tuning tables."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from cohobate.cli.parsing import Parser, parse
from cohobate.errors import UserError

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "simplejpeg",
    "pillow",
    "av",
    "torchcodec",
    "safetensors",
    "xformers",
    "flash-attn",
    "flash-attn-4",
    "timm",
    "transformers",
)
KEYS = (50, 64, 128, 197, 256, 392, 1568)  # of students, decoders and teachers, images and clips
HEAD_DIMS = (32, 64)
NO_CUDA = "no CUDA device"


def version(distribution: str) -> str:
    """Installed version, or ``not installed``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str]) -> int:
    """Print everything that :func:`show` knows."""
    if (
        parse(Parser(prog="cohobate info", description="What works here, and why the rest does not."), arguments)
        is not None
    ):
        show()
    return 0


def show() -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(highlight=False)
    for table in (_versions(), _devices(), _ops(), _backends(), _attention(), _loaders(), _tuning()):
        console.print(table)
        console.print()


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _answer(reasons: Iterable[str]) -> str:
    reasons = list(reasons)
    return "no: " + "; ".join(reasons) if reasons else "yes"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _versions() -> Any:
    from cohobate import __version__

    versions = {"cohobate": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    there = [f"{name} {number}" for name, number in versions.items() if number != "not installed"]
    table = _table("versions", "")
    table.add_row("installed", ", ".join(there))
    table.add_row("not installed", ", ".join(name for name, number in versions.items() if number == "not installed"))
    return table


def _devices() -> Any:
    import torch

    from cohobate.kernels import native

    table = _table("device", "what")
    threads = f"{os.cpu_count()} logical cores, {torch.get_num_threads()} threads"
    table.add_row("cpu", f"{threads}, torch sees {torch.backends.cpu.get_cpu_capability()}")
    reasons = native.why_not()
    table.add_row("native library", "; ".join(reasons) if reasons else f"loaded, chose {native.instruction_set()}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            "this torch is built without CUDA"
            if built is None
            else f"torch is built for CUDA {built}, but finds no device"
        )
        table.add_row("cuda", why)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        table.add_row(f"cuda:{index}", f"{properties.name}, {size}")
    return table


def _ops() -> Any:
    """Ops with the same answers share a row."""
    from cohobate.kernels import OPS, why_not

    rows: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(OPS):
        native = _answer(why_not(name, "native", "cpu"))
        triton = _answer(why_not(name, "triton", "cuda") if _cuda() else [NO_CUDA])
        if "triton" not in OPS[name].implementations:
            triton = "none"
        rows.setdefault((_answer(why_not(name, "reference", "cpu")), native, triton), []).append(name)
    table = _table("ops", "reference", "native (cpu)", "triton (cuda)")
    for answers, names in rows.items():
        table.add_row(", ".join(names), *answers)
    return table


def _backends() -> Any:
    """Attention, norm and optimizer backends, asked about a common call: bf16, 197 keys, heads of 64, a gradient."""
    import torch

    from cohobate.kernels.backends import attention, norm, optimizer

    kind, devices = torch.bfloat16, ("cpu", "cuda")
    table = _table("backends", "", "cpu", "cuda" if _cuda() else "cuda (not here)")
    for name in attention.BACKENDS:
        answers = [attention.why_not(name, device, kind, 197, 64, True) for device in devices]
        table.add_row("attention", name, *map(_cell, devices, answers))
    for name in norm.BACKENDS:
        table.add_row("norm", name, *(_cell(device, norm.why_not(name, device, kind)) for device in devices))
    for name in optimizer.BACKENDS:
        table.add_row("optimizer", name, *(_cell(device, optimizer.why_not(name, device)) for device in devices))
    return table


def _cell(device: str, reasons: list[str]) -> str:
    """An answer, less what the column says already."""
    if device == "cpu" and "it runs on CUDA" in reasons:
        return "-"
    others = [reason for reason in reasons if reason != NO_CUDA]
    return "untried" if device == "cuda" and not _cuda() and not others else _answer(others)


def _attention() -> Any:
    """What the table of attention chooses, and where each rule comes from; calls with one answer share a row."""
    import torch

    from cohobate.kernels.backends import attention
    from cohobate.kernels.backends.probe import Call

    here = ["cpu", "cuda"] if _cuda() else ["cpu"]
    origins = list(dict.fromkeys(rule.provenance for rule in attention.rules()))
    rows: dict[tuple[str, str], list[str]] = {}
    for device, kind in itertools.product(("cpu", "cuda"), (torch.bfloat16, torch.float16, torch.float32)):
        answers: dict[str, list[str]] = {}
        for dim, grad in itertools.product(HEAD_DIMS, (True, False)):
            calls = [Call(device, kind, keys, dim, grad) for keys in KEYS]
            taken = [attention.by_table(call, anywhere=device not in here)[0] for call in calls]
            names = [f"{rule.backend} [{origins.index(rule.provenance) + 1}]" for rule in taken]
            answers.setdefault(_ranges(names), []).append(f"d={dim} {'with' if grad else 'without'} gradient")
        for choice, variants in answers.items():
            label = str(kind).removeprefix("torch.")
            if len(answers) > 1:
                label += f" ({', '.join(variants)})"
            rows.setdefault((device, choice), []).append(label)
    table = _table("attention", "calls", "backend by number of keys [where from]")
    for (device, choice), labels in rows.items():
        table.add_row(device if device in here else f"{device} (not here)", ", ".join(labels), choice)
    for number, origin in enumerate(origins, 1):
        if any(f"[{number}]" in choice for _, choice in rows):
            table.add_row(f"[{number}]", "", origin)
    return table


def _ranges(names: list[str]) -> str:
    """``50-392 short, 1568 sdpa``: neighbours in :data:`KEYS` with one answer are written together."""
    parts = []
    for name, group in itertools.groupby(zip(KEYS, names, strict=True), key=lambda pair: pair[1]):
        keys = [key for key, _ in group]
        parts.append(f"{keys[0]}-{keys[-1]} {name}" if len(keys) > 1 else f"{keys[0]} {name}")
    return ", ".join(parts)


def _loaders() -> Any:
    """Executors, and what decodes video files for ``torch``."""
    from cohobate import data
    from cohobate.data.video import decode as video

    table = _table("loader", "usable")
    for name, reasons in data.why_not_loaders().items():
        table.add_row(name, _answer(reasons))
    try:
        taken = video.video_decoder()
    except UserError as error:
        taken = ""
        table.add_row("video files", _answer([str(error)]))
    for name in video.DECODERS:
        reason = video.why_not_decoder(name)
        answer = _answer([reason] if reason else []) + (", and taken" if name == taken and not reason else "")
        table.add_row(f"video files by {name}", answer)
    return table


def _tuning() -> Any:
    """Launch configurations of the Triton kernels; the ops are those of the table of ops."""
    from cohobate.kernels import tuning

    table = _table("launch configurations", "entries", "where from")
    for architecture in tuning.ARCHITECTURES:
        entries = tuning.entries(architecture)
        origins = sorted({str(entry["provenance"]) for entry in entries})
        table.add_row(architecture, str(len(entries)), "; ".join(origins))
    return table
