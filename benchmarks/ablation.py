"""``cohobate bench ablation``: what each switch of the engine's step is worth.

The step as it ships is timed beside the same step with one thing changed, in turns, on one set of weights, one batch
and one mask. What ships on is turned off, what ships off is turned on. Every variant's loss and gradients are compared
with those of the step as it ships, and may differ from them by twice as much as these differ from an fp32 step; one
that ends in another optimizer must end in the same weights. A ratio is given or refused by the rules of the
other benchmarks (:mod:`cohobate.benchmarks.harness`); a switch that cannot be thrown here has a row that says why.

Several masks of one crop are a case of their own: one pass that shares the teacher against a pass a mask.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cohobate.benchmarks import command, literal
from cohobate.benchmarks.harness import Case, Provider, Row, errors, measure
from cohobate.benchmarks.reference import update, vit
from cohobate.benchmarks.reference.update import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY
from cohobate.benchmarks.step import ERROR_RATIO, LARGEST_ERROR, SAME_MATHS, add_shape_options, cost, prepare
from cohobate.benchmarks.teacher import FP8_ERROR
from cohobate.benchmarks.twins import MASK_RATIO, Shape, Twins, make
from cohobate.errors import UserError
from cohobate.kernels import Cost, tokens, use_backend, why_not
from cohobate.kernels.backends import optimizer
from cohobate.kernels.backends.attention import use_attention
from cohobate.kernels.tokens.embed import embed_patches_reference
from cohobate.kernels.transformer.block import PARTS
from cohobate.masking import MaskPlan, random_plan
from cohobate.methods import amd
from cohobate.methods.objective import AlignTerm, PixelTerm, StepLoss, objective
from cohobate.models import Decoder
from cohobate.models.layers import Block, compile_blocks, set_checkpointing
from cohobate.teacher.fp8 import check_card, quantise
from cohobate.teacher.graphs import Ahead
from cohobate.training.optimizer import Updater

SHIPPED = "as it ships"
MASKS = 4
PACKED = "the teacher's packed products stay"
APART = "the blocks' other kernels one by one"
FAST = {"cpu": "native", "cuda": "triton"}
KERNELS = (
    "pre_norm_block", "linear", "add_norm", "bias_gelu", "embed_patches", "assemble", "take", "put", "align_loss",
    "pixel_loss",
)  # fmt: skip
LEAST = 5  # rounds a repeat: a step takes a second or more


@dataclass(frozen=True)
class Variant:
    """The step with one thing changed.

    Attributes:
        around: held while the step runs, its backward pass too. loss, update: in place of the engine's.
        weights: ``update`` is another optimizer, so what it makes of the weights is compared, too.
        capture: on CUDA, time it as one CUDA graph, as the step itself is timed.
        more: relative error that the change itself may make. note: goes into the row.
    """

    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    loss: Callable[[], Tensor] | None = None
    update: Callable[[], object] | None = None
    weights: bool = False
    capture: bool = True
    more: float = 0.0
    note: str = ""


class Bench:
    """A method with weights, a batch and a mask, and the step that ships, of which every variant is a change.

    All variants train the same parameters, which begin anew at every call; only an optimizer's moments go on.
    """

    def __init__(self, shape: Shape, device: str, seed: int = 0) -> None:
        self.shape, self.device, self.seed = shape, device, seed
        self.twins: Twins = make(shape, device, seed)
        self.method: Any = self.twins.method
        self.batch, self.plan = self.twins.batch, self.twins.plan
        self.parameters = {name: p for name, p in self.method.named_parameters() if p.requires_grad}
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updater = make_updater(self.method)
        if device == "cuda" and hasattr(self.method, "teacher"):
            self.method.teacher.cuda_graph = False  # it is inside the step's graph
        self.called: set[str] = set()  # ops that the step calls of ours
        with _Calls(self.called):
            self.step(Variant())

    def update(self) -> None:
        """The engine's."""
        apply(self.updater)

    def loss(self) -> Tensor:
        """The engine's."""
        total: Tensor = self.method.loss(self.batch, self.plan).total
        return total

    def step(self, variant: Variant) -> Tensor:
        """What is timed: loss, backward, update. Returns the loss without a graph."""
        with variant.around():
            loss = self.differentiate(variant)
            (variant.update or self.update)()
        return loss

    def differentiate(self, variant: Variant) -> Tensor:
        """Loss and gradients alone."""
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = (variant.loss or self.loss)()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Give the parameters their first values again."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.initial[name])
        self.updater.write_shadows()

    def results(self, variant: Variant, *, weights: bool = False) -> dict[str, Tensor]:
        """Loss and gradients, not clipped; with ``weights`` also those behind the update. Good until the next call."""
        self.reset()
        with variant.around():
            loss = self.differentiate(variant)
            gradients = {f"grad {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
            if not weights:
                return {"loss": loss, **gradients}
            gradients = {name: value.clone() for name, value in gradients.items()}  # the update may clip them
            (variant.update or self.update)()
        return {"loss": loss, **gradients, **{f"weight {name}": p.detach() for name, p in self.parameters.items()}}


class _Calls(TorchDispatchMode):
    """Notes the names of our torch ops that are called."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cohobate":
            self.found.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def make_updater(module: nn.Module, **options: Any) -> Updater:
    """The optimizer of a run."""
    return Updater(module, weight_decay=WEIGHT_DECAY, betas=BETAS, clip=CLIP, **options)


def apply(updater: Updater) -> None:
    """What a run calls behind the backward pass."""
    norm = updater.gradient_norm()
    updater.step(LEARNING_RATE, 1.0 - norm.isfinite().float())


# -- the switches ------------------------------------------------------------------------------------------------------

Make = Callable[[Bench], Variant | str]  # a text: why it is not measured


@dataclass(frozen=True)
class Switch:
    """One row: what is switched, whether it ships on (in words), and what this row does instead."""

    name: str
    ships: str
    instead: str
    make: Make

    @property
    def provider(self) -> str:
        """Its name in a row."""
        return f"{self.name}: {self.instead}"


def by_reference(*ops: str) -> Make:
    """Named ops by their references in PyTorch."""

    def build(bench: Bench) -> Variant | str:
        if not bench.called.intersection(ops):
            fast = FAST[bench.device]
            reasons = [reason for op in ops for reason in why_not(op, fast, bench.device)]
            return "; ".join(dict.fromkeys(reasons)) or f"this step does not call {' or '.join(ops)} of ours"
        apart = "pre_norm_block" in bench.called and not set(PARTS[1:]).isdisjoint(ops)
        notes = [PACKED] * ("linear" in ops) + [APART] * apart
        return Variant(lambda: use_backend("reference", *ops), note="; ".join(notes))

    return build


def _attention(bench: Bench) -> Variant:
    return Variant(lambda: use_attention("sdpa"), note=APART if "pre_norm_block" in bench.called else "")


def _every_op(bench: Bench) -> Variant:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with use_backend("reference", *KERNELS), use_attention("sdpa"):
            yield

    return Variant(around, note=PACKED)


def _every_patch(bench: Bench) -> Variant:
    """Every patch embedded, the visible ones picked afterwards, as published codes do."""

    def embed(pixels: Tensor, rows: Tensor | None, weight: Tensor, bias: Any, positions: Any, **options: Any) -> Tensor:
        options.pop("backend", None)
        x = embed_patches_reference(pixels, None, weight, bias, positions, **options)
        return x if rows is None else literal.take(x, rows.long())

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        # The name of the backend, too, so that a teacher replayed from a CUDA graph is captured anew.
        with use_backend("reference", "embed_patches"), patch.object(tokens, "embed_patches", embed):
            yield

    return Variant(around)


def _launches(bench: Bench) -> Variant | str:
    """Every layer of every alignment term in a launch of its own."""
    if bench.shape.recipe != "amd":
        return f"{bench.shape.recipe} has one term"

    def apart(terms: Sequence[AlignTerm | PixelTerm], signals: dict[str, Tensor] | None = None) -> StepLoss:
        found = [objective([single]) for term in terms for single in _layers(term)]
        return StepLoss(torch.stack([loss.total for loss in found]).sum(), {}, signals or {})

    return Variant(lambda: patch.object(amd, "objective", apart))


def _layers(term: AlignTerm | PixelTerm) -> list[AlignTerm | PixelTerm]:
    if isinstance(term, PixelTerm):
        return [term]
    weight = term.weight / (len(term.predictions) if term.reduction == "mean" else 1)
    rows: Sequence[Tensor | None] = term.target_rows or [None] * len(term.predictions)
    return [
        dataclasses.replace(
            term, predictions=[p], targets=[t], weight=weight, target_rows=None if r is None else [r], reduction="sum"
        )
        for p, t, r in zip(term.predictions, term.targets, rows, strict=True)
    ]


def _ordinary_teacher(bench: Bench) -> Variant | str:
    """The literal twin's module with scaled_dot_product_attention; it embeds every patch."""
    if bench.shape.recipe not in ("dbot", "amd"):
        return f"{bench.shape.recipe} has no teacher"
    teacher, images = bench.method.teacher, bench.twins.inputs[0]
    module: Any = copy.deepcopy(bench.twins.literal.teacher)
    vit.fuse(module)

    def forward(_: Tensor, rows: Tensor | None = None, *, queries: Tensor | None = None, **__: Any) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(bench.device, torch.bfloat16):
            found: list[Tensor]
            if rows is None:
                found = module.states(images, teacher.layers)
            else:
                found = module.states(tokens.take(module.embed(images), rows), teacher.layers)
        return found if queries is None else [tokens.take(x, queries) for x in found]

    note = "it is given normalised fp32 images"
    return Variant(lambda: patch.object(teacher, "forward", forward), note=note)


def _whole_teacher(bench: Bench) -> Variant | str:
    if bench.shape.recipe != "dbot":
        return (
            "amd's loss reads all of its rows"
            if bench.shape.recipe == "amd"
            else f"{bench.shape.recipe} has no teacher"
        )
    teacher = bench.method.teacher
    pruned = teacher.forward

    def forward(pixels: Tensor, rows: Tensor | None = None, *, queries: Tensor, norm: bool = False) -> list[Tensor]:
        return [tokens.take(x, queries) for x in pruned(pixels, rows, norm=norm)]

    return Variant(lambda: patch.object(teacher, "forward", forward))


def _whole_decoder(bench: Bench) -> Variant:
    decoder = bench.method.decoder

    def forward(x: Tensor, plan: MaskPlan, queries: Tensor, *, generator: Any = None) -> Tensor:
        return tokens.take(Decoder.forward(decoder, x, plan, None, generator=generator), queries)

    return Variant(lambda: patch.object(decoder, "forward", forward))


def _torch_adamw(bench: Bench) -> Variant | str:
    if not isinstance(bench.updater.optimizer, optimizer.AdamW):
        return "; ".join(optimizer.why_not("cohobate", bench.device))
    with patch.object(optimizer, "_environment", "torch"):
        updater = make_updater(bench.method, shadow=False)
    return Variant(_without_shadows(bench), update=partial(apply, updater), weights=True)


def _apart(bench: Bench) -> Variant:
    # torch lets a CUDA graph capture what says beforehand that it can be.
    with patch.object(torch.optim, "AdamW", partial(torch.optim.AdamW, capturable=bench.device == "cuda")):
        ended = update.current(bench.method)
    return Variant(_without_shadows(bench), update=ended, weights=True)


def _no_shadows(bench: Bench) -> Variant | str:
    if not bench.updater.shadowed:
        return "off CUDA no product reads them: the CPU's packs the fp32 weight as fast"
    updater = make_updater(bench.method, shadow=False)
    return Variant(_without_shadows(bench), update=partial(apply, updater), weights=True)


def _without_shadows(bench: Bench) -> Callable[[], AbstractContextManager[Any]]:
    """Products cast their weights: no other optimizer keeps the copies."""

    def around() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for layer in bench.updater.shadowed:
            stack.enter_context(patch.object(layer, "shadow", None))
        return stack

    return around


def checkpointing(kind: str) -> Make:
    """Activation checkpointing of every block."""

    def build(bench: Bench) -> Variant:
        @contextlib.contextmanager
        def around() -> Iterator[None]:
            set_checkpointing(bench.method, kind)
            try:
                yield
            finally:
                set_checkpointing(bench.method, "none")

        return Variant(around)

    return build


def _compile(bench: Bench) -> Variant:
    """torch.compile of every trained block."""
    blocks = [module for module in bench.method.modules() if isinstance(module, Block)]
    compile_blocks(bench.method)
    programs = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None

    def around() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for block, program in zip(blocks, programs):
            stack.enter_context(patch.object(block, "_compiled_call_impl", program))
        return stack

    return Variant(around)


def _ahead(bench: Bench) -> Variant | str:
    if bench.shape.recipe not in ("dbot", "amd"):
        return f"{bench.shape.recipe} has no teacher"
    if bench.device != "cuda":
        return "off CUDA there is one stream, so nothing would run beside the optimizer"
    return ahead(bench)


def ahead(bench: Bench) -> Variant:
    """The teacher of the next batch (here the same one) started behind the backward pass, beside the optimizer."""
    method, runner, waiting = bench.method, Ahead(bench.method.teacher), False

    def begin() -> None:
        nonlocal waiting
        method.teach(bench.batch, bench.plan, runner.start)
        waiting = True

    def loss() -> Tensor:
        nonlocal waiting
        if not waiting:  # the very first batch
            begin()
        waiting = False
        total: Tensor = method.loss(bench.batch, bench.plan, features=runner.take()).total
        return total

    def updated() -> None:
        begin()
        bench.update()

    return Variant(loss=loss, update=updated, capture=False)


def _no_graph(bench: Bench) -> Variant | str:
    if bench.device != "cuda":
        return "CUDA graphs are CUDA's"
    teacher = getattr(bench.method, "teacher", None)  # has graphs of its own then
    around = nullcontext if teacher is None else partial(patch.object, teacher, "cuda_graph", None)
    return Variant(around, capture=False)


def _fp8(bench: Bench) -> Variant | str:
    if bench.shape.recipe not in ("dbot", "amd"):
        return f"{bench.shape.recipe} has no teacher"
    if bench.device != "cuda":
        return "no fp8 products on a CPU"
    check_card(bench.batch.pixels.device)
    teacher = copy.deepcopy(bench.method.teacher)
    rows = None if bench.shape.recipe == "dbot" else bench.plan.teacher_rows
    quantise(teacher, bench.batch.pixels, error=FP8_ERROR, rows=rows)
    note = f"teacher in {teacher.precision_name}, not exact; its gate allows {FP8_ERROR:.0%}"
    return Variant(lambda: patch.object(bench.method.teacher, "forward", teacher.forward), more=FP8_ERROR, note=note)


SWITCHES = (
    Switch("one call a block", "on", "its kernels called one by one", by_reference("pre_norm_block")),
    Switch("attention table", "on", "scaled_dot_product_attention for every call", _attention),
    Switch("linear kernel", "on", "torch's products of weights cast at every call", by_reference("linear")),
    Switch("add + norm kernel", "on", "torch's sum, LayerNorm and cast", by_reference("add_norm")),
    Switch("bias + GELU kernel", "on", "torch's sum and GELU", by_reference("bias_gelu")),
    Switch("embedding kernel", "on", "every patch normalised and embedded, then picked", _every_patch),
    Switch("decoder-input kernel", "on", "torch's gather, cat and sum", by_reference("assemble")),
    Switch("row kernels", "on", "torch's gather and scatter", by_reference("take", "put")),
    Switch("loss kernel", "on", "the formulas in PyTorch", by_reference("align_loss", "pixel_loss")),
    Switch("one launch for all terms", "on", "a launch a term and layer", _launches),
    Switch("all kernels", "on", "all of the above by PyTorch", _every_op),
    Switch("teacher runtime", "on", "an ordinary eager module under autocast", _ordinary_teacher),
    Switch("teacher's last block", "on", "all of its rows, the loss's picked afterwards", _whole_teacher),
    Switch("decoder's last block", "on", "all of its rows, the loss's picked afterwards", _whole_decoder),
    Switch("AdamW kernel", "on", "torch's fused AdamW, clipping inside it", _torch_adamw),
    Switch("clipping inside AdamW", "on", "clip_grad_norm_, then torch's fused AdamW", _apart),
    Switch("shadow weights", "on", "weights cast in every product", _no_shadows),
    Switch("CUDA graph of the step", "on here, off in a run", "launched call by call, the teacher replayed", _no_graph),
    Switch("checkpointing", "off", "operations", checkpointing("operations")),
    Switch("checkpointing", "off", "blocks", checkpointing("blocks")),
    Switch("compile", "off", "torch.compile of every block", _compile),
    Switch("ahead", "off", "the next batch's teacher beside the optimizer", _ahead),
    Switch("fp8 teacher", "off", "e4m3 products in its inner blocks", _fp8),
)


# -- measuring ---------------------------------------------------------------------------------------------------------


def run(shape: Shape, setting: command.Setting, *, seed: int = 0, switches: Sequence[Switch] = SWITCHES) -> list[Row]:
    """Check and time the step as it ships and every switch; one row each.

    Raises:
        UserError: a shape that cannot be made.
    """
    bench = Bench(shape, setting.device, seed)
    expected = {name: value.clone() for name, value in bench.results(Variant(), weights=True).items()}
    answer = {name: value for name, value in expected.items() if not name.startswith("weight")}
    rounding = _exact(bench, answer, setting)
    tolerance = min(ERROR_RATIO * max(rounding.max_rel_err or 0.0, rounding.grad_rel_err or 0.0), LARGEST_ERROR)
    case = Case(f"{shape.recipe}_ablation", str(shape), setting.device, answer, partial(_compare, expected, answer))
    needed = cost(bench.twins, "bf16")
    found: list[Row | Provider] = [rounding, _provider(bench, SHIPPED, Variant(), tolerance, needed, role="other")]
    for switch in switches:
        variant = _made(switch, bench)
        if isinstance(variant, str):
            found.append(_unmeasured(case.name, "train", switch.provider, bench, setting, variant))
        else:
            found.append(_provider(bench, switch.provider, variant, tolerance + variant.more, needed))
    return [*_timed(case, found, setting), *masks(bench, setting, tolerance)]


def masks(bench: Bench, setting: command.Setting, tolerance: float, count: int = MASKS) -> list[Row]:
    """``count`` masks of every crop: one pass with one call of the teacher, against a pass a mask, accumulated."""
    name, mode = f"{bench.shape.recipe}_masks", f"{count} masks"
    providers = (f"a pass a mask, {count} times", f"one pass of {count} masks, one call of the teacher")
    if bench.shape.recipe != "dbot":
        why = "only dBOT's teacher sees the same whatever the mask is"
        return [_unmeasured(name, mode, provider, bench, setting, why) for provider in providers]
    ids = torch.arange(bench.shape.batch, device=bench.device)
    grid = bench.method.student.grid
    whole = random_plan(grid, ids, seed=bench.seed, stage=0, epoch=0, ratio=MASK_RATIO, masks=count)
    single = [MaskPlan(order, whole.student, whole.teacher) for order in whole.order.chunk(count)]

    def together() -> Tensor:
        total: Tensor = bench.method.loss(bench.batch, whole).total
        return total

    def apart() -> Tensor:
        losses = []
        for plan in single:
            loss = bench.method.loss(bench.batch, plan).total / count
            losses.append(loss.detach())
            if plan is not single[-1]:
                loss.backward()
        return loss - loss.detach() + sum(losses)  # the value of all, the graph of the last

    first, second = Variant(loss=apart), Variant(loss=together)
    expected = {name: value.clone() for name, value in bench.results(first).items()}
    case = Case(name, f"{bench.shape}, {count} masks", bench.device, expected)
    needed = Cost(bytes=0, flops=bench.shape.batch * bench.method.flops(whole, count))
    pair = [
        _provider(bench, providers[0], first, tolerance, needed, role="other", mode=mode),
        _provider(bench, providers[1], second, tolerance, needed, mode=mode),
    ]
    return _timed(case, pair, setting)


def _made(switch: Switch, bench: Bench) -> Variant | str:
    try:
        return switch.make(bench)
    except UserError as error:  # a card without fp8, a gate that is missed
        return str(error).splitlines()[0]


def _timed(case: Case, found: Sequence[Row | Provider], setting: command.Setting) -> list[Row]:
    """Rows as they are, providers measured, in their order; the first provider is what the others are compared with.

    All take turns on a CPU. On CUDA, where each keeps the memory of its graph, they do so with the first one alone.
    """
    base, *others = (each for each in found if isinstance(each, Provider))
    effort = dataclasses.replace(setting.effort, least=min(setting.effort.least, LEAST))
    groups = [[base, *others]]
    if case.device == "cuda" and others:
        groups = [[base, other] for other in others]
        effort = dataclasses.replace(effort, seconds=effort.seconds / len(groups))
    rows: list[Row] = []
    for group in groups:
        measured = measure(
            case,
            group,
            ceilings=setting.ceilings,
            environment=setting.environment,
            effort=effort,
            baselines=(),
        )
        rows += measured[1:] if rows else measured
        gc.collect()  # graphs and their memory
        if case.device == "cuda":
            torch.cuda.empty_cache()
    measured_rows = iter(rows)
    return [each if isinstance(each, Row) else next(measured_rows) for each in found]


def _provider(
    bench: Bench,
    name: str,
    variant: Variant,
    tolerance: float,
    needed: Cost,
    *,
    role: str = "ours",
    mode: str = "train",
) -> Provider:
    return Provider(
        name,
        mode,
        partial(bench.step, variant),
        bench.reset,
        role=role,
        dtype="bf16",
        results=lambda _: bench.results(variant, weights=variant.weights),
        tolerance=SAME_MATHS if variant.weights else tolerance,
        cost=needed,
        capture=variant.capture,
        note=variant.note,
    )


def _compare(
    expected: Mapping[str, Tensor], answer: Mapping[str, Tensor], results: Mapping[str, Tensor]
) -> tuple[float, float | None]:
    """Errors; of the weights behind the update as well, where the results have them."""
    return errors(results, expected if any(name.startswith("weight") for name in results) else answer)


def _exact(bench: Bench, answer: Mapping[str, Tensor], setting: command.Setting) -> Row:
    """A row without timings: how far the step as it ships is from the same in fp32."""
    bench.reset()
    method = bench.twins.exact()
    loss = method.loss(bench.batch, bench.plan).total
    loss.backward()
    exact = {f"grad {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    row = _blank(f"{bench.shape.recipe}_ablation", "all of it in fp32", "train", bench, setting)
    row.dtype, row.note = "fp32", "checked, not timed: the error of the step as it ships"
    row.max_rel_err, row.grad_rel_err = errors(answer, {"loss": loss.detach(), **exact})
    return row


def _unmeasured(name: str, mode: str, provider: str, bench: Bench, setting: command.Setting, why: str) -> Row:
    row = _blank(name, provider, mode, bench, setting)
    row.note = f"not measured: {why}"
    return row


def _blank(name: str, provider: str, mode: str, bench: Bench, setting: command.Setting) -> Row:
    row = Row(name, provider, "other", mode, bench.device, "bf16", str(bench.shape))
    row.env = dict(setting.environment)
    return row


# -- the table ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table for each case: every switch with its time and memory against the step as it ships."""
    parts = []
    for key in dict.fromkeys((row.name, row.mode, row.shape) for row in rows):
        own = [row for row in rows if (row.name, row.mode, row.shape) == key]
        parts.append(f"**{key[0].partition('_')[0]}, {key[1]}**: {key[2]}\n")
        parts.append(_masks_table(own) if key[0].endswith("_masks") else _switches_table(own))
    return "\n".join(parts)


def _switches_table(rows: Sequence[Row]) -> str:
    ships = {switch.provider: switch for switch in SWITCHES}
    shipped = next((row for row in rows if row.provider == SHIPPED), None)
    titles = (
        "switch",
        "ships",
        "in this row",
        "p50",
        "time, shipped = 1",
        "peak MB",
        "loss and gradient error",
        "note",
    )
    lines = [_line(*titles), "|---" * len(titles) + "|"]
    for row in rows:
        switch = ships.get(row.provider)
        name, _, instead = row.provider.partition(": ")
        on = "-" if switch is None else switch.ships
        peak = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        lines.append(
            _line(name, on, instead or "-", _ms(row.p50_ms), _times(row, shipped), peak, _errors(row), _note(row))
        )
    return "\n".join(lines) + "\n"


def _masks_table(rows: Sequence[Row]) -> str:
    count = int(rows[0].mode.partition(" ")[0])
    titles = ("", "p50", "a mask", "against a pass a mask", "peak MB", "loss and gradient error", "note")
    lines = [_line(*titles), "|---" * len(titles) + "|"]
    for row in rows:
        each = None if row.p50_ms is None else row.p50_ms / count
        peak = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        times = _times(row, rows[0])
        lines.append(_line(row.provider, _ms(row.p50_ms), _ms(each), times, peak, _errors(row), _note(row)))
    return "\n".join(lines) + "\n"


def _times(row: Row, base: Row | None) -> str:
    """How many times the base's time; where that may not be said, why in a word."""
    if row is base or row.p50_ms is None:
        return "-"
    if row.ratio_vs_best_other is not None:
        return f"{1 / row.ratio_vs_best_other:.2f}"
    for words, said in (
        ("spread", "within noise"),
        ("numerics", "numerics disagree"),
        ("other processes", "disturbed"),
    ):
        if words in row.note:
            return said
    return "-"


def _errors(row: Row) -> str:
    if row.max_rel_err is None:
        return "-"
    return f"{row.max_rel_err:.0e}" if row.grad_rel_err is None else f"{row.max_rel_err:.0e}, {row.grad_rel_err:.0e}"


def _note(row: Row) -> str:
    """What is not in another column; a ratio that is refused for noise says so there."""
    return "; ".join(part for part in row.note.split("; ") if ": spread " not in part)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms" if value < 1000 else f"{value / 1e3:.2f} s"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench ablation", description=__doc__)
    command.add_options(parser)
    add_shape_options(parser)
    args = parser.parse_args(argv)
    shape, setting = prepare(args)
    rows = run(shape, setting, seed=args.seed)
    console = command.wide_console()
    console.width = max(console.width, 150)
    return command.finish(args, setting, rows, console)


if __name__ == "__main__":
    raise SystemExit(main())
