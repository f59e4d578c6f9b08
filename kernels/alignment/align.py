"""align_loss: multi-layer feature alignment in one call, gradient computed in the forward pass.

    total = sum over layers l of w_l * per_layer[l],   per_layer[l] = mean over (b, j, d) of f(p - g)

    p = prediction[b, prediction_rows[b, j]]
    g = target[b, target_rows[b, j]], standardised over its channels if asked: (t - mean) / sqrt(var + eps), or
        (t - mean) / (sqrt(var) + eps); var divides by D - ddof

    smooth_l1   f(e) = e^2 / (2 beta) if |e| < beta else |e| - beta / 2        f'(e) = clamp(e / beta, -1, 1)
    mse         f(e) = e^2                                                      f'(e) = 2 e
    l1          f(e) = |e|                                                      f'(e) = sign(e)
    cosine      per_layer[l] = mean over (b, j) of 1 - p.g / (|p| |g|)          norms at least 1e-8

Sources: dBOT (Liu et al., ICLR 2024): smooth_l1 with beta 2 on Standardise(ddof=1, eps=1e-6, eps_inside=True), the rows
being the class token and the masked tokens; AMD (Zhao et al., CVPR 2024): mse on raw targets, plain mean over layers.

| tensor              | shape      | dtype            | strides                                     |
|---------------------|------------|------------------|---------------------------------------------|
| predictions[l]      | [B, Rp, D] | fp32, bf16, fp16 | last one is 1 (else copied once)            |
| targets[l]          | [B, Rt, D] | fp32, bf16, fp16 | last one is 1 (else copied once)            |
| prediction_rows [l] | [B, n]     | int32            | last one is 1 (else copied once); None: all |
| target_rows [l]     | [B, n]     | int32            | last one is 1 (else copied once); None: all |
| total, per_layer    | 0-d, [L]   | fp32             |                                             |

Layers may differ in every size but B. Values are computed in fp32 whatever the dtypes; float64 runs as the reference.
Floor: :func:`align_cost`.

Gradient. It is computed while the row is in cache or registers, and never when no prediction needs it. ``triton``
stores it compactly, [B, n, D] in the prediction's dtype and without the factor w / (B n D), which would underflow fp16
before any loss scale can arrive; the backward pass multiplies by that factor and the incoming gradient, read on the
device, and places the rows. ``native`` (fp32 and bf16, whose exponents reach) writes it in its final form, so a
backward pass whose incoming gradient is one moves nothing at all. The stored gradient is never modified.

Determinism: bitwise from run to run. Each row's loss is one number and the rows are added in an order that follows from
their number alone, whatever the thread count or launch configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cohobate.kernels import tuning
from cohobate.kernels.memory import recycled
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

LOSSES = ("smooth_l1", "mse", "l1", "cosine")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 2048  # channels that one Triton program keeps in registers
LAYERS_A_LAUNCH = 8

Rows = Tensor | None


class Standardise(NamedTuple):
    """Per-token standardisation of the target: divide by sqrt(var + eps) or by sqrt(var) + eps."""

    ddof: int = 1
    eps: float = 1e-6
    eps_inside: bool = True


class AlignLoss(NamedTuple):
    """Result of :func:`align_loss`: ``total`` 0-d fp32 with gradient, ``per_layer`` [L] fp32 without."""

    total: Tensor
    per_layer: Tensor


def standardise_reference(target: Tensor, standardise: Standardise) -> Tensor:
    """(t - mean) / sqrt(var + eps) per row, in fp32 (fp64 stays fp64)."""
    mean = target.mean(-1, keepdim=True)
    var = target.var(-1, keepdim=True, correction=standardise.ddof)
    scale = (var + standardise.eps).sqrt() if standardise.eps_inside else var.sqrt() + standardise.eps
    return (target - mean) / scale


def align_loss_reference(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    prediction_rows: Rows | Sequence[Rows] = None,
    target_rows: Rows | Sequence[Rows] = None,
    loss: str = "smooth_l1",
    beta: float = 2.0,
    standardise: Standardise | None = None,
    weights: Sequence[float] | None = None,
) -> AlignLoss:
    """Reference of :func:`align_loss`: the literal chain of eager operations, layer by layer."""
    values = []
    chosen = _a_layer(prediction_rows, len(predictions)), _a_layer(target_rows, len(predictions))
    for prediction, target, from_rows, to_rows in zip(predictions, targets, *chosen, strict=True):
        prediction, target = _gather(prediction, from_rows), _gather(target, to_rows)
        kind = torch.promote_types(torch.float32, prediction.dtype)
        prediction, target = prediction.to(kind), target.detach().to(kind)
        if standardise is not None:
            target = standardise_reference(target, standardise)
        if loss == "smooth_l1":
            values.append(torch.nn.functional.smooth_l1_loss(prediction, target, beta=beta))
        elif loss == "mse":
            values.append(torch.nn.functional.mse_loss(prediction, target))
        elif loss == "l1":
            values.append(torch.nn.functional.l1_loss(prediction, target))
        else:
            values.append((1 - torch.nn.functional.cosine_similarity(prediction, target, dim=-1)).mean())
    per_layer = torch.stack(values)
    total = sum(value * weight for value, weight in zip(values, _weights(weights, len(values)), strict=True))
    return AlignLoss(torch.as_tensor(total), per_layer.detach())


def _gather(x: Tensor, rows: Rows) -> Tensor:
    return x if rows is None else x.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _a_layer(rows: Rows | Sequence[Rows], layers: int) -> list[Rows]:
    """One entry a layer: the same rows for all of them, or the list as it is."""
    return [rows] * layers if rows is None or isinstance(rows, Tensor) else list(rows)


def _weights(weights: Sequence[float] | None, layers: int) -> list[float]:
    return [1 / layers] * layers if weights is None else [float(weight) for weight in weights]


def align_cost(
    batch: int,
    count: int,
    width: int,
    prediction_itemsize: int,
    target_itemsize: int,
    *,
    length: int | None = None,
    loss: str = "smooth_l1",
    standardise: bool = True,
    gradient: bool = True,
) -> Cost:
    """Floor of one layer, forward and backward: chosen rows and their indices read once, the gradient written once.

    ``length``: rows a sample of the whole prediction where ``count`` of them are chosen (the other rows of its gradient
    are zeros that somebody must write); None where the loss reads all of them.
    """
    values = batch * count * width
    read = values * (prediction_itemsize + target_itemsize)
    indices = 0 if length is None else 2 * 4 * batch * count
    written = batch * (length or count) * width * prediction_itemsize if gradient else 0
    flops = {"smooth_l1": 5, "mse": 3, "l1": 3, "cosine": 6}[loss]
    flops += (6 if standardise else 0) + ((3 if loss == "cosine" else 1) if gradient else 0)
    return Cost(bytes=read + written + indices, flops=flops * values)


# ---------------------------------------------------------------------------------------------------------- Triton


MEAN_BLOCK = 8192  # rows that the summing program reads at a time
MEAN_CONFIG = {"num_warps": 8}  # fixed: it shapes the tree of the sum
PLACE_BLOCK = 256


@jit
def _pick(values, layer):  # type: ignore[no-untyped-def]
    """The layer's entry of a tuple of kernel arguments."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        if layer == i:
            value = values[i]
    return value


@jit
def _row_ptr(base, rows, layer, sample, j, stride_b, stride_n, stride_rows):  # type: ignore[no-untyped-def]
    """Start of row j, or of row rows[sample, j], of the sample."""
    if rows is not None:
        j = tl.load(_pick(rows, layer) + sample * stride_rows + j).to(tl.int64)
    return _pick(base, layer) + sample * stride_b + j * stride_n


@jit
def _align_kernel(  # type: ignore[no-untyped-def]
    predictions, targets, prediction_rows, target_rows, grads, row_losses, count, stride_p_b, stride_p_n, stride_t_b,
    stride_t_n, stride_prediction_rows, stride_target_rows, beta, eps, LOSS: tl.constexpr, STANDARDISE: tl.constexpr,
    DDOF: tl.constexpr, EPS_INSIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes one row of one layer; the tuples hold one tensor a layer."""
    i, layer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample, j = i // count, i % count
    p_ptr = _row_ptr(predictions, prediction_rows, layer, sample, j, stride_p_b, stride_p_n, stride_prediction_rows)
    t_ptr = _row_ptr(targets, target_rows, layer, sample, j, stride_t_b, stride_t_n, stride_target_rows)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    p = tl.load(p_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(t_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if STANDARDISE:
        first = tl.load(t_ptr).to(tl.float32)  # deviations from it: a constant row becomes exactly zero
        g = tl.where(inside, g - first, 0.0)
        g = tl.where(inside, g - tl.sum(g) / D, 0.0)
        variance = tl.sum(g * g) / (D - DDOF)
        if EPS_INSIDE:
            g = g * (1.0 / tl.sqrt_rn(variance + eps))
        else:
            g = g * (1.0 / (tl.sqrt_rn(variance) + eps))
    if LOSS == "cosine":
        dot, p_norm, g_norm = tl.sum(p * g), tl.sqrt_rn(tl.sum(p * p)), tl.sqrt_rn(tl.sum(g * g))
        p_safe = tl.maximum(p_norm, 1e-8)
        across = 1.0 / (p_safe * tl.maximum(g_norm, 1e-8))
        along = tl.where(p_norm > 0, dot * across / (p_safe * tl.maximum(p_norm, 1e-30)), 0.0)
        slope = along * p - across * g
        value = 1.0 - dot * across
    else:
        e = p - g
        if LOSS == "smooth_l1":
            clamped = tl.where(e < -beta, -beta, tl.where(e > beta, beta, e))
            slope = clamped / beta
            f = slope * (e - 0.5 * clamped)
        elif LOSS == "mse":
            slope = 2.0 * e
            f = e * e
        else:
            slope = tl.where(e < 0, -1.0, tl.where(e > 0, 1.0, e))
            f = tl.abs(e)
        value = tl.sum(tl.where(inside, f, 0.0))
    tl.store(_pick(row_losses, layer) + i, value)
    if grads is not None:
        grad_ptr = _pick(grads, layer)
        tl.store(grad_ptr + i * D + columns, slope.to(grad_ptr.dtype.element_ty), mask=inside)


@jit
def _align_mean_kernel(row_losses, per_layer_ptr, rows, divisor, LAYERS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program adds the rows of one layer: BLOCK sums in order, then their tree."""
    layer = tl.program_id(0)
    row_ptr = _pick(row_losses, layer)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        acc += tl.load(row_ptr + i, mask=i < rows, other=0.0)
    tl.store(per_layer_ptr + _pick(LAYERS, layer), tl.sum(acc) / divisor)


@jit
def _align_total_kernel(per_layer_ptr, total_ptr, weights):  # type: ignore[no-untyped-def]
    """One program: the weighted sum over the layers, in order."""
    total = 0.0
    for layer in tl.static_range(len(weights)):
        total += weights[layer] * tl.load(per_layer_ptr + layer)
    tl.store(total_ptr, total)


@jit
def _align_place_kernel(rows_ptr, place_ptr, count, length, stride_rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """place[b, rows[b, j]] = j, BLOCK entries a program; the rest was set to -1 before."""
    sample = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + sample * stride_rows + j, mask=j < count, other=0)
    tl.store(place_ptr + sample * length + row, j, mask=j < count)


@jit
def _align_backward_kernel(  # type: ignore[no-untyped-def]
    grads, outs, places, grad_ptr, scales, count, length, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program writes one row of one layer's gradient: stored gradient * (scale * incoming), or zeros."""
    i, layer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    source, here = i, True
    if places is not None:
        j = tl.load(_pick(places, layer) + i)
        here = j >= 0
        source = (i // length) * count + tl.maximum(j, 0)
    stored = tl.load(_pick(grads, layer) + source * D + columns, mask=inside & here, other=0.0)
    scale = _pick(scales, layer) * tl.load(grad_ptr)
    out_ptr = _pick(outs, layer)
    tl.store(out_ptr + i * D + columns, (stored.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=inside)


def _alike(keys: Sequence[Any]) -> Iterator[list[int]]:
    """Layer numbers with equal keys, as many together as one launch takes."""
    for key in dict.fromkeys(keys):
        layers = [layer for layer, other in enumerate(keys) if other == key]
        for start in range(0, len(layers), LAYERS_A_LAUNCH):
            yield layers[start : start + LAYERS_A_LAUNCH]


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _rows_stride(rows: Rows) -> int:
    return -1 if rows is None else rows.stride(0)


def _loss_triton(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    prediction_rows: Sequence[Rows],
    target_rows: Sequence[Rows],
    loss: str,
    beta: float,
    standardise: bool,
    ddof: int,
    eps: float,
    eps_inside: bool,
    weights: Sequence[float],
    wanted: Sequence[bool],
    final: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    first = predictions[0]
    counts = _counts(predictions, prediction_rows)
    grads = _empty_grads(predictions, counts, wanted, final)
    kept = iter(grads)
    grad_of = [next(kept) if want else None for want in wanted]
    per_layer, total = first.new_empty(len(predictions), dtype=torch.float32), first.new_empty((), dtype=torch.float32)
    keys = [
        (n, p.shape, p.dtype, t.dtype, _strides(p), _strides(t), _rows_stride(r), _rows_stride(there), want)
        for p, t, n, r, there, want in zip(
            predictions, targets, counts, prediction_rows, target_rows, wanted, strict=True
        )
    ]
    with torch.cuda.device_of(first):
        for layers in _alike(keys):
            p, t, count = predictions[layers[0]], targets[layers[0]], counts[layers[0]]
            batch, _, width = p.shape
            row_losses = [per_layer.new_empty(batch * count) for _ in layers]
            if batch * count:
                config = tuning.lookup("align_loss", str(p.dtype), width, count, architecture(p.device))
                _align_kernel[(batch * count, len(layers))](
                    _of(predictions, layers), _of(targets, layers), _of(prediction_rows, layers),
                    _of(target_rows, layers), _of(grad_of, layers), tuple(row_losses), count, *_strides(p),
                    *_strides(t), _rows_stride(prediction_rows[layers[0]]), _rows_stride(target_rows[layers[0]]),
                    beta, eps, LOSS=loss, STANDARDISE=standardise, DDOF=ddof, EPS_INSIDE=eps_inside, D=width,
                    BLOCK_D=triton.next_power_of_2(width), **config,
                )  # fmt: skip
            _align_mean_kernel[(len(layers),)](
                tuple(row_losses), per_layer, batch * count, float(_divisor(loss, batch, count, width)),
                LAYERS=tuple(layers), BLOCK=MEAN_BLOCK, **MEAN_CONFIG,
            )  # fmt: skip
        _align_total_kernel[(1,)](per_layer, total, tuple(weights), num_warps=1)
    return total, per_layer, grads


def _of(values: Sequence[Any], layers: Sequence[int]) -> tuple[Any, ...] | None:
    """The layers' entries as one kernel argument; None where they have none."""
    return None if values[layers[0]] is None else tuple(values[layer] for layer in layers)


def _backward_triton(
    grads: Sequence[Tensor],
    grad: Tensor,
    rows: Sequence[Rows],
    lengths: Sequence[int],
    loss: str,
    weights: Sequence[float],
) -> list[Tensor]:
    outs = [g.new_empty(g.shape[0], length, g.shape[2]) for g, length in zip(grads, lengths, strict=True)]
    scales = [w / max(_divisor(loss, *g.shape), 1) for g, w in zip(grads, weights, strict=True)]
    with torch.cuda.device_of(grad):
        places = _places(rows, lengths)
        keys = [(g.shape, length, g.dtype, r is None) for g, length, r in zip(grads, lengths, rows, strict=True)]
        for layers in _alike(keys):
            batch, count, width = grads[layers[0]].shape
            length = lengths[layers[0]]
            if batch * length:
                dtype = str(grads[layers[0]].dtype)
                config = tuning.lookup("align_loss", dtype, width, count, architecture(grad.device))
                _align_backward_kernel[(batch * length, len(layers))](
                    _of(grads, layers), _of(outs, layers), _of(places, layers), grad, _of(scales, layers), count,
                    length, D=width, BLOCK_D=triton.next_power_of_2(width), **config,
                )  # fmt: skip
    return outs


def _places(rows: Sequence[Rows], lengths: Sequence[int]) -> list[Rows]:
    """For each layer int32 [B, length]: which chosen row stands there, or -1. Layers with the same rows share one."""
    made: dict[tuple[int, ...], Tensor] = {}
    places: list[Rows] = []
    for chosen, length in zip(rows, lengths, strict=True):
        if chosen is None:
            places.append(None)
            continue
        key = (chosen.data_ptr(), chosen.stride(0), *chosen.shape, length)
        if key not in made:
            batch, count = chosen.shape
            made[key] = chosen.new_full((batch, length), -1)
            if chosen.numel():
                _align_place_kernel[(batch, triton.cdiv(count, PLACE_BLOCK))](
                    chosen, made[key], count, length, chosen.stride(0), BLOCK=PLACE_BLOCK, num_warps=4
                )
        places.append(made[key])
    return places


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels as the launchers above call them, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, pointer, shipped

    def tuples(layers: int, **kinds: str) -> dict[str, str | tuple[str, ...]]:
        return {name: (kind,) * layers for name, kind in kinds.items()}

    cases = []
    vectors = frozenset({"vector16"})
    numbers = {f"stride_{name}": "i32:16" for name in ("p_b", "p_n", "t_b", "t_n")}
    numbers |= dict.fromkeys(("stride_prediction_rows", "stride_target_rows", "count"), "i32")
    numbers |= {"beta": "fp32", "eps": "fp32"}
    plain = [(1, "smooth_l1", True)]
    variants = [*plain, (1, "mse", False), (1, "l1", False), (1, "cosine", True), (LAYERS_A_LAUNCH, "smooth_l1", True)]
    widths = (384, 512, 768, 1024, WIDEST)
    for dtype, width, config in shipped("align_loss", arch, dtypes=FLOAT_DTYPES[:2], widths=widths):
        kind, sizes = pointer(dtype), {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
        for layers, loss, standardise in variants if width == 768 else plain:
            rows = tuples(layers, prediction_rows="*i32", target_rows="*i32", row_losses="*fp32")
            signature = tuples(layers, predictions=kind, targets=kind, grads=kind) | rows | numbers
            constants = sizes | {"LOSS": loss, "STANDARDISE": standardise, "DDOF": 1, "EPS_INSIDE": True}
            name = f"{loss} {dtype} {width} layers {layers}"
            cases.append(AotCase(_align_kernel, signature, constants, config, vectors, name))
        for layers in (1, LAYERS_A_LAUNCH) if width == 768 else (1,):
            signature = tuples(layers, grads=kind, outs=kind, places="*i32", scales="fp32")
            signature |= {"grad_ptr": "*fp32", "count": "i32", "length": "i32"}
            name = f"{dtype} {width} layers {layers}"
            cases.append(AotCase(_align_backward_kernel, signature, sizes, config, vectors, name))
    mean = tuples(LAYERS_A_LAUNCH, row_losses="*fp32") | {"per_layer_ptr": "*fp32", "rows": "i32", "divisor": "fp32"}
    constants = {"LAYERS": tuple(range(LAYERS_A_LAUNCH)), "BLOCK": MEAN_BLOCK}
    cases.append(AotCase(_align_mean_kernel, mean, constants, MEAN_CONFIG, frozenset(), "8 layers"))
    total = tuples(4, weights="fp32") | {"per_layer_ptr": "*fp32", "total_ptr": "*fp32"}
    cases.append(AotCase(_align_total_kernel, total, {}, {"num_warps": 1}, frozenset(), "4 layers"))
    place = {"rows_ptr": "*i32", "place_ptr": "*i32", "count": "i32", "length": "i32", "stride_rows": "i32"}
    cases.append(AotCase(_align_place_kernel, place, {"BLOCK": PLACE_BLOCK}, {"num_warps": 4}, frozenset(), "rows"))
    return cases


# ---------------------------------------------------------------------------------------------------------- native


def _loss_native(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    prediction_rows: Sequence[Rows],
    target_rows: Sequence[Rows],
    loss: str,
    beta: float,
    standardise: bool,
    ddof: int,
    eps: float,
    eps_inside: bool,
    weights: Sequence[float],
    wanted: Sequence[bool],
    final: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    means, grads = [], []
    counts = _counts(predictions, prediction_rows)
    for layer, (prediction, count) in enumerate(zip(predictions, counts, strict=True)):
        batch, length, width = prediction.shape
        divisor = _divisor(loss, batch, count, width)
        grad = recycled((batch, length, width), prediction.dtype) if wanted[layer] else None
        value = torch.ops.cohobate_native.align(
            prediction, targets[layer], prediction_rows[layer], target_rows[layer], LOSSES.index(loss), beta,
            standardise, ddof, eps, eps_inside, weights[layer] / max(divisor, 1), grad,
        )  # fmt: skip
        means.append(value / divisor if divisor else float("nan"))
        if grad is not None:
            grads.append(grad)
    per_layer = torch.tensor(means, dtype=torch.float32)
    total = sum(mean * weight for mean, weight in zip(means, weights, strict=True))
    return torch.tensor(total, dtype=torch.float32), per_layer, grads


def _backward_native(
    grads: Sequence[Tensor],
    grad: Tensor,
    rows: Sequence[Rows],
    lengths: Sequence[int],
    loss: str,
    weights: Sequence[float],
) -> list[Tensor]:
    return [torch.mul(stored, grad, out=recycled(stored.shape, stored.dtype)) for stored in grads]


# ---------------------------------------------------------------------------------------------------- registration


def _counts(predictions: Sequence[Tensor], rows: Sequence[Rows]) -> list[int]:
    """Rows a sample that each layer's loss reads."""
    return [p.shape[1] if r is None else r.shape[1] for p, r in zip(predictions, rows, strict=True)]


def _divisor(loss: str, batch: int, count: int, width: int) -> int:
    """What the mean of a layer divides by."""
    return batch * count * (1 if loss == "cosine" else width)


def _empty_grads(
    predictions: Sequence[Tensor], counts: Sequence[int], wanted: Sequence[bool], final: bool
) -> list[Tensor]:
    return [
        p.new_empty(p.shape[0], p.shape[1] if final else n, p.shape[2])
        for p, n, want in zip(predictions, counts, wanted, strict=True)
        if want
    ]


def _fake_loss(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    predictions, rows, wanted, final = args[0], args[2], args[-2], args[-1]
    first = predictions[0]
    total, per_layer = first.new_empty((), dtype=torch.float32), first.new_empty(len(predictions), dtype=torch.float32)
    return total, per_layer, _empty_grads(predictions, _counts(predictions, rows), wanted, final)


def _dtype_reasons(implementation: str, known: Sequence[torch.dtype], dtypes: Sequence[str]) -> list[str]:
    names = [str(dtype) for dtype in known]
    computes = f"{implementation} computes in {', '.join(names)}".replace("torch.", "")
    return [f"{computes}, not {name.removeprefix('torch.')}" for name in dtypes if name not in names]


def _native_limit(*, dtypes: Sequence[str], wide: bool) -> list[str]:
    return _dtype_reasons("native", NATIVE_DTYPES, dtypes)


def _triton_limit(*, dtypes: Sequence[str], wide: bool) -> list[str]:
    reasons = _dtype_reasons("triton", FLOAT_DTYPES, dtypes)
    return reasons + [f"triton keeps rows of up to {WIDEST} channels in registers, a layer is wider"] * wide


register(
    Op(
        "align_loss",
        ("reference", "native", "triton"),
        align_cost,
        {"native": _native_limit, "triton": _triton_limit},
    )
)

_loss_op = define(
    "align_loss(Tensor[] predictions, Tensor[] targets, Tensor?[] prediction_rows, Tensor?[] target_rows, str loss, "
    "float beta, bool standardise, int ddof, float eps, bool eps_inside, float[] weights, bool[] wanted, bool final, "
    "str impl) -> (Tensor, Tensor, Tensor[])",
    fake=_fake_loss,
    native=_loss_native,
    triton=_loss_triton,
)
_backward_op = define(
    "align_loss_backward(Tensor[] grads, Tensor grad, Tensor?[] rows, SymInt[] lengths, str loss, float[] weights, "
    "str impl) -> Tensor[]",
    fake=lambda grads, grad, rows, lengths, loss, weights: [
        g.new_empty(g.shape[0], length, g.shape[2]) for g, length in zip(grads, lengths, strict=True)
    ],
    native=_backward_native,
    triton=_backward_triton,
)


class _Settings(NamedTuple):
    """What a call says beside its tensors, in the order of the op's schema."""

    loss: str
    beta: float
    standardise: bool
    ddof: int
    eps: float
    eps_inside: bool
    weights: list[float]
    wanted: list[bool]
    final: bool


class _Align(torch.autograd.Function):
    """``tensors``: predictions, targets, then every different tensor of rows; ``rows``: which is a layer's, or -1.

    torch.compile refuses one tensor given twice.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, settings: _Settings, rows: list[int], rows_there: list[int], impl: str, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        layers = len(rows)
        predictions, targets, tables = tensors[:layers], tensors[layers : 2 * layers], (*tensors[2 * layers :], None)
        chosen, chosen_there = [tables[i] for i in rows], [tables[i] for i in rows_there]
        total, per_layer, grads = _loss_op(predictions, targets, chosen, chosen_there, *settings, impl)
        ctx.mark_non_differentiable(per_layer)
        wanted = [layer for layer, want in enumerate(settings.wanted) if want]
        ctx.wanted, ctx.inputs, ctx.impl, ctx.loss = wanted, len(tensors), impl, settings.loss
        ctx.lengths = [predictions[layer].shape[1] for layer in wanted]
        ctx.weights = [settings.weights[layer] for layer in wanted]
        ctx.save_for_backward(*grads, *(chosen[layer] for layer in wanted))
        return total, per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
        count = len(ctx.wanted)
        stored, rows = list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        if ctx.impl != "native" or not _is_one(grad):
            stored = _backward_op(stored, grad, rows, ctx.lengths, ctx.loss, ctx.weights, ctx.impl)
        grads: list[Tensor | None] = [None] * ctx.inputs
        for layer, of_layer in zip(ctx.wanted, stored, strict=True):
            grads[layer] = of_layer
        return None, None, None, None, *grads


def _is_one(grad: Tensor) -> bool:
    """Whether this CPU scalar is 1, the usual incoming gradient; unknown, so False, while something traces the call."""
    return not torch.compiler.is_compiling() and type(grad) is Tensor and grad.item() == 1.0


# ---------------------------------------------------------------------------------------------------------- public


def align_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    prediction_rows: Rows | Sequence[Rows] = None,
    target_rows: Rows | Sequence[Rows] = None,
    loss: str = "smooth_l1",
    beta: float = 2.0,
    standardise: Standardise | None = None,
    weights: Sequence[float] | None = None,
    backend: str | None = None,
) -> AlignLoss:
    """Distance of predictions from target features: L layers, each the mean over its rows and channels, then weighted.

    Args:
        predictions: [B, Rp, D], or one such tensor a layer; fp32, bf16, fp16 (fp64: reference). Layers share B alone.
        targets: as many of [B, Rt, D]. They get no gradient.
        prediction_rows: int32 [B, n], the rows of each prediction to read, distinct within a sample; None for all. One
            for all layers, or one (or None) a layer. Values are checked by ``native`` alone: that reads them anyway.
        target_rows: likewise for the targets; n must agree with what the predictions give.
        loss: "smooth_l1", "mse", "l1" or "cosine".
        beta: where smooth_l1 turns from square to linear; 0 is l1.
        standardise: how to standardise each target row over its channels; None for not at all.
        weights: w_l; 1 / L each if None.
        backend: auto (None), reference, native or triton.

    Returns:
        AlignLoss(total, per_layer): 0-d fp32, the weighted sum, with gradient; fp32 [L], unweighted, without. fp64
        predictions give fp64. A layer without rows is nan, as the mean of nothing is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what was expected and what came.
    """
    predictions = [predictions] if isinstance(predictions, Tensor) else list(predictions)
    targets = [targets] if isinstance(targets, Tensor) else list(targets)
    layers = len(predictions)
    rows, rows_there = _a_layer(prediction_rows, layers), _a_layer(target_rows, layers)
    _check(predictions, targets, rows, rows_there)
    _check_settings(loss, beta, standardise, weights, predictions)
    scales = _weights(weights, layers)
    dtypes = tuple(sorted({str(x.dtype) for x in (*predictions, *targets)}))
    wide = any(prediction.shape[2] > WIDEST for prediction in predictions)
    impl = choose("align_loss", predictions[0], backend, dtypes=dtypes, wide=wide)
    if impl == "reference":
        return align_loss_reference(
            predictions, targets, prediction_rows=rows, target_rows=rows_there, loss=loss, beta=beta,
            standardise=standardise, weights=scales,
        )  # fmt: skip
    if loss == "smooth_l1" and beta == 0:
        loss = "l1"
    wanted = [torch.is_grad_enabled() and prediction.requires_grad for prediction in predictions]
    flags = standardise if standardise is not None else Standardise()
    settings = _Settings(loss, float(beta), standardise is not None, *flags, scales, wanted, impl == "native")
    targets = [_dense(x.detach()) for x in targets]
    if True not in wanted:  # nothing to remember for a backward pass
        chosen, chosen_there = ([None if r is None else _dense(r) for r in both] for both in (rows, rows_there))
        predictions = [_dense(x) for x in predictions]
        total, per_layer, _ = _loss_op(predictions, targets, chosen, chosen_there, *settings, impl)
        return AlignLoss(total, per_layer)
    predictions = [_dense(x) for x in _distinct(predictions)]
    tables: list[Tensor] = []
    which, which_there = ([_index(r, tables) for r in both] for both in (rows, rows_there))
    total, per_layer = _Align.apply(settings, which, which_there, impl, *predictions, *targets, *map(_dense, tables))
    return AlignLoss(total, per_layer)


def _distinct(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors, a repeated one as a view of itself."""
    for i, tensor in enumerate(tensors):
        yield tensor.view_as(tensor) if any(tensor is earlier for earlier in tensors[:i]) else tensor


def _index(rows: Rows, tables: list[Tensor]) -> int:
    """Where ``rows`` stands in ``tables``, added if it is not there yet; -1 for None."""
    if rows is None:
        return -1
    for i, table in enumerate(tables):
        if table is rows:
            return i
    tables.append(rows)
    return len(tables) - 1


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], rows: Sequence[Rows], rows_there: Sequence[Rows]
) -> None:
    if not predictions:
        raise ValueError("predictions: expected at least one layer, got none")
    for name, values in (("targets", targets), ("prediction_rows", rows), ("target_rows", rows_there)):
        if len(values) != len(predictions):
            raise ValueError(f"{name}: expected {len(predictions)}, one a prediction, got {len(values)}")
    first, dtypes = predictions[0], (*FLOAT_DTYPES, torch.float64)
    check_tensor("predictions[0]", first, dtypes=dtypes, shape=(None, None, None))
    batch = first.shape[0]
    for layer, (prediction, target, r, there) in enumerate(zip(predictions, targets, rows, rows_there, strict=True)):
        if not _fits(prediction, first, dtypes):
            check_tensor(f"predictions[{layer}]", prediction, dtypes=dtypes, shape=(batch, None, None), like=first)
        width = prediction.shape[2]
        if not _fits(target, first, dtypes) or target.shape[2] != width:
            check_tensor(f"targets[{layer}]", target, dtypes=dtypes, shape=(batch, None, width), like=first)
        for name, indices in (("prediction_rows", r), ("target_rows", there)):
            if indices is not None and not _fits(indices, first, (torch.int32,), dims=2):
                check_tensor(f"{name}[{layer}]", indices, dtypes=(torch.int32,), shape=(batch, None), like=first)
        here = prediction.shape[1] if r is None else r.shape[1]
        found = target.shape[1] if there is None else there.shape[1]
        if found != here:
            name = f"targets[{layer}]" if there is None else f"target_rows[{layer}]"
            raise ValueError(f"{name}: expected {here} rows a sample, as predictions[{layer}] gives, got {found}")


def _fits(x: Tensor, first: Tensor, dtypes: Sequence[torch.dtype], dims: int = 3) -> bool:
    """Whether ``x`` has one of ``dtypes``, ``dims`` dimensions, and the first prediction's batch and device.

    ``check_tensor``, which takes four times as long, then only has to find words.
    """
    alike = isinstance(x, Tensor) and x.dtype in dtypes and x.device == first.device
    return alike and x.dim() == dims and x.shape[0] == first.shape[0]


def _check_settings(
    loss: str,
    beta: float,
    standardise: Standardise | None,
    weights: Sequence[float] | None,
    predictions: Sequence[Tensor],
) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}; got {loss!r}")
    if not beta >= 0:
        raise ValueError(f"beta: expected a number of at least 0, got {beta}")
    if weights is not None and len(weights) != len(predictions):
        raise ValueError(f"weights: expected {len(predictions)}, one a layer, got {len(weights)}")
    if standardise is None:
        return
    if standardise.ddof not in (0, 1):
        raise ValueError(f"standardise.ddof: expected 0 or 1, got {standardise.ddof}")
    if not standardise.eps >= 0:
        raise ValueError(f"standardise.eps: expected a number of at least 0, got {standardise.eps}")
    narrow = min(prediction.shape[2] for prediction in predictions)
    if narrow <= standardise.ddof:
        raise ValueError(f"standardise.ddof: expected less than the channels, {narrow}; got {standardise.ddof}")
