"""AdamW on parameter groups in two calls: the gradient's norm, and an update that clips, skips, keeps bf16 copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import backends
from cohobate.kernels.backends.optimizer import AdamW
from cohobate.kernels.optimizer import gradient_norm
from cohobate.kernels.transformer.linear import reads_shadow
from cohobate.models.layers import Linear, Precision

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


def _read_shadows(model: nn.Module) -> list[Linear]:
    """The layers whose products would cast their matrix to bf16 at every call."""
    precisions = (getattr(module, "precision", None) for module in model.modules())
    if not any(isinstance(p, Precision) and p.compute == torch.bfloat16 for p in precisions):
        return []
    layers = [module for module in model.modules() if isinstance(module, Linear) and module.weight.requires_grad]
    return [layer for layer in layers if reads_shadow(layer.weight)]


class Updater:
    """One AdamW update: global norm, clipping, a finite check and the step, all on the device.

    The kernel clips a gradient as it reads it, and it is there that an update whose gradient is not finite is skipped,
    the step count included: no extra pass over the parameters, and no wait for the device. The gradients themselves
    stay as they are (torch's AdamW, which takes what our kernel does not, leaves them clipped).

    Args:
        model: its parameters that need a gradient are updated. weight_decay, betas, eps: of AdamW. rule: see
            :func:`parameter_groups`.
        clip: largest norm of the gradient; None for any.
        shadow: keep bf16 copies of the matrices, written in the same pass, where their products read them.

    Attributes:
        norm: 0-d fp32, global L2 norm of the last gradient before clipping.
        scale: 0-d fp32, what the last gradient was divided by; None without clipping.
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
        shadow: bool = True,
    ) -> None:
        groups = parameter_groups(model, weight_decay, rule)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise UserError("model: expected at least one parameter that needs a gradient, got none")
        device = self.parameters[0].device
        self.clip = clip
        self.optimizer = backends.adamw(groups, betas=betas, eps=eps)
        self.shadowed: list[Linear] = []
        if shadow and isinstance(self.optimizer, AdamW):
            self.shadowed = _read_shadows(model)
            self.optimizer.shadows = {layer.weight: layer.write_shadow() for layer in self.shadowed}
        self.scale: Tensor | None = None
        self.norm = torch.zeros((), device=device)
        self.bad = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradient now held; 0-d fp32."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        plain = all(type(gradient) is Tensor for gradient in gradients)  # not a DTensor's, of which a rank has a part
        self.norm = gradient_norm(gradients, backend=None if plain else "reference")
        return self.norm

    @torch.no_grad()
    def step(self, rate: float | Tensor, bad: Tensor) -> None:
        """Update with rate ``rate``, or skip where ``bad`` (0-d fp32) is 1. Call :meth:`gradient_norm` first.

        A rate that is a 0-d fp32 tensor on the device is read there, at every replay of a captured step.
        """
        self.bad = bad
        self.skipped += bad
        self.streak.add_(1).mul_(bad)
        before = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        optimizer: Any = self.optimizer
        optimizer.found_inf = bad
        if self.clip is not None:
            # A norm that is not finite comes with bad=1, so what it is divided by does not matter.
            optimizer.grad_scale = self.scale = (self.norm / self.clip).clamp_min(1.0)
        self.optimizer.step()
        if isinstance(rate, Tensor):  # a resume point holds numbers there
            for group, number in zip(self.optimizer.param_groups, before, strict=True):
                group["lr"] = number
        for layer in self.shadowed:
            if layer.weight.grad is not None:
                layer.mark_shadow()

    def write_shadows(self) -> None:
        """Write the bf16 copies anew, after a change of the weights that no update made (they are not used else)."""
        for layer in self.shadowed:
            layer.write_shadow()

    def counters(self) -> dict[str, Tensor]:
        """The counts of skipped updates, as a resume point keeps them; loading into them sets them."""
        return {"skipped": self.skipped, "streak": self.streak}

    def zero(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
