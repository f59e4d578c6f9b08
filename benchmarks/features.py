"""``cohobate bench features``: features for evaluation, by the runtime and by the Hugging Face model it rebuilds.

The images lie in memory. The originals, transformers' ``ViTModel`` with scaled_dot_product_attention, get them
normalised and cast already; the engine reads uint8. Compared are all tokens behind the final norm, with the float64
answer; in bf16 they may be twice as far from it as the original's are in bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cohobate.benchmarks import command
from cohobate.benchmarks.harness import QUICK, Case, Provider, Row, errors, measure
from cohobate.benchmarks.step import ERROR_RATIO
from cohobate.benchmarks.teacher import NOISE
from cohobate.errors import UserError
from cohobate.evaluation import Extractor
from cohobate.evaluation.extractor import BF16, FP32
from cohobate.kernels import Cost
from cohobate.models import SIZES
from cohobate.teacher import FrozenTeacher, load_source

DTYPES = {"fp32": (torch.float32, FP32), "bf16": (torch.bfloat16, BF16)}


@dataclass(frozen=True)
class Shape:
    """A named ViT, square images, and how many of them a call."""

    size: str = "base"
    image: int = 224
    batch: int = 8


class Parts:
    """The original with random weights, a batch in memory, and the float64 answer."""

    def __init__(self, shape: Shape, device: str, seed: int) -> None:
        import transformers

        size = SIZES[shape.size]
        config = transformers.ViTConfig(
            hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.heads,
            intermediate_size=4 * size.width, image_size=shape.image, patch_size=size.patch,
        )  # fmt: skip
        torch.manual_seed(seed)
        self.model = transformers.ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=NOISE)
        self.source = load_source(self.model)
        self.model.to(device)
        self.pixels = torch.randint(0, 256, (shape.batch, *self.source.grid.pixel_shape), dtype=torch.uint8).to(device)
        self.expected = {"tokens": _tokens(self.original(torch.float64), self.images(torch.float64))}

    def images(self, dtype: torch.dtype) -> Tensor:
        """The normalised batch [B, C, H, W]."""
        mean, std = (torch.tensor(x, device=self.pixels.device) for x in (self.source.mean, self.source.std))
        return ((self.pixels[:, 0].float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous().to(dtype)

    def original(self, dtype: torch.dtype) -> Any:
        """A copy of the model, cast as a whole."""
        twin = type(self.model)(self.model.config, add_pooling_layer=False)
        twin.load_state_dict(self.model.state_dict())
        return twin.to(self.pixels.device, dtype).eval().requires_grad_(False)


@torch.no_grad()
def _tokens(model: Callable[..., Any], images: Tensor) -> Tensor:
    found: Tensor = model(images).last_hidden_state
    return found


def _named(tokens: Tensor) -> Mapping[str, Tensor]:
    return {"tokens": tokens}


def run(shape: Shape, setting: command.Setting, *, seed: int = 0, compiled: bool = True) -> list[Row]:
    """Check and time every provider, one row each."""
    parts = Parts(shape, setting.device, seed)
    images = {name: parts.images(dtype) for name, (dtype, _) in DTYPES.items()}
    models = {name: parts.original(dtype) for name, (dtype, _) in DTYPES.items()}
    limit = ERROR_RATIO * errors(_named(_tokens(models["bf16"], images["bf16"])), parts.expected)[0]
    flops = FrozenTeacher(parts.source.anatomy).flops() if parts.source.anatomy is not None else 0
    cost = Cost(bytes=0, flops=shape.batch * flops)
    forms: list[tuple[str, str, str, Callable[[], Tensor]]] = []
    for name in DTYPES:
        role = "eager" if name == "fp32" else "other"
        forms.append((f"transformers {name}", role, name, partial(_tokens, models[name], images[name])))
        if compiled:
            role = "compile" if name == "fp32" else "other"
            function = torch.compile(models[name], dynamic=False)
            forms.append((f"transformers {name}, compiled", role, name, partial(_tokens, function, images[name])))
    for name, (_, precision) in DTYPES.items():
        extractor = Extractor(parts.source, precision, device=setting.device)
        forms.append((f"engine {name}", "ours", name, partial(extractor.tokens, parts.pixels)))
    providers = [
        Provider(
            provider, "fwd", function, role=role, dtype=dtype, results=_named,
            tolerance=limit if dtype == "bf16" else None, cost=cost, capture=False,
        )
        for provider, role, dtype, function in forms
    ]  # fmt: skip
    case = Case(
        "features",
        f"ViT-{shape.size}/{SIZES[shape.size].patch}, {shape.image} px, batch {shape.batch}, all tokens",
        setting.device,
        parts.expected,
    )
    return measure(
        case,
        providers,
        ceilings=setting.ceilings,
        environment=setting.environment,
        effort=dataclasses.replace(setting.effort, least=min(setting.effort.least, 5)),  # a round takes seconds
        baselines=("eager", "compile") if compiled else ("eager",),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench features", description=__doc__)
    command.add_options(parser)
    parser.add_argument("--size", choices=tuple(SIZES), default="base", help="encoder (default: base)")
    parser.add_argument("--image", type=int, default=224, help="side of the images, pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images a call (default: 8)")
    args = parser.parse_args(argv)
    for name in ("image", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    shape, setting = Shape(args.size, args.image, args.batch), command.prepare(args)
    if args.quick:
        shape, setting = Shape("tiny", 64, 2), dataclasses.replace(setting, effort=QUICK)
    return command.finish(args, setting, run(shape, setting, seed=args.seed, compiled=not args.quick))


if __name__ == "__main__":
    raise SystemExit(main())
