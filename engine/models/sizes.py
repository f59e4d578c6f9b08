"""The named sizes, and the one function that builds an encoder from plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cohobate.errors import UserError
from cohobate.models.layers import Precision
from cohobate.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from cohobate.tokens import TokenGrid


@dataclass(frozen=True)
class Size:
    """Width, depth, heads and patch of a published ViT."""

    width: int
    depth: int
    heads: int
    patch: int = 16


SIZES: dict[str, Size] = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16, 14),
}


def build(
    size: str = "base",
    *,
    image_size: int | tuple[int, int] = 224,
    patch: int | tuple[int, int] | None = None,
    channels: int = 3,
    frames: int = 1,
    tubelet: int = 1,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp_ratio: float = 4.0,
    cls_token: bool = True,
    drop_path: float = 0.0,
    precision: Precision | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    positions: str = "sincos",
    layer_scale: float | None = None,
    relative_positions: bool = False,
) -> VisionTransformer:
    """An encoder of a named size; ``width``, ``depth``, ``heads`` and ``patch`` replace the size's own.

    ``mean`` and ``std`` default to ImageNet's for 3 channels and to 0.5 otherwise; the last three are explained at
    :class:`VisionTransformer`.

    Raises:
        UserError: an unknown size, or values that do not fit together; the message names the argument.
    """
    if size not in SIZES:
        raise UserError(f"size: expected one of {', '.join(SIZES)}; got {size!r}")
    named = SIZES[size]
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    side = named.patch if patch is None else patch
    ph, pw = (side, side) if isinstance(side, int) else side
    rgb = channels == 3
    return VisionTransformer(
        TokenGrid(frames, rows, columns, (tubelet, ph, pw), channels),
        named.width if width is None else width,
        named.depth if depth is None else depth,
        named.heads if heads is None else heads,
        mlp_ratio,
        cls_token,
        drop_path,
        precision,
        mean if mean is not None else IMAGENET_MEAN if rgb else [0.5] * channels,
        std if std is not None else IMAGENET_STD if rgb else [0.5] * channels,
        positions,
        layer_scale,
        relative_positions,
    )
