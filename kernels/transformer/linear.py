"""linear: a bf16 product whose weight is fp32, as training under mixed precision has it.

    out = x W^T + b         dx = grad W         dW = grad^T x  (fp32)         db = column sums of grad  (fp32)

| tensor | shape      | dtype      | strides                     |
|--------|------------|------------|-----------------------------|
| x      | [..., in]  | any        | contiguous (else copied)    |
| weight | [out, in]  | fp32 (any) | contiguous (else copied)    |
| bias   | [out]      | fp32 (any) | any                         |
| shadow | [out, in]  | as x       | any                         |
| out    | [..., out] | as x       | contiguous                  |

``reference`` casts weight and bias to x's dtype and calls torch's product; so does every CUDA call, where cuBLAS is the
right kernel. Where somebody keeps a shadow, a copy of the weight in x's dtype, it takes that and casts nothing; the
numbers are the same. ``native`` is for processors with avx512_bf16 and no AMX: it casts while it packs the weight,
which takes no longer than packing a shadow would, and writes the weight's gradient in fp32 out of its accumulators,
where torch rounds it to bf16 and converts it back. Both round each output once; the gradient of the weight is the more
exact one. Saved for backward: x and the weight, or its shadow.

Floor: :func:`linear_cost`. Determinism: bitwise; each value is summed in the order of the summed dimension, whatever
the number of threads or of rows, so a row of the output depends on its own input alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import native
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, count_flops, define, register

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, shadow: Tensor | None = None) -> Tensor:
    """Reference of :func:`linear`, differentiable."""
    matrix = weight.to(x.dtype) if shadow is None else _Cast.apply(weight, shadow)
    return F.linear(x, matrix, None if bias is None else bias.to(x.dtype))


class _Cast(torch.autograd.Function):
    """``weight.to(shadow.dtype)`` whose result is there already: its gradient goes to the weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, shadow: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.dtype = weight.dtype
        return shadow.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad.to(ctx.dtype), None


def linear_cost(rows: int, inputs: int, outputs: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Floor: every matrix moved once, weights and their gradient in fp32; 2 FLOPs a multiply-add, bias not counted."""
    product = 2 * rows * inputs * outputs
    moved = rows * (inputs + outputs) * itemsize + 4 * inputs * outputs
    if not backward:
        return Cost(bytes=moved, flops=product)
    read = rows * (inputs + outputs) * itemsize + 4 * inputs * outputs
    return Cost(bytes=read + rows * inputs * itemsize + 4 * (inputs + 1) * outputs, flops=2 * product)


# ---------------------------------------------------------------------------------------------------------- native


def _forward_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    out = recycled((*x.shape[:-1], outputs), x.dtype)
    torch.ops.cohobate_native.linear(x.view(-1, inputs), weight, bias, out.view(-1, outputs))
    return out


def _backward_native(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = recycled(x.shape if wants_x else (0,), x.dtype)
    dweight = recycled(weight.shape if wants_weight else (0,), weight.dtype)
    outputs, inputs = weight.shape
    dbias = torch.empty(outputs * wants_bias, dtype=weight.dtype)
    grad = grad.view(-1, outputs)
    if wants_x:
        torch.ops.cohobate_native.linear_dx(grad, weight, dx.view(-1, inputs))
    if wants_weight:
        torch.ops.cohobate_native.linear_dw(grad, x.view(-1, inputs), dweight, dbias if wants_bias else None)
    elif wants_bias:
        torch.sum(grad, 0, dtype=torch.float32, out=dbias)
    return dx, dweight, dbias


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients; empty ones where they are not wanted."""
    dx = x.new_empty(x.shape if wants_x else 0)
    return dx, weight.new_empty(weight.shape if wants_weight else 0), weight.new_empty(weight.shape[0] * wants_bias)


ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}


@functools.cache
def is_fast() -> bool:
    """Is ``native`` for this processor? For those with avx512_bf16 and without AMX, whose tiles it does not use."""
    return not native.why_not() and bool(torch.ops.cohobate_native.linear_is_fast())


class PackedLinear:
    """``activation(x W^T + b)`` of a bf16 weight that never changes: packed once, no gradient. Where :func:`is_fast`.

    Args:
        weight: [out, in] bf16, ``in`` even. bias: [out] bf16 or None. activation: a key of ``ACTIVATIONS``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        self.bias, self.activation = bias, ACTIVATIONS[activation]
        ops: Any = torch.ops.cohobate_native
        self.packed = torch.empty(ops.linear_packed_size(self.inputs, self.outputs), dtype=torch.int32)
        ops.linear_pack(weight.contiguous(), self.packed)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] bf16 -> [..., out] bf16; the activation is computed in the product's fp32 accumulators."""
        rows, out = x.reshape(-1, self.inputs).contiguous(), recycled((*x.shape[:-1], self.outputs), torch.bfloat16)
        torch.ops.cohobate_native.linear_packed(
            rows, self.packed, self.bias, self.activation, out.view(-1, self.outputs)
        )
        return out


# ---------------------------------------------------------------------------------------------------- registration


def _native_limit(*, x: torch.dtype, weight: torch.dtype, even: bool) -> list[str]:
    reasons = []
    if (x, weight) != (torch.bfloat16, torch.float32):
        reasons.append(f"native multiplies bf16 by fp32 weights, not {_short(x)} by {_short(weight)}")
    if not even:
        reasons.append("native multiplies pairs: both sizes of the weight must be even")
    if not native.why_not() and not is_fast():
        reasons.append("native is for processors with avx512_bf16 and without AMX, whose tiles torch uses")
    return reasons


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


register(Op("linear", ("reference", "native"), linear_cost, {"native": _native_limit}, quiet=True))

_linear_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    native=_forward_native,
)
_backward_op = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool wants_x, bool wants_weight, bool wants_bias, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_gradients,
    native=_backward_native,
)


def _forward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])


def _backward_flops(grad: Any, x: Any, weight: Any, wants_x: bool, wants_weight: bool, *_: Any, **__: Any) -> int:
    return (wants_x + wants_weight) * _forward_flops(x, weight)


count_flops(linear=_forward_flops, linear_backward=_backward_flops)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:  # type: ignore[no-untyped-def]
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.impl = impl
        return _linear_op(x, weight, bias, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        found = _backward_op(grad.contiguous(), x, weight, *wanted, ctx.impl)
        return (*(value if want else None for value, want in zip(found, wanted, strict=True)), None)


# ---------------------------------------------------------------------------------------------------------- public


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shadow: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + b`` in x's dtype, whatever dtype the parameters are kept in (autocast is not consulted).

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.
        shadow: [out, in], the weight in x's dtype, where somebody keeps it; nothing is cast then. It must be what the
            cast would give, and gets no gradient: the weight does.
        backend: auto (None), reference or native (bf16 x and fp32 parameters).

    Returns:
        [..., out] in x's dtype. Gradients come in the dtypes of their inputs.

    Raises:
        TypeError, ValueError: a dtype, shape, device or backend that does not fit; the message names the argument.
    """
    _check(x, weight, bias, shadow)
    impl = choose("linear", x, backend, **_facts(x.dtype, weight))
    if impl == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return linear_reference(x, weight, bias, shadow)
    shift = None if bias is None else bias.float().contiguous()
    out: Tensor = _Linear.apply(x, weight, shift, impl)
    return out


def reads_shadow(weight: Tensor) -> bool:
    """Would a bf16 input's product with ``weight`` cast it, so that a shadow is of use?"""
    return choose("linear", weight, **_facts(torch.bfloat16, weight)) == "reference"


def _facts(dtype: torch.dtype, weight: Tensor) -> dict[str, Any]:
    return {"x": dtype, "weight": weight.dtype, "even": not (weight.shape[0] | weight.shape[1]) & 1}


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, shadow: Tensor | None) -> None:
    check_tensor("x", x, dtypes=FLOATS)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got none")
    check_tensor("weight", weight, dtypes=FLOATS, shape=(None, x.shape[-1]), like=x)
    if bias is not None:
        check_tensor("bias", bias, dtypes=FLOATS, shape=(weight.shape[0],), like=x)
    if shadow is not None:
        check_tensor("shadow", shadow, dtypes=(x.dtype,), shape=weight.shape, like=x)
