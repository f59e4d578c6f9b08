"""One case an op: its inputs at the sizes of a real step, the literal form, ours, and the floor.

Random floats are rounded to bf16 first: every dtype computes on the same numbers, and one float64 answer serves all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cohobate.benchmarks import literal
from cohobate.benchmarks.harness import Case, Provider
from cohobate.benchmarks.machine import DTYPES
from cohobate.errors import UserError
from cohobate.kernels import Cost, alignment, tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXACT = ("mean", "std", "mask")  # arguments that stay fp32 when the data is half precision
WIDTHS = {"vit-tiny": 192, "vit-s": 384, "vit-b": 768, "vit-l": 1024}
MODES = ("fwd", "fwd+bwd")


@dataclass(frozen=True)
class Sizes:
    """A dBOT step: square images, a class token, ``keep`` of the patches visible, the decoder's own width."""

    batch: int = 8
    width: int = 768
    image: int = 224
    patch: int = 16
    decoder: int = 512
    keep: float = 0.25

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def visible(self) -> int:
        return int(self.patches * self.keep)

    @property
    def row(self) -> int:
        return 3 * self.patch**2


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
            return value if name in EXACT and dtype is not torch.float64 else value.to(dtype)

        return Call(self.function, {name: convert(name, value) for name, value in self.arguments.items()})


@dataclass(frozen=True)
class KernelCase:
    """An op of the registry. ``ours`` also takes ``backend=``; ``leaves`` are the arguments that get a gradient.

    ``to_ours`` maps the literal's gradient of a leaf to our layout. ``cost(mode, itemsize)`` is the floor of one call.
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
    """Literal eager, ``torch.compile`` of it, the reference and the fast implementation of the inputs' device.

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
        found.append(Provider(full, mode, run, role=role, dtype=dtype, results=results, cost=cost, copies=copies))

    main, rest = (dtypes[0], dtypes[1:]) if kernel.has_dtype else ("int32", ())
    add("literal", literal_call, main, "eager")
    add("compile", Call(compiled, literal_call.arguments), main, "compile")
    add("reference", reference_call, main, "other")
    add(fast, fast_call, main, "ours")
    for dtype in rest:
        add("literal", literal_call, dtype, "other")
        add("compile", Call(compiled, literal_call.arguments), dtype, "other")
        add(fast, fast_call, dtype, "ours")
    return found


def _with(call: Call, backend: str) -> Call:
    return Call(lambda *values: call.function(*values, backend=backend), call.arguments)


def build(name: str, sizes: Sizes, device: str, seed: int) -> KernelCase:
    """The case of one op.

    Raises:
        UserError: no case of that name.
    """
    if name not in CASES:
        raise UserError(f"ops: expected some of {', '.join(CASES)}; got {name!r}")
    generator = torch.Generator().manual_seed(seed)
    return CASES[name](sizes, device, _Random(sizes, device, generator))


class _Random:
    """Inputs by one generator: pixels, bf16-representable floats, and an order of the patches with its inverse."""

    def __init__(self, sizes: Sizes, device: str, generator: torch.Generator) -> None:
        self.sizes, self.device, self.generator = sizes, device, generator
        shape = (sizes.batch, sizes.patches)
        order = torch.rand(shape, generator=generator).argsort(dim=1)
        cut = sizes.visible
        self.order = torch.cat([order[:, :cut].sort(dim=1).values, order[:, cut:].sort(dim=1).values], dim=1).to(device)
        self.where = self.order.argsort(dim=1)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.bfloat16().float().to(self.device)

    def pixels(self) -> Tensor:
        s = self.sizes
        shape = (s.batch, 1, s.image, s.image, 3)
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8).to(self.device)

    def statistics(self) -> dict[str, Tensor]:
        return {"mean": torch.tensor(MEAN, device=self.device), "std": torch.tensor(STD, device=self.device)}


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _gather(s: Sizes, device: str, random: _Random) -> KernelCase:
    pixels, index = random.pixels(), random.order[:, : s.visible].contiguous()
    patch = (1, s.patch, s.patch)

    def literal_form(pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
        return literal.gather_patches(pixels, index, mean, std, patch).to(dtype)

    def ours(pixels: Tensor, rows: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        return tokens.gather_patches(pixels, rows, patch=patch, mean=MEAN, std=STD, dtype=dtype, backend=backend)

    return KernelCase(
        "gather_patches",
        f"{s.batch} images of {s.image} px, {s.visible} of {s.patches} patches of {s.patch} px",
        Call(literal_form, {"pixels": pixels, "index": index, **random.statistics(), "dtype": torch.float32}),
        Call(ours, {"pixels": pixels, "rows": _int32(index), "dtype": torch.float32}),
        lambda mode, size: Cost(0, 0),
    )


def _embed(s: Sizes, device: str, random: _Random) -> KernelCase:
    pixels, index = random.pixels(), random.order[:, : s.visible].contiguous()
    patch = (1, s.patch, s.patch)
    weight = random.floats(s.width, 3, s.patch, s.patch, scale=s.row**-0.5)
    bias, positions = random.floats(s.width), random.floats(s.patches, s.width)

    def to_rows(w: Tensor) -> Tensor:
        return w.permute(0, 2, 3, 1).reshape(s.width, s.row)

    def ours(
        pixels: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, dtype: torch.dtype, backend: str
    ) -> Tensor:
        return tokens.embed_patches(
            pixels, rows, weight, bias, positions, patch=patch, mean=MEAN, std=STD, dtype=dtype, backend=backend
        )

    shared = {"bias": bias, "positions": positions}
    return KernelCase(
        "embed_patches",
        f"{s.batch} images of {s.image} px, {s.visible} of {s.patches} patches of {s.patch} px, width {s.width}",
        Call(
            literal.embed_patches,
            {"pixels": pixels, "index": index, "weight": weight, **shared, **random.statistics()},
        ),
        Call(
            ours,
            {"pixels": pixels, "rows": _int32(index), "weight": to_rows(weight), **shared, "dtype": torch.float32},
        ),
        lambda mode, size: Cost(0, 0),
        leaves=("weight", "bias"),
        to_ours={"weight": to_rows},
        upstream=random.floats(s.batch, s.visible, s.width),
    )


def _assemble(s: Sizes, device: str, random: _Random) -> KernelCase:
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
        lambda mode, size: Cost(0, 0),
        leaves=("x", "mask_token"),
        upstream=random.floats(s.batch, 1 + s.patches, s.decoder),
    )


def _take(s: Sizes, device: str, random: _Random) -> KernelCase:
    x, index = random.floats(s.batch, s.patches, s.width), random.order[:, : s.visible].contiguous()
    return KernelCase(
        "take",
        f"{s.batch} x {s.visible} of {s.patches} rows, width {s.width}",
        Call(literal.take, {"x": x, "index": index}),
        Call(lambda x, rows, backend: tokens.take(x, rows, backend=backend), {"x": x, "rows": _int32(index)}),
        lambda mode, size: Cost(0, 0),
        leaves=("x",),
        upstream=random.floats(s.batch, s.visible, s.width),
    )


def _put(s: Sizes, device: str, random: _Random) -> KernelCase:
    x, index = random.floats(s.batch, s.visible, s.width), random.order[:, : s.visible].contiguous()
    n = s.patches
    return KernelCase(
        "put",
        f"{s.batch} x {s.visible} of {n} rows, width {s.width}",
        Call(lambda x, index: literal.put(x, index, n), {"x": x, "index": index}),
        Call(lambda x, rows, backend: tokens.put(x, rows, n, backend=backend), {"x": x, "rows": _int32(index)}),
        lambda mode, size: Cost(0, 0),
        leaves=("x",),
        upstream=random.floats(s.batch, n, s.width),
    )


def _order(s: Sizes, device: str, random: _Random) -> KernelCase:
    ids = torch.arange(s.batch, device=device) + 1_000_000
    n = s.patches

    def ours(sample_ids: Tensor, backend: str) -> Tensor:
        return tokens.random_order(sample_ids, n, seed=0, backend=backend)

    def permutation(results: Mapping[str, Tensor]) -> tuple[float, float | None]:
        right = torch.equal(results["out"].long().sort(dim=1).values.cpu(), torch.arange(n).expand(s.batch, n))
        return (0.0 if right else float("inf")), None

    return KernelCase(
        "random_order",
        f"{s.batch} permutations of {n}",
        Call(lambda sample_ids: literal.random_order(sample_ids, n), {"sample_ids": ids}),
        Call(ours, {"sample_ids": ids}),
        lambda mode, size: Cost(0, 0),
        compare=permutation,
    )


def _align(s: Sizes, device: str, random: _Random) -> KernelCase:
    shape = (s.batch, 1 + s.patches, s.width)
    prediction, target = random.floats(*shape), random.floats(*shape, scale=3.0)
    mask = torch.ones(s.batch, 1 + s.patches, device=device)  # dBOT counts the class token as masked
    mask[:, 1:].scatter_(1, random.order[:, : s.visible], 0.0)
    masked = random.order[:, s.visible :] + 1
    rows = _int32(torch.cat([torch.zeros_like(masked[:, :1]), masked], dim=1))

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
        lambda mode, size: Cost(0, 0),
        leaves=("prediction",),
    )


def _pixel(s: Sizes, device: str, random: _Random) -> KernelCase:
    pixels, prediction = random.pixels(), random.floats(s.batch, s.patches, s.row)
    patch = (1, s.patch, s.patch)
    mask = torch.ones(s.batch, s.patches, device=device).scatter_(1, random.order[:, : s.visible], 0.0)
    index = random.order[:, s.visible :].contiguous()

    def literal_form(prediction: Tensor, pixels: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return literal.pixel_loss(prediction, pixels, mask, mean, std, patch)

    def ours(prediction: Tensor, pixels: Tensor, rows: Tensor, backend: str) -> Tensor:
        return alignment.pixel_loss(prediction, pixels, rows, patch=patch, mean=MEAN, std=STD, backend=backend)

    return KernelCase(
        "pixel_loss",
        f"{s.batch} images of {s.image} px, {s.patches - s.visible} of {s.patches} patches of {s.patch} px",
        Call(literal_form, {"prediction": prediction, "pixels": pixels, "mask": mask, **random.statistics()}),
        Call(ours, {"prediction": literal.rows_of(prediction, index), "pixels": pixels, "rows": _int32(index)}),
        lambda mode, size: Cost(0, 0),
        leaves=("prediction",),
        to_ours={"prediction": lambda gradient: literal.rows_of(gradient, index)},
    )


CASES: dict[str, Callable[[Sizes, str, _Random], KernelCase]] = {
    "align_loss": _align,
    "pixel_loss": _pixel,
    "gather_patches": _gather,
    "embed_patches": _embed,
    "assemble": _assemble,
    "take": _take,
    "put": _put,
    "random_order": _order,
}
