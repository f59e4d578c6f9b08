"""attend: softmax attention of packed rows by the backend that was measured to be the fastest for the call.

Which one is fast depends on device, dtype, sizes and whether a gradient is wanted, so the choice is data:
``tuning/attention.json``, read from the top, the first rule that fits and whose backend can run. A rule is
``{"device", "dtype", "keys", "head_dim", "grad", "backend", "provenance"}``; null matches anything, ``keys`` is the
upper end of a bucket. Choice: argument > :func:`use_attention` > COHOBATE_ATTENTION > the table.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from cohobate.kernels import tuning
from cohobate.kernels.backends import dense, flash, short, xformers
from cohobate.kernels.backends.probe import Call, Run
from cohobate.kernels.backends.probe import short as short_name
from cohobate.kernels.registry import check_tensor

log = logging.getLogger("cohobate.kernels")


@dataclass(frozen=True)
class Backend:
    """One way to compute attention: ``run(qkv, heads, queries)``, and the reasons why it cannot serve a call.

    ``takes_bias``: ``run`` takes a bias of the scores as well, behind the queries, and gives its gradient.
    """

    run: Run
    reasons: Callable[[Call], list[str]]
    takes_bias: bool = False


BACKENDS: dict[str, Backend] = {
    "short": Backend(short.run, short.why_not),
    "explicit": Backend(dense.explicit, dense.anywhere, takes_bias=True),
    "sdpa": Backend(dense.sdpa, dense.anywhere, takes_bias=True),
    "sdpa-flash": Backend(*dense.restricted("sdpa-flash", SDPBackend.FLASH_ATTENTION)),
    "sdpa-cudnn": Backend(*dense.restricted("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)),
    "sdpa-efficient": Backend(*dense.restricted("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION)),
    "sdpa-fa3": Backend(*dense.external("sdpa-fa3", "FA3")),
    "sdpa-fa4": Backend(*dense.external("sdpa-fa4", "FA4")),
    "flash-attn-2": Backend(flash.run_2, flash.why_not_2),
    "flash-attn-3": Backend(flash.run_3, flash.why_not_3),
    "flash-attn-4": Backend(flash.run_4, flash.why_not_4),
    "xformers": Backend(xformers.run, xformers.why_not),
}


@dataclass(frozen=True)
class Rule:
    """A row of the table: where ``backend`` is taken; None matches anything."""

    backend: str
    provenance: str
    device: str | None = None
    dtype: str | None = None
    keys: int | None = None
    head_dim: int | None = None
    grad: bool | None = None

    def fits(self, call: Call) -> bool:
        """Does the rule speak of this call?"""
        return (
            self.device in (None, call.device)
            and self.dtype in (None, short_name(call.dtype))
            and (self.keys is None or call.keys <= self.keys)
            and self.head_dim in (None, call.head_dim)
            and self.grad in (None, call.grad)
        )


@functools.cache
def rules() -> tuple[Rule, ...]:
    """The shipped table, in the order in which it is read."""
    path = Path(tuning.__file__).with_name("attention.json")
    return tuple(Rule(**row) for row in json.loads(path.read_text()))


def why_not(
    name: str, device: str, dtype: torch.dtype, keys: int, head_dim: int, grad: bool, *, bias: bool = False
) -> list[str]:
    """Reasons why backend ``name`` cannot serve such a call; empty when it can. The first question may take a while."""
    return _reasons(name, Call(device, dtype, keys, head_dim, grad, bias))


def _reasons(name: str, call: Call) -> list[str]:
    if call.bias and not BACKENDS[name].takes_bias:
        return ["it takes no additive bias of the scores"]
    return BACKENDS[name].reasons(call)


def choose(
    device: str,
    dtype: torch.dtype,
    keys: int,
    head_dim: int,
    grad: bool,
    backend: str | None = None,
    *,
    bias: bool = False,
) -> str:
    """Name of the backend that serves such a call.

    Raises:
        ValueError: ``backend`` is not a known name, or the one asked for by name cannot run (every reason is listed).
    """
    return _resolve(device, dtype, keys, head_dim, grad, bias, backend if backend is not None else asked())


def asked() -> str | None:
    """The backend that the innermost :func:`use_attention` around this call asks for; None for none."""
    return _overrides[-1] if _overrides else None


def _resolve(
    device: str, dtype: torch.dtype, keys: int, head_dim: int, grad: bool, bias: bool, backend: str | None
) -> str:
    question = (device, dtype, keys, head_dim, grad, bias, backend, _environment)
    answer = _answers.get(question)
    if answer is None:
        source, wanted = ("backend", backend) if backend is not None else ("COHOBATE_ATTENTION", _environment)
        answer = _answers[question] = _decide(Call(device, dtype, keys, head_dim, grad, bias), source, wanted)
    return answer


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, and all it needs, with us.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide(call: Call, source: str, wanted: str) -> str:
    _check_name(source, wanted)
    if wanted != "auto":
        reasons = _reasons(wanted, call)
        if reasons:
            raise ValueError(f"{source}: {wanted!r} cannot run attention ({call}): {'; '.join(reasons)}")
        return wanted
    rule, refused = by_table(call)
    _say(call, refused, rule.backend)
    return rule.backend


def by_table(call: Call, anywhere: bool = False) -> tuple[Rule, dict[str, list[str]]]:
    """The rule that serves a call, and why the backends of the rules before it do not.

    ``anywhere`` leaves out that second question: what the table says of a device that is not here.
    """
    refused: dict[str, list[str]] = {}
    for rule in rules():
        if rule.backend in refused or not rule.fits(call):
            continue
        reasons = [] if anywhere else _reasons(rule.backend, call)
        if not reasons:
            return rule, refused
        refused[rule.backend] = reasons
    raise LookupError(f"no rule of attention.json serves attention ({call})")


def _say(call: Call, refused: dict[str, list[str]], chosen: str) -> None:
    """Log, once for each backend and reason, that the table's choice could not be taken."""
    for name, reasons in refused.items():
        if (name, reasons[0]) not in _logged:
            _logged.add((name, reasons[0]))
            log.warning("attention (%s) runs as %s, not %s: %s", call, chosen, name, "; ".join(reasons))


@contextlib.contextmanager
def use_attention(backend: str) -> Iterator[None]:
    """Run every attention inside the block with this backend (an argument of a call still wins).

    Raises:
        ValueError: ``backend`` is neither auto nor one of :data:`BACKENDS`.
    """
    _check_name("backend", backend)
    _overrides.append(backend)
    try:
        yield
    finally:
        _overrides.pop()


def _check_name(source: str, backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of auto, {', '.join(BACKENDS)}; got {backend!r}")


def attend(
    qkv: Tensor,
    heads: int,
    queries: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head softmax attention, scores scaled by ``1 / sqrt(d)``; Vaswani et al., NeurIPS 2017, equation 1.

    Args:
        qkv: [B, N, 3 * D] floating point, rows q, k, v of a fused projection, heads contiguous in each, D = heads * d.
            With ``queries`` it is kv, [B, N, 2 * D].
        heads: number of heads.
        queries: [B, n, D] in the same dtype and on the same device; None when every row asks.
        bias: added to the scaled scores, [H, N or n, N] or [B, H, N or n, N], any floating point; None for none. The
            backends "explicit" and "sdpa" alone take one.
        backend: auto (None) or one of :data:`BACKENDS`.

    Returns:
        [B, N, D], or [B, n, D], in the dtype of ``qkv``. Differentiable in all inputs.

    Raises:
        TypeError, ValueError: a dtype, shape, device or backend that does not fit; the message names the argument.
    """
    _check(qkv, heads, queries, bias)
    parts = 3 if queries is None else 2
    wanted = qkv.requires_grad or (queries is not None and queries.requires_grad)
    grad = torch.is_grad_enabled() and (wanted or (bias is not None and bias.requires_grad))
    # index(): a trace with symbolic sizes settles on these, since the choice depends on them.
    keys, head_dim = operator.index(qkv.shape[1]), operator.index(qkv.shape[2] // (parts * heads))
    name = choose(qkv.device.type, qkv.dtype, keys, head_dim, grad, backend, bias=bias is not None)
    if bias is None:
        return BACKENDS[name].run(qkv, heads, queries)
    return BACKENDS[name].run(qkv, heads, queries, bias.to(qkv.dtype))


def _check(qkv: Tensor, heads: int, queries: Tensor | None, bias: Tensor | None) -> None:
    check_tensor("qkv", qkv, shape=(None, None, None))
    if not qkv.dtype.is_floating_point:
        raise TypeError(f"qkv: expected a floating-point type, got {short_name(qkv.dtype)}")
    parts = 3 if queries is None else 2
    if heads < 1 or qkv.shape[2] % (parts * heads) or not qkv.shape[2]:
        raise ValueError(f"qkv: expected rows of {parts} * {heads} heads * head dim values, got {qkv.shape[2]}")
    if queries is not None:
        check_tensor("queries", queries, dtypes=(qkv.dtype,), shape=(qkv.shape[0], None, qkv.shape[2] // 2), like=qkv)
    if bias is not None:
        shape = (heads, (qkv if queries is None else queries).shape[1], qkv.shape[1])
        check_tensor("bias", bias, shape=shape if bias.dim() == 3 else (qkv.shape[0], *shape), like=qkv)
        if not bias.dtype.is_floating_point:
            raise TypeError(f"bias: expected a floating-point type, got {short_name(bias.dtype)}")


_overrides: list[str] = []
_answers: dict[tuple[object, ...], str] = {}
_logged: set[tuple[str, str]] = set()
_environment = os.environ.get("COHOBATE_ATTENTION") or "auto"
