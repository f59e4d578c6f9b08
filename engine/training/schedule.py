"""The learning rate inside one stage: linear warm-up from 0, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cohobate.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Rate of each update of a stage, counted from the stage's start (MAE and dBOT; restarted in every stage).

    Args:
        steps: updates of the stage. warmup: updates of the warm-up, may be fractional, below ``steps``.
        peak: rate after the warm-up. floor: rate that the cosine ends in.

    Raises:
        UserError: a warm-up that leaves nothing of the stage, or rates out of order.
    """

    steps: int
    warmup: float
    peak: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise UserError(
                f"optimizer.warmup_epochs: expected a warm-up shorter than the stage ({self.steps} steps), "
                f"got {self.warmup:g} steps"
            )
        if not 0 <= self.floor <= self.peak or not math.isfinite(self.peak):
            raise UserError(f"optimizer.min_lr: expected 0 <= min_lr <= lr, got {self.floor:g} and {self.peak:g}")

    def rate(self, step: int) -> float:
        """Rate of update ``step`` (0 is the first, and has rate 0 where there is a warm-up)."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def peak_rate(lr: float | None, blr: float, images: int) -> float:
    """The rate itself, or the base rate for 256 images scaled to the ``images`` that an update sees."""
    return lr if lr is not None else blr * images / 256
