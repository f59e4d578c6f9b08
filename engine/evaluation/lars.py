"""LARS (You et al., 2017) for many learning rates at once: every parameter holds one replica a rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Lars:
    """Momentum with a rate of its own a layer, for parameters [R, ...] whose replicas do not know of each other.

        g = dL/dw + decay w;   g = trust |w| / |g| g   (matrices alone; factor 1 where a norm is 0)
        m = momentum m + g;    w = w - rate m

    Args:
        parameters: [R, ...] each; those with one more axis are biases, which have neither decay nor trust.
        momentum, trust, decay: as published for linear probes (MAE: 0.9, 0.001, 0).
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, momentum: float = 0.9, trust: float = 1e-3, decay: float = 0.0
    ) -> None:
        self.parameters = list(parameters)
        self.momentum, self.trust, self.decay = momentum, trust, decay
        self._moments = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Update every replica with its rate, [R]; the gradients are dropped."""
        for parameter, moment in zip(self.parameters, self._moments):
            if parameter.grad is None:
                continue
            gradient, shape = parameter.grad, [-1] + [1] * (parameter.dim() - 1)
            if parameter.dim() > 2:
                gradient = gradient + self.decay * parameter
                weight_norm = parameter.flatten(1).norm(dim=1)
                norm = gradient.flatten(1).norm(dim=1)
                ratio = torch.where((weight_norm > 0) & (norm > 0), self.trust * weight_norm / norm, 1.0)
                gradient = gradient * ratio.view(shape)
            moment.mul_(self.momentum).add_(gradient)
            parameter.sub_(moment * rates.view(shape))
            parameter.grad = None
