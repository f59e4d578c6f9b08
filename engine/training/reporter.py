"""Reads a stage's metrics from the device every few updates, and works out speed and shares of time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.training.distributed import Ranks, sum_over_ranks
from cohobate.training.metrics import Clock, CollapseWatch, Meter, peak_flops
from cohobate.training.stages import Stage

LOOK_EVERY = 10  # readings from one look for a collapse to the next


class Reporter:
    """Metrics of one stage, from update ``stage_step`` on.

    Args:
        images: [n, T, H, W, C] uint8 on the device, by which the student is watched for a collapse; None for no watch.

    Attributes:
        pace: seconds an update, over everything read so far.
    """

    def __init__(
        self, ranks: Ranks, clock: Clock, meter: Meter, stage: Stage, stage_step: int, images: Tensor | None = None
    ) -> None:
        self.ranks, self.clock, self.meter, self.stage = ranks, clock, meter, stage
        self._watch = None if images is None else CollapseWatch(stage.method.student, images)
        self.pace = 0.0
        self._begin = self._last = time.perf_counter()
        self._first_step = self._last_step = stage_step
        self._peak = peak_flops(ranks.device)

    def read(self, stage_step: int, asked: bool, due: bool) -> tuple[dict[str, Any], bool, bool]:
        """Metrics after ``stage_step`` updates, means over ranks; and, the same on every rank, whether one was asked
        to stop and whether a checkpoint is due by the clock of one. A row whose student or targets have collapsed has
        an ``alarm``, in words.

        Raises:
            UserError: too many updates in a row were skipped because their gradient was not finite.
        """
        updater, zero = self.stage.updater, torch.zeros((), device=self.ranks.device)
        self.meter.latest({"grad_norm": updater.norm, "bad_steps": updater.skipped, "bad_streak": updater.streak})
        self.meter.latest({"asked": zero + float(asked), "due": zero + float(due)})
        row: dict[str, Any] = self.meter.read(self._mean)
        asked, due, streak = row.pop("asked") > 0, row.pop("due") > 0, row.pop("bad_streak")
        limit = self.stage.config.optimizer.max_bad_steps
        if streak >= limit:
            raise UserError(
                f"stages.{self.stage.index}: the gradient was not finite in {streak:.0f} updates in a row "
                f"(optimizer.max_bad_steps={limit}): expected a lower optimizer.blr, or precision.compute=fp32"
            )
        row |= self._speed(stage_step)
        if self._watch is not None and self._looks(stage_step):
            row |= self._watch.look()
            self.clock.mark("watch")
        alarm = CollapseWatch.alarm(row)
        return (row if alarm is None else row | {"alarm": alarm}), asked, due

    def _looks(self, stage_step: int) -> bool:
        """At a stage's first reading, every tenth and the last: by the step, so a resumed run looks at them, too."""
        every = self.stage.config.log.every
        number = stage_step // every
        return stage_step == self.stage.steps or number == 1 or number % LOOK_EVERY == 0

    def _mean(self, vector: Tensor) -> Tensor:
        return sum_over_ranks(self.ranks, vector) / self.ranks.world

    def _speed(self, stage_step: int) -> dict[str, Any]:
        config, spent, now = self.stage.config, self.clock.flush(), time.perf_counter()
        interval, steps = now - self._last, stage_step - self._last_step
        speed = steps * config.data.batch_size * config.optimizer.accumulate * self.ranks.world / interval
        row: dict[str, Any] = {
            "lr": self.stage.schedule.rate(stage_step - 1),
            "perf/samples_s": round(speed, 1),
            "perf/data_wait": round(spent.get("data", 0.0) / interval, 4),
        }
        if self._peak is not None:
            row["perf/mfu"] = speed * self.stage.flops / (self._peak * self.ranks.world)
        if self.ranks.device.type == "cuda":
            row["perf/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.pace = (now - self._begin) / (stage_step - self._first_step)
        self._last, self._last_step = now, stage_step
        return row
