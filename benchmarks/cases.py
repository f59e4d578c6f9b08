"""One case an op: its inputs at the sizes of a real step, the literal form, ours, and the floor.

Random floats are rounded to bf16 first: every dtype computes on the same numbers, and one float64 answer serves all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cohobate.benchmarks import literal
from cohobate.benchmarks.harness import Case, Provider
from cohobate.benchmarks.machine import DTYPES
from cohobate.errors import UserError
from cohobate.kernels import Cost, alignment, optimizer, tokens, transformer, why_not
from cohobate.kernels.alignment.align import align_cost
from cohobate.kernels.alignment.pixel import pixel_loss_cost
from cohobate.kernels.optimizer.adamw import adamw_cost, gradient_norm_cost
from cohobate.kernels.tokens.assemble import assemble_cost
from cohobate.kernels.tokens.embed import embed_patches_backward_cost, embed_patches_cost
from cohobate.kernels.tokens.gather import gather_patches_cost
from cohobate.kernels.tokens.order import random_order_cost
from cohobate.kernels.tokens.rows import rows_cost
from cohobate.kernels.transformer.activation import bias_gelu_cost
from cohobate.kernels.transformer.add_norm import add_norm_cost
from cohobate.kernels.transformer.attention import attention_cost
from cohobate.kernels.transformer.block import Parameters, pre_norm_block_cost
from cohobate.kernels.transformer.fp8 import quantise_cost
from cohobate.kernels.transformer.linear import linear, linear_cost

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Arguments that stay fp32 when the data is half precision.
EXACT = ("mean", "std", "mask", "residual")
WIDTHS = {"vit-tiny": 192, "vit-s": 384, "vit-b": 768, "vit-l": 1024}
MODES = ("fwd", "fwd+bwd")


@dataclass(frozen=True)
class Sizes:
    """A dBOT step: square images, a class token, ``keep`` of the patches visible, the decoder's own width.

    A clip has ``frames`` above 1 and patches of ``tubelet`` frames.
    """

    batch: int = 8
    width: int = 768
    image: int = 224
    patch: int = 16
    decoder: int = 512
    keep: float = 0.25
    frames: int = 1
    tubelet: int = 1
    channels: int = 3

    @property
    def patches(self) -> int:
        return self.frames // self.tubelet * (self.image // self.patch) ** 2

    @property
    def visible(self) -> int:
        return int(self.patches * self.keep)

    @property
    def cube(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return self.tubelet, self.patch, self.patch

    @property
    def row(self) -> int:
        """Values of a patch."""
        return self.tubelet * self.patch**2 * self.channels

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(itertools.islice(itertools.cycle(MEAN), self.channels))

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(itertools.islice(itertools.cycle(STD), self.channels))

    @property
    def pixels(self) -> str:
        """The inputs in words."""
        clips = f"{self.batch} images" if self.frames == 1 else f"{self.batch} clips of {self.frames} frames"
        return f"{clips}, {self.image} px, patches of {self.patch} px"


@dataclass(frozen=True)
class Call:
    """A function and its arguments by name, in the order in which the function takes them."""

    function: Callable[..., Tensor]
    arguments: Mapping[str, Any]

    def cast(self, dtype: torch.dtype) -> Call:
        """Floating arguments in ``dtype``; statistics and weights of a loss stay fp32 except in float64."""

        def convert(name: str, value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return dtype
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            exact = name in EXACT or name.startswith("fp32_")
            return value if exact and dtype is not torch.float64 else value.to(dtype)

        return Call(self.function, {name: convert(name, value) for name, value in self.arguments.items()})


@dataclass(frozen=True)
class KernelCase:
    """An op of the registry. ``ours`` also takes ``backend=``; ``leaves`` are the arguments that get a gradient.

    ``to_ours`` maps the literal's gradient of a leaf to our layout. ``cost(mode, itemsize)`` is the floor of one call.
    ``others`` are further functions of the literal's arguments; ``dtypes`` are those that the op has, ``fast`` those
    that our fast form takes. ``tolerance`` is what a result in a dtype may be off by, where it is not the dtype's own.
    """

    name: str
    shape: str
    literal: Call
    ours: Call
    cost: Callable[[str, int], Cost]
    leaves: tuple[str, ...] = ()
    to_ours: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    upstream: Tensor | None = None
    compare: Callable[[Mapping[str, Tensor]], tuple[float, float | None]] | None = None
    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    fast: tuple[str, ...] = ("fp32", "bf16", "fp16", "int32")
    tolerance: Mapping[str, float] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else ("fwd",)

    @property
    def device(self) -> str:
        """Where the inputs are."""
        return next(value.device.type for value in self.ours.arguments.values() if isinstance(value, Tensor))

    @property
    def has_dtype(self) -> bool:
        """False for an op on integers alone."""
        values = self.ours.arguments.values()
        return any(isinstance(v, torch.dtype) or (isinstance(v, Tensor) and v.is_floating_point()) for v in values)

    def case(self, mode: str) -> Case:
        """The answer: the literal form in float64."""
        if self.compare is not None:
            return Case(self.name, self.shape, self.device, {}, self.compare)
        upstream = None if self.upstream is None else self.upstream.double()
        found = runner(self.literal.cast(torch.float64), self.leaves, mode, upstream)()
        return Case(self.name, self.shape, self.device, self.results(mode, self.to_ours)(found))

    def results(
        self, mode: str, layout: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Callable[[tuple[Tensor, ...]], dict[str, Tensor]]:
        """Names for what a runner returns: ``out``, then ``grad <leaf>``."""

        def name(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
            out = {"out": found[0]}
            for leaf, gradient in zip(self.leaves if mode == "fwd+bwd" else (), found[1:]):
                out[f"grad {leaf}"] = layout[leaf](gradient) if leaf in layout else gradient
            return out

        return name


def runner(
    call: Call, leaves: tuple[str, ...], mode: str, upstream: Tensor | None, copies: int = 1
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns (output, gradients of ``leaves``) and walks through ``copies`` input sets."""
    sets: list[dict[str, Any]] = []
    for _ in range(copies):
        values = {name: v.clone() if isinstance(v, Tensor) else v for name, v in call.arguments.items()}
        if mode == "fwd+bwd":
            for leaf in leaves:
                values[leaf].requires_grad_(True)
        sets.append(values)
    turns: Iterator[dict[str, Any]] = itertools.cycle(sets)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (call.function(*next(turns).values()),)

    def both() -> tuple[Tensor, ...]:
        values = next(turns)
        out = call.function(*values.values())
        return (out.detach(), *torch.autograd.grad(out, [values[leaf] for leaf in leaves], upstream))

    return both if mode == "fwd+bwd" else forward


def providers(
    kernel: KernelCase, mode: str, *, dtypes: tuple[str, ...] = ("fp32", "bf16"), l2_bytes: int = 0
) -> list[Provider]:
    """Literal eager, ``torch.compile`` of it, what others offer, our reference and the fast form of the inputs' device.

    ``l2_bytes`` above 0 asks for input sets that together exceed three times that cache.
    """
    fast = "triton" if kernel.device == "cuda" else "native"
    compiled = torch.compile(kernel.literal.function, dynamic=False, fullgraph=True)  # fullgraph: never quietly eager
    literal_call, reference_call, fast_call = kernel.literal, _with(kernel.ours, "reference"), _with(kernel.ours, fast)
    found = []

    def add(name: str, call: Call, dtype: str, role: str) -> None:
        cost = kernel.cost(mode, DTYPES[dtype].itemsize)
        copies = 1 if not l2_bytes else max(1, min(64, -(-3 * l2_bytes // max(cost.bytes, 1))))
        upstream = None if kernel.upstream is None else kernel.upstream.to(DTYPES[dtype])
        run = runner(call.cast(DTYPES[dtype]), kernel.leaves, mode, upstream, copies)
        results = kernel.results(mode, {} if role == "ours" or name == "reference" else kernel.to_ours)
        full = name if dtype in ("fp32", "int32") else f"{name} {dtype}"
        found.append(
            Provider(
                full, mode, run, role=role, dtype=dtype, results=results, cost=cost, copies=copies,
                tolerance=kernel.tolerance.get(dtype),
            )
        )  # fmt: skip

    dtypes = tuple(dtype for dtype in dtypes if dtype in kernel.dtypes)
    main, rest = (dtypes[0], dtypes[1:]) if kernel.has_dtype else ("int32", ())
    add("literal", literal_call, main, "eager")
    add("compile", Call(compiled, literal_call.arguments), main, "compile")
    add("reference", reference_call, main, "other")
    for dtype in (main, *rest):
        if dtype != main:
            add("literal", literal_call, dtype, "other")
            add("compile", Call(compiled, literal_call.arguments), dtype, "other")
        for name, function in kernel.others.items():
            add(name, Call(function, literal_call.arguments), dtype, "other")
        if dtype in kernel.fast:
            add(fast, fast_call, dtype, "ours")
    return found


def _with(call: Call, backend: str) -> Call:
    return Call(lambda *values: call.function(*values, backend=backend), call.arguments)


def build(name: str, sizes: Sizes, device: str, seed: int) -> KernelCase:
    """The case of one op.

    Raises:
        UserError: no case of that name.
    """
    builders = {**CASES, **MORE, **SOMEWHERE}
    if name not in builders:
        raise UserError(f"ops: expected some of {', '.join(builders)}; got {name!r}")
    return builders[name](sizes, _Random(sizes, device, seed))


class _Random:
    """Inputs by one generator: pixels, bf16-representable floats, and an order of the patches with its inverse."""

    def __init__(self, sizes: Sizes, device: str, seed: int) -> None:
        self.sizes, self.device = sizes, device
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.rand(sizes.batch, sizes.patches, generator=self.generator).argsort(dim=1)
        cut = sizes.visible
        self.order = torch.cat([order[:, :cut].sort(dim=1).values, order[:, cut:].sort(dim=1).values], dim=1).to(device)
        self.where = self.order.argsort(dim=1)

    def visible(self) -> Tensor:
        """int64 [B, n] of the kept patches, ascending."""
        return self.order[:, : self.sizes.visible].contiguous()

    def masked(self) -> Tensor:
        """int64 [B, N - n] of the others, ascending."""
        return self.order[:, self.sizes.visible :].contiguous()

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.bfloat16().float().to(self.device)

    def pixels(self) -> Tensor:
        s = self.sizes
        shape = (s.batch, s.frames, s.image, s.image, s.channels)
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8).to(self.device)

    def statistics(self) -> dict[str, Tensor]:
        s = self.sizes
        return {"mean": torch.tensor(s.mean, device=self.device), "std": torch.tensor(s.std, device=self.device)}


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _gather(s: Sizes, random: _Random) -> KernelCase:
    pixels, index = random.pixels(), random.visible()

    def literal_form(pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
        return literal.gather_patches(pixels, index, mean, std, s.cube).to(dtype)

    def ours(pixels: Tensor, rows: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        return tokens.gather_patches(pixels, rows, patch=s.cube, mean=s.mean, std=s.std, dtype=dtype, backend=backend)

    return KernelCase(
        "gather_patches",
        f"{s.pixels}, {s.visible} of {s.patches}",
        Call(literal_form, {"pixels": pixels, "index": index, **random.statistics(), "dtype": torch.float32}),
        Call(ours, {"pixels": pixels, "rows": _int32(index), "dtype": torch.float32}),
        lambda mode, size: gather_patches_cost(s.batch, s.visible, s.row, size),
    )


def _embed(s: Sizes, random: _Random) -> KernelCase:
    pixels, index = random.pixels(), random.visible()
    window = (s.patch, s.patch) if s.frames == 1 else s.cube
    weight = random.floats(s.width, s.channels, *window, scale=s.row**-0.5)
    bias, positions = random.floats(s.width), random.floats(s.patches, s.width)

    def to_rows(w: Tensor) -> Tensor:
        """[D, C, ...] -> [D, ... * C]."""
        return w.movedim(1, -1).reshape(s.width, s.row)

    def ours(
        pixels: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, dtype: torch.dtype, backend: str
    ) -> Tensor:
        return tokens.embed_patches(
            pixels,
            rows,
            weight,
            bias,
            positions,
            patch=s.cube,
            mean=s.mean,
            std=s.std,
            dtype=dtype,
            backend=backend,
        )

    def cost(mode: str, size: int) -> Cost:
        sizes = (s.batch, s.visible, s.row, s.width, size)
        return _both(mode, embed_patches_cost(*sizes), embed_patches_backward_cost(*sizes))

    shared = {"bias": bias, "positions": positions}
    return KernelCase(
        "embed_patches",
        f"{s.pixels}, {s.visible} of {s.patches}, width {s.width}",
        Call(
            literal.embed_patches,
            {"pixels": pixels, "index": index, "weight": weight, **shared, **random.statistics()},
        ),
        Call(
            ours,
            {"pixels": pixels, "rows": _int32(index), "weight": to_rows(weight), **shared, "dtype": torch.float32},
        ),
        cost,
        leaves=("weight", "bias"),
        to_ours={"weight": to_rows},
        upstream=random.floats(s.batch, s.visible, s.width),
    )


def _assemble(s: Sizes, random: _Random) -> KernelCase:
    x, token = random.floats(s.batch, 1 + s.visible, s.decoder), random.floats(s.decoder)
    positions = random.floats(1 + s.patches, s.decoder)

    def ours(x: Tensor, mask_token: Tensor, positions: Tensor, rows: Tensor, backend: str) -> Tensor:
        return tokens.assemble(x, mask_token, positions, rows, layout="raster", prefix=1, backend=backend)

    shared = {"x": x, "mask_token": token, "positions": positions}
    return KernelCase(
        "assemble",
        f"{s.batch} x {1 + s.visible} of {1 + s.patches} rows, width {s.decoder}",
        Call(literal.assemble, {**shared, "restore": random.where}),
        Call(ours, {**shared, "rows": _int32(random.where)}),
        _assemble_cost(s, prefix=1),
        leaves=("x", "mask_token"),
        upstream=random.floats(s.batch, 1 + s.patches, s.decoder),
    )


def _assemble_visible_first(s: Sizes, random: _Random) -> KernelCase:
    x, token = random.floats(s.batch, s.visible, s.decoder), random.floats(s.decoder)
    positions = random.floats(s.patches, s.decoder)

    def ours(x: Tensor, mask_token: Tensor, positions: Tensor, rows: Tensor, backend: str) -> Tensor:
        return tokens.assemble(x, mask_token, positions, rows, layout="visible_first", prefix=0, backend=backend)

    shared = {"x": x, "mask_token": token, "positions": positions}
    return KernelCase(
        "assemble_visible_first",
        f"{s.batch} x {s.visible} of {s.patches} rows, width {s.decoder}",
        Call(literal.assemble_visible_first, {**shared, "visible": random.visible(), "masked": random.masked()}),
        Call(ours, {**shared, "rows": _int32(random.order)}),
        _assemble_cost(s, prefix=0),
        leaves=("x", "mask_token"),
        upstream=random.floats(s.batch, s.patches, s.decoder),
    )


def _assemble_cost(s: Sizes, prefix: int) -> Callable[[str, int], Cost]:
    def cost(mode: str, size: int) -> Cost:
        sizes = (s.batch, s.visible, s.patches, s.decoder, size)
        forward = assemble_cost(*sizes, prefix=prefix, positions_itemsize=size)
        return _both(mode, forward, assemble_cost(*sizes, prefix=prefix))

    return cost


def _take(s: Sizes, random: _Random) -> KernelCase:
    x, index = random.floats(s.batch, s.patches, s.width), random.visible()
    return KernelCase(
        "take",
        f"{s.batch} x {s.visible} of {s.patches} rows, width {s.width}",
        Call(literal.take, {"x": x, "index": index}),
        Call(lambda x, rows, backend: tokens.take(x, rows, backend=backend), {"x": x, "rows": _int32(index)}),
        lambda mode, size: _both(
            mode,
            rows_cost(s.batch, s.visible, s.width, size),
            rows_cost(s.batch, s.visible, s.width, size, length=s.patches),
        ),
        leaves=("x",),
        upstream=random.floats(s.batch, s.visible, s.width),
    )


def _put(s: Sizes, random: _Random) -> KernelCase:
    x, index = random.floats(s.batch, s.visible, s.width), random.visible()
    return KernelCase(
        "put",
        f"{s.batch} x {s.visible} of {s.patches} rows, width {s.width}",
        Call(lambda x, index: literal.put(x, index, s.patches), {"x": x, "index": index}),
        Call(lambda x, rows, backend: tokens.put(x, rows, s.patches, backend=backend), {"x": x, "rows": _int32(index)}),
        lambda mode, size: _both(
            mode,
            rows_cost(s.batch, s.visible, s.width, size, length=s.patches),
            rows_cost(s.batch, s.visible, s.width, size),
        ),
        leaves=("x",),
        upstream=random.floats(s.batch, s.patches, s.width),
    )


def _order(s: Sizes, random: _Random) -> KernelCase:
    ids = torch.arange(s.batch, device=random.device) + 1_000_000

    def ours(sample_ids: Tensor, backend: str) -> Tensor:
        return tokens.random_order(sample_ids, s.patches, seed=0, backend=backend)

    def permutation(results: Mapping[str, Tensor]) -> tuple[float, float | None]:
        ordered = results["out"].long().sort(dim=1).values.cpu()
        return (0.0 if torch.equal(ordered, torch.arange(s.patches).expand(s.batch, -1)) else math.inf), None

    return KernelCase(
        "random_order",
        f"{s.batch} permutations of {s.patches}",
        Call(lambda sample_ids: literal.random_order(sample_ids, s.patches), {"sample_ids": ids}),
        Call(ours, {"sample_ids": ids}),
        lambda mode, size: random_order_cost(s.batch, s.patches),
        compare=permutation,
    )


def _align(s: Sizes, random: _Random) -> KernelCase:
    shape = (s.batch, 1 + s.patches, s.width)
    prediction, target = random.floats(*shape), random.floats(*shape, scale=3.0)
    mask = torch.ones(s.batch, 1 + s.patches, device=random.device)  # dBOT counts the class token as masked
    mask[:, 1:].scatter_(1, random.visible(), 0.0)
    masked = random.masked() + 1
    rows = _int32(torch.cat([masked.new_zeros(s.batch, 1), masked], dim=1))

    def ours(prediction: Tensor, target: Tensor, rows: Tensor, backend: str) -> Tensor:
        return alignment.align_loss(
            prediction,
            target,
            prediction_rows=rows,
            target_rows=rows,
            standardise=alignment.Standardise(),
            backend=backend,
        ).total

    shared = {"prediction": prediction, "target": target}
    return KernelCase(
        "align_loss",
        f"{s.batch} x {rows.shape[1]} of {1 + s.patches} rows, width {s.width}, smooth-L1, standardised targets",
        Call(literal.align_loss, {**shared, "mask": mask}),
        Call(ours, {**shared, "rows": rows}),
        lambda mode, size: align_cost(
            s.batch, rows.shape[1], s.width, size, size, length=1 + s.patches, gradient=mode == "fwd+bwd"
        ),
        leaves=("prediction",),
    )


def _align_layers(kind: str) -> Callable[[Sizes, _Random], KernelCase]:
    def build_layers(s: Sizes, random: _Random) -> KernelCase:
        seen = max(s.visible, 1)
        predictions = {f"prediction_{i}": random.floats(s.batch, seen, s.width) for i in range(2)}
        targets = {f"target_{i}": random.floats(s.batch, s.patches, s.width) for i in range(2)}
        rows = torch.arange(seen, dtype=torch.int32, device=random.device).repeat(s.batch, 1)

        def ours(p0: Tensor, p1: Tensor, t0: Tensor, t1: Tensor, rows: Tensor, backend: str) -> Tensor:
            return alignment.align_loss([p0, p1], [t0, t1], target_rows=rows, loss=kind, backend=backend).total

        def cost(mode: str, size: int) -> Cost:
            layer = align_cost(
                s.batch, seen, s.width, size, size, loss=kind, standardise=False, gradient=mode == "fwd+bwd"
            )
            return Cost(2 * layer.bytes, 2 * layer.flops)

        return KernelCase(
            f"align_layers_{kind}",
            f"2 layers of {s.batch} x {seen} of {s.patches} rows, width {s.width}, {kind}",
            Call(
                lambda p0, p1, t0, t1: literal.align_layers(p0, p1, t0, t1, kind),
                {**predictions, **targets},
            ),
            Call(ours, {**predictions, **targets, "rows": rows}),
            cost,
            leaves=tuple(predictions),
        )

    return build_layers


def _pixel(s: Sizes, random: _Random) -> KernelCase:
    pixels, prediction = random.pixels(), random.floats(s.batch, s.patches, s.row)
    mask = torch.ones(s.batch, s.patches, device=random.device).scatter_(1, random.visible(), 0.0)
    index = random.masked()

    def literal_form(prediction: Tensor, pixels: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return literal.pixel_loss(prediction, pixels, mask, mean, std, s.cube)

    def ours(prediction: Tensor, pixels: Tensor, rows: Tensor, backend: str) -> Tensor:
        return alignment.pixel_loss(prediction, pixels, rows, patch=s.cube, mean=s.mean, std=s.std, backend=backend)

    return KernelCase(
        "pixel_loss",
        f"{s.pixels}, {index.shape[1]} of {s.patches}",
        Call(literal_form, {"prediction": prediction, "pixels": pixels, "mask": mask, **random.statistics()}),
        Call(ours, {"prediction": literal.rows_of(prediction, index), "pixels": pixels, "rows": _int32(index)}),
        _pixel_cost(s, index.shape[1]),
        leaves=("prediction",),
        to_ours={"prediction": lambda gradient: literal.rows_of(gradient, index)},
    )


def _pixel_video(s: Sizes, random: _Random) -> KernelCase:
    pixels, index = random.pixels(), random.masked()
    prediction = random.floats(s.batch, index.shape[1], s.row)

    def literal_form(prediction: Tensor, pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return literal.pixel_loss_video(prediction, pixels, index, mean, std, s.cube)

    def ours(prediction: Tensor, pixels: Tensor, rows: Tensor, backend: str) -> Tensor:
        return alignment.pixel_loss(
            prediction,
            pixels,
            rows,
            patch=s.cube,
            mean=s.mean,
            std=s.std,
            convention="videomae",
            backend=backend,
        )

    shared = {"prediction": prediction, "pixels": pixels}
    return KernelCase(
        "pixel_loss_video",
        f"{s.pixels}, {index.shape[1]} of {s.patches}",
        Call(literal_form, {**shared, "index": index, **random.statistics()}),
        Call(ours, {**shared, "rows": _int32(index)}),
        _pixel_cost(s, index.shape[1]),
        leaves=("prediction",),
    )


def _pixel_cost(s: Sizes, count: int) -> Callable[[str, int], Cost]:
    def cost(mode: str, size: int) -> Cost:
        if mode == "fwd+bwd":
            return pixel_loss_cost(s.batch, count, s.row, size)
        values = s.batch * count * s.row  # pixels and the prediction are read, nothing of size is written
        return Cost(values * (1 + size) + 4 * s.batch * count, 6 * values)

    return cost


def _add_norm(s: Sizes, random: _Random) -> KernelCase:
    width = max(s.width, 16)  # a norm of two values leaves their signs, and a gradient of rounding errors
    shape = (s.batch, 1 + s.patches, width)
    tensors = {"residual": random.floats(*shape), "branch": random.floats(*shape)}
    tensors |= {"fp32_weight": 1 + random.floats(width, scale=0.125), "fp32_bias": random.floats(width, scale=0.125)}

    def ours(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return transformer.add_norm(residual, branch, weight=weight, bias=bias, dtype=branch.dtype, backend=backend)[1]

    def cost(mode: str, size: int) -> Cost:
        """fp32 residual. Only the normed rows get a gradient here, and in fp32 both leaves share one."""
        rows = s.batch * (1 + s.patches)
        forward = add_norm_cost(rows, width, 4, size, branch_itemsize=size)
        backward = add_norm_cost(rows, width, 4, size, branch_itemsize=size if size < 4 else 0, backward=True)
        return _both(mode, forward, Cost(backward.bytes - 4 * rows * width, backward.flops))

    return KernelCase(
        "add_norm",
        f"{s.batch} x {1 + s.patches} rows, width {width}, fp32 residual",
        Call(literal.add_norm, tensors),
        Call(ours, tensors),
        cost,
        leaves=tuple(tensors),
        upstream=random.floats(*shape),
    )


def _bias_gelu(s: Sizes, random: _Random) -> KernelCase:
    rows, width = 1 + s.patches, 4 * s.width
    tensors = {"x": random.floats(s.batch, rows, width), "bias": random.floats(width)}
    return KernelCase(
        "bias_gelu",
        f"{s.batch} x {rows} rows, width {width}",
        Call(literal.bias_gelu, tensors),
        Call(lambda x, bias, backend: transformer.bias_gelu(x, bias, backend=backend), tensors),
        lambda mode, size: _both(
            mode,
            bias_gelu_cost(s.batch * rows, width, size),
            bias_gelu_cost(s.batch * rows, width, size, backward=True),
        ),
        leaves=("x", "bias"),
        upstream=random.floats(s.batch, rows, width),
    )


def _short_attention(s: Sizes, random: _Random) -> KernelCase:
    heads, rows = max(1, s.width // 64), 1 + s.visible
    dim = 64 if s.width >= 64 else max(2, s.width // 2 * 2)
    tensors = {"qkv": random.floats(s.batch, rows, 3 * heads * dim)}
    sizes = (s.batch, rows, rows, heads, dim)
    return KernelCase(
        "short_attention",
        f"{s.batch} x {rows} rows, {heads} heads of {dim}",
        Call(lambda qkv: literal.attention(qkv, heads), tensors),
        Call(lambda qkv, backend: transformer.short_attention(qkv, heads, backend=backend), tensors),
        lambda mode, size: _both(mode, attention_cost(*sizes, size), attention_cost(*sizes, size, backward=True)),
        leaves=("qkv",),
        upstream=random.floats(s.batch, rows, heads * dim),
        others={"sdpa": lambda qkv: literal.attention_sdpa(qkv, heads)},
    )


def _quantise_fp8(s: Sizes, random: _Random) -> KernelCase:
    rows, scale = 1 + s.patches, 2.0**-7  # a power of two: no rounding before the one to fp8, so all bytes are equal
    tensors = {"x": random.floats(s.batch, rows, s.width)}
    right = literal.quantise_fp8(tensors["x"].double(), scale)

    def same_bytes(results: Mapping[str, Tensor]) -> tuple[float, float | None]:
        return (0.0 if torch.equal(results["out"], right) else math.inf), None

    return KernelCase(
        "quantise_fp8",
        f"{s.batch} x {rows} rows, width {s.width}",
        Call(lambda x: literal.quantise_fp8(x, scale), tensors),
        Call(lambda x, backend: transformer.quantise_fp8(x, scale, backend=backend).view(torch.uint8), tensors),
        lambda mode, size: quantise_cost(s.batch * rows * s.width, size),
        compare=same_bytes,
    )


def _linear(s: Sizes, random: _Random) -> KernelCase:
    rows, inputs, outputs = s.batch * (1 + s.visible), s.width, 4 * s.width
    tensors = {
        "x": random.floats(s.batch, 1 + s.visible, inputs),
        "fp32_weight": random.floats(outputs, inputs, scale=inputs**-0.5),
        "fp32_bias": random.floats(outputs),
    }
    facts = {"x": torch.bfloat16, "weight": torch.float32, "even": inputs % 2 == 0}
    return KernelCase(
        "linear",
        f"{rows} rows, {inputs} to {outputs}, fp32 weight",
        Call(literal.linear, tensors),
        Call(lambda x, weight, bias, backend: linear(x, weight, bias, backend=backend), tensors),
        lambda mode, size: _both(
            mode,
            linear_cost(rows, inputs, outputs, size),
            linear_cost(rows, inputs, outputs, size, backward=True),
        ),
        leaves=tuple(tensors),
        upstream=random.floats(s.batch, 1 + s.visible, outputs),
        fast=() if random.device != "cpu" or why_not("linear", "native", "cpu", **facts) else ("bf16",),
    )


def _pre_norm_block(s: Sizes, random: _Random) -> KernelCase:
    rows, w, hidden = 1 + s.visible, s.width, 4 * s.width
    heads = max(1, w // 64)
    tensors: dict[str, Any] = {"residual": random.floats(s.batch, rows, w), "dtype": torch.bfloat16}
    for part, inputs, outputs in (
        ("norm1", 0, w), ("qkv", w, 3 * w), ("proj", w, w), ("norm2", 0, w), ("fc1", w, hidden), ("fc2", hidden, w)
    ):  # fmt: skip
        weight = random.floats(outputs, inputs, scale=inputs**-0.5) if inputs else 1 + random.floats(w, scale=0.125)
        tensors |= {f"fp32_{part}_weight": weight, f"fp32_{part}_bias": random.floats(outputs, scale=0.125)}

    def ours(residual: Tensor, dtype: torch.dtype, *parameters: Tensor, backend: str) -> Tensor:
        p = Parameters(*parameters)
        return transformer.pre_norm_block(residual, None, p, heads, dtype=dtype, backend=backend)[1]

    sizes = (s.batch, rows, w, hidden, heads, 4)
    facts = {"x": torch.float32, "branch": torch.bfloat16, "parameters": frozenset()}
    facts |= {"heads": heads, "width": w, "hidden": hidden}
    return KernelCase(
        "pre_norm_block",
        f"{s.batch} x {rows} rows, width {w}, fp32 residual and weights",
        Call(functools.partial(literal.pre_norm_block, heads), tensors),
        Call(ours, tensors),
        lambda mode, size: _both(
            mode, pre_norm_block_cost(*sizes, size), pre_norm_block_cost(*sizes, size, backward=True)
        ),
        leaves=("residual", *(name for name in tensors if name.startswith("fp32_"))),
        upstream=random.floats(s.batch, rows, w),
        tolerance={"bf16": 0.03},  # ten roundings of 2^-9, one behind the other
        fast=() if random.device != "cpu" or why_not("pre_norm_block", "native", "cpu", **facts) else ("bf16",),
    )


def _adamw(s: Sizes, random: _Random) -> KernelCase:
    w = s.width
    block = [3 * w * w, 3 * w, w * w, w, 4 * w * w, 4 * w, 4 * w * w, w, *[w] * 4]
    sizes = block * 2
    total = sum(sizes)
    state = {
        "parameters": random.floats(total),
        "gradients": random.floats(total, scale=0.01),
        "exp_avg": random.floats(total, scale=0.01),
        "exp_avg_sq": random.floats(total, scale=0.01).square(),
        "steps": torch.full((len(sizes),), 10.0, device=random.device),
    }
    rate, decays = torch.tensor(literal.RATE, device=random.device), [literal.DECAY] * len(sizes)

    def ours(
        parameters: Tensor, gradients: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, backend: str
    ) -> Tensor:
        values, slopes, averages, squares = (t.split(sizes) for t in (parameters, gradients, exp_avg, exp_avg_sq))
        norm = optimizer.gradient_norm(slopes, backend=backend)
        optimizer.adamw(
            values,
            slopes,
            averages,
            squares,
            steps,
            rate=rate,
            scale=(norm / literal.CLIP).clamp_min(1.0),
            decays=decays,
            betas=literal.BETAS,
            eps=literal.EPS,
            backend=backend,
        )
        return parameters

    norm_and_update = _both("fwd+bwd", gradient_norm_cost(total), adamw_cost(total))
    return KernelCase(
        "adamw",
        f"2 blocks of width {w}, clipped by their norm",
        Call(functools.partial(literal.adamw, sizes), state),
        Call(ours, state),
        lambda mode, size: norm_and_update,
        others={"torch fused": functools.partial(literal.adamw_fused, sizes)},
        dtypes=("fp32",),
        tolerance={"fp32": 1e-4},  # torch's fp32 norm on a CPU, which it clips by, is off by some 4e-5
    )


def _both(mode: str, forward: Cost, backward: Cost) -> Cost:
    if mode == "fwd":
        return forward
    return Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)


CASES: dict[str, Callable[[Sizes, _Random], KernelCase]] = {
    "align_loss": _align,
    "pixel_loss": _pixel,
    "gather_patches": _gather,
    "embed_patches": _embed,
    "assemble": _assemble,
    "take": _take,
    "put": _put,
    "random_order": _order,
    "add_norm": _add_norm,
    "bias_gelu": _bias_gelu,
    "short_attention": _short_attention,
    "adamw": _adamw,
}
"""What ``cohobate bench kernels`` runs by default: every op in the form that dBOT uses."""

MORE: dict[str, Callable[[Sizes, _Random], KernelCase]] = {
    "assemble_visible_first": _assemble_visible_first,
    "pixel_loss_video": _pixel_video,
    **{f"align_layers_{kind}": _align_layers(kind) for kind in ("mse", "l1", "smooth_l1", "cosine")},
    "quantise_fp8": _quantise_fp8,
}
"""The forms that AMD, VideoMAE and a teacher in fp8 use; tested like the rest, benchmarked when asked for by name."""

SOMEWHERE: dict[str, Callable[[Sizes, _Random], KernelCase]] = {
    "linear": _linear,
    "pre_norm_block": _pre_norm_block,
}
"""Ops whose fast form takes one dtype and exists on some processors only; benchmarked when asked for by name."""
