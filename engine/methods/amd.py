"""AMD: VideoMAE or MAE whose student also follows a larger teacher that sees more (Zhao et al., CVPR 2024).

The student sees ``plan.visible``, the frozen teacher ``plan.teacher_rows``: the same tokens and, behind them,
``plan.diff``. Three terms:

    pixels       the decoder's patches against the pixels of ``plan.masked``, as in VideoMAE or MAE
    direct       P_s(h_s) against t at the tokens that both see
    generation   G(P_s(h_s)) against t at ``plan.diff``, where G is a :class:`cohobate.models.Generator`

h_s is the student's residual stream behind block s and t the teacher's behind block t, both without a norm. P_s is
linear without bias and belongs to the student's layer: its product is computed once and serves both alignments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.masking import MaskPlan
from cohobate.methods.mae import MAE, MAEOptions
from cohobate.methods.objective import AlignTerm, HasPixels, PixelTerm, StepLoss, objective
from cohobate.models import Decoder, Generator, VisionTransformer
from cohobate.models.layers import Linear, draw
from cohobate.models.pixels import renormalise
from cohobate.teacher import OriginalTeacher, Teacher

Pairs = tuple[tuple[int, int], ...]
LOSSES = {"l2": "mse", "l1": "l1", "smooth_l1": "smooth_l1"}


@dataclass(frozen=True)
class AMDOptions(MAEOptions):
    """What is compared, and how; the defaults are the published video recipe.

    ``norm_pix``, ``convention``: of the pixel target; "mae" for images. ``direct``, ``generation``: pairs (student
    block, teacher block), 1-based; the lists may differ. ``loss``: "l2" (mean squared error), "l1" or "smooth_l1", the
    last with ``beta``. ``reduction`` over the pairs of a term: "mean" as in the published code, "sum" as in the paper.
    ``pixel_weight``, ``direct_weight``, ``generation_weight``: of the terms. ``align_cls``: direct alignment counts the
    prefix (the cls token) too. The paper does not say, its clips having none; we count it, for both models see it.

    A term of weight 0 is not computed, and its pairs are dropped. The weight of the pixels is above 0: the student's
    final norm learns from that term alone.

    Raises:
        UserError: a choice that is not offered, or a term of positive weight without pairs.
    """

    convention: str = "videomae"
    direct: Pairs = ((6, 12), (12, 24))
    generation: Pairs = ((6, 12), (12, 24))
    loss: str = "l2"
    beta: float = 1.0
    reduction: str = "mean"
    pixel_weight: float = 1.0
    direct_weight: float = 1.0
    generation_weight: float = 1.0
    align_cls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss", tuple(LOSSES)), ("reduction", ("mean", "sum"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not self.pixel_weight > 0:
            raise UserError(f"pixel_weight: expected a number above 0, got {self.pixel_weight}")
        for name in ("direct", "generation"):
            weight, pairs = getattr(self, f"{name}_weight"), getattr(self, name)
            if not weight >= 0:
                raise UserError(f"{name}_weight: expected a number of at least 0, got {weight}")
            if weight and not pairs:
                raise UserError(f"{name}: expected at least one pair of layers, or {name}_weight 0; got none")
            object.__setattr__(self, name, tuple((s, t) for s, t in pairs) if weight else ())
        if not self.direct and not self.generation:
            raise UserError("direct_weight, generation_weight: expected one above 0 (without a teacher it is MAE)")

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Student blocks that are aligned, ascending; each has a projection."""
        return tuple(sorted({student for student, _ in chain(self.direct, self.generation)}))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Teacher blocks that are targets, ascending: the layers that the teacher is made with."""
        return tuple(sorted({teacher for _, teacher in chain(self.direct, self.generation)}))


class Alignment(nn.Module):
    """Projections to the teacher's width, one an aligned student layer, and generators, one a pair of that term.

    Args:
        student: whose layers are aligned.
        width: D_T, the teacher's.
        heads: of the generators; the teacher's in the paper.
        options: which layers.
        depth: blocks of a generator; 2 in the paper.
        frozen_token: see :class:`cohobate.models.Generator`.

    Raises:
        UserError: a student layer that there is not, or sizes that do not fit.
    """

    def __init__(
        self,
        student: VisionTransformer,
        width: int,
        heads: int,
        options: AMDOptions,
        *,
        depth: int = 2,
        frozen_token: bool = False,
    ) -> None:
        super().__init__()
        layers = options.student_layers
        if layers[0] < 1 or layers[-1] > student.depth:
            raise UserError(f"direct, generation: expected student blocks in [1, {student.depth}], got {list(layers)}")
        self.layers, self.direct, self.generation = layers, options.direct, options.generation
        self.width, self.prefix, self.compute = width, student.prefix, student.precision.compute
        self.projections = nn.ModuleList(Linear(student.width, width, bias=False) for _ in layers)
        self.generators = nn.ModuleList(
            Generator(
                student.grid,
                width,
                heads,
                depth,
                prefix=student.prefix,
                precision=student.precision,
                frozen_token=frozen_token,
            )
            for _ in options.generation
        )
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew from the generator: projections Xavier uniform, then each generator."""
        draw(self.projections, generator)
        for module in self.generators:
            cast(Generator, module).reset(generator)

    def forward(self, features: Mapping[int, Tensor], plan: MaskPlan) -> tuple[list[Tensor], list[Tensor]]:
        """Predictions of both terms, a pair each.

        Args:
            features: the student's residual streams [B, P + a, D] by layer.
            plan: which tokens they are.

        Returns:
            Direct, [B, P + a, D_T] each in the compute dtype, and generated, [B, b - a, D_T] in the residual dtype.
        """
        projected = {
            layer: projection(features[layer].to(self.compute))
            for layer, projection in zip(self.layers, self.projections, strict=True)
        }
        generated = zip(self.generators, self.generation, strict=True)
        return [projected[s] for s, _ in self.direct], [module(projected[s], plan) for module, (s, _) in generated]

    def flops(self, visible: int, seen: int) -> int:
        """Multiply-adds x 2 of one sample's forward: the student sees ``visible`` patches, the teacher ``seen``."""
        products = sum(2 * (self.prefix + visible) * p.numel() for p in self.projections.parameters())
        return products + sum(cast(Generator, module).flops(visible, seen) for module in self.generators)


class AMD(MAE):
    """Student, pixel decoder, frozen teacher, and what lies between student and teacher.

    :meth:`parameters` are those of student, decoder and alignment; only the student is kept after pretraining.

    Args:
        student: the encoder being trained.
        decoder: as in :class:`cohobate.methods.MAE`.
        teacher: frozen, on the same token grid, of any width, with the layers ``options.teacher_layers``.
        alignment: made with the same options.
        options: see :class:`AMDOptions`.

    Raises:
        UserError: parts that do not fit each other; the message names them.
    """

    options: AMDOptions

    def __init__(
        self,
        student: VisionTransformer,
        decoder: Decoder,
        teacher: Teacher,
        alignment: Alignment,
        options: AMDOptions | None = None,
    ) -> None:
        options = options or AMDOptions()
        super().__init__(student, decoder, options)
        for name in ("direct", "generation"):
            if getattr(alignment, name) != getattr(options, name):
                expected, got = list(getattr(options, name)), list(getattr(alignment, name))
                raise UserError(f"alignment: expected {name} pairs {expected}, the options', got {got}")
        widths = {p.in_features for p in cast("list[Linear]", alignment.projections)}
        if widths != {student.width} or alignment.prefix != student.prefix:
            sizes = f"{student.width} channels and {student.prefix} prefix tokens, the student's"
            raise UserError(f"alignment: expected {sizes}; got {sorted(widths)} and {alignment.prefix}")
        self.alignment = alignment
        self.set_teacher(teacher)

    def set_teacher(self, teacher: Teacher) -> None:
        """Swap the teacher, as at a stage boundary.

        Raises:
            UserError: a teacher of another grid, width or layers, that cannot be shown some patches alone, or whose
                prefix is not the student's where that is aligned.
        """
        options = self.options
        if isinstance(getattr(teacher, "teacher", teacher), OriginalTeacher):
            raise UserError(f"teacher: expected one that can see some patches alone; {teacher.name} runs as it is")
        if teacher.grid != self.student.grid:
            raise UserError(f"teacher: expected the student's grid {self.student.grid}, got {teacher.grid}")
        if teacher.width != self.alignment.width:
            raise UserError(f"teacher: expected the alignment's width {self.alignment.width}, got {teacher.width}")
        if tuple(teacher.layers) != options.teacher_layers:
            expected = f"target layers {list(options.teacher_layers)}, those of the pairs"
            raise UserError(f"teacher: expected {expected}, got {list(teacher.layers)}")
        if options.direct and options.align_cls and teacher.prefix != self.student.prefix:
            expected = f"a teacher with the student's {self.student.prefix} prefix tokens, or align_cls=False"
            raise UserError(f"align_cls: expected {expected}; got {teacher.prefix}")
        self.teacher = teacher

    def check_plan(self, batch: HasPixels, plan: MaskPlan) -> None:
        """As :meth:`MAE.check_plan`; with a generation term the teacher must see more than the student does."""
        super().check_plan(batch, plan)
        if self.options.generation and plan.teacher == plan.student:
            raise UserError(
                f"plan: expected a teacher that sees more than the student's {plan.student} tokens, for the "
                f"generation term; got {plan.teacher}"
            )

    def forward(
        self,
        batch: HasPixels,
        plan: MaskPlan,
        *,
        generator: torch.Generator | None = None,
        signals: bool = False,
        features: Sequence[Tensor] | None = None,
    ) -> StepLoss:
        """As :meth:`loss`: a wrapper such as DDP calls the module."""
        return self.loss(batch, plan, generator=generator, signals=signals, features=features)

    def teach(self, batch: HasPixels, plan: MaskPlan, ask: Callable[..., Any] | None = None) -> Any:
        """The teacher's features of a batch, a list with one a layer, as :meth:`loss` takes them: a function of batch
        and plan.

        ``ask`` is called in the teacher's place, such as :meth:`cohobate.teacher.graphs.Ahead.start`; what it returns
        is returned.
        """
        seen = renormalise(batch.pixels, self.student, self.teacher)
        return (self.teacher if ask is None else ask)(seen, plan.teacher_rows)

    def loss(
        self,
        batch: HasPixels,
        plan: MaskPlan,
        *,
        generator: torch.Generator | None = None,
        signals: bool = False,
        features: Sequence[Tensor] | None = None,
    ) -> StepLoss:
        """One step's loss.

        Args:
            batch: ``batch.pixels`` uint8 [B, T, H, W, C], or floating and normalised by the student's mean and std.
            plan: what the student sees, and what the teacher sees beside it.
            generator: where drop path draws from.
            signals: add "target/std", the spread of the teacher's features over tokens, mean over channels and layers:
                0 says that the teacher gives every token the same target.
            features: what :meth:`teach` gave for this batch and plan; None to ask the teacher here.

        Returns:
            terms: "loss/pixels", "loss/direct" and "loss/generation", without weights; those of weight 0 are left out.

        Raises:
            UserError: a plan for another number of samples, or one that leaves a term nothing to compare.
        """
        self.check_plan(batch, plan)
        student, teacher, options = self.student, self.teacher, self.options
        seen = dict(zip(teacher.layers, self.teach(batch, plan) if features is None else features, strict=True))
        layers = sorted({*options.student_layers, student.depth})
        found = student.intermediates(batch.pixels, layers, plan.visible, generator=generator)
        streams = dict(zip(layers, found, strict=True))
        direct, generated = self.alignment(streams, plan)
        encoded = student.norm(streams[student.depth], student.precision.compute)
        terms: list[PixelTerm | AlignTerm] = [self.pixel_term(encoded, batch, plan, generator, options.pixel_weight)]
        # Rows of the teacher's streams: its prefix, what both see, what it sees alone. Slices are views.
        both = teacher.prefix + plan.student
        kept = student.prefix if options.align_cls else 0
        if direct:
            targets = [seen[layer][:, teacher.prefix - kept : both] for _, layer in options.direct]
            predictions = [p[:, student.prefix - kept :] for p in direct]
            terms.append(self._term("loss/direct", predictions, targets, options.direct_weight))
        if generated:
            targets = [seen[layer][:, both:] for _, layer in options.generation]
            terms.append(self._term("loss/generation", generated, targets, options.generation_weight))
        spread = None
        if signals:
            spread = {"target/std": torch.stack([t.float().flatten(0, 1).std(0).mean() for t in seen.values()]).mean()}
        return objective(terms, spread)

    def _term(self, name: str, predictions: list[Tensor], targets: list[Tensor], weight: float) -> AlignTerm:
        options = self.options
        return AlignTerm(
            name, predictions, targets, weight, LOSSES[options.loss], options.beta, reduction=options.reduction
        )

    def flops(self, plan: MaskPlan) -> int:
        """Multiply-adds x 2 of one sample's step: teacher forward, and a forward and backward of the rest."""
        trained = 3 * self.alignment.flops(plan.student, plan.teacher)
        return super().flops(plan) + trained + self.teacher.flops(patches=plan.teacher)
