"""pre_norm_block: a whole pre-norm transformer block in one call, the kernels of this package behind each other.

    s1 = x + factor * branch             h = attention(norm1(s1) Wqkv^T + bqkv) Wproj^T + bproj
    s  = s1 + drop * h                 out = gelu(norm2(s) W1^T + b1) W2^T + b2

Source: Xiong et al., "On layer normalization in the transformer architecture" (ICML 2020), figure 1b; Dosovitskiy et
al., ICLR 2021, equations 2 and 3. The result is a stream and a branch that is not added to it yet: the next norm does
both.

| tensor       | shape     | dtype      | strides                 |
|--------------|-----------|------------|-------------------------|
| x, s         | [B, N, D] | fp32, bf16 | contiguous (else copied)|
| branch, out  | [B, N, D] | bf16 (any) | contiguous (else copied)|
| factor, drop | [B]       | fp32       | contiguous (else copied)|
| parameters   | as listed | fp32 (any) | contiguous (else copied)|

``native`` computes what the ops behind each other compute, to the last bit, and is for the processors of
:mod:`.linear`. It is faster by what lies between them: after a product, which passes megabytes through the caches, the
interpreter's code and data have to be fetched again, sixteen times a block instead of twice. Saved for backward: the
results of every op, in one tensor. Floor: the sum of the ops'. Determinism: bitwise, as theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import registry
from cohobate.kernels.backends import attention as attention_table
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register, takes, why_not
from cohobate.kernels.tokens.rows import FLOAT_DTYPES
from cohobate.kernels.transformer.activation import bias_gelu_cost, bias_gelu_reference
from cohobate.kernels.transformer.add_norm import CHUNK, add_norm_cost, add_norm_reference
from cohobate.kernels.transformer.attention import MOST_DIM, attention_cost, short_attention_reference
from cohobate.kernels.transformer.fp8 import NATIVE_DTYPES, dtype_reasons
from cohobate.kernels.transformer.linear import PackedLinear, linear_cost, linear_reference

PARTS = ("pre_norm_block", "add_norm", "linear", "short_attention", "bias_gelu")
FC1 = 8  # place of its weight in Parameters
MATRICES, VECTORS = (2, 4, FC1, 10), (0, 1, 3, 5, 6, 7, 9, 11)  # of the products' weights, and of all else

Products = Sequence[PackedLinear]  # qkv, proj, fc1, fc2


class Parameters(NamedTuple):
    """Of a block: [D] and [3 D, D], [3 D] of qkv, [D, D] of proj, [H, D] of fc1, [D, H] of fc2."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def pre_norm_block_reference(
    x: Tensor,
    branch: Tensor | None,
    parameters: Parameters,
    heads: int,
    *,
    factor: Tensor | None = None,
    drop: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`pre_norm_block`, differentiable: the references of its parts behind each other."""
    p = parameters
    x, normed = add_norm_reference(
        x, branch, weight=p.norm1_weight, bias=p.norm1_bias, factor=factor, eps=eps, dtype=dtype
    )
    mixed = short_attention_reference(linear_reference(normed, p.qkv_weight, p.qkv_bias), heads)
    branch = linear_reference(mixed, p.proj_weight, p.proj_bias)
    x, normed = add_norm_reference(
        x, branch, weight=p.norm2_weight, bias=p.norm2_bias, factor=drop, eps=eps, dtype=dtype
    )
    hidden = bias_gelu_reference(linear_reference(normed, p.fc1_weight, p.fc1_bias))
    return x, linear_reference(hidden, p.fc2_weight, p.fc2_bias)


def pre_norm_block_cost(
    batch: int,
    length: int,
    width: int,
    hidden: int,
    heads: int,
    x_itemsize: int,
    itemsize: int,
    *,
    backward: bool = False,
) -> Cost:
    """Floor: the sum of its parts', branches of ``itemsize`` bytes a value."""
    rows = batch * length
    norm = add_norm_cost(rows, width, x_itemsize, itemsize, branch_itemsize=itemsize, backward=backward)
    parts = [norm, norm, attention_cost(batch, length, length, heads, width // heads, itemsize, backward=backward)]
    for inputs, outputs in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        parts.append(linear_cost(rows, inputs, outputs, itemsize, backward=backward))
    parts.append(bias_gelu_cost(rows, hidden, itemsize, backward=backward))
    return Cost(bytes=sum(part.bytes for part in parts), flops=sum(part.flops for part in parts))


# ---------------------------------------------------------------------------------------------------------- native


def _kept(x: Tensor, hidden: int) -> tuple[int, int]:
    """Shape of what waits for the backward pass, in bf16; the norms' statistics are two fp32 numbers a row."""
    return x.shape[0] * x.shape[1], 8 + 6 * x.shape[2] + 2 * hidden


def _forward_native(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    drop: Tensor | None,
    parameters: Sequence[Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = x.new_empty(0) if branch is None else recycled(x.shape, x.dtype)
    kept = recycled(_kept(x, parameters[FC1].shape[0]), torch.bfloat16)
    total, out = recycled(x.shape, x.dtype), recycled(x.shape, torch.bfloat16)
    torch.ops.cohobate_native.block.default(
        x, branch, factor, drop, parameters, heads, eps, None if branch is None else first, kept, total, out
    )
    return first, kept, total, out


def _backward_native(
    grad_sum: Tensor | None,
    grad_out: Tensor,
    first: Tensor,
    total: Tensor,
    kept: Tensor,
    parameters: Sequence[Tensor],
    factor: Tensor | None,
    drop: Tensor | None,
    heads: int,
    wants_branch: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    batch, length, width = total.shape
    hidden = parameters[FC1].shape[0]
    wide = 2 * width + max(hidden, 3 * width) + width * total.element_size() // 2
    scratch = recycled((batch * length, wide), torch.bfloat16)
    dx, dbranch = recycled(total.shape, total.dtype), recycled(total.shape if wants_branch else (0,), torch.bfloat16)
    matrices = [recycled(parameters[i].shape, torch.float32) for i in MATRICES]
    vectors = torch.empty(sum(parameters[i].shape[0] for i in VECTORS))
    torch.ops.cohobate_native.block_backward.default(
        grad_sum, grad_out, first, total, kept, parameters, factor, drop, heads, CHUNK, scratch, dx,
        dbranch if wants_branch else None, [*matrices, vectors],
    )  # fmt: skip
    return dx, dbranch, [*matrices, vectors]


def packed_blocks(
    x: Tensor, branch: Tensor | None, blocks: Sequence[Products], heads: int, eps: float, *, wants_first: bool = False
) -> tuple[Tensor | None, Tensor, Tensor]:
    """:func:`pre_norm_block` of a frozen network, several times: no parameters in the norms, products packed before.

    Args:
        x: [B, N, D] fp32 or bf16. branch: [B, N, D] bf16 or None.
        blocks: qkv, proj, fc1 and fc2 of each, every one with a bias, fc1 with the activation.

    Returns:
        s1 of the first block (None where it is not wanted), s and out of the last, [B, N, D] each; no gradient.
    """
    qkv, _, fc1, _ = blocks[0]
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    first = recycled(x.shape, x.dtype) if wants_first and branch is not None else None
    # Two statistics in fp32, a norm's result, and the larger one of qkv and the MLP's inside.
    scratch = recycled((x.shape[0] * x.shape[1], 4 + qkv.inputs + max(qkv.outputs, fc1.outputs)), torch.bfloat16)
    total, out = recycled(x.shape, x.dtype), recycled(x.shape, torch.bfloat16)
    products = [product for block in blocks for product in block]
    weights, biases = [product.packed for product in products], [product.bias for product in products]
    torch.ops.cohobate_native.blocks_packed.default(
        x, branch, weights, biases, fc1.activation, heads, eps, first, scratch, total, out
    )
    return (x if wants_first and branch is None else first), total, out


# ---------------------------------------------------------------------------------------------------- registration


def _native_limit(
    *, x: torch.dtype, branch: torch.dtype, parameters: frozenset[torch.dtype], heads: int, width: int, hidden: int
) -> list[str]:
    dim = width // heads
    short = {"dtype": torch.bfloat16, "wide": dim > MOST_DIM, "odd": dim % 2 == 1, "long": False}
    return [
        *dtype_reasons("native", NATIVE_DTYPES, (x,)),
        *dtype_reasons("native", (torch.bfloat16,), (branch,)),
        *dtype_reasons("native", (torch.float32,), sorted(parameters, key=str)),
        *why_not("linear", "native", "cpu", x=torch.bfloat16, weight=torch.float32, even=not (width | hidden) & 1),
        *why_not("short_attention", "native", "cpu", **short),
    ]


register(Op("pre_norm_block", ("reference", "native"), pre_norm_block_cost, {"native": _native_limit}, quiet=True))

_forward_op = define(
    "pre_norm_block(Tensor x, Tensor? branch, Tensor? factor, Tensor? drop, Tensor[] parameters, int heads, float eps, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, branch, factor, drop, parameters, heads, eps: (
        x.new_empty(0) if branch is None else x.new_empty(x.shape),
        x.new_empty(_kept(x, parameters[FC1].shape[0]), dtype=torch.bfloat16),
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=torch.bfloat16),
    ),
    native=_forward_native,
)
_backward_op = define(
    "pre_norm_block_backward(Tensor? grad_sum, Tensor grad_out, Tensor first, Tensor sum, Tensor kept, "
    "Tensor[] parameters, Tensor? factor, Tensor? drop, int heads, bool wants_branch, str impl)"
    " -> (Tensor, Tensor, Tensor[])",
    fake=lambda grad_sum, grad_out, first, total, kept, parameters, factor, drop, heads, wants_branch: (
        total.new_empty(total.shape),
        total.new_empty(total.shape if wants_branch else 0, dtype=torch.bfloat16),
        [
            *(parameters[i].new_empty(parameters[i].shape) for i in MATRICES),
            parameters[0].new_empty(sum(parameters[i].shape[0] for i in VECTORS)),
        ],
    ),
    native=_backward_native,
)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        branch: Tensor | None,
        factor: Tensor | None,
        drop: Tensor | None,
        heads: int,
        eps: float,
        impl: str,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first, kept, total, out = _forward_op(x, branch, factor, drop, parameters, heads, eps, impl)
        ctx.save_for_backward(x if branch is None else first, total, kept, factor, drop, *parameters)
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.impl, ctx.added = heads, impl, branch is not None
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor | None, grad_out: Tensor | None):  # type: ignore[no-untyped-def]
        first, total, kept, factor, drop, *parameters = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(total, dtype=torch.bfloat16)
        dx, dbranch, found = _backward_op(
            None if grad_sum is None else grad_sum.contiguous(), grad_out.contiguous(), first, total, kept, parameters,
            factor, drop, ctx.heads, ctx.added, ctx.impl,
        )  # fmt: skip
        qkv, proj, fc1, fc2, vectors = found
        (hidden, d) = fc1.shape
        scale1, shift1, dqkv, dproj, scale2, shift2, dfc1, dfc2 = vectors.split((d, d, 3 * d, d, d, d, hidden, d))
        return (
            dx, dbranch if ctx.added else None, None, None, None, None, None,
            scale1, shift1, qkv, dqkv, proj, dproj, scale2, shift2, fc1, dfc1, fc2, dfc2,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- public


def pre_norm_block(
    x: Tensor,
    branch: Tensor | None,
    parameters: Parameters,
    heads: int,
    *,
    factor: Tensor | None = None,
    drop: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A pre-norm transformer block; formulas at the top of the module.

    Args:
        x: [B, N, D] residual stream, fp32 or bf16 (others: reference).
        branch: [B, N, D] in ``dtype``, what the stream waits for; None: nothing is added.
        parameters: of the block; their gradients are all computed.
        heads: H, a divisor of D.
        factor, drop: [B] fp32, drop-path factors of ``branch`` and of the attention branch; None for 1. No gradient.
        eps: of the norms.
        dtype: of the branches and their products.
        backend: auto (None), reference or native (bf16 branches, fp32 parameters, even sizes; on processors that
            :func:`.linear` has it for).

    Returns:
        (s, out), [B, N, D] each: the stream with the attention branch added, in x's dtype, and the MLP's branch in
        ``dtype``, which is not added yet. Once differentiable.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what was expected and what came.
    """
    _check(x, branch, parameters, heads, factor, drop, dtype)
    impl = choose("pre_norm_block", x, backend, **_facts(x, parameters, heads, dtype))
    if impl == "reference":
        return pre_norm_block_reference(x, branch, parameters, heads, factor=factor, drop=drop, eps=eps, dtype=dtype)
    return _run(x, branch, parameters, heads, factor, drop, float(eps), impl)


def _run(
    x: Tensor,
    branch: Tensor | None,
    parameters: Parameters,
    heads: int,
    factor: Tensor | None,
    drop: Tensor | None,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    given = [t if t is None else t.contiguous() for t in (x, branch, factor, drop)]
    weights = [t.contiguous() for t in parameters]
    if torch.is_grad_enabled():
        total, out = _Block.apply(*given, heads, eps, impl, *weights)
    else:
        _, _, total, out = _forward_op(*given, weights, heads, eps, impl)
    return total, out


def in_one_call(
    x: Tensor,
    branch: Tensor | None,
    parameters: Parameters,
    heads: int,
    *,
    factor: Tensor | None = None,
    drop: Tensor | None = None,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """:func:`pre_norm_block` where it computes what its parts would, and faster; None elsewhere.

    It does where ``native`` serves it, nothing asks for another backend of one of its parts, and every parameter wants
    a gradient if any is recorded. The arguments must fit.
    """
    grad = torch.is_grad_enabled()
    if not _fits(x, branch, compute) or (grad and not all(p.requires_grad for p in parameters)):
        return None
    facts = _facts(x, parameters, heads, compute)
    if not _serves(PARTS, grad, x.shape[1], *facts.values(), registry.asked(), attention_table.asked()):
        return None
    return _run(x, branch, parameters, heads, factor, drop, eps, "native")


def packed_in_one_call(x: Tensor, branch: Tensor | None, products: Sequence[object], heads: int) -> bool:
    """Is :func:`packed_blocks` for this block? Packed products stay what they are, whatever is asked of ``linear``."""
    if not all(type(product) is PackedLinear and product.bias is not None for product in products):
        return False
    if not _fits(x, branch, torch.bfloat16):
        return False
    width, hidden = x.shape[2], cast(PackedLinear, products[2]).outputs
    parts = tuple(name for name in PARTS if name not in ("linear", "bias_gelu"))
    asked = registry.asked(), attention_table.asked()
    return _serves(parts, False, x.shape[1], x.dtype, torch.bfloat16, frozenset(), heads, width, hidden, *asked)


def _fits(x: Tensor, branch: Tensor | None, compute: torch.dtype) -> bool:
    half = compute == torch.bfloat16 and (branch is None or branch.dtype == compute)
    return half and type(x) is Tensor and x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


@functools.cache
def _serves(
    parts: tuple[str, ...],
    grad: bool,
    keys: int,
    x: torch.dtype,
    half: torch.dtype,
    kinds: frozenset[torch.dtype],
    heads: int,
    width: int,
    hidden: int,
    *_: str | None,  # the backends that are asked for: other ones, another answer
) -> bool:
    facts: dict[str, dict[str, Any]] = {
        "pre_norm_block": {
            "x": x,
            "branch": half,
            "parameters": kinds,
            "heads": heads,
            "width": width,
            "hidden": hidden,
        },
        "add_norm": {"dtypes": (x, half), "wide": False},
        "linear": {"x": half, "weight": torch.float32, "even": True},
        "bias_gelu": {"dtypes": (half,)},
        "short_attention": {"dtype": half, "wide": False, "odd": False, "long": False},
    }
    if not all(takes(name, "native", "cpu", **facts[name]) for name in parts):
        return False
    return attention_table.choose("cpu", half, keys, width // heads, grad) == "short"


def _facts(x: Tensor, parameters: Parameters, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    kinds = frozenset(p.dtype for p in parameters)
    hidden, width = parameters.fc1_weight.shape
    return {"x": x.dtype, "branch": dtype, "parameters": kinds, "heads": heads, "width": width, "hidden": hidden}


def _check(
    x: Tensor,
    branch: Tensor | None,
    parameters: Parameters,
    heads: int,
    factor: Tensor | None,
    drop: Tensor | None,
    dtype: torch.dtype,
) -> None:
    kinds = (*FLOAT_DTYPES, torch.float64)
    check_tensor("x", x, dtypes=kinds, shape=(None, None, None))
    batch, length, width = x.shape
    if branch is not None:
        check_tensor("branch", branch, dtypes=(dtype,), shape=(batch, length, width), like=x)
    if not isinstance(heads, int) or heads < 1 or width % heads or not width:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads!r}")
    check_tensor("fc1_weight", parameters.fc1_weight, dtypes=kinds, shape=(None, width), like=x)
    hidden = parameters.fc1_weight.shape[0]
    for name, parameter, shape in zip(Parameters._fields, parameters, _shapes(width, hidden), strict=True):
        check_tensor(name, parameter, dtypes=kinds, shape=shape, like=x)
    for name, scale in (("factor", factor), ("drop", drop)):
        if scale is not None:
            check_tensor(name, scale, dtypes=(torch.float32,), shape=(batch,), like=x)
    if factor is not None and branch is None:
        raise ValueError("factor: expected None without a branch, got a tensor")


def _shapes(width: int, hidden: int) -> Iterator[tuple[int, ...]]:
    """Of the parameters."""
    for outputs, inputs in (
        (width, 0),
        (3 * width, width),
        (width, width),
        (width, 0),
        (hidden, width),
        (width, hidden),
    ):
        yield (outputs, inputs) if inputs else (outputs,)
        yield (outputs,)
