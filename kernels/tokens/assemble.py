"""assemble: visible rows + mask token + positions -> the input of a decoder or generator."""

from __future__ import annotations

import torch
from torch import Tensor


def assemble_reference(x: Tensor, mask_token: Tensor, positions: Tensor | None, rows: Tensor, *, layout: str = "raster", prefix: int = 0) -> Tensor:
    """Reference of :func:`assemble`, differentiable in x, mask_token and positions."""
    batch, seen, width = x.shape
    visible = seen - prefix
    count = rows.shape[1]
    index = rows.long()
    if layout == "raster":
        source = index
    else:
        source = torch.arange(count, device=x.device).expand(batch, count)
    filled = torch.cat([x[:, prefix:], mask_token.to(x.dtype).view(1, 1, width).expand(batch, 1, width)], dim=1)
    out = filled.gather(1, source.clamp(max=visible).unsqueeze(-1).expand(-1, -1, width))
    out = torch.cat([x[:, :prefix], out], dim=1)
    if positions is not None:
        grid = positions[prefix:].to(x.dtype)
        body = grid.unsqueeze(0) if layout == "raster" else grid[index]
        out = out + torch.cat([positions[:prefix].to(x.dtype).expand(batch, -1, -1), body.expand(batch, -1, -1)], dim=1)
    return out


def assemble(
    x: Tensor, mask_token: Tensor, positions: Tensor | None, rows: Tensor, *, layout: str = "raster", prefix: int = 0, backend: str | None = None
) -> Tensor:
    """[B,P+a,D] -> [B,P+m,D]."""
    return assemble_reference(x, mask_token, positions, rows, layout=layout, prefix=prefix)
