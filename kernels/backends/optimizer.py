"""AdamW by our kernel, by torch's fused one, or by apex's where it is asked for by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cohobate.kernels import optimizer, registry
from cohobate.kernels.backends import apex
from cohobate.kernels.backends.probe import capability

BACKENDS = ("cohobate", "torch", "apex")


def why_not(name: str, device: str) -> list[str]:
    """Reasons why ``name``, one of BACKENDS, cannot update parameters on ``device`` (cpu, cuda); empty if it can."""
    if name == "cohobate":
        if device == "cuda" and capability() is None:
            return ["no CUDA device"]
        return registry.why_not("adamw", "native" if device == "cpu" else "triton", device)
    return apex.why_not_adamw(device) if name == "apex" else []


def adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, backend: str | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019) over parameter groups, with a rate of 0 until one is set.

    Whichever it is, ``step`` divides the gradients by the attribute ``grad_scale`` and skips the update where the
    attribute ``found_inf`` is 1 (0-d fp32 tensors, set before it), without waiting for the device. A group's ``lr`` may
    be a 0-d fp32 tensor on the device, which is read there.

    Args:
        groups: ``{"params": [...], "weight_decay": float}`` each; the first parameter's device counts.
        betas, eps: of Adam.
        backend: cohobate, torch, apex or auto; None asks COHOBATE_OPTIMIZER, then takes auto: cohobate where its kernel
            runs on all of the parameters, and torch elsewhere (DTensors, other dtypes than fp32).

    Raises:
        ValueError: an unknown backend, or one that cannot run (every reason is listed).
    """
    source, wanted = ("backend", backend) if backend is not None else ("COHOBATE_OPTIMIZER", _environment)
    if wanted not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected one of auto, {', '.join(BACKENDS)}; got {wanted!r}")
    parameters = [parameter for group in groups for parameter in group["params"]]
    device = parameters[0].device.type
    if wanted == "auto":
        wanted = "torch" if why_not("cohobate", device) or _odd(parameters) else "cohobate"
    reasons = why_not(wanted, device) + (_odd(parameters) if wanted == "cohobate" else [])
    if reasons:
        raise ValueError(f"{source}: {wanted!r} cannot run AdamW: {'; '.join(reasons)}")
    if wanted == "apex":
        return apex.adamw(groups, betas, eps)
    if wanted == "cohobate":
        return AdamW(groups, betas=betas, eps=eps)
    # A step that is captured in a CUDA graph asks for `capturable`.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True, capturable=device == "cuda")


def _odd(parameters: list[Tensor]) -> list[str]:
    plain = all(type(p) in (Tensor, torch.nn.Parameter) and p.dtype == torch.float32 for p in parameters)
    return [] if plain and all(p.is_contiguous() for p in parameters) else ["parameters are plain, contiguous and fp32"]


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, with its groups and its state under its keys, whose ``step`` is one call of our kernel.

    Attributes:
        shadows: bf16 copies of some parameters, which a step writes in the same pass; they are in no state.
        grad_scale, found_inf: as torch's fused AdamW takes them; None for 1 and 0.
    """

    shadows: dict[Tensor, Tensor]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.shadows = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[Any, tuple[dict[str, Any], list[tuple[Tensor, float]]]] = {}
        for group in self.param_groups:
            rate = group["lr"]
            key = (id(rate) if isinstance(rate, Tensor) else rate, tuple(group["betas"]), group["eps"])
            _, members = alike.setdefault(key, (group, []))
            members += [(p, group["weight_decay"]) for p in group["params"] if p.grad is not None]
        for group, members in alike.values():
            if members:
                self._update(members, group["lr"], tuple(group["betas"]), group["eps"])
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("shadows", {})

    def _update(
        self, members: list[tuple[Tensor, float]], rate: float | Tensor, betas: tuple[float, float], eps: float
    ) -> None:
        members = sorted(members, key=lambda entry: entry[0] not in self.shadows)  # those with a shadow come first
        parameters = [parameter for parameter, _ in members]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": parameter.new_zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        if not isinstance(rate, Tensor):
            rate = parameters[0].new_full((), rate)
        optimizer.adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            _together(states),
            rate=rate,
            decays=[decay for _, decay in members],
            betas=betas,
            eps=eps,
            scale=self.grad_scale,
            skip=self.found_inf,
            shadows=[self.shadows[parameter] for parameter in parameters if parameter in self.shadows],
        )


def _together(states: list[dict[str, Tensor]]) -> Tensor:
    """The step counts as one tensor, of which those in the states are views; made anew where they are not."""
    counts = [state["step"] for state in states]
    base = counts[0]._base
    places = [count.storage_offset() for count in counts if base is not None and count._base is base]
    if base is None or places != list(range(base.numel())) or len(counts) != len(places):
        base = torch.stack(counts)
        for i, state in enumerate(states):
            state["step"] = base[i]
    return base


_environment = os.environ.get("COHOBATE_OPTIMIZER") or "auto"
