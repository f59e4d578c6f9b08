"""Thirty seconds on the machine at hand: a copy, a matrix product, and real updates of the recipe's stages.

The updates run the stage's own method, with a teacher of its shape, on random weights and pixels; the batch is as small
as time and memory ask. What they take says which share of the product's rate a step reaches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cohobate.config import Config
from cohobate.models.layers import compile_blocks, set_checkpointing
from cohobate.planning.estimate import fit_share, rank_memory
from cohobate.planning.hardware import Hardware, Range, label_here, memory_here
from cohobate.planning.parts import frozen_bytes, step_parts
from cohobate.planning.shapes import Shapes
from cohobate.training.optimizer import Updater
from cohobate.training.stages import Stage

SECONDS = 30.0
CEILING_S = 1.0  # for each of copy and products
STEP_S = 1.5  # a step that is expected to take longer gets a smaller batch
ROOM = 0.6  # share of the memory that a step may fill
LEAST = 0.10  # error of a share, however steady the updates were: the batch, the length of a run
FEW, FEW_LEAST = 3, 0.30  # so few updates say nothing of their spread
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Measured:
    """Updates of one stage: its name, images or clips a forward pass, how many, and seconds of one (p20, p50, p80).

    ``load``: processes that wanted the CPU before we began, None where that cannot be known.
    """

    stage: str
    batch: int
    updates: int
    seconds: Range
    load: float | None = None


@dataclass
class _Batch:
    pixels: Tensor


def calibrate(config: Config, samples: int, *, seconds: float = SECONDS) -> tuple[Hardware, list[Measured]]:
    """This machine, with the shares of this recipe's methods; and what was measured for them.

    Args:
        config: the run's. samples: files in an epoch. seconds: for all of it; a step once begun is finished.

    Raises:
        UserError: settings that cannot go together, or a teacher whose shape nobody knows.
    """
    end = time.perf_counter() + seconds
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = sorted({"bf16", "fp32", config.precision.compute})
    hardware = Hardware(
        name="here",
        label=label_here(),
        device=device,
        copy=_copy_rate(device),
        share={},
        provenance=f"measured now, within {seconds:.0f} s",
        matmul={name: _product_rate(device, _DTYPES[name]) for name in dtypes},
        peak={},
        memory=memory_here(),
        cores=None if device == "cuda" else torch.get_num_threads(),
    )
    shapes, measured, shares = Shapes(config, samples, 1), [], {}
    firsts: dict[str, int] = {}
    for index, stage in enumerate(config.stages):
        firsts.setdefault(stage.method, index)
    for done, (method, index) in enumerate(firsts.items()):
        until = time.perf_counter() + (end - time.perf_counter()) / (len(firsts) - done)
        found, share = _measure(shapes, index, hardware, until)
        measured.append(replace(found, load=load))
        shares[method] = share
    return replace(hardware, share=shares), measured


def _measure(shapes: Shapes, index: int, hardware: Hardware, until: float) -> tuple[Measured, Range]:
    shape = shapes.stage(index)
    parts, dtype = step_parts(shape, shapes.teachers.get(index)), shape.config.precision.compute
    batch = _batch(shape, shapes, index, hardware)
    shape = shapes.stage(index, "cpu")
    method = shape.method.to(hardware.device).train()
    set_checkpointing(method, shape.config.execution.checkpointing)
    if shape.config.execution.compile:
        compile_blocks(method)
    settings = shape.config.optimizer
    updater = Updater(method, weight_decay=settings.weight_decay, betas=settings.betas, eps=settings.eps, clip=1.0)
    ids = torch.arange(batch, device=hardware.device)
    shown = (batch, *shape.method.student.grid.pixel_shape)
    images = _Batch(torch.randint(0, 256, shown, dtype=torch.uint8).to(hardware.device))

    def update() -> None:
        plan = shape.plan(ids, 0)
        method.loss(images, plan).total.backward()
        norm = updater.gradient_norm()
        updater.step(1e-4, 1.0 - norm.isfinite().float())
        updater.zero()

    warm = _timed(update, hardware.device)  # the first one also plans, packs and compiles
    times: list[float] = []
    while not times or (time.perf_counter() + min([warm, *times]) < until and len(times) < 200):
        times.append(_timed(update, hardware.device))
    times.sort()
    p20, p50, p80 = (times[int(fraction * (len(times) - 1))] for fraction in (0.2, 0.5, 0.8))
    middle = fit_share(parts, hardware, dtype, p50, batch)
    least = LEAST if len(times) >= FEW else FEW_LEAST
    low = min(fit_share(parts, hardware, dtype, p80, batch), middle * (1 - least))
    high = max(fit_share(parts, hardware, dtype, p20, batch), middle * (1 + least))
    return Measured(shape.name, batch, len(times), (p20, p50, p80)), (low, middle, min(high, 1.0))


def _batch(shape: Stage, shapes: Shapes, index: int, hardware: Hardware) -> int:
    """Images or clips a step: at most the recipe's, fewer for a slow machine or a small memory."""
    parts, batch = step_parts(shape, shapes.teachers.get(index)), shape.config.data.batch_size
    teacher = frozen_bytes(shape, shapes.teachers.get(index), hardware.device)
    memory = rank_memory(shape, parts, teacher, hardware.device)
    if hardware.memory is not None:
        each = (memory.activations + memory.working + memory.pixels) / batch
        fixed = memory.weights + memory.gradients + memory.moments + memory.teacher
        batch = min(batch, int((ROOM * hardware.memory * 1e9 - fixed) / each))
    fast = STEP_S * 0.5 * hardware.rate(shape.config.precision.compute) * 1e12  # FLOPs of such a step at half the rate
    return max(1, min(batch, int(fast / max(1, sum(part.flops for part in parts)))))


def _copy_rate(device: str) -> float:
    """GB/s, read and written both counted, of more bytes than any cache holds."""
    size = 2**30 if device == "cuda" else 2**28
    source = torch.randn(size // 8, device=device)
    target = torch.empty_like(source)
    return size / _best(partial(target.copy_, source), device) / 1e9


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random matrices."""
    order = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(order, order, device=device).to(dtype) for _ in range(2))
    return 2 * order**3 / _best(partial(torch.mm, a, b), device) / 1e12


def _best(function: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest call: a ceiling is what can be reached."""
    _timed(function, device)
    end, best = time.perf_counter() + CEILING_S, _timed(function, device)
    while time.perf_counter() < end:
        best = min(best, _timed(function, device))
    return best


def _timed(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
