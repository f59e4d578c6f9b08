"""Stand-ins for the optional packages, and a stand-in for a card: what detection sees, without either."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cohobate.kernels.backends import attention, flash, probe

OPTIONAL = ("apex", "amp_C", "flash_attn", "flash_attn_interface", "fused_layer_norm_cuda", "xformers")
Install = Callable[..., None]
Card = Callable[[int, int], None]


def _forget() -> None:
    probe._verdicts.clear()
    attention._answers.clear()
    attention._logged.clear()
    flash._function.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in OPTIONAL]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(distribution, {"package/__init__.py": source})``: files on a path of their own, and their metadata."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()

    def write(distribution: str | None = None, files: dict[str, str] | None = None) -> None:
        for name, source in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        if distribution is not None:
            folder = tmp_path / f"{distribution.replace('-', '_')}-0.0.0.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.0.0\n")
        importlib.invalidate_caches()

    yield write
    _forget()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """``card(9, 0)``: questions about CUDA see such a card, and small runs go to the CPU instead."""

    def insert(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        monkeypatch.setattr(probe, "place", lambda _: torch.device("cpu"))

    return insert
