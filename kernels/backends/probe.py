"""Questions about optional packages, answered by trying: imports that may break in any way, and runs on a few elements.

No version string is trusted. A package may be another one of the same name (``apex`` on PyPI), a namespace without the
code (``flash_attn`` where only flash-attn-4 is), or import well and then not run (xformers built for another torch).
Every answer is a list of reasons why not; empty means yes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Run = Callable[..., Tensor]  # (qkv, heads, queries), and a bias behind them where the backend takes one


class Call(NamedTuple):
    """What a choice of an attention backend may depend on. ``device`` is a type: cpu, cuda."""

    device: str
    dtype: torch.dtype
    keys: int
    head_dim: int
    grad: bool
    bias: bool = False

    def __str__(self) -> str:
        grad, bias = "with" if self.grad else "without", ", with a bias" if self.bias else ""
        size = f"{short(self.dtype)}, {self.keys} keys, head dim {self.head_dim}"
        return f"{size}, on {self.device}, {grad} gradient{bias}"


def load(module: str, *names: str) -> tuple[Any, list[str]]:
    """(the module, []) if it imports and has ``names``, else (None, reasons)."""
    try:
        found = importlib.import_module(module)
        missing = [name for name in names if not hasattr(found, name)]
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None, [f"{error.name} is not installed"]
        return None, [f"{module} does not import ({line(error)})"]
    except Exception as error:  # a broken install has been seen to raise ImportError, OSError, AttributeError, ...
        return None, [f"{module} does not import ({line(error)})"]
    if missing:
        return None, [f"{module} has no {' and no '.join(missing)}"]
    return found, []


def present(module: str) -> bool:
    """Could a top-level module be imported? Asked without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def installed(distribution: str) -> bool:
    """Is there a distribution of this name, whatever it imports as?"""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def capability() -> tuple[int, int] | None:
    """Compute capability of the current CUDA device; None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def cuda_limits(
    call: Call,
    dtypes: Sequence[torch.dtype],
    *,
    most_dim: int | None = None,
    oldest: int = 0,
    newest: int | None = None,
) -> list[str]:
    """Reasons that do not need the package: device, card (major compute capabilities), dtype, head dimension."""
    if call.device != "cuda":
        return ["it runs on CUDA"]
    reasons = []
    card = capability()
    if card is None:
        reasons.append("no CUDA device")
    elif card[0] < oldest or (newest is not None and card[0] > newest):
        wanted = f"{oldest}.0 or later" if newest is None else f"{oldest}.0 to {newest}.x"
        reasons.append(f"needs compute capability {wanted}, this card has {card[0]}.{card[1]}")
    if call.dtype not in dtypes:
        reasons.append(f"computes in {', '.join(map(short, dtypes))}, not {short(call.dtype)}")
    if most_dim is not None and call.head_dim > most_dim:
        reasons.append(f"takes head dimensions up to {most_dim}, not {call.head_dim}")
    return reasons


def deterministic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind ``deterministic=True`` where the function has it: a step must repeat bit for bit."""
    if "deterministic" in inspect.signature(function).parameters:
        return functools.partial(function, deterministic=True)
    return function


def once(what: tuple[Any, ...], run: Callable[[], bool]) -> list[str]:
    """Verdict of one small real run, remembered under the key ``what``; ``run`` says whether the values were right."""
    if what not in _verdicts:
        try:
            # The question may come from inside a trace or a no_grad block; the answer must not depend on it.
            with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
                _verdicts[what] = [] if run() else ["a small run gave wrong values"]
        except Exception as error:
            _verdicts[what] = [f"a small run failed ({line(error)})"]
    return _verdicts[what]


def smoke(name: str, run: Run, call: Call) -> list[str]:
    """Run an attention backend on eight equal tokens of one head: the result is the value row, its gradient ones."""

    def right() -> bool:
        row = torch.arange(3 * call.head_dim, device=place(call.device)).to(call.dtype) / (3 * call.head_dim)
        qkv = row.repeat(1, 8, 1).requires_grad_(call.grad)
        out = run(qkv, 1, None)
        # 1e-2: a few roundings in bf16, or tf32 products.
        if not torch.allclose(out.detach(), qkv.detach()[..., 2 * call.head_dim :], rtol=0, atol=1e-2):
            return False
        if not call.grad:
            return True
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        dq, dk, dv = grad.float().unflatten(2, (3, -1)).unbind(2)
        return torch.allclose(dv, torch.ones_like(dv), atol=1e-2) and bool((dq + dk).isfinite().all())

    return once((name, call.device, call.dtype, call.head_dim, call.grad), right)


def place(device: str) -> torch.device:
    """Where a small run puts its tensors."""
    return torch.device(device)


def line(error: BaseException) -> str:
    """One line of an error: its type and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__


def short(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


_verdicts: dict[tuple[Any, ...], list[str]] = {}
