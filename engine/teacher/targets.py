"""What every teacher checks of its targets: which layers they are, and that they are numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cohobate.errors import UserError


def target_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks whose outputs are targets, 1-based; 0 is the embedding. None is the last one.

    Raises:
        UserError: layers that are not ascending inside [0, depth].
    """
    wanted = (depth,) if layers is None else tuple(layers)
    if not wanted or list(wanted) != sorted(set(wanted)):
        raise UserError(f"layers: expected ascending numbers, got {list(wanted)}")
    if wanted[0] < 0 or wanted[-1] > depth:
        raise UserError(f"layers: expected numbers in [0, {depth}], got {list(wanted)}")
    return wanted


def check_finite(features: Sequence[Tensor], layers: Sequence[int], name: str) -> None:
    """Read the features, which waits for the device.

    Raises:
        UserError: a layer with inf or nan in it; the message names the first.
    """
    for layer, x in zip(layers, features, strict=True):
        if not bool(x.isfinite().all()):
            raise UserError(f"teacher: expected finite features, got inf or nan behind layer {layer} of {name}")
