"""The machines that a plan can be made for: ``hardware.yaml``, or what was measured here."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cohobate.errors import UserError

Range = tuple[float, float, float]  # low, middle, high


@dataclass(frozen=True)
class Hardware:
    """One card, or one CPU with its cores.

    Attributes:
        matmul, peak: TFLOP/s by dtype, of a large product and of the specification; peak is empty for CPUs.
        copy: GB/s. memory: GB, None where it is not known. cores: of a CPU.
        share: (low, middle, high) of the peak, or of ``matmul`` without one, by method or method and width
            ("dbot 768"); "other" for the rest.
        provenance: where all that comes from.
    """

    name: str
    label: str
    device: str
    copy: float
    share: dict[str, Range]
    provenance: str
    matmul: dict[str, float]
    peak: dict[str, float]
    memory: float | None = None
    cores: int | None = None

    def rate(self, dtype: str) -> float:
        """TFLOP/s that shares refer to.

        Raises:
            UserError: a dtype whose rate is not known.
        """
        rates = self.peak or self.matmul
        if dtype not in rates:
            raise UserError(f"precision.compute: expected one of {', '.join(rates)} on {self.label}, got {dtype}")
        return rates[dtype]

    def ceiling(self, dtype: str) -> float:
        """TFLOP/s of a large product; the peak where that was not measured."""
        return self.matmul.get(dtype, self.rate(dtype))

    def shares(self, method: str, width: int) -> tuple[Range, bool]:
        """(low, middle, high) for a method and a student's width, and whether that was found for such a step.

        Raises:
            UserError: a machine that was measured with other methods alone.
        """
        for key in (f"{method} {width}", method):
            if key in self.share:
                return self.share[key], True
        if "other" not in self.share:
            raise UserError(f"hardware: expected one measured with {method}, got one with {', '.join(self.share)}")
        return self.share["other"], False


@functools.cache
def facts() -> dict[str, Any]:
    """The shipped file."""
    tree: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"))
    return tree


def names() -> list[str]:
    """Machines that are known."""
    return list(facts()["cards"])


def load(name: str) -> Hardware:
    """A machine by name; "here": the one that this process runs on.

    Raises:
        UserError: an unknown name, or a machine here of which nothing is known.
    """
    known = facts()["cards"]
    if name == "here":
        name = _here()
    if name not in known:
        raise UserError(f"--hardware: expected one of {', '.join([*known, 'here'])}; got {name!r}")
    card: dict[str, Any] = {"matmul": {}, "peak": {}} | known[name]
    card["share"] = {method: tuple(map(float, values)) for method, values in card["share"].items()}
    return Hardware(name=name, **card)


def _here() -> str:
    """The known machine that this one is."""
    label = label_here()
    for name, card in facts()["cards"].items():
        model = str(card["label"]).removeprefix("NVIDIA ").split()[0].split(",")[0]
        if card["label"] == label or (card["device"] == "cuda" and torch.cuda.is_available() and model in label):
            return str(name)
    raise UserError(
        f"--hardware: expected --calibrate with `here`, for nothing was measured on {label}; got no --calibrate"
    )


def label_here() -> str:
    """``NVIDIA H200``, or ``AMD EPYC (family 26, model 2), 2 threads``."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().split("\n\n", 1)[0].splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", "CPU")
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return f"{name}, {torch.get_num_threads()} threads"


def memory_here() -> float | None:
    """GB of the card, or of the machine; None where that cannot be read."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
