"""AdamW on parameter groups; clipping, and skipping of updates that are not finite, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import backends

_TOKENS = ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float, rule: str = "mae") -> list[dict[str, Any]]:
    """Two groups for the optimizer: what decays and what does not; parameters that need no gradient are left out.

    Rule "mae": everything decays but biases and 1-D tensors, so the class and mask tokens do (MAE and dBOT). Rule
    "videomae": tokens and position tables do not decay either (VideoMAE and AMD).

    Raises:
        UserError: unknown rule.
    """
    if rule not in ("mae", "videomae"):
        raise UserError(f"optimizer.decay: expected mae or videomae, got {rule!r}")
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        token = rule == "videomae" and name.rsplit(".", 1)[-1] in _TOKENS
        plain = parameter.ndim <= 1 or name.endswith(".bias") or token
        (keep if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


class Updater:
    """One AdamW update: global norm, clipping, a finite check and the step, all on the device.

    The norm is divided out inside the fused kernel (its ``grad_scale``), and an update whose gradient is not finite is
    skipped inside it too (its ``found_inf``), the step count included. That is the route of torch.amp.GradScaler, so no
    extra pass over the parameters and no wait for the device is needed.

    Attributes:
        norm: 0-d fp32, global L2 norm of the last gradient before clipping.
        bad: 0-d fp32, 1 if the last update was skipped. skipped: how many were. streak: how many in a row, until now.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip: float | None = None,
        rule: str = "mae",
    ) -> None:
        groups = parameter_groups(model, weight_decay, rule)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise UserError("model: expected at least one parameter that needs a gradient, got none")
        device = self.parameters[0].device
        self.clip = clip
        self.optimizer = backends.adamw(groups, betas=betas, eps=eps)
        self.norm = torch.zeros((), device=device)
        self.bad = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradient now held; 0-d fp32."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return self.norm

    @torch.no_grad()
    def step(self, rate: float, bad: Tensor) -> None:
        """Update with rate ``rate``, or skip where ``bad`` (0-d fp32) is 1. Call :meth:`gradient_norm` first."""
        self.bad = bad
        self.skipped += bad
        self.streak.add_(1).mul_(bad)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        optimizer: Any = self.optimizer
        optimizer.found_inf = bad
        if self.clip is not None:
            # A norm that is not finite comes with bad=1, so what it is divided by does not matter.
            optimizer.grad_scale = (self.norm / self.clip).clamp_min(1.0)
        self.optimizer.step()

    def counters(self) -> dict[str, Tensor]:
        """The counts of skipped updates, as a resume point keeps them; loading into them sets them."""
        return {"skipped": self.skipped, "streak": self.streak}

    def zero(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
