"""The same model for input of another size: other images, clips instead of images, or images instead of clips."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop.parts import Hints, Parts, Sizes, build
from cohobate.models.exports import fill
from cohobate.tokens import TokenGrid


def reshaped(parts: Parts, hints: Hints, *, cls: bool = True) -> tuple[Parts, list[str]]:
    """A model of the size that ``hints`` asks for, and what was done to it, one line each.

    Args:
        parts: the model; not changed, and returned itself if nothing is asked for.
        hints: ``image_size``, ``frames``, ``tubelet``.
        cls: keep the class token; without it the decoder stays behind too.

    Raises:
        UserError: a size that the patches do not divide, or a change from one tubelet to another.
    """
    sizes = parts.sizes
    grid = _grid(sizes.grid, hints)
    drop_cls = sizes.cls and not cls
    if grid == sizes.grid and not drop_cls:
        return parts, []
    notes: list[str] = []
    new = replace(sizes, grid=grid, cls=sizes.cls and cls)
    if grid.patch != sizes.grid.patch or drop_cls:
        for part in ("decoder", "alignment"):
            if getattr(sizes, part) is not None:
                reason = "the class token is gone" if drop_cls else "a patch has another number of pixels"
                notes.append(f"dropped {part}: {reason}")
        new = replace(new, decoder=None, alignment=None)
    if drop_cls:
        notes.append("dropped student.cls_token: the new model has none")
    made = build(new)
    weights, computed = dict(made.state_dict()), []
    for key, old in parts.state_dict().items():
        if key not in weights:
            continue
        if key == "student.patch_embed.proj.weight":
            weights[key] = kernel(old, sizes.grid, grid, notes)
        elif key.endswith("pos_embed") and (grid.shape != sizes.grid.shape or drop_cls):
            if sizes.grid.frames == grid.frames == 1:
                weights[key] = table(old, sizes, grid, cls=new.cls)
                notes.append(f"{key}: bicubic from {sizes.grid.shape[1:]} to {grid.shape[1:]} patches")
            else:
                computed.append(key)
        else:
            weights[key] = old
    if computed:
        notes.append(f"{', '.join(computed)}: computed for {grid.shape} tokens")
    fill(made, weights, "the model")
    return made, notes


def _grid(old: TokenGrid, hints: Hints) -> TokenGrid:
    height, width = hints.image_size or (old.height, old.width)
    frames = hints.frames or old.frames
    tubelet = hints.tubelet or (1 if frames == 1 else old.patch[0])
    return TokenGrid(frames, height, width, (tubelet, *old.patch[1:]), old.channels)


def kernel(old: Tensor, before: TokenGrid, after: TokenGrid, notes: list[str]) -> Tensor:
    """The patch kernel over another number of frames: the mean over a tubelet, or the sum over time.

    Inflated, a clip that stands still gives what the image gave; collapsed, an image gives what it gave as a clip that
    stands still.

    Raises:
        UserError: from one tubelet of several frames to another.
    """
    was, now = before.patch[0], after.patch[0]
    full = old if old.dim() == 5 else old.unsqueeze(2)
    if was == 1 < now:
        full = full.repeat(1, 1, now, 1, 1) / now
        notes.append(f"student.patch_embed.proj.weight: repeated over {now} frames and divided by {now}")
    elif now == 1 < was:
        full = full.sum(2, keepdim=True)
        notes.append(f"student.patch_embed.proj.weight: summed over {was} frames")
    elif was != now:
        raise UserError(f"tubelet: expected {was} or 1, for a kernel of {was} frames, got {now}")
    return full if after.shape[0] > 1 or now > 1 else full[:, :, 0]


def table(old: Tensor, sizes: Sizes, grid: TokenGrid, *, cls: bool) -> Tensor:
    """Positions [1, P + N, D] for another image size: bicubic, as MAE does it; the class token's row stays."""
    prefix = int(sizes.cls)
    _, rows, columns = sizes.grid.shape
    x = old[:, prefix:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    if grid.shape != sizes.grid.shape:
        x = F.interpolate(x.float(), size=grid.shape[1:], mode="bicubic", align_corners=False)
    body = x.permute(0, 2, 3, 1).reshape(1, grid.size, -1)
    return torch.cat([old[:, : prefix if cls else 0], body], dim=1)
