"""Cohobate: custom-kernel masked distillation pretraining of vision transformers (dBOT, AMD; MAE, VideoMAE under them).

Importing this package imports neither torch, Triton nor DALI: sub-modules load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "TokenGrid": "tokens",
    "MaskPlan": "masking",
    "mask_plan": "masking",
    "random_plan": "masking",
    "UserError": "errors",
}
_MODULES = (
    "config",
    "data",
    "errors",
    "evaluation",
    "interop",
    "kernels",
    "masking",
    "methods",
    "models",
    "report",
    "teacher",
    "tokens",
    "training",
)

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"cohobate.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"cohobate.{name}")
    raise AttributeError(f"module 'cohobate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
