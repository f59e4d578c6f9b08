"""An objective is a list of weighted terms; terms of equal kind go to one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

from torch import Tensor

from cohobate.kernels.alignment import Standardise, align_loss, pixel_loss
from cohobate.kernels.alignment.pixel import pixel_loss_reference
from cohobate.models.pixels import Statistics, denormalise


class HasPixels(Protocol):
    """What a method reads of a batch."""

    @property
    def pixels(self) -> Tensor:
        """[B, T, H, W, C] uint8, or floating and normalised by the student's ``mean`` and ``std``."""


class StepLoss(NamedTuple):
    """Result of one step: what to differentiate, and what to log (0-d, on the device, without a graph)."""

    total: Tensor
    terms: dict[str, Tensor]
    signals: dict[str, Tensor]


@dataclass(frozen=True)
class AlignTerm:
    """weight * mean over layers of loss(prediction, target), predictions [B, n, D_T] each, rows already chosen.

    ``reduction``: "mean" over the layers, or their "sum".
    ``target_rows``: where those rows stand in each target [B, R, D_T], int32 [B, n] a layer; None if they are chosen
    already. A target may stand in several layers, with rows of their own: it is read where it lies, never copied.
    """

    name: str
    predictions: Sequence[Tensor]
    targets: Sequence[Tensor]
    weight: float = 1.0
    loss: str = "smooth_l1"
    beta: float = 2.0
    standardise: Standardise | None = None
    target_rows: Sequence[Tensor] | None = None
    reduction: str = "mean"

    @property
    def kind(self) -> tuple[object, ...]:
        """Terms of the same kind can share a launch."""
        shapes = {tuple(p.shape) for p in self.predictions}
        return self.loss, self.beta, self.standardise, self.target_rows is None, tuple(sorted(shapes))


@dataclass(frozen=True)
class PixelTerm:
    """weight * mean squared error against normalised pixels of the patches ``rows``.

    ``pixels``: uint8, or floating and already normalised by ``mean`` and ``std``; the target is the same.
    """

    name: str
    prediction: Tensor
    pixels: Tensor
    rows: Tensor
    patch: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    weight: float = 1.0
    convention: str = "mae"
    normalise: bool = True


def objective(terms: Sequence[AlignTerm | PixelTerm], signals: dict[str, Tensor] | None = None) -> StepLoss:
    """Evaluate the terms: the weighted total with its graph, and each unweighted value without."""
    totals: list[Tensor] = []
    values: dict[str, Tensor] = {}
    for pixel in (term for term in terms if isinstance(term, PixelTerm)):
        squared_error = pixel_loss_reference if pixel.pixels.is_floating_point() else pixel_loss
        loss = squared_error(
            pixel.prediction,
            byte_levels(pixel.pixels, pixel),
            pixel.rows,
            patch=pixel.patch,
            mean=pixel.mean,
            std=pixel.std,
            convention=pixel.convention,
            normalise=pixel.normalise,
        )
        totals.append(loss * pixel.weight)
        values[pixel.name] = loss.detach()
    aligned = sorted((term for term in terms if isinstance(term, AlignTerm)), key=lambda term: str(term.kind))
    for _, same in groupby(aligned, key=lambda term: str(term.kind)):
        group = list(same)
        target_rows = [r for term in group for r in term.target_rows or ()]
        result = align_loss(
            [p for term in group for p in term.predictions],
            [t for term in group for t in term.targets],
            prediction_rows=None,
            target_rows=target_rows or None,
            loss=group[0].loss,
            beta=group[0].beta,
            standardise=group[0].standardise,
            weights=[term.weight * _share(term) for term in group for _ in term.predictions],
        )
        totals.append(result.total)
        start = 0
        for term in group:
            stop = start + len(term.predictions)
            values[term.name] = result.per_layer[start:stop].sum() * _share(term)
            start = stop
    return StepLoss(sum(totals[1:], totals[0]), values, signals or {})


def _share(term: AlignTerm) -> float:
    """What one layer counts in its term."""
    return 1 / len(term.predictions) if term.reduction == "mean" else 1.0


def byte_levels(pixels: Tensor, by: Statistics) -> Tensor:
    """Pixels [B, T, H, W, C] as the pixel loss reads them: bytes as they are, normalised floats as levels of 0 to 255.

    The second are not rounded: other people's crops need not have whole levels.
    """
    return denormalise(pixels, by) * 255 if pixels.is_floating_point() else pixels
