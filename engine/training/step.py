"""One update: forward and backward over the micro-batches, then the optimizer. Nothing in it waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from cohobate.methods import StepLoss
from cohobate.models import Decoder
from cohobate.training.distributed import Ranks, derive_seed, sum_over_ranks
from cohobate.training.metrics import Clock, Meter
from cohobate.training.stages import Stage

if TYPE_CHECKING:
    from cohobate.data import Batch


class Step:
    """The update of one stage.

    Args:
        stage: what is trained. ranks: who takes part. clock: told what the time went on. meter: told the losses.
        next_batch: the next micro-batch on the device, and the epoch it belongs to.
    """

    def __init__(
        self, stage: Stage, ranks: Ranks, clock: Clock, meter: Meter, next_batch: Callable[[], tuple[Batch, int]]
    ) -> None:
        self.stage, self.ranks, self.clock, self.meter, self.next_batch = stage, ranks, clock, meter, next_batch
        student, decoder = stage.method.student, stage.method.decoder
        self._drops = student.drop_path.rate > 0 or (isinstance(decoder, Decoder) and decoder.drop_path.rate > 0)
        self._follower, self._every = stage.follower, stage.config.stages[stage.index].teacher.every
        if self._follower is not None:
            self._follower.pack()  # a resume point may have filled in the average
        self._generator = torch.Generator(ranks.device)

    def __call__(self, step: int, *, signals: bool = False) -> None:
        """Update ``step`` of the stage (from 0); ``signals`` asks the method for its costlier figures too."""
        config, updater = self.stage.config, self.stage.updater
        count = config.optimizer.accumulate
        bad = torch.zeros((), device=self.ranks.device)
        for part in range(count):
            batch, epoch = self.next_batch()
            self.clock.mark("data")
            with self._no_sync(part < count - 1):
                result = self._forward(batch, epoch, step, part, signals and part == count - 1)
                self.clock.mark("forward")
                (result.total / count if count > 1 else result.total).backward()
                self.clock.mark("backward")
            self.meter.add({"loss/total": result.total, **result.terms})
            self.meter.latest(result.signals)
            bad += ~result.total.detach().isfinite()
        bad += ~updater.gradient_norm().isfinite()
        updater.step(self.stage.schedule.rate(step), sum_over_ranks(self.ranks, bad).clamp(max=1.0))
        updater.zero()
        if self._follower is not None and (step + 1) % self._every == 0:
            self._follower.follow(self.stage.method.student)
        self.clock.mark("optimizer")

    def _forward(self, batch: Batch, epoch: int, step: int, part: int, signals: bool) -> StepLoss:
        config, index = self.stage.config, self.stage.index
        plan = self.stage.plan(batch.sample_ids, epoch)
        generator = None
        if self._drops:
            # Drop path is a function of the step and the rank, so a resumed run drops the same branches.
            self._generator.manual_seed(derive_seed(config.seed, "drop", index, step, part, self.ranks.rank))
            generator = self._generator
        result: StepLoss = self.stage.module(batch, plan, generator=generator, signals=signals)
        return result

    def _no_sync(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Between micro-batches the ranks need not exchange gradients."""
        if more and self.ranks.many:
            return self.stage.module.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()
