"""What an op is: its registration with torch, its implementations, and the choice between them.

An op has up to three implementations. ``reference`` is plain differentiable PyTorch and the specification; ``native``
is C++ on the CPU; ``triton`` is CUDA (or any device under ``TRITON_INTERPRET=1``). The public function of an op asks
:func:`choose` which one to use, calls the reference directly, or calls the torch op made by :func:`define` with the
chosen name as its last argument. The name travels with the call, so that a backward pass uses what its forward used.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cohobate.kernels import native, triton_support

IMPLEMENTATIONS = ("reference", "native", "triton")
EVERY = "*"
LIBRARY = torch.library.Library("cohobate", "DEF")

log = logging.getLogger("cohobate.kernels")


@dataclass(frozen=True)
class Cost:
    """What an op must move and compute: the floor that a benchmark measures against."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Op:
    """One public op, as ``cohobate info`` lists it.

    ``limits`` maps an implementation to a function of the call's facts (device type, dtypes and sizes as keyword
    arguments) that returns the reasons why it cannot serve that call. ``quiet``: the reference is as good where the
    fast implementation does not serve, so falling back to it is not worth a word.
    """

    name: str
    implementations: tuple[str, ...]
    cost: Callable[..., Cost]
    limits: dict[str, Callable[..., list[str]]] = field(default_factory=dict)
    quiet: bool = False


OPS: dict[str, Op] = {}
_overrides: list[dict[str, str]] = []  # each block's, with those around it: op -> backend; EVERY for the others
_logged: set[tuple[str, str]] = set()


def register(op: Op) -> Op:
    """Add an op to the table that :func:`choose` and ``cohobate info`` read."""
    OPS[op.name] = op
    return op


def dtype_limit(implementation: str, *dtypes: torch.dtype) -> Callable[..., list[str]]:
    """A limit for :class:`Op`: the fact ``dtype`` of a call must be one of these."""

    def limit(*, dtype: torch.dtype, **_: Any) -> list[str]:
        if dtype in dtypes:
            return []
        return [f"{implementation} computes in {', '.join(map(_short, dtypes))}, not {_short(dtype)}"]

    return limit


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    native: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``cohobate::<schema>`` for CPU and CUDA and return the callable torch op.

    ``schema`` ends with ``str impl``; the implementations get every argument but that one. Library.define + impl costs
    half of what ``torch.library.custom_op`` costs a call.
    """
    name = schema.split("(", 1)[0]
    table = {key: function for key, function in (("native", native), ("triton", triton)) if function is not None}

    def run(*args: Any) -> Any:
        return table[args[-1]](*args[:-1])

    def run_fake(*args: Any) -> Any:
        return fake(*args[:-1])

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"cohobate::{name}", run_fake, lib=LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.cohobate, name).default
    return op


def count_flops(**formulas: Callable[..., int]) -> None:
    """Let torch's FlopCounterMode count ops of :func:`define`; a formula gets shapes in place of tensors."""
    try:
        from torch.utils.flop_counter import register_flop_formula
    except (AttributeError, OSError, RuntimeError):  # it imports Triton; a broken one raises any of these
        return
    for name, formula in formulas.items():
        register_flop_formula(getattr(torch.ops.cohobate, name))(formula)


def why_not(name: str, implementation: str, device: str, **facts: Any) -> list[str]:
    """Reasons why ``implementation`` of op ``name`` cannot run on ``device`` ("cpu", "cuda"); empty when it can."""
    op = OPS[name]
    if implementation not in op.implementations:
        return [f"{name} has no {implementation} implementation"]
    reasons: list[str] = []
    if implementation == "native":
        reasons += native.why_not()
        if device != "cpu":
            reasons.append(f"native runs on the CPU, the tensors are on {device}")
    if implementation == "triton":
        reasons += triton_support.why_not(device)
    limit = op.limits.get(implementation)
    if limit is not None and facts:
        reasons += limit(**facts)
    return reasons


def choose(name: str, tensor: torch.Tensor, backend: str | None = None, **facts: Any) -> str:
    """Name of the implementation that serves this call: argument > :func:`use_backend` > COHOBATE_BACKEND > auto.

    Auto takes the fast implementation of the tensor's device and falls back to the reference, saying so once.

    Raises:
        ValueError: ``backend`` is not a known name, or the one asked for by name cannot run (every reason is listed).
    """
    return _resolve(name, tensor.device.type, backend if backend is not None else asked(name), tuple(facts.items()))


def takes(name: str, implementation: str, device: str, **facts: Any) -> bool:
    """Would op ``name`` run as ``implementation``, the fast one of ``device``, where no argument asks for another?"""
    wanted = asked(name) or _environment
    return wanted in ("auto", implementation) and not why_not(name, implementation, device, **facts)


def asked(name: str | None = None) -> str | None:
    """The backend that :func:`use_backend` around this call asks of op ``name``; None for none.

    Without a name: a text that differs where any op's would (part of the key of a captured graph).
    """
    if not _overrides:
        return None
    wanted = _overrides[-1]
    if name is None:
        return ", ".join(f"{op}={backend}" for op, backend in sorted(wanted.items()))
    return wanted[name] if name in wanted else wanted.get(EVERY)


def _resolve(name: str, device: str, backend: str | None, facts: tuple[tuple[str, Any], ...]) -> str:
    source, wanted = ("backend", backend) if backend is not None else ("COHOBATE_BACKEND", _environment)
    _check_name(source, wanted)
    if wanted != "auto":
        reasons = why_not(name, wanted, device, **dict(facts))
        if reasons:
            raise ValueError(f"{source}: {wanted!r} cannot run {name}: {'; '.join(reasons)}")
        return wanted
    fast = "native" if device == "cpu" else "triton"
    if fast not in OPS[name].implementations:
        return "reference"  # what it calls is the right kernel there
    reasons = why_not(name, fast, device, **dict(facts))
    if not reasons:
        return fast
    if not OPS[name].quiet and (name, reasons[0]) not in _logged:
        _logged.add((name, reasons[0]))
        log.warning("%s runs as reference on %s: %s", name, device, "; ".join(reasons))
    return "reference"


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, and all it needs, with us.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """Run the named ops, or without names every op, inside the block with this backend (an argument still wins).

    Of nested blocks the inner one wins, for the ops that it is about.

    Raises:
        ValueError: ``backend`` is none of auto, reference, native, triton, or there is no such op.
    """
    _check_name("backend", backend)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"ops: expected some of {', '.join(sorted(OPS))}; got {op!r}")
    outer = _overrides[-1] if ops and _overrides else {}
    _overrides.append({**outer, **dict.fromkeys(ops or (EVERY,), backend)})
    try:
        yield
    finally:
        _overrides.pop()


def _check_name(source: str, backend: str) -> None:
    if backend not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{source}: expected one of auto, {', '.join(IMPLEMENTATIONS)}; got {backend!r}")


def check_tensor(
    argument: str,
    tensor: torch.Tensor,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    like: torch.Tensor | None = None,
) -> None:
    """Raise a one-line error naming ``argument`` unless the tensor has one of ``dtypes``, ``shape``, ``like``'s device.

    ``None`` inside ``shape`` allows any size.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(tensor).__name__}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = " or ".join(map(_short, dtypes))
        raise TypeError(f"{argument}: expected dtype {names}, got {_short(tensor.dtype)}")
    if shape is not None:
        fits = tensor.dim() == len(shape) and all(e is None or e == s for e, s in zip(shape, tensor.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if e is None else str(e) for e in shape)
            raise ValueError(f"{argument}: expected shape [{expected}], got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{argument}: expected device {like.device}, got {tensor.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_environment = os.environ.get("COHOBATE_BACKEND") or "auto"
