"""gradient_norm and adamw: the whole update of a model, one call each, over lists of tensors.

    norm       = sqrt(sum of g^2 over every gradient)
    step       = step + 1                                         a tensor; not where the update is skipped
    g          = gradient / scale
    exp_avg    = exp_avg + (1 - beta1) (g - exp_avg)
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    average    = exp_avg / (1 - beta1^step)                       average_sq likewise, with beta2
    parameter  = (1 - rate decay) parameter - rate average / (sqrt(average_sq) + eps)
    shadow     = bf16(parameter)                                  round to nearest even

Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019), as torch.optim.AdamW computes it.

| tensor                          | shape | dtype               | strides                     |
|---------------------------------|-------|---------------------|-----------------------------|
| parameters, exp_avgs, _sqs      | any   | fp32                | contiguous (else reference) |
| gradients                       | as p. | fp32, or bf16 all   | contiguous (else copied)    |
| shadows, of the first so many   | as p. | bf16                | contiguous (else reference) |
| steps                           | [n]   | fp32                | contiguous                  |
| rate, scale, skip, norm         | []    | fp32                | -                           |

Everything that changes from step to step is read on the device, and the addresses of the tensors travel as arguments
of a kernel: nothing waits for the device, and both calls can be captured in a CUDA graph (after one call outside of it
with tensors of these sizes). Where ``skip`` is not 0, the update changes nothing, whatever the gradients hold; shadows
are written all the same, so after a call they equal the parameters. Bias corrections are computed in fp64. The fast
implementations multiply by 1 / scale, one rounding more than a division.

Floor: :func:`adamw_cost`, :func:`gradient_norm_cost`. Determinism: bitwise. AdamW is elementwise; the norm adds the
squares of a block of fixed size in fp32, and the blocks in a fixed order in fp64. The squares are fp32, so a value
above 1.8e19 makes the norm infinite, as a gradient that is not finite does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cohobate.kernels import tuning
from cohobate.kernels.registry import LIBRARY, Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

Tensors = Sequence[Tensor]
GRADIENTS = (torch.float32, torch.bfloat16)


def gradient_norm_reference(gradients: Tensors) -> Tensor:
    """Reference of :func:`gradient_norm`."""
    half = any(gradient.dtype.itemsize < 4 for gradient in gradients)
    found = tuple(gradients)
    norms = torch._foreach_norm(found, 2, torch.float32) if half else torch._foreach_norm(found)
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def adamw_reference(
    parameters: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    shadows: Tensors,
    rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Reference of :func:`adamw`; computes in the parameters' dtype."""
    beta1, beta2 = betas
    moves = torch.ones_like(rate, dtype=torch.bool) if skip is None else skip == 0
    steps += moves
    for i, (parameter, gradient, exp_avg, exp_avg_sq) in enumerate(
        zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True)
    ):
        g = gradient.to(parameter.dtype) if scale is None else gradient.to(parameter.dtype) / scale
        correction1, correction2 = 1 - beta1 ** steps[i].double(), 1 - beta2 ** steps[i].double()
        average = exp_avg.lerp(g, 1 - beta1)
        average_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
        step = (rate / correction1).to(g.dtype) * average / (average_sq / correction2.to(g.dtype)).sqrt().add(eps)
        moved = (1 - rate.double() * decays[i]).to(g.dtype) * parameter - step
        for held, new in ((exp_avg, average), (exp_avg_sq, average_sq), (parameter, moved)):
            held.copy_(torch.where(moves, new, held))
        if i < len(shadows):
            shadows[i].copy_(parameter)


def adamw_cost(values: int, gradient_itemsize: int = 4, *, shadowed: int = 0) -> Cost:
    """Floor: parameter and moments read and written, the gradient read, the shadow of ``shadowed`` values written."""
    return Cost(bytes=values * (24 + gradient_itemsize) + 2 * shadowed, flops=15 * values)


def gradient_norm_cost(values: int, itemsize: int = 4) -> Cost:
    """Floor: every gradient read once."""
    return Cost(bytes=values * itemsize, flops=2 * values)


# ---------------------------------------------------------------------------------------------------------- Triton

ADDRESSES = 256  # a launch: 2 KiB of the 4 that kernel arguments may take
SUM_BLOCK = 1024


@jit
def _addresses_kernel(out_ptr, addresses):  # type: ignore[no-untyped-def]
    """Write addresses x 16 from the arguments to memory. One program."""
    for i in tl.static_range(len(addresses)):
        tl.store(out_ptr + i, addresses[i].to(tl.int64) >> 4)


@jit
def _pointer(addresses_ptr, index, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tensor's first value."""
    pointer = tl.load(addresses_ptr + index).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _coefficients_kernel(  # type: ignore[no-untyped-def]
    steps_ptr, rate_ptr, skip_ptr, decays_ptr, logs_ptr, out_ptr, count, BLOCK: tl.constexpr
):  # fmt: skip
    """Step counts, and out [3, count]: 1 - rate decay, rate / (1 - beta1^step), 1 / sqrt(1 - beta2^step)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    step = tl.load(steps_ptr + i, mask=inside, other=1.0)
    if skip_ptr is None:
        step += 1.0
    else:
        step += tl.where(tl.load(skip_ptr) == 0.0, 1.0, 0.0)
    tl.store(steps_ptr + i, step, mask=inside)
    rate = tl.load(rate_ptr).to(tl.float64)
    decay = tl.load(decays_ptr + i, mask=inside, other=0.0)
    times = step.to(tl.float64)
    keep = 1.0 - rate * decay
    move = rate / (1.0 - tl.exp(times * tl.load(logs_ptr)))
    correction = 1.0 / tl.sqrt(1.0 - tl.exp(times * tl.load(logs_ptr + 1)))
    tl.store(out_ptr + i, keep.to(tl.float32), mask=inside)
    tl.store(out_ptr + count + i, move.to(tl.float32), mask=inside)
    tl.store(out_ptr + 2 * count + i, correction.to(tl.float32), mask=inside)


@jit
def _adamw_values(  # type: ignore[no-untyped-def]
    parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, shadow_ptr, inside, has_shadow, skipped, inverse, keep,
    move, correction, rest1, beta2, rest2, eps,
):  # fmt: skip
    """The update of one block; ``inside`` None: all of it lies inside the tensor."""
    parameter = tl.load(parameter_ptr, mask=inside)
    exp_avg = tl.load(exp_avg_ptr, mask=inside)
    exp_avg_sq = tl.load(exp_avg_sq_ptr, mask=inside)
    g = tl.load(gradient_ptr, mask=inside).to(tl.float32) * inverse
    average = exp_avg + (g - exp_avg) * rest1
    average_sq = exp_avg_sq * beta2 + g * g * rest2
    moved = parameter * keep - move * (average / (tl.sqrt_rn(average_sq) * correction + eps))
    moved = tl.where(skipped, parameter, moved)
    tl.store(exp_avg_ptr, tl.where(skipped, exp_avg, average), mask=inside)
    tl.store(exp_avg_sq_ptr, tl.where(skipped, exp_avg_sq, average_sq), mask=inside)
    tl.store(parameter_ptr, moved, mask=inside)
    if has_shadow:
        tl.store(shadow_ptr, moved.to(tl.bfloat16), mask=inside)


@jit(do_not_specialize=("count", "shadowed"))
def _adamw_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr, owners_ptr, firsts_ptr, sizes_ptr, coefficients_ptr, scale_ptr, skip_ptr, count, shadowed, rest1,
    beta2, rest2, eps, HALF: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates one block of one tensor: owners[program], whose first program is firsts[owner]."""
    program = tl.program_id(0)
    owner = tl.load(owners_ptr + program)
    begin = (program - tl.load(firsts_ptr + owner)).to(tl.int64) * BLOCK
    size = tl.load(sizes_ptr + owner)
    i = begin + tl.arange(0, BLOCK)
    parameter_ptr = _pointer(addresses_ptr, owner, tl.float32, ALIGNED) + i
    gradient_ptr = _pointer(addresses_ptr, count + owner, tl.bfloat16 if HALF else tl.float32, ALIGNED) + i
    exp_avg_ptr = _pointer(addresses_ptr, 2 * count + owner, tl.float32, ALIGNED) + i
    exp_avg_sq_ptr = _pointer(addresses_ptr, 3 * count + owner, tl.float32, ALIGNED) + i
    has_shadow = owner < shadowed
    shadow_ptr = _pointer(addresses_ptr, 4 * count + tl.minimum(owner, shadowed - 1), tl.bfloat16, ALIGNED) + i
    keep = tl.load(coefficients_ptr + owner)
    move = tl.load(coefficients_ptr + count + owner)
    correction = tl.load(coefficients_ptr + 2 * count + owner)
    inverse = 1.0
    if scale_ptr is not None:
        inverse = 1.0 / tl.load(scale_ptr)
    skipped = False
    if skip_ptr is not None:
        skipped = tl.load(skip_ptr) != 0.0
    if begin + BLOCK <= size:  # no mask, so that 16 bytes move at a time whatever the size
        _adamw_values(
            parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, shadow_ptr, None, has_shadow, skipped, inverse,
            keep, move, correction, rest1, beta2, rest2, eps,
        )  # fmt: skip
    else:
        _adamw_values(
            parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, shadow_ptr, i < size, has_shadow, skipped,
            inverse, keep, move, correction, rest1, beta2, rest2, eps,
        )  # fmt: skip


@jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr, owners_ptr, firsts_ptr, sizes_ptr, partial_ptr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds the squares of one block of one tensor."""
    program = tl.program_id(0)
    owner = tl.load(owners_ptr + program)
    begin = (program - tl.load(firsts_ptr + owner)).to(tl.int64) * BLOCK
    size = tl.load(sizes_ptr + owner)
    i = begin + tl.arange(0, BLOCK)
    pointer = _pointer(addresses_ptr, owner, tl.bfloat16 if HALF else tl.float32, ALIGNED) + i
    if begin + BLOCK <= size:
        x = tl.load(pointer).to(tl.float32)
    else:
        x = tl.load(pointer, mask=i < size, other=0.0).to(tl.float32)
    tl.store(partial_ptr + program, tl.sum(x * x))


@jit
def _norm_kernel(partial_ptr, norm_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program adds the blocks: BLOCK sums in order, then their tree, in fp64."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total)).to(tl.float32))


def _addresses(tensors: Tensors) -> tuple[Tensor, bool]:
    """The tensors' addresses on their device, int64 [n], and whether all are multiples of 16.

    They go as arguments of a kernel: a captured copy from the host would read the host again at every replay. Sixteen
    times as large they are all divisible by 16, so that one kernel serves, whatever they are.
    """
    found = [tensor.data_ptr() for tensor in tensors]
    out = torch.empty(len(found), dtype=torch.int64, device=tensors[0].device)
    for start in range(0, len(found), ADDRESSES):
        some = tuple(16 * address for address in found[start : start + ADDRESSES])
        _addresses_kernel[(1,)](out[start:], some, num_warps=1)
    return out, not any(address % 16 for address in found)


@functools.cache
def _layout(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Owner of each program, first program and size of each tensor. Kept for good: a graph may hold them."""
    counts = torch.tensor([-(-size // block) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    firsts = (counts.cumsum(0) - counts).int()
    return owners.to(device), firsts.to(device), torch.tensor(sizes, dtype=torch.int64).to(device)


@functools.cache
def _constants(decays: tuple[float, ...], betas: tuple[float, float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Decays, and the logarithms of the betas, in fp64."""
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    return (
        torch.tensor(decays, dtype=torch.float64).to(device),
        torch.tensor(logs, dtype=torch.float64).to(device),
    )


def _adamw_triton(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    shadows: list[Tensor],
    rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    decays: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    count, kind = len(parameters), gradients[0].dtype
    config = tuning.lookup("adamw", str(kind), 0, 0, architecture(steps.device))
    owners, firsts, sizes = _layout(tuple(p.numel() for p in parameters), config["BLOCK"], steps.device)
    decay, logs = _constants(tuple(decays), (beta1, beta2), steps.device)
    coefficients = torch.empty(3, count, dtype=torch.float32, device=steps.device)
    with torch.cuda.device_of(steps):
        addresses, aligned = _addresses([*parameters, *gradients, *exp_avgs, *exp_avg_sqs, *shadows])
        _coefficients_kernel[(triton.cdiv(count, 128),)](
            steps, rate, skip, decay, logs, coefficients, count, BLOCK=128, num_warps=4
        )
        if owners.numel():
            _adamw_kernel[(owners.numel(),)](
                addresses, owners, firsts, sizes, coefficients, scale, skip, count, len(shadows), 1 - beta1, beta2,
                1 - beta2, eps, HALF=kind == torch.bfloat16, ALIGNED=aligned, **config,
            )  # fmt: skip


def _gradient_norm_triton(gradients: list[Tensor]) -> Tensor:
    device, kind = gradients[0].device, gradients[0].dtype
    config = tuning.lookup("gradient_norm", str(kind), 0, 0, architecture(device))
    owners, firsts, sizes = _layout(tuple(g.numel() for g in gradients), config["BLOCK"], device)
    partial = torch.empty(owners.numel(), dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    with torch.cuda.device_of(norm):
        if partial.numel():
            addresses, aligned = _addresses(gradients)
            _squares_kernel[(owners.numel(),)](
                addresses, owners, firsts, sizes, partial, HALF=kind == torch.bfloat16, ALIGNED=aligned, **config,
            )  # fmt: skip
        _norm_kernel[(1,)](partial, norm, owners.numel(), BLOCK=SUM_BLOCK, num_warps=4)
    return norm


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, shipped

    cases = []
    layout = {"addresses_ptr": "*i64", "owners_ptr": "*i32", "firsts_ptr": "*i32", "sizes_ptr": "*i64"}
    moments = layout | {"coefficients_ptr": "*fp32", "count": "i32", "shadowed": "i32"}
    moments |= dict.fromkeys(("rest1", "beta2", "rest2", "eps"), "fp32")
    scalars = {"scale_ptr": "*fp32", "skip_ptr": "*fp32"}
    for aligned in (True, False):
        for kind, _, config in shipped("adamw", architecture, dtypes=GRADIENTS, widths=(0,)):
            constants: dict[str, Any] = {"HALF": kind == torch.bfloat16, "ALIGNED": aligned}
            vectors, name = frozenset({"vector16"} if aligned else ()), f"{kind} aligned {aligned}"
            cases.append(AotCase(_adamw_kernel, moments | scalars, constants, config, vectors, name))
            constants = constants | dict.fromkeys(scalars)
            cases.append(AotCase(_adamw_kernel, moments, constants, config, vectors, f"{name} plain"))
        for kind, _, config in shipped("gradient_norm", architecture, dtypes=GRADIENTS, widths=(0,)):
            constants = {"HALF": kind == torch.bfloat16, "ALIGNED": aligned}
            loads, signature = frozenset({"load16"} if aligned else ()), layout | {"partial_ptr": "*fp32"}
            cases.append(AotCase(_squares_kernel, signature, constants, config, loads, f"{kind} aligned {aligned}"))
    numbers = {"steps_ptr": "*fp32", "rate_ptr": "*fp32", "decays_ptr": "*fp64", "logs_ptr": "*fp64"}
    numbers |= {"out_ptr": "*fp32", "count": "i32"}
    plain, warps = frozenset[str](), {"num_warps": 4}
    for skip in ({"skip_ptr": "*fp32"}, {}):
        constants = {"BLOCK": 128} | ({} if skip else {"skip_ptr": None})
        cases.append(AotCase(_coefficients_kernel, numbers | skip, constants, warps, plain, f"skip {bool(skip)}"))
    norm = {"partial_ptr": "*fp32", "norm_ptr": "*fp32", "count": "i32"}
    cases.append(AotCase(_norm_kernel, norm, {"BLOCK": SUM_BLOCK}, warps, plain, "norm"))
    addresses: dict[str, str | tuple[str, ...]] = {"out_ptr": "*i64", "addresses": ("i64:16",) * ADDRESSES}
    cases.append(AotCase(_addresses_kernel, addresses, {}, {"num_warps": 1}, plain, "addresses"))
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _gradient_norm_native(gradients: list[Tensor]) -> Tensor:
    return torch.tensor(math.sqrt(torch.ops.cohobate_native.squares(gradients)), dtype=torch.float32)


def _adamw_native(*arguments: Any) -> None:
    torch.ops.cohobate_native.adamw(*arguments)


# ---------------------------------------------------------------------------------------------------- registration


def _limit(*, dtypes: Sequence[torch.dtype], contiguous: bool = True, plain: bool = True) -> list[str]:
    """Facts: the gradients' dtypes, whether parameters and moments are contiguous, and fp32."""
    reasons = []
    if len(set(dtypes)) != 1 or dtypes[0] not in GRADIENTS:
        names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        reasons.append(f"gradients are all float32, or all bfloat16, not {names}")
    if not plain:
        reasons.append("parameters and moments are float32")
    if not contiguous:
        reasons.append("parameters, moments and shadows are contiguous")
    return reasons


for _name, _cost in (("gradient_norm", gradient_norm_cost), ("adamw", adamw_cost)):
    register(Op(_name, ("reference", "native", "triton"), _cost, {"native": _limit, "triton": _limit}))

_norm_op = define(
    "gradient_norm(Tensor[] gradients, str impl) -> Tensor",
    fake=lambda gradients: gradients[0].new_empty((), dtype=torch.float32),
    native=_gradient_norm_native,
    triton=_gradient_norm_triton,
)
_adamw_op = define(
    "adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!) steps, Tensor(e!)[] shadows, Tensor rate, Tensor? scale, Tensor? skip, float[] decays, float beta1, "
    "float beta2, float eps, str impl) -> ()",
    fake=lambda *arguments: None,
    native=_adamw_native,
    triton=_adamw_triton,
)


def _count_changes(keys: Any, *arguments: Any) -> None:
    """Tell autograd what changes in place, as torch.library.custom_op does for the ops that it makes."""
    parameters, _, exp_avgs, exp_avg_sqs, steps, shadows, *_ = arguments
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs, steps, *shadows])
    _adamw_op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)  # type: ignore[attr-defined]


LIBRARY.impl("adamw", _count_changes, "ADInplaceOrView", with_keyset=True)


# ---------------------------------------------------------------------------------------------------------- public


@torch.no_grad()
def gradient_norm(gradients: Tensors, *, backend: str | None = None) -> Tensor:
    """Global L2 norm of a list of gradients.

    Args:
        gradients: at least one, on one device, of any shapes; fp32, or all bf16 (others: reference).
        backend: auto (None), reference, native or triton.

    Returns:
        0-d fp32 on their device; not finite where a gradient is not.

    Raises:
        TypeError, ValueError: no tensor, or one that does not fit; the message names it.
    """
    if not gradients:
        raise ValueError("gradients: expected at least one tensor, got none")
    _check("gradients", gradients, gradients[0], _FLOATS)
    impl = choose("gradient_norm", gradients[0], backend, dtypes=tuple({g.dtype for g in gradients}))
    if impl == "reference":
        return gradient_norm_reference(gradients)
    norm: Tensor = _norm_op([_dense(gradient) for gradient in gradients], impl)
    return norm


@torch.no_grad()
def adamw(
    parameters: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    *,
    rate: Tensor,
    decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    shadows: Tensors = (),
    backend: str | None = None,
) -> None:
    """One AdamW update of every parameter, in place; formulas at the top of the module.

    Args:
        parameters, gradients, exp_avgs, exp_avg_sqs: n tensors each, of the parameters' shapes, on one device.
            Parameters and moments are fp32, gradients fp32 or all bf16 (other floats: reference).
        steps: [n] fp32, updates that each parameter has had; counted up.
        rate: 0-d fp32, learning rate. decays: n weight decays.
        betas, eps: of Adam.
        scale: 0-d fp32, what the gradients are divided by; None for 1.
        skip: 0-d fp32, not 0 to leave everything as it is; None for 0.
        shadows: bf16 copies of the first so many parameters, written in the same pass.
        backend: auto (None), reference, native or triton.

    Raises:
        TypeError, ValueError: a list or a tensor that does not fit; the message names it.
    """
    _check_adamw(parameters, gradients, exp_avgs, exp_avg_sqs, steps, shadows, rate, scale, skip, decays, betas)
    held = (*parameters, *exp_avgs, *exp_avg_sqs)
    facts: dict[str, Any] = {
        "dtypes": tuple({gradient.dtype for gradient in gradients}),
        "contiguous": all(tensor.is_contiguous() for tensor in (*held, *shadows, steps)),
        "plain": all(tensor.dtype == torch.float32 for tensor in held),
    }
    impl = choose("adamw", steps, backend, **facts)
    if impl == "reference":
        adamw_reference(
            parameters, gradients, exp_avgs, exp_avg_sqs, steps, shadows, rate, scale, skip, decays, betas, eps
        )
        return
    _adamw_op(
        list(parameters), [_dense(gradient) for gradient in gradients], list(exp_avgs), list(exp_avg_sqs), steps,
        list(shadows), rate, scale, skip, [float(decay) for decay in decays], float(betas[0]), float(betas[1]),
        float(eps), impl,
    )  # fmt: skip


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.is_contiguous() else gradient.contiguous()


def _check(
    name: str, tensors: Tensors, like: Tensor, dtypes: Sequence[torch.dtype], shapes: Sequence[torch.Size] | None = None
) -> None:
    """Every tensor of a list; a message is only made for one that does not fit."""
    device = like.device
    for i, tensor in enumerate(tensors):
        fits = isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.device == device
        if not fits or (shapes is not None and tensor.shape != shapes[i]):
            check_tensor(f"{name}[{i}]", tensor, dtypes=dtypes, shape=None if shapes is None else shapes[i], like=like)


def _check_adamw(
    parameters: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    shadows: Tensors,
    rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    decays: Sequence[float],
    betas: tuple[float, float],
) -> None:
    if not parameters:
        raise ValueError("parameters: expected at least one tensor, got none")
    count = len(parameters)
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "decays": decays}
    for name, found in lists.items():
        if len(found) != count:
            raise ValueError(f"{name}: expected {count}, as many as parameters, got {len(found)}")
    if len(shadows) > count:
        raise ValueError(f"shadows: expected at most {count}, as many as parameters, got {len(shadows)}")
    first, shapes = parameters[0], [parameter.shape for parameter in parameters]
    for name, tensors in (
        ("parameters", parameters), ("gradients", gradients), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs),
    ):  # fmt: skip
        _check(name, tensors, first, _FLOATS, shapes)
    _check("shadows", shadows, first, (torch.bfloat16,), shapes)
    check_tensor("steps", steps, dtypes=(torch.float32,), shape=(count,), like=first)
    for name, scalar in (("rate", rate), ("scale", scale), ("skip", skip)):
        if scalar is not None:
            check_tensor(name, scalar, dtypes=(torch.float32,), shape=(), like=first)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
