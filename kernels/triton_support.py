"""One door to Triton: op files import ``tl``, ``triton`` and ``jit`` from here and stay importable without it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

try:
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit
    _import_error = ""
except (ImportError, AttributeError, OSError, RuntimeError) as error:  # a broken install raises more than ImportError
    _import_error = f"{type(error).__name__}: {error}"
    triton = None

    class _Absent:
        """Stands in for ``triton.language`` so that annotations such as ``tl.constexpr`` evaluate."""

        def __getattr__(self, name: str) -> None:
            return None

    tl = _Absent()

    def jit(function: Any = None, **_: Any) -> Any:  # kernels stay plain functions that nobody may launch
        return function if function is not None else jit


@functools.cache
def why_not(device: str) -> tuple[str, ...]:
    """Reasons why Triton kernels cannot run on tensors of this device type; empty when they can."""
    if _import_error:
        return (f"triton does not import ({_import_error})",)
    if INTERPRET:
        return ()
    if device != "cuda":
        return (f"triton runs on CUDA (or anywhere under TRITON_INTERPRET=1), the tensors are on {device}",)
    major, minor = torch.cuda.get_device_capability()
    return () if major >= 8 else (f"triton needs compute capability 8.0 or later, this card has {major}.{minor}",)


def architecture(device: torch.device) -> str:
    """Tuning table for the card that holds ``device``'s tensors: sm80, sm90 or sm100 (sm90 off CUDA)."""
    if device.type != "cuda":
        return "sm90"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm80", 9: "sm90"}.get(major, "sm100")
