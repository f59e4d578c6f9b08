"""``cohobate bench teacher``: features of a frozen ViT, by the runtime and by the module that it was rebuilt from.

The originals are a plain ViT in PyTorch, eager and compiled, with scaled_dot_product_attention ("eager", as timm and
transformers run it today) and with explicit scores ("literal"), in fp32 and cast to bf16 as a whole. They get images
that are normalised and cast already; the runtime reads uint8. Pruned means the rows that dBOT's loss reads: the class
token and the hidden patches; who wants them of the originals computes all and picks them afterwards, which costs next
to nothing, so that pruned rows are compared with the same originals.

Features of every provider are compared with the float64 ones. In bf16 they may be twice as far from them as the
original's are in bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cohobate import models
from cohobate.benchmarks import command
from cohobate.benchmarks.harness import QUICK, Case, Provider, Row, errors, measure
from cohobate.benchmarks.reference import vit
from cohobate.benchmarks.step import ERROR_RATIO
from cohobate.benchmarks.twins import FP32, MASK_RATIO
from cohobate.errors import UserError
from cohobate.kernels import Cost
from cohobate.masking import random_plan
from cohobate.models import VisionTransformer
from cohobate.teacher import FrozenTeacher
from cohobate.teacher.fp8 import OLDEST, quantise

NOISE = 0.1  # of biases and norms, which are drawn as 0 and 1: a part that is folded wrongly shall show
FP8_ERROR = 0.03  # fp8 is not exact: what its own gate allows against bf16; what bf16 may err is added to it
HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A named encoder, square images, a batch, and the layers that are wanted (none: the last)."""

    size: str = "base"
    image: int = 224
    batch: int = 8
    layers: tuple[int, ...] = ()


@dataclass
class Parts:
    """The encoder with random weights, a batch, the rows that a loss reads, and the float64 answer by name."""

    encoder: VisionTransformer
    layers: tuple[int, ...]
    pixels: Tensor
    rows: Tensor
    expected: dict[str, Tensor]

    @classmethod
    def make(cls, shape: Shape, device: str, seed: int) -> Parts:
        """Weights and pixels from one generator.

        Raises:
            UserError: a size, image or layer that does not exist.
        """
        generator = torch.Generator().manual_seed(seed)
        encoder = models.build(shape.size, image_size=shape.image)
        encoder.reset(generator)
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
        layers = shape.layers or (encoder.depth,)
        if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > encoder.depth:
            raise UserError(f"--layers: expected ascending numbers in [1, {encoder.depth}], got {list(layers)}")
        size = (shape.batch, *encoder.grid.pixel_shape)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)
        ids = torch.arange(shape.batch, device=device)
        hidden = 1 + random_plan(encoder.grid, ids, seed=seed, stage=0, epoch=0, ratio=MASK_RATIO).masked
        rows = torch.cat([hidden.new_zeros(shape.batch, 1), hidden], dim=1)
        parts = cls(encoder.to(device), layers, pixels, rows, {})
        with torch.no_grad():
            whole = parts.original(torch.float64, fused=False).states(parts.images(torch.float64), layers)
        index = rows.long()[..., None].expand(-1, -1, encoder.width)
        for layer, features in zip(layers, whole, strict=True):
            parts.expected |= {f"layer {layer}": features, f"rows of layer {layer}": features.gather(1, index)}
        return parts

    def images(self, dtype: torch.dtype) -> Tensor:
        """The normalised batch, [B, C, H, W]."""
        return vit.normalise(self.pixels.cpu(), self.encoder.mean, self.encoder.std).to(self.pixels.device, dtype)

    def original(self, dtype: torch.dtype, *, fused: bool) -> vit.Encoder:
        """The plain module with these weights, cast as a whole."""
        e = self.encoder
        _, rows, columns = e.grid.shape
        twin = vit.Encoder((rows, columns), e.grid.patch[1], e.width, e.depth, e.heads, e.grid.channels, fused)
        twin.load_state_dict(e.state_dict())
        return twin.to(self.pixels.device, dtype).eval().requires_grad_(False)

    def named(self, features: Sequence[Tensor], *, pruned: bool = False) -> Mapping[str, Tensor]:
        """Features by layer, as in ``expected``."""
        kind = "rows of layer" if pruned else "layer"
        return {f"{kind} {layer}": x for layer, x in zip(self.layers, features, strict=True)}

    def errors(self, results: Mapping[str, Tensor]) -> tuple[float, float | None]:
        """(largest error of what a provider computed, None)."""
        return errors(results, {name: self.expected[name] for name in results})


def run(shape: Shape, setting: command.Setting, *, seed: int = 0, compiled: bool = True) -> list[Row]:
    """Check and time every provider; one row each.

    Raises:
        UserError: a size, image or layer that does not exist.
    """
    parts = Parts.make(shape, setting.device, seed)
    limit = allowed(parts)
    count, patch, layers = parts.rows.shape[1], parts.encoder.grid.patch[1], ", ".join(map(str, parts.layers))
    case = Case(
        "teacher",
        f"ViT-{shape.size}/{patch}, {shape.image} px, batch {shape.batch}, layers {layers} of {parts.encoder.depth}; "
        f"pruned: {count} of {parts.encoder.grid.size + parts.encoder.prefix} rows",
        setting.device,
        parts.expected,
        parts.errors,
    )
    return measure(
        case,
        [*originals(parts, limit, compiled), *runtimes(parts, limit)],
        ceilings=setting.ceilings,
        environment=setting.environment,
        effort=dataclasses.replace(setting.effort, least=min(setting.effort.least, 5)),  # a round takes seconds
        baselines=("eager", "compile") if compiled else ("eager",),
    )


def allowed(parts: Parts) -> float:
    """The error that features in bf16 may have: twice the original's in bf16."""
    with torch.no_grad():
        found = parts.original(HALF, fused=True).states(parts.images(HALF), parts.layers)
    return ERROR_RATIO * parts.errors(parts.named(found))[0]


def originals(parts: Parts, limit: float, compiled: bool = True) -> list[Provider]:
    """The plain module in both dtypes: eager, literal, and ``torch.compile`` of the eager one with its defaults."""
    cost = Cost(bytes=0, flops=len(parts.pixels) * parts.encoder.flops())
    found = []
    for dtype, name in ((torch.float32, "fp32"), (HALF, "bf16")):
        images, tolerance = parts.images(dtype), limit if dtype is HALF else None
        fused, literal = parts.original(dtype, fused=True), parts.original(dtype, fused=False)
        forms: list[tuple[str, str, Callable[..., list[Tensor]]]] = [("eager", "eager", fused.states)]
        forms += [("literal", "other", literal.states)]
        if compiled:
            forms += [("compile", "compile", torch.compile(fused.states, dynamic=False))]
        for form, role, states in forms:
            found.append(
                Provider(
                    f"{form} {name}",
                    "fwd",
                    partial(_without_gradient, states, images, parts.layers),
                    role=role if dtype is torch.float32 else "other",
                    dtype=name,
                    results=parts.named,
                    tolerance=tolerance,
                    cost=cost,
                    capture=False,
                )
            )
    return found


def runtimes(parts: Parts, limit: float) -> list[Provider]:
    """The engine's teacher, whole and pruned, in fp32 and bf16; on a card that has it, in fp8."""
    exact = FrozenTeacher(parts.encoder, parts.layers, precision=FP32)
    half = FrozenTeacher(parts.encoder, parts.layers)
    known = [("engine fp32", exact, "fp32", None, ""), ("engine bf16", half, "bf16", limit, "")]
    if parts.pixels.is_cuda:
        eager = FrozenTeacher(parts.encoder, parts.layers, cuda_graph=False)
        known.append(("engine bf16, no graph", eager, "bf16", limit, ""))
        if torch.cuda.get_device_capability(parts.pixels.device) >= OLDEST:
            known += _fp8(parts, limit)
    found = []
    for name, teacher, dtype, tolerance, note in known:
        for pruned in (False, True):
            queries = parts.rows if pruned else None
            flops = teacher.flops(parts.rows.shape[1] if pruned else None)
            found.append(
                Provider(
                    f"{name}, pruned" if pruned else name,
                    "fwd",
                    partial(teacher, parts.pixels, queries=queries),
                    dtype=dtype,
                    results=partial(parts.named, pruned=pruned),
                    tolerance=tolerance,
                    cost=Cost(bytes=0, flops=len(parts.pixels) * flops),
                    capture=False,  # the runtime replays graphs of its own
                    note=note,
                )
            )
    return found


def _fp8(parts: Parts, limit: float) -> list[tuple[str, FrozenTeacher, str, float | None, str]]:
    """The runtime in fp8, calibrated on the batch itself; none where its gate refuses it."""
    teacher = FrozenTeacher(parts.encoder, parts.layers)
    try:
        quantise(teacher, parts.pixels, error=FP8_ERROR)
    except UserError:
        return []
    tolerance = FP8_ERROR + limit
    note = f"{teacher.precision_name}: not exact, tolerance {tolerance:.1%}; the share is of the bf16 rate"
    return [("engine fp8", teacher, "bf16", tolerance, note)]


def _without_gradient(states: Callable[..., list[Tensor]], images: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    with torch.no_grad():
        return states(images, layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench teacher", description=__doc__)
    command.add_options(parser)
    parser.add_argument("--size", choices=tuple(models.SIZES), default="base", help="encoder (default: base)")
    parser.add_argument("--image", type=int, default=224, help="side of the images, pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images a call (default: 8)")
    parser.add_argument(
        "--layers", default="", metavar="N,N", help="blocks whose outputs are wanted (default: the last)"
    )
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {args.batch}")
    try:
        layers = tuple(int(word) for word in args.layers.split(",") if word)
    except ValueError:
        raise UserError(f"--layers: expected numbers with commas between them, got {args.layers!r}") from None
    shape = Shape(args.size, args.image, args.batch, layers)
    setting = command.prepare(args)
    if args.quick:
        shape, setting = Shape("tiny", 64, 2, layers), dataclasses.replace(setting, effort=QUICK)
    rows = run(shape, setting, seed=args.seed, compiled=not args.quick)
    return command.finish(args, setting, rows)


if __name__ == "__main__":
    raise SystemExit(main())
