"""What every test shares: which tests can run here, and that none of them leaves the machine's settings changed.

Markers (declared in pyproject.toml):

``gpu``          skipped unless a CUDA device is present
``interpreter``  Triton's interpreter must be chosen before Triton is imported, so these run in a process of their own:
                 ``TRITON_INTERPRET=1 pytest -m interpreter``; in any other run they are deselected
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if (item.get_closest_marker("interpreter") is not None) == INTERPRETED]
    if len(chosen) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA device")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


def pytest_report_header() -> str:
    return "only tests marked `interpreter`" if INTERPRETED else "without the tests marked `interpreter`"


@pytest.fixture
def stub() -> Any:
    """Stands in for ``torch.cuda``, see ``stub_cuda.py``."""
    spec = importlib.util.spec_from_file_location("stub_cuda", Path(__file__).with_name("stub_cuda.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Stub()
