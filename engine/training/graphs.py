"""A whole update as one CUDA graph: forward, backward, gradient norm and optimizer become a single launch.

The first updates run as they are, on the stream that the capture will be on, as torch asks; they train like any other.
Then one graph is captured for updates whose signals are asked for and one for those without, in one pool of memory.
From then on an update is two copies into the graphs' inputs, and a replay.

What a graph holds is a function of device memory alone: pixels, masks and learning rate stand in buffers that stay,
drop path draws from a generator that is registered with the graph (seeded outside, it draws what an eager step draws),
gradients live and die inside, and what is reported is copied out before the next replay.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.masking import MaskPlan
from cohobate.methods import StepLoss
from cohobate.training.distributed import Ranks

log = logging.getLogger("cohobate.training")

WARM_UP = 3  # updates in front of the capture: kernels are compiled and loaded, the optimizer makes its state


@dataclass(frozen=True)
class Pixels:
    """What a method reads of a batch."""

    pixels: Tensor


class Outcome(NamedTuple):
    """What an update reports: its loss, and the optimizer's norm and verdict; without a graph of autograd."""

    loss: StepLoss
    norm: Tensor
    bad: Tensor


Update = Callable[[Pixels, MaskPlan, bool], Outcome]


def why_not(config: Config, ranks: Ranks) -> str | None:
    """Why the updates of a stage cannot be CUDA graphs, ``config`` being the stage's; None where they can."""
    if ranks.device.type != "cuda":
        return f"the device is {ranks.device.type}"
    if ranks.many:
        return f"{ranks.world} ranks exchange gradients"
    if config.optimizer.accumulate > 1:
        return f"optimizer.accumulate is {config.optimizer.accumulate}"
    if config.execution.ahead:
        return "execution.ahead is true"
    return None


class StepGraph:
    """Calls of an update: eager at first, then captured, then replayed.

    Args:
        update: forward, backward and optimizer of a batch; given pixels, masks, and whether signals are asked for. It
            may depend on nothing else that changes, but for what it reads from device memory.
        generator: of random numbers that ``update`` draws; None where it draws none.
        required: raise UserError if the capture fails; else say so once.
        cuda: stands in for ``torch.cuda`` in tests.
    """

    def __init__(
        self, update: Update, generator: torch.Generator | None = None, required: bool = False, cuda: Any = torch.cuda
    ) -> None:
        self._update, self._generator, self._required, self._cuda = update, generator, required, cuda
        self._stream: Any = None
        self._warm = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._captured: dict[bool, tuple[Any, Outcome]] = {}

    def __call__(self, pixels: Tensor, plan: MaskPlan, signals: bool) -> Outcome | None:
        """One update. Its outcome is to be read before the next call; None: it cannot be captured, and nothing is done.

        Every call has pixels and masks of the same shape.
        """
        with self._cuda.device(pixels.device):
            if self._warm < WARM_UP:
                self._warm += 1
                return self._eager(pixels, plan, signals)
            if not self._captured and not self._capture(pixels, plan):
                return None
            assert self._inputs is not None
            for static, given in zip(self._inputs, (pixels, plan.order), strict=True):
                static.copy_(given)
            graph, outcome = self._captured[signals]
            graph.replay()
            return outcome

    def clear(self) -> None:
        """Give back the graphs' memory; the next call would capture them anew."""
        if self._captured:
            self._cuda.synchronize()  # the last replay may still use it
            self._captured, self._inputs = {}, None

    def _eager(self, pixels: Tensor, plan: MaskPlan, signals: bool) -> Outcome:
        """On the capture's stream, and always with the signals, whose kernels must be loaded too."""
        cuda = self._cuda
        if self._stream is None:
            self._stream = cuda.Stream()
        now = cuda.current_stream()
        self._stream.wait_stream(now)
        with cuda.stream(self._stream):
            outcome = self._update(Pixels(pixels), plan, True)
        now.wait_stream(self._stream)
        return outcome if signals else outcome._replace(loss=outcome.loss._replace(signals={}))

    def _capture(self, pixels: Tensor, plan: MaskPlan) -> bool:
        cuda = self._cuda
        gc.collect()  # what autograd still holds of an earlier update belongs to no capture
        cuda.synchronize()
        pool = cuda.graph_pool_handle()
        inputs = pixels.clone(), plan.order.clone()
        captured = {}
        try:
            for signals in (False, True):
                graph = cuda.CUDAGraph()
                if self._generator is not None and hasattr(graph, "register_generator_state"):
                    graph.register_generator_state(self._generator)  # later versions of torch do it unasked
                # The stream outside too: a graph that fails does not leave it. A loader's threads may allocate
                # meanwhile.
                with cuda.stream(self._stream), cuda.graph(graph, pool, self._stream, "thread_local"):
                    # A plan of its own: the inverse order that it remembers is computed in the graph.
                    masks = MaskPlan(inputs[1], plan.student, plan.teacher)
                    captured[signals] = graph, self._update(Pixels(inputs[0]), masks, signals)
        except RuntimeError as error:
            text = f"the step cannot be captured: {' '.join(str(error).split())}"
            if self._required:
                raise UserError(f"execution.cuda_graph: {text}") from error
            log.warning("execution.cuda_graph: off, %s", text)
            return False
        self._inputs, self._captured = inputs, captured
        return True
