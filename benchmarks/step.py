"""``cohobate bench step``: a whole training step of a method, ours against the literal implementation of the same step.

One step is forward, backward, gradient clipping and AdamW, from one batch, one mask and one set of weights. The literal
step gets normalised fp32 images, as a published loader hands them over; ours reads uint8 and normalises by itself.
Loss and gradients are compared with the literal fp32 step's before anything is timed; in bf16 a step may be at most
twice as wrong as the literal one under autocast is.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cohobate import models
from cohobate.benchmarks import command
from cohobate.benchmarks.harness import QUICK, Case, Provider, Row, errors, measure
from cohobate.benchmarks.twins import CLIPS, MAKERS, Shape, Twins, make
from cohobate.errors import UserError
from cohobate.kernels import Cost
from cohobate.training.optimizer import Updater

CLIP, LEARNING_RATE, BETAS, WEIGHT_DECAY = 3.0, 2.4e-3, (0.9, 0.95), 0.05
# fp32 sums in another order, through a whole network and back; the largest error over all gradient tensors.
SAME_MATHS = 1e-5
# In bf16 a step may be twice as far from the fp32 step as the literal one under autocast: flash-attention's rule. But
# not beyond the second figure: a literal gradient summed in bf16 over all tokens says nothing of what is good.
ERROR_RATIO, LARGEST_ERROR = 2.0, 5e-2


class Step:
    """One training step as a function: loss, backward, ``update``. Gradients, clipped, stay until the next call."""

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], update: Callable[[], None]) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.loss, self.update = loss, update

    def __call__(self) -> Tensor:
        """Run it; the loss, without a graph."""
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        self.update()
        return loss.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Give the parameters their first values again."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.initial[name])

    def results(self, loss: Tensor) -> Mapping[str, Tensor]:
        """The loss and every (clipped) gradient."""
        gradients = {f"grad {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
        return {"loss": loss, **gradients}

    def with_loss(self, loss: Callable[[], Tensor]) -> Step:
        """Another way to compute the loss of the same parameters, with the same optimizer state."""
        twin = object.__new__(Step)
        twin.__dict__ = {**self.__dict__, "loss": loss}
        return twin


def literal_update(module: nn.Module) -> Callable[[], None]:
    """Clipping and AdamW as published codes call them."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def run() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return run


def engine_update(module: nn.Module) -> Callable[[], None]:
    """What a run of the engine calls."""
    updater = Updater(module, weight_decay=WEIGHT_DECAY, betas=BETAS, clip=CLIP)

    def run() -> None:
        norm = updater.gradient_norm()
        updater.step(LEARNING_RATE, 1.0 - norm.isfinite().float())

    return run


def autocast(loss: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """The same under bf16 autocast."""

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss()

    return run


def run(shape: Shape, setting: command.Setting, *, seed: int = 0, compiled: bool = True) -> list[Row]:
    """Check and time every provider of the step; one row each.

    Raises:
        UserError: the engine in fp32 does not agree with the literal step; then nothing is timed.
    """
    device = setting.device
    twins = make(shape, device, seed)
    cost = Cost(bytes=0, flops=shape.batch * twins.method.flops(twins.plan))

    literal = Step(twins.literal, lambda: twins.literal(*twins.inputs), literal_update(twins.literal))
    expected = {name: value.clone() for name, value in literal.results(literal()).items()}
    case = Case(f"{shape.recipe}_step", str(shape), device, expected)
    exact = _check_fp32(twins, case, setting)

    engine = _engine(twins.method, twins)
    half = literal.with_loss(autocast(literal.loss, device))
    half.reset()
    theirs = max(value or 0.0 for value in errors(half.results(half()), expected))
    allowed = min(ERROR_RATIO * theirs, LARGEST_ERROR)
    providers = [
        _provider("literal fp32", literal, "eager", "fp32", SAME_MATHS, cost),
        _provider("literal bf16 autocast", half, "other", "bf16", allowed, cost),
    ]
    if compiled:
        program = torch.compile(twins.literal)
        fast = literal.with_loss(autocast(lambda: program(*twins.inputs), device))
        providers.append(_provider("literal bf16 compiled", fast, "compile", "bf16", allowed, cost))
    providers.append(_provider("engine bf16", engine, "ours", "bf16", allowed, cost))
    baselines = ("eager", "compile") if compiled else ("eager",)
    rows = measure(
        case,
        providers,
        ceilings=setting.ceilings,
        environment=setting.environment,
        effort=dataclasses.replace(setting.effort, least=3),  # seconds a call: a few rounds say enough
        baselines=baselines,
    )
    return [exact, *rows]


def _engine(method: Any, twins: Twins) -> Step:
    return Step(method, lambda: method.loss(twins.batch, twins.plan).total, engine_update(method))


def _provider(name: str, step: Step, role: str, dtype: str, tolerance: float, cost: Cost) -> Provider:
    return Provider(
        name,
        "train",
        step,
        step.reset,
        role=role,
        dtype=dtype,
        results=step.results,
        tolerance=tolerance,
        cost=cost,
        capture=False,
    )


def _check_fp32(twins: Twins, case: Case, setting: command.Setting) -> Row:
    """A row without timings: the engine in fp32 computes the literal step."""
    step = _engine(twins.exact(), twins)
    row = Row(case.name, "engine fp32", "ours", "train", case.device, "fp32", case.shape)
    row.max_rel_err, row.grad_rel_err = errors(step.results(step()), case.expected)
    row.tolerance, row.note, row.env = SAME_MATHS, "checked, not timed", dict(setting.environment)
    if not row.agrees:
        raise UserError(
            f"{case.name}: the engine in fp32 disagrees with the literal step: loss {row.max_rel_err:.1e}, "
            f"gradient {row.grad_rel_err:.1e}, allowed {SAME_MATHS:.0e}"
        )
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench step", description=__doc__)
    command.add_options(parser)
    parser.add_argument("--recipe", choices=tuple(MAKERS), default="dbot", help="method (default: dbot)")
    parser.add_argument("--size", choices=tuple(models.SIZES), default="base", help="encoder (default: base)")
    parser.add_argument("--image", type=int, default=224, help="side of images or frames, pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images or clips a step (default: 8)")
    parser.add_argument("--frames", type=int, default=16, help=f"of a clip, for {' and '.join(CLIPS)} (default: 16)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {args.batch}")
    shape = Shape(args.recipe, args.size, args.image, args.batch, args.frames)
    setting = command.prepare(args)
    if args.quick:
        shape = Shape(args.recipe, "tiny", 64, 2, 4)
        setting = dataclasses.replace(setting, effort=QUICK)
    rows = run(shape, setting, seed=args.seed, compiled=not args.quick)
    return command.finish(args, setting, rows)


if __name__ == "__main__":
    raise SystemExit(main())
