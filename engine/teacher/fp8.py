"""A frozen teacher in fp8: weights quantised once, static activation scales, and a gate that its features must pass.

    y = (sum_k x8[k] w8[n, k]) * (s_x s_w) + b,   x8 = e4m3(x / s_x),   w8 = e4m3(w / s_w)

Blocks but the first and the last run their four products so; patch embedding, attention, residual stream and the
activations' formulas stay as they were. Nothing is quantised in a pass of its own but the attention's result: the norms
write what qkv and fc1 read, GELU writes what fc2 reads. One scale a tensor, both for x and for w: that is the recipe
which cuBLASLt runs at full speed, and e4m3 keeps its relative precision over 15 binades, so that a scale a channel
would gain little. An activation's scale is amax * margin / 448 over one calibration batch and never changes.

Off a GPU the same numbers are quantised and multiplied in fp32: what a card computes, up to the order of additions.
Source: Micikevicius et al., "FP8 formats for deep learning" (arXiv 2209.05433).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.kernels.alignment import Standardise
from cohobate.kernels.alignment.align import standardise_reference
from cohobate.kernels.transformer import bias_gelu_fp8, quantise_fp8
from cohobate.kernels.transformer.fp8 import FP8, LARGEST
from cohobate.teacher.anatomy import ACTIVATIONS
from cohobate.teacher.frozen import FrozenTeacher, Layer
from cohobate.teacher.product import Product
from cohobate.teacher.targets import check_finite

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # activations that quantise their own result
PRODUCTS = ("qkv", "proj", "fc1", "fc2")
MULTIPLE = 16  # of the sizes of a matrix, for cuBLASLt
OLDEST = (8, 9)  # compute capability


class Fp8Product(Product):
    """:class:`Product` in fp8; takes its input quantised with ``scale``, or quantises it.

    Args:
        product: what to quantise; it stays as it is.
        scale: of the input.
        out_scale: quantise the result of a GELU, for the product that reads it.
    """

    def __init__(self, product: Product, scale: float, out_scale: float | None = None) -> None:
        self.scale, self.out_scale = scale, out_scale
        self.weight_scale = float(product.weight.abs().amax()) / LARGEST or 1.0
        self.weight = quantise_fp8(product.weight, self.weight_scale)
        self.bias, self.activation, self.dtype = product.bias, product.activation, product.weight.dtype
        self._scales = self._scale_tensors()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, n, in] -> [B, n, out], or half of that behind a gated activation; float8 where ``out_scale`` says so."""
        x8 = (x if x.dtype == FP8 else quantise_fp8(x, self.scale)).flatten(0, 1)
        multiply = scaled_product if x.is_cuda else scaled_product_reference
        fused = self.out_scale is not None and self.activation in APPROXIMATE
        out = multiply(x8, self.weight, *self._scales, None if fused else self.bias, self.dtype)
        out = out.unflatten(0, x.shape[:2])
        if self.out_scale is not None and self.activation in APPROXIMATE:
            return bias_gelu_fp8(out, self.bias, self.out_scale, approximate=APPROXIMATE[self.activation])
        return out if self.activation is None else ACTIVATIONS[self.activation](out)

    def part(self, start: int, stop: int) -> Product:
        """Outputs [start, stop) alone, sharing the weight and its scale."""
        other = copy.copy(self)
        other.weight, other.bias = self.weight[start:stop], None if self.bias is None else self.bias[start:stop]
        return other

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Weight and bias to where ``fn`` puts them; a card without fp8 is refused."""
        super().move(fn)
        check_card(self.weight.device)
        self._scales = self._scale_tensors()

    def _scale_tensors(self) -> tuple[Tensor, Tensor]:
        """Made once: the product reads them on the device."""
        scales = (self.scale, self.weight_scale)
        first, second = (torch.tensor(scale, dtype=torch.float32, device=self.weight.device) for scale in scales)
        return first, second


def scaled_product_reference(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x W^T * (x_scale weight_scale) + bias`` of e4m3 [M, in] and [out, in], in fp32, rounded once."""
    out = F.linear(x.float(), weight.float()) * (x_scale * weight_scale)
    return (out if bias is None else out + bias.float()).to(dtype)


def scaled_product(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same by cuBLASLt. Hopper's fast accumulation errs by about 2^-13, next to e4m3's 2^-4."""
    kind = F.ScalingType.TensorWise
    return F.scaled_mm(
        x, weight.t(), x_scale, kind, weight_scale, kind, bias=bias, output_dtype=dtype, use_fast_accum=True
    )


class Fp8Layer(Layer):
    """A block's products in fp8.

    Args:
        layer: what to quantise; it stays as it is.
        amax: largest magnitudes of what qkv, proj, fc1 and fc2 read, times the margin.
    """

    def __init__(self, layer: Layer, amax: Sequence[float]) -> None:
        qkv, proj, fc1, fc2 = (largest / LARGEST or 1.0 for largest in amax)
        self.qkv, self.proj = Fp8Product(layer.qkv, qkv), Fp8Product(layer.proj, proj)
        self.fc1, self.fc2 = Fp8Product(layer.fc1, fc1, out_scale=fc2), Fp8Product(layer.fc2, fc2)
        self.qkv_scale, self.fc1_scale = qkv, fc1
        self._split = None


# ---------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Fidelity:
    """How near features are to those of the teacher in its own precision.

    ``cosine``: mean over the tokens. ``error``: relative, of the whole tensor. ``target_error``: the same of the
    standardised target (dBOT's: per token, unbiased variance, eps 1e-6 inside the root).
    """

    cosine: float
    error: float
    target_error: float

    def passes(self, gate: float, error: float) -> bool:
        """Inside the gate? Not with a nan."""
        return self.cosine >= gate and self.error <= error and self.target_error <= error

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f}  error {self.error:7.3%}  target {self.target_error:7.3%}"


@dataclass(frozen=True)
class BlockReport:
    """One block: its precision, why it is not fp8, and what it does alone in fp8, all others as they were.

    ``fidelity``: of the stream behind the block; its target error is that of the worst layer asked for.
    """

    number: int
    precision: str
    why: str
    fidelity: Fidelity | None


@dataclass(frozen=True)
class Report:
    """What :func:`quantise` measured; as a text, one line a block and a layer asked for."""

    teacher: str
    emulated: bool
    gate: float
    error: float
    blocks: tuple[BlockReport, ...]
    features: Mapping[int, Fidelity]

    @property
    def quantised(self) -> int:
        """Number of blocks in fp8."""
        return sum(block.precision == "fp8" for block in self.blocks)

    @property
    def passed(self) -> bool:
        """Some blocks run in fp8, and the features of every layer asked for are inside the gate."""
        return self.quantised > 0 and all(each.passes(self.gate, self.error) for each in self.features.values())

    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary a line, for JSON."""
        about = {"teacher": self.teacher, "emulated": self.emulated, "gate": self.gate, "max_error": self.error}
        lines: list[tuple[str, int, str, str, Fidelity | None]] = [
            ("block", block.number, block.precision, block.why, block.fidelity) for block in self.blocks
        ]
        lines += [("features", layer, "fp8", "", each) for layer, each in self.features.items()]
        nothing = dict.fromkeys(("cosine", "error", "target_error"))
        return [
            about
            | {"part": part, "number": number, "precision": precision, "why": why}
            | (nothing if found is None else asdict(found))
            for part, number, precision, why, found in lines
        ]

    def __str__(self) -> str:
        where = "emulated on the CPU: the numbers of a card, not its speed" if self.emulated else "on the GPU"
        lines = [
            f"fp8 (e4m3, static scales) of {self.teacher}, {where}",
            f"{self.quantised} of {len(self.blocks)} blocks; gate: cosine {self.gate:g}, errors {self.error:.1%}",
        ]
        for block in self.blocks:
            numbers = "" if block.fidelity is None else str(block.fidelity)
            lines.append(f"  block {block.number:3d}  {block.precision}  {numbers}  {block.why}".rstrip())
        lines += [f"  features of layer {layer:3d}  {each}" for layer, each in self.features.items()]
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- quantise


@torch.no_grad()
def quantise(
    teacher: FrozenTeacher,
    pixels: Tensor,
    *,
    gate: float = 0.999,
    rows: Tensor | None = None,
    error: float = 0.03,
    margin: float = 2.0,
) -> Report:
    """Turn a teacher into one that runs in fp8, as far as its features stay inside the gate; in place.

    Scales come from one batch. A block that misses the gate alone stays bf16; then, while the features of the whole
    miss it, the block that costs the target most is put back.

    Args:
        teacher: in bf16, with at least three blocks; on a refusal it stays as it was.
        pixels: [B, T, H, W, C] uint8, a batch like those to come.
        gate: smallest mean cosine of features.
        rows: [B, n] int32, the patches that the teacher will see; None for all.
        error: largest relative error of features and of standardised targets.
        margin: room above the batch's largest magnitude. e4m3 is a floating-point format: a power of 2 costs no
            precision, but for the smallest numbers.

    Raises:
        UserError: a card without fp8 (compute capability 8.9), a teacher that is not bf16, is fp8 already or has sizes
            that are no multiples of 16; or no block stays inside the gate, with the report.
    """
    check_card(pixels.device)
    _check(teacher, margin)
    inner = range(2, teacher.depth)
    layers = [layer for layer in teacher.layers if layer > 0]
    amax = _calibrate(teacher, inner, pixels, rows)
    quantised = {n: Fp8Layer(teacher._blocks[n - 1], [margin * value for value in amax[n]]) for n in inner}
    expected = _streams(teacher, {}, sorted({*inner, *layers}), pixels, rows)

    alone: dict[int, Fidelity] = {}
    for n, block in quantised.items():
        found = _streams(teacher, {n: block}, sorted({n, *layers}), pixels, rows)
        own = fidelity(found[n], expected[n])
        worst = max(fidelity(found[layer], expected[layer]).target_error for layer in layers)
        alone[n] = Fidelity(own.cosine, own.error, worst)
    why = {1: "first", teacher.depth: "last"}
    why |= {n: "misses the gate alone" for n in inner if not alone[n].passes(gate, error)}

    def chosen() -> dict[int, Layer]:
        return {n: block for n, block in quantised.items() if n not in why}

    while True:
        found = _streams(teacher, chosen(), layers, pixels, rows)
        features = {layer: fidelity(found[layer], expected[layer]) for layer in layers}
        if not chosen() or all(each.passes(gate, error) for each in features.values()):
            break
        why[max(chosen(), key=lambda n: alone[n].target_error)] = "put back: together they miss the gate"

    blocks = tuple(
        BlockReport(n, "bf16" if n in why else "fp8", why.get(n, ""), alone.get(n))
        for n in range(1, teacher.depth + 1)
    )  # fmt: skip
    report = Report(teacher.name, not pixels.is_cuda, gate, error, blocks, features)
    if not report.passed:
        raise UserError(f"teacher: expected some block to stay inside the gate in fp8, got none\n{report}")
    teacher.replace_blocks(chosen())
    return report


def fidelity(got: Tensor, expected: Tensor) -> Fidelity:
    """Of features [B, n, D]."""
    got, expected = got.float(), expected.float()
    targets = (standardise_reference(x, Standardise(ddof=1, eps=1e-6, eps_inside=True)) for x in (got, expected))
    cosine = float(F.cosine_similarity(got, expected, dim=-1).mean())
    return Fidelity(cosine, _relative(got, expected), _relative(*targets))


def check_card(device: torch.device) -> None:
    """Raise UserError for a CUDA device that cannot multiply fp8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        have, name = ".".join(map(str, capability)), torch.cuda.get_device_name(device)
        raise UserError(f"precision: fp8 needs a card of compute capability 8.9 or newer, got {name} with {have}")


def _check(teacher: FrozenTeacher, margin: float) -> None:
    if teacher.precision.compute != torch.bfloat16:
        raise UserError(f"teacher: fp8 expected a teacher in bf16, got {teacher.precision_name}")
    if any(isinstance(block, Fp8Layer) for block in teacher._blocks):
        raise UserError(f"teacher: expected one that is not quantised yet, got {teacher.precision_name}")
    if teacher.depth < 3:
        raise UserError(f"teacher: fp8 leaves the first and last block in bf16, so it needs 3, got {teacher.depth}")
    for n, block in enumerate(teacher._blocks[1:-1], start=2):
        for name in PRODUCTS:
            shape = list(getattr(block, name).weight.shape)
            if any(size % MULTIPLE for size in shape):
                raise UserError(f"teacher: fp8 expected multiples of {MULTIPLE}, got {name} {shape} in block {n}")
    if not margin >= 1:
        raise UserError(f"margin: expected at least 1, got {margin}")


class _Probe(Product):
    """A product that remembers the largest magnitude it was given."""

    def __init__(self, product: Product) -> None:
        self.product, self.weight, self.largest = product, product.weight, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.abs().amax()))
        return self.product(x)


def _calibrate(
    teacher: FrozenTeacher, numbers: Sequence[int], pixels: Tensor, rows: Tensor | None
) -> dict[int, list[float]]:
    """Largest magnitudes of what the four products of each block read."""
    probed = {}
    for n in numbers:
        probed[n] = copy.copy(teacher._blocks[n - 1])
        for name in PRODUCTS:
            setattr(probed[n], name, _Probe(getattr(probed[n], name)))
    found = _streams(teacher, probed, teacher.layers, pixels, rows)
    check_finite(list(found.values()), teacher.layers, teacher.name)
    return {n: [getattr(block, name).largest for name in PRODUCTS] for n, block in probed.items()}


def _streams(
    teacher: FrozenTeacher, blocks: Mapping[int, Layer], layers: Sequence[int], pixels: Tensor, rows: Tensor | None
) -> dict[int, Tensor]:
    """Residual streams behind ``layers``, the last among them, with some blocks exchanged."""
    with _exchanged(teacher, blocks), torch.autocast(pixels.device.type, enabled=False):
        return dict(zip(layers, teacher._features(pixels, rows, None, layers), strict=True))


@contextlib.contextmanager
def _exchanged(teacher: FrozenTeacher, blocks: Mapping[int, Layer]) -> Iterator[None]:
    before = teacher._blocks
    teacher._blocks = [blocks.get(n, block) for n, block in enumerate(before, start=1)]
    try:
        yield
    finally:
        teacher._blocks = before


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
