"""One matrix product of a frozen model: the weight cast once, laid out once, the activation in its epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.kernels.transformer.activation import bias_gelu
from cohobate.kernels.transformer.linear import PackedLinear, is_fast
from cohobate.teacher.anatomy import ACTIVATIONS

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # name -> torch's word for the formula


class Product:
    """``activation(x W^T + b)`` without gradient.

    On a CPU, in bf16, the weight is laid out at the first call and GELU is computed in the product's fp32 accumulators,
    before they are rounded: by our own kernel where it can run, else by oneDNN's.

    Args:
        weight: [out, in]. bias: [out] or None. dtype: of the product. activation: a key of ``ACTIVATIONS``, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str | None = None) -> None:
        self.weight = weight.detach().to(dtype, copy=True)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.activation = activation
        self._packed: Callable[[Tensor], Tensor] | None = None

    def part(self, start: int, stop: int) -> Product:
        """Outputs [start, stop) alone, sharing the weight."""
        other = object.__new__(Product)
        other.weight, other.bias = self.weight[start:stop], None if self.bias is None else self.bias[start:stop]
        other.activation, other._packed = self.activation, None
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """[B, n, in] -> [B, n, out], or half of that behind a gated activation."""
        packed = self.packed(x)
        if packed is not None:
            out = packed(x)
            return out if self.activation is None or self.activation in GELU else ACTIVATIONS[self.activation](out)
        if self.activation in GELU and self.bias is not None:
            return bias_gelu(F.linear(x, self.weight), self.bias, approximate=GELU[self.activation])
        out = F.linear(x, self.weight, self.bias)
        return out if self.activation is None else ACTIVATIONS[self.activation](out)

    def packed(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The same by a kernel that has the weight laid out, for inputs of x's rows; None where there is none."""
        if self.weight.dtype != torch.bfloat16 or not _can_pack(x):
            return None
        if self._packed is None:
            self._packed = _pack(self.weight, self.bias, self.activation if self.activation in GELU else None, x)
        return self._packed

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Weight and bias to where ``fn`` puts them."""
        self.weight, self._packed = moved(self.weight, fn), None
        self.bias = None if self.bias is None else moved(self.bias, fn)


def _can_pack(x: Tensor) -> bool:
    return (
        type(x) is Tensor  # not a fake one, that has a shape alone
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and (is_fast() or (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")))
    )


def _pack(weight: Tensor, bias: Tensor | None, activation: str | None, x: Tensor) -> Callable[[Tensor], Tensor]:
    if is_fast() and weight.shape[1] % 2 == 0:
        return PackedLinear(weight, bias, activation)
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.contiguous(), x.numel() // x.shape[-1])
    kind: tuple[str, list[Any], str] = ("none", [], "") if activation is None else ("gelu", [], GELU[activation])
    return lambda x: ops._linear_pointwise(x, packed, bias, *kind)


def moved(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """x on the device to which ``fn``, as ``nn.Module`` applies it, moves tensors; its dtype is kept."""
    return x.to(fn(x.new_empty(0)).device)
