"""One update: forward and backward over the micro-batches, then the optimizer. Nothing in it waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cohobate.masking import MaskPlan
from cohobate.methods import AMD, DBOT, HasPixels, StepLoss
from cohobate.models import Decoder
from cohobate.teacher import FrozenTeacher
from cohobate.teacher.graphs import Ahead
from cohobate.training.distributed import Ranks, derive_seed, sum_over_ranks
from cohobate.training.graphs import Outcome, Pixels, StepGraph, why_not
from cohobate.training.metrics import Clock, Meter
from cohobate.training.stages import Stage

if TYPE_CHECKING:
    from cohobate.data import Batch


class Step:
    """The update of one stage.

    Args:
        stage: what is trained. ranks: who takes part. clock: told what the time went on. meter: told the losses.
        next_batch: the next micro-batch on the device, and the epoch it belongs to.

    Attributes:
        graph: what captures the update (``execution.cuda_graph``); None where it runs as it is.
    """

    def __init__(
        self, stage: Stage, ranks: Ranks, clock: Clock, meter: Meter, next_batch: Callable[[], tuple[Batch, int]]
    ) -> None:
        self.stage, self.ranks, self.clock, self.meter, self.next_batch = stage, ranks, clock, meter, next_batch
        config, student, decoder = stage.config, stage.method.student, stage.method.decoder
        self._follower, self._every = stage.follower, config.stages[stage.index].teacher.every
        if self._follower is not None:
            self._follower.pack()  # a resume point may have filled in the average
        self._rate = torch.zeros((), device=ranks.device)  # read by a graph
        drops = student.drop_path.rate > 0 or (isinstance(decoder, Decoder) and decoder.drop_path.rate > 0)
        self._generator = torch.Generator(ranks.device) if drops else None
        self._ahead: Ahead | None = None
        if config.execution.ahead and isinstance(stage.method, (DBOT, AMD)):
            self._ahead = Ahead(stage.method.teacher)
        self._waiting: tuple[Batch, MaskPlan] | None = None  # fetched already
        self.graph: StepGraph | None = None
        if config.execution.cuda_graph != "off" and why_not(config, ranks) is None:
            self.graph = StepGraph(self._update, self._generator, config.execution.cuda_graph == "on")
            self._capture_teacher(False)  # it is in the step's graph

    def __call__(self, step: int, *, signals: bool = False) -> None:
        """Update ``step`` of the stage (from 0); ``signals`` asks the method for its costlier figures too."""
        if self.graph is None or not self._replayed(step, signals):
            self._eager(step, signals)
        if self._follower is not None and (step + 1) % self._every == 0:
            self._follower.follow(self.stage.method.student)
            self.clock.mark("optimizer")

    def close(self) -> None:
        """Give back the memory of the graphs, before the stage is evaluated and the next one begins."""
        if self.graph is not None:
            self.graph.clear()
            self._capture_teacher(True)
        self.graph = None  # which holds this step in turn

    def _eager(self, step: int, signals: bool) -> None:
        """The update as it is, of any number of micro-batches and ranks."""
        count = self.stage.config.optimizer.accumulate
        bad = torch.zeros((), device=self.ranks.device)
        for part in range(count):
            batch, plan, features = self._take()
            self._seed(step, part)
            with self._no_sync(part < count - 1):
                result = self._forward(batch, plan, signals and part == count - 1, features)
                self.clock.mark("forward")
                (result.total / count if count > 1 else result.total).backward()
                self.clock.mark("backward")
            self._report(result)
            bad += ~result.total.detach().isfinite()
            if part < count - 1 or step + 1 < self.stage.steps:
                self._look_ahead()
        self._optimise(self.stage.schedule.rate(step), bad)
        self.clock.mark("optimizer")

    def _replayed(self, step: int, signals: bool) -> bool:
        """The same update through :attr:`graph`; False, and nothing is done, where it cannot be captured."""
        assert self.graph is not None
        batch, plan, _ = self._take()
        self._seed(step, 0)
        self._rate.fill_(self.stage.schedule.rate(step))
        outcome = self.graph(batch.pixels, plan, signals)
        if outcome is None:
            self.graph, self._waiting = None, (batch, plan)
            self._capture_teacher(True)
            self.stage.updater.zero()  # gradients that no memory stands behind
            if self._generator is not None:
                self._generator = torch.Generator(self.ranks.device)  # the other one belongs to the capture
            return False
        self.stage.updater.norm, self.stage.updater.bad = outcome.norm, outcome.bad
        self._report(outcome.loss)
        self.clock.mark("step")
        return True

    def _update(self, batch: Pixels, plan: MaskPlan, signals: bool) -> Outcome:
        """What a graph holds: the update of one micro-batch on one rank."""
        result = self._forward(batch, plan, signals)
        result.total.backward()
        bad = torch.zeros((), device=self.ranks.device)
        bad += ~result.total.detach().isfinite()
        self._optimise(self._rate, bad)
        return Outcome(result._replace(total=result.total.detach()), self.stage.updater.norm, self.stage.updater.bad)

    def _forward(
        self, batch: HasPixels, plan: MaskPlan, signals: bool, features: Sequence[Tensor] | None = None
    ) -> StepLoss:
        known = {} if features is None else {"features": features}
        result: StepLoss = self.stage.module(batch, plan, generator=self._generator, signals=signals, **known)
        return result

    def _optimise(self, rate: float | Tensor, bad: Tensor) -> None:
        """Norm, clipping and AdamW; ``bad`` counts losses that are not finite, of all micro-batches of this rank."""
        updater = self.stage.updater
        bad += ~updater.gradient_norm().isfinite()
        updater.step(rate, sum_over_ranks(self.ranks, bad).clamp(max=1.0))
        updater.zero()

    def _report(self, result: StepLoss) -> None:
        self.meter.add({"loss/total": result.total, **result.terms})
        self.meter.latest({name: value.clone() for name, value in result.signals.items()})  # a replay overwrites them

    # -- batches, and what the teacher says of them --------------------------------------------------------------------

    def _take(self) -> tuple[Batch, MaskPlan, Sequence[Tensor] | None]:
        """The next micro-batch, its masks, and its features where they have been computed ahead."""
        if self._waiting is None:
            return (*self._fetch(), None)
        (batch, plan), self._waiting = self._waiting, None
        return batch, plan, None if self._ahead is None else self._ahead.take()

    def _fetch(self) -> tuple[Batch, MaskPlan]:
        batch, epoch = self.next_batch()
        self.clock.mark("data")
        return batch, self.stage.plan(batch.sample_ids, epoch)

    def _look_ahead(self) -> None:
        """Fetch the next micro-batch and let the teacher begin with it, beside what is still to come of this update."""
        method = self.stage.method
        if self._ahead is not None and isinstance(method, (DBOT, AMD)):
            self._waiting = self._fetch()
            method.teach(*self._waiting, self._ahead.start)

    def _seed(self, step: int, part: int) -> None:
        """Drop path is a function of the step and the rank, so a resumed run drops the same branches."""
        if self._generator is not None:
            stage, rank = self.stage, self.ranks.rank
            self._generator.manual_seed(derive_seed(stage.config.seed, "drop", stage.index, step, part, rank))

    def _no_sync(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Between micro-batches the ranks need not exchange gradients."""
        if more and self.ranks.many:
            return self.stage.module.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()

    def _capture_teacher(self, wanted: bool) -> None:
        """Whether the teacher captures its forward pass by itself."""
        teacher = getattr(self.stage.method, "teacher", None)
        runtime = getattr(teacher, "teacher", teacher)
        if isinstance(runtime, FrozenTeacher):
            runtime.cuda_graph = None if wanted else False
