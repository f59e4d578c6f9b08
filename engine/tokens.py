"""The token grid: how an image or a clip is cut into patches, and the order in which they are counted."""

from __future__ import annotations

from dataclasses import dataclass

from cohobate.errors import UserError


@dataclass(frozen=True)
class TokenGrid:
    """A clip of ``frames`` x ``height`` x ``width`` pixels cut into patches of ``patch`` = (frames, rows, columns).

    An image has one frame. Tokens are counted in raster order: frame, row, column.

    Raises:
        UserError: a size that is not positive, or not divisible by the patch.
    """

    frames: int
    height: int
    width: int
    patch: tuple[int, int, int]
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise UserError(f"patch: expected three positive sizes (frames, rows, columns), got {self.patch}")
        if self.channels < 1:
            raise UserError(f"channels: expected at least 1, got {self.channels}")
        sizes = {"frames": self.frames, "height": self.height, "width": self.width}
        for (name, size), side in zip(sizes.items(), self.patch, strict=True):
            if size < 1 or size % side:
                raise UserError(f"{name}: expected a positive multiple of the patch size {side}, got {size}")

    @classmethod
    def image(cls, size: int | tuple[int, int], patch: int | tuple[int, int], channels: int = 3) -> TokenGrid:
        """Grid of a still image; ``size`` and ``patch`` are one number (square) or (height, width)."""
        height, width = (size, size) if isinstance(size, int) else size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return cls(1, height, width, (1, rows, columns), channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens along (time, height, width)."""
        pt, ph, pw = self.patch
        return self.frames // pt, self.height // ph, self.width // pw

    @property
    def size(self) -> int:
        """N, the number of tokens."""
        t, h, w = self.shape
        return t * h * w

    @property
    def row_length(self) -> int:
        """Values of one patch: pt * ph * pw * channels, ordered (frame, row, column, channel)."""
        pt, ph, pw = self.patch
        return pt * ph * pw * self.channels

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) that a batch of pixels must have behind its first dimension."""
        return self.frames, self.height, self.width, self.channels
