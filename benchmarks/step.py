"""``cohobate bench step``: a whole training step of a method, ours against the literal implementation of the same step.

One step is forward, backward, gradient clipping and AdamW, from one batch, one mask and one set of weights. The
baselines are those of :func:`cohobate.benchmarks.twins.variants`; they get normalised fp32 images, as a published
loader hands them over, where ours reads uint8 and normalises by itself. Loss and gradients are compared with the
literal fp32 step's before anything is timed; in bf16 a step may be at most twice as wrong as the literal one under
autocast is.

``--profile`` says where each millisecond goes (:mod:`cohobate.benchmarks.profile`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cohobate import models
from cohobate.benchmarks import command, profile
from cohobate.benchmarks.harness import QUICK, Case, Provider, Row, errors, measure
from cohobate.benchmarks.reference.update import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY
from cohobate.benchmarks.twins import CLIPS, MAKERS, Shape, Twins, Variant, make, variants
from cohobate.errors import UserError
from cohobate.kernels import Cost
from cohobate.training.optimizer import Updater

# fp32 sums in another order, through a whole network and back; the largest error over all gradient tensors.
SAME_MATHS = 1e-5
# In bf16 a step may be twice as far from the fp32 step as the literal one under autocast: flash-attention's rule. But
# not beyond the second figure: a literal gradient summed in bf16 over all tokens says nothing of what is good.
ERROR_RATIO, LARGEST_ERROR = 2.0, 5e-2
ITEM_SIZE = {"fp32": 4, "bf16": 2}


class Step:
    """One training step as a function: loss, backward, ``update``."""

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], update: Callable[[], object]) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.loss, self.update = loss, update

    def __call__(self) -> Tensor:
        """Run it; the loss, without a graph."""
        loss = self._differentiate()
        self.update()
        return loss

    def _differentiate(self) -> Tensor:
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Give the parameters their first values again."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.initial[name])

    def results(self, loss: Tensor) -> Mapping[str, Tensor]:
        """The loss, and every gradient at the first weights before it is clipped.

        Clipped ones would say less of the kernels, and torch's norm on a CPU is off by 2e-5.
        """
        self.reset()
        self._differentiate()
        gradients = {f"grad {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
        return {"loss": loss, **gradients}

    def with_loss(self, loss: Callable[[], Tensor]) -> Step:
        """Another way to compute the loss of the same parameters, with the same optimizer state."""
        twin = object.__new__(Step)
        twin.__dict__ = {**self.__dict__, "loss": loss}
        return twin


class EngineStep(Step):
    """What a run of the engine calls."""

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__(module, loss, self._update)
        self.updater = Updater(module, weight_decay=WEIGHT_DECAY, betas=BETAS, clip=CLIP)

    def _update(self) -> None:
        norm = self.updater.gradient_norm()
        self.updater.step(LEARNING_RATE, 1.0 - norm.isfinite().float())

    def reset(self) -> None:
        """As ever; the bf16 copies of the weights, which an update would have left, are written too."""
        super().reset()
        self.updater.write_shadows()


def engine_step(twins: Twins, method: Any | None = None) -> Step:
    """The engine's step; ``method`` (default ``twins.method``) may be the same in another precision."""
    method = twins.method if method is None else method
    return EngineStep(method, lambda: method.loss(twins.batch, twins.plan).total)


def variant_steps(found: Sequence[Variant]) -> dict[str, Step]:
    """A step for each variant; those of one module share its weights and the optimizer's state."""
    modules: dict[nn.Module, Step] = {}
    for variant in found:
        modules.setdefault(variant.module, Step(variant.module, variant.loss, variant.update))
    return {variant.name: modules[variant.module].with_loss(variant.loss) for variant in found}


def cost(twins: Twins, dtype: str) -> Cost:
    """What any implementation of the step must at least compute and move.

    FLOPs are those of :meth:`flops` of the method. Bytes: every weight is read forward and backward in ``dtype``, its
    gradient written, and read again once the norm of all is known; AdamW reads and writes the fp32 weight and its two
    averages. A teacher's weights and the pixels are read once. Activations are left out: they may stay in a cache.
    """
    trained = sum(p.numel() for p in twins.method.parameters() if p.requires_grad)
    teacher = getattr(twins.literal, "teacher", None)
    frozen = 0 if teacher is None else sum(p.numel() for p in teacher.blocks.parameters())
    size, state = ITEM_SIZE[dtype], 4
    moved = trained * (2 * size + 2 * state + 6 * state) + frozen * size + twins.batch.pixels.nbytes
    return Cost(bytes=moved, flops=len(twins.batch.pixels) * twins.method.flops(twins.plan))


def baselines(twins: Twins, device: str, which: str = "all", compiled: bool = True) -> list[Variant]:
    """The variants to compare with: ``which`` "all", or "main" without the one that takes longest to compile."""
    found = [v for v in variants(twins, device) if compiled or v.role != "compile"]
    return [v for v in found if which == "all" or "max-autotune" not in v.name]


def run(
    shape: Shape, setting: command.Setting, *, seed: int = 0, which: str = "all", compiled: bool = True
) -> list[Row]:
    """Check and time every provider of the step; one row each.

    Raises:
        UserError: the engine in fp32 does not agree with the literal step; then nothing is timed.
    """
    device = setting.device
    twins = make(shape, device, seed)
    found = baselines(twins, device, which, compiled)
    steps = variant_steps(found)
    literal = steps[found[0].name]
    expected = {name: value.clone() for name, value in literal.results(literal()).items()}
    case = Case(f"{shape.recipe}_step", str(shape), device, expected)
    exact = _check_fp32(twins, case, setting)

    allowed = {"fp32": SAME_MATHS, "bf16": _allowed(steps, found, case)}
    providers = [
        _provider(v.name, steps[v.name], v.role, v.dtype, allowed[v.dtype], cost(twins, v.dtype), v.note) for v in found
    ]
    step, needed = engine_step(twins), cost(twins, "bf16")
    providers.append(_provider("engine bf16", step, "ours", "bf16", allowed["bf16"], needed))
    if device == "cuda":  # what execution.cuda_graph makes of it
        graph = _provider("engine bf16, one CUDA graph", step, "ours", "bf16", allowed["bf16"], needed)
        providers.append(dataclasses.replace(graph, capture=True))
    rows = measure(
        case,
        providers,
        ceilings=setting.ceilings,
        environment=setting.environment,
        effort=dataclasses.replace(setting.effort, least=3),  # seconds a call: a few rounds say enough
        baselines=("eager", "compile") if compiled else ("eager",),
    )
    return [exact, *rows]


def _allowed(steps: Mapping[str, Step], found: Sequence[Variant], case: Case) -> float:
    """Largest error in bf16: twice that of the literal step under autocast, up to a limit."""
    half = steps[next(v.name for v in found if v.module is found[0].module and v.dtype == "bf16")]
    half.reset()
    theirs = max(value or 0.0 for value in errors(half.results(half()), case.expected))
    return min(ERROR_RATIO * theirs, LARGEST_ERROR)


def _provider(name: str, step: Step, role: str, dtype: str, tolerance: float, cost: Cost, note: str = "") -> Provider:
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
        note=note,
    )


def _check_fp32(twins: Twins, case: Case, setting: command.Setting) -> Row:
    """A row without timings: the engine in fp32 computes the literal step."""
    step = engine_step(twins, twins.exact())
    row = Row(case.name, "engine fp32", "ours", "train", case.device, "fp32", case.shape)
    row.max_rel_err, row.grad_rel_err = errors(step.results(step()), case.expected)
    row.tolerance, row.note, row.env = SAME_MATHS, "checked, not timed", dict(setting.environment)
    if not row.agrees:
        raise UserError(
            f"{case.name}: the engine in fp32 disagrees with the literal step: loss {row.max_rel_err:.1e}, "
            f"gradient {row.grad_rel_err:.1e}, allowed {SAME_MATHS:.0e}"
        )
    return row


# -- where the time goes -----------------------------------------------------------------------------------------------


def run_profile(shape: Shape, setting: command.Setting, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of :mod:`cohobate.benchmarks.profile` for the engine's step and the uncompiled baselines in bf16."""
    twins = make(shape, setting.device, seed)
    found = [v for v in baselines(twins, setting.device, compiled=False) if v.dtype == "bf16"]
    steps = variant_steps(found)
    subjects = [
        profile.Subject("engine bf16", engine_step(twins), twins.method, "bf16"),
        *(profile.Subject(v.name, steps[v.name], v.module, v.dtype) for v in found),
    ]
    work = profile.work(twins.method, twins.plan, shape.batch)
    repeats = 2 * setting.effort.repeats - 1  # odd, for a middle one
    return profile.run(f"{shape.recipe}_step", str(shape), subjects, work, setting, repeats)


# -- the command -------------------------------------------------------------------------------------------------------


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Which step is meant; :func:`prepare` reads them."""
    parser.add_argument("--recipe", choices=tuple(MAKERS), default="dbot", help="method (default: dbot)")
    parser.add_argument("--size", choices=tuple(models.SIZES), default="base", help="encoder (default: base)")
    parser.add_argument("--image", type=int, default=224, help="side of images or frames, pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images or clips a step (default: 8)")
    parser.add_argument("--frames", type=int, default=16, help=f"of a clip, for {' and '.join(CLIPS)} (default: 16)")


def prepare(args: argparse.Namespace) -> tuple[Shape, command.Setting]:
    """The step that the options ask for, a tiny one with ``--quick``, and the prepared machine.

    Raises:
        UserError: an option that cannot be followed here.
    """
    if args.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {args.batch}")
    setting = command.prepare(args)
    if args.quick:
        return Shape(args.recipe, "tiny", 64, 2, 4), dataclasses.replace(setting, effort=QUICK)
    return Shape(args.recipe, args.size, args.image, args.batch, args.frames), setting


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench step", description=__doc__)
    command.add_options(parser)
    add_shape_options(parser)
    parser.add_argument(
        "--variants",
        choices=("main", "all"),
        default="all",
        help="baselines: all, or without max-autotune, which takes longest to compile (default: all)",
    )
    parser.add_argument("--profile", action="store_true", help="instead: where each millisecond of a step goes")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE", help="with --profile: draw it")
    args = parser.parse_args(argv)
    if args.picture is not None and not args.profile:
        raise UserError("--picture: expected --profile with it")
    shape, setting = prepare(args)
    if args.profile:
        return _profile(args, setting, shape)
    rows = run(shape, setting, seed=args.seed, which=args.variants, compiled=not args.quick)
    return command.finish(args, setting, rows)


def _profile(args: argparse.Namespace, setting: command.Setting, shape: Shape) -> int:
    console = command.wide_console()
    console.width = max(console.width, 120)
    rows = run_profile(shape, setting, seed=args.seed)
    command.print_machine(setting, console)
    profile.print_tables(rows, console)
    command.save(args, setting, rows)
    if args.json is not None:
        console.print(f"wrote {args.json} ({len(rows)} rows)")
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        profile.profile_figure(rows).savefig(args.picture, dpi=130)
        console.print(f"wrote {args.picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
