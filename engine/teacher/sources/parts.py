"""Reading layers: each function takes the weights out of a layer that is what it seems, or says why it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cohobate.teacher.anatomy import ACTIVATIONS, Affine
from cohobate.teacher.sources.source import NotPlainError
from cohobate.tokens import TokenGrid


def first(owner: Any, *paths: str) -> Any:
    """The first of several dotted attributes that is there and not None, or None."""
    for path in paths:
        found = owner
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def linear(layer: Any, what: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of an ``nn.Linear``."""
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise NotPlainError(f"{what} is {_kind(layer)}, not a plain Linear")
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def stacked(layers: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Several linear layers as one; a bias that some lack is zero there."""
    weight = torch.cat([w for w, _ in layers])
    if all(b is None for _, b in layers):
        return weight, None
    return weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in layers])


class Norms:
    """Reads LayerNorms, which must share one eps."""

    def __init__(self) -> None:
        self.eps: float | None = None

    def __call__(self, layer: Any, what: str) -> Affine:
        if not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) != 1:
            raise NotPlainError(f"{what} is {_kind(layer)}, not a LayerNorm over the width")
        if self.eps not in (None, layer.eps):
            raise NotPlainError(f"{what} has eps {layer.eps}, and norms before it {self.eps}")
        self.eps = layer.eps
        width = layer.normalized_shape[0]
        weight, bias = layer.weight, layer.bias
        return Affine(
            torch.ones(width) if weight is None else weight.detach(),
            torch.zeros(width) if bias is None else bias.detach(),
        )


def patch_rows(conv: Any, grid: TokenGrid) -> tuple[Tensor, Tensor | None]:
    """Kernel [D, row_length] and bias of the convolution that cuts and projects the patches."""
    plain = isinstance(conv, (nn.Conv2d, nn.Conv3d)) and conv.stride == conv.kernel_size
    if not plain or conv.groups != 1 or set(conv.dilation) != {1} or conv.padding not in ("valid", (0, 0), (0, 0, 0)):
        raise NotPlainError(f"the patch embedding is {_kind(conv)}, not a convolution of whole patches")
    if tuple(conv.kernel_size)[-2:] != grid.patch[1:]:
        raise NotPlainError(f"the patch embedding has kernel {tuple(conv.kernel_size)}, and the grid {grid.patch}")
    bias = None if conv.bias is None else conv.bias.detach()
    return conv.weight.detach().movedim(1, -1).flatten(1), bias


def activation(function: Any, what: str) -> str:
    """The name in ACTIVATIONS of an elementwise function, told by what it computes."""
    x = torch.linspace(-8, 8, 161)
    for name, known in ACTIVATIONS.items():
        # GELU and its tanh form differ by 5e-4, evaluations of one form by 1e-6
        if name != "swiglu" and _same(function, known, x):
            return name
    raise NotPlainError(f"{what} is {_kind(function)}, not one of {', '.join(ACTIVATIONS)}")


def is_silu(function: Any) -> bool:
    """Whether a function is x * sigmoid(x)."""
    return _same(function, nn.functional.silu, torch.linspace(-8, 8, 161))


def _same(function: Any, known: Any, x: Tensor) -> bool:
    if not callable(function) or any(True for _ in getattr(function, "parameters", tuple)()):
        return False
    return torch.allclose(function(x.clone()), known(x), rtol=0, atol=5e-6)


def _kind(part: Any) -> str:
    return "missing" if part is None else type(part).__name__
