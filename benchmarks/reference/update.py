"""How a training step ends, as published codes have it and as one writes it today: clipping, AdamW, waiting or not.

Both give the global L2 norm of the gradient before clipping, 0-d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLIP, LEARNING_RATE, BETAS, WEIGHT_DECAY = 3.0, 2.4e-3, (0.9, 0.95), 0.05


def published(module: nn.Module) -> Callable[[], Tensor]:
    """One small kernel an operation and tensor, and a wait for the device at the end of every step."""
    groups = _groups(module)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, foreach=False, fused=False)

    def run() -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, CLIP, foreach=False)
        optimizer.step()
        if parameters[0].is_cuda:
            torch.cuda.synchronize()
        return norm

    return run


def current(module: nn.Module) -> Callable[[], Tensor]:
    """One kernel for the norm and one for AdamW, over all tensors; nothing waits."""
    groups = _groups(module)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def run() -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return norm

    return run


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    """What decays, and what does not: biases and other 1-D tensors."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in named if parameter.ndim <= 1 or name.endswith(".bias")]
    rest = [parameter for name, parameter in named if parameter.ndim > 1 and not name.endswith(".bias")]
    return [{"params": rest, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
