"""``cohobate info``: versions, devices, which implementation serves which op, loaders, tuning tables."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "simplejpeg",
    "pillow",
    "safetensors",
)
OPTIONAL = {
    "xformers": "xformers",
    "flash-attn": "flash_attn",
    "apex": "apex",
    "timm": "timm",
    "transformers": "transformers",
}


def version(distribution: str) -> str:
    """Installed version, or ``not installed``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def show() -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(highlight=False)
    for table in (_versions(), _devices(), _ops(), _loaders(), _tuning()):
        console.print(table)


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _versions() -> Any:
    from cohobate import __version__

    table = _table("versions", "package", "version")
    table.add_row("cohobate", __version__)
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        table.add_row(name, version(name))
    for name, module in OPTIONAL.items():
        present = importlib.util.find_spec(module) is not None
        table.add_row(name, version(name) if present else "not installed")
    return table


def _devices() -> Any:
    import torch

    from cohobate.kernels import native

    table = _table("devices", "device", "what")
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
    import torch

    from cohobate.kernels import OPS, why_not

    table = _table("ops", "op", "reference", "native (cpu)", "triton (cuda)")
    cuda = torch.cuda.is_available()
    for name in sorted(OPS):
        cells = []
        for implementation, device in (("reference", "cpu"), ("native", "cpu"), ("triton", "cuda")):
            if implementation in OPS[name].implementations and device == "cuda" and not cuda:
                reasons = ["no CUDA device"]
            else:
                reasons = why_not(name, implementation, device)
            cells.append("yes" if not reasons else "no: " + "; ".join(reasons))
        table.add_row(name, *cells)
    return table


def _loaders() -> Any:
    from cohobate import data

    table = _table("loaders", "loader", "usable")
    for name, reasons in data.why_not_loaders().items():
        table.add_row(name, "yes" if not reasons else "no: " + "; ".join(reasons))
    return table


def _tuning() -> Any:
    from cohobate.kernels import tuning

    table = _table("tuning tables", "architecture", "entries", "where from", "ops")
    for architecture in tuning.ARCHITECTURES:
        entries = tuning.entries(architecture)
        origins = sorted({str(entry["provenance"]) for entry in entries})
        ops = ", ".join(sorted({str(entry["op"]) for entry in entries}))
        table.add_row(architecture, str(len(entries)), "; ".join(origins), ops)
    return table
