"""What pictures are made of: features as colours, attention, reconstructions, nearest images.

Computed anew for a few images; training never runs any of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.evaluation import ImageSource
from cohobate.evaluation.extractor import Extractor
from cohobate.evaluation.retrieval import nearest
from cohobate.kernels.tokens.gather import gather_patches_reference
from cohobate.masking import MaskPlan
from cohobate.models import Decoder, VisionTransformer
from cohobate.models.pixels import patch_rows
from cohobate.teacher.anatomy import Anatomy
from cohobate.tokens import TokenGrid

HEADS = 3  # drawn one by one, beside the mean of all
NEIGHBOURS = 7


class Colours:
    """The map from features [n,N,D] to three colours in 0..1: their first principal components.

    Args:
        features: what the components and the range of the colours are fitted to, over all tokens of all images.
    """

    def __init__(self, features: Tensor) -> None:
        rows = features.flatten(0, 1).float().nan_to_num()  # a broken network still gets a picture
        self.mean = rows.mean(dim=0)
        centred = rows - self.mean
        _, axes = torch.linalg.eigh((centred.T @ centred).double())
        axes = axes[:, -3:].flip(1).float()
        # The sign of a component is arbitrary: its largest weight is made positive, so that colours repeat.
        self.axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        values = centred @ self.axes
        # Percentiles, so that one odd token does not grey out the rest.
        self.low, self.high = values.quantile(torch.tensor([0.02, 0.98], device=rows.device), dim=0)

    def __call__(self, features: Tensor) -> Tensor:
        """[n,N,D] -> [n,N,3]."""
        values = (features.float() - self.mean) @ self.axes
        return ((values - self.low) / (self.high - self.low).clamp_min(1e-6)).clamp(0, 1)


def looked_at(anatomy: Anatomy, images: Tensor) -> dict[str, Tensor]:
    """``attention`` [n,1+k,t,h,w], the mean over heads and up to k = 3 heads, and ``attention_heads`` [k] from 0."""
    weights = attention(anatomy, images)[:, :, anatomy.prefix.shape[0] :]
    heads = sorted({round(place * (anatomy.heads - 1) / (HEADS - 1)) for place in range(HEADS)})
    maps = torch.cat([weights.mean(1, keepdim=True), weights[:, heads]], dim=1)
    shown = torch.stack([on_grid(maps[:, place], anatomy.grid) for place in range(maps.shape[1])], dim=1)
    return {"attention": shown, "attention_heads": torch.tensor(heads)}


@torch.no_grad()
def attention(anatomy: Anatomy, pixels: Tensor) -> Tensor:
    """How the last block spreads its attention over whole images: softmax(q k^T / sqrt(d) + r), written out.

    Args:
        anatomy: of the model, at least one block deep. pixels: [n,T,H,W,C] uint8, on its device.

    Returns:
        [n, heads, P + N] fp32, rows that sum to one: what the first token in front of the patches attends to (the class
        token), or, where nothing is in front, the mean over all patches of what they attend to.

    Raises:
        UserError: a model without blocks.
    """
    if not anatomy.blocks:
        raise UserError(f"attention: expected a model of at least one block, got {anatomy.name} without any")
    block, found = anatomy.blocks[-1], []
    stream = replace(anatomy, head=None)
    rows = 1 if anatomy.prefix.shape[0] else anatomy.grid.size
    for image in pixels.split(1):  # one at a time: a clip's table of queries and keys is large
        (x,) = stream.forward(image, [anatomy.depth - 1])
        x = F.layer_norm(x, (anatomy.width,), *block.norm1, anatomy.eps)
        q, k, _ = F.linear(x, block.qkv, block.qkv_bias).unflatten(-1, (3, anatomy.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q[:, :, :rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if anatomy.relative is not None:
            scores = scores + anatomy.relative[:, :rows]
        found.append(scores.softmax(dim=-1).mean(dim=2))
    return torch.cat(found).float()


def predicted_pixels(encoder: VisionTransformer, decoder: Decoder, pixels: Tensor, plan: MaskPlan) -> Tensor:
    """What an autoencoder answers at ``plan.masked``, [n, N - a, row_length] fp32, in the units of its loss."""
    answer: Tensor = decoder(encoder(pixels, plan.visible), plan, decoder.masked_rows(plan))
    return answer.float()


def reconstruct(
    predicted: Tensor,
    pixels: Tensor,
    plan: MaskPlan,
    encoder: VisionTransformer,
    *,
    convention: str = "mae",
    normalised: bool = True,
) -> Tensor:
    """The images with the predictions in place of what was hidden.

    Args:
        predicted: [n, N - a, row_length] at ``plan.masked``, in the units of the loss.
        pixels: [n,T,H,W,C] uint8. encoder: for its grid and the statistics of its pixels.
        convention, normalised: of the target, see :class:`cohobate.methods.MAEOptions`.

    Returns:
        [n,T,H,W,C] uint8.
    """
    grid = encoder.grid
    rows = denormalise_target(
        in_raster_order(predicted, plan.masked, plan.tokens), pixels,
        grid=grid, mean=encoder.mean, std=encoder.std, convention=convention, normalised=normalised,
    )  # fmt: skip
    hidden, _ = plan.to_boolean()
    rounded = (rows * 255).round().clamp(0, 255).to(torch.uint8)
    return from_patches(torch.where(hidden.unsqueeze(-1), rounded, patch_rows(pixels, None, grid)), grid)


def denormalise_target(
    rows: Tensor,
    pixels: Tensor,
    *,
    grid: TokenGrid,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    convention: str = "mae",
    normalised: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Undo :func:`cohobate.kernels.alignment.pixel.pixel_target_reference`: its values back to pixels on 0..1.

    A standardised patch has lost its brightness and contrast; they are taken from the true patch.

    Args:
        rows: [n, N, row_length], in raster order. pixels: [n,T,H,W,C] uint8, the truth. mean, std: of the encoder.
        convention, normalised, eps: as there.

    Returns:
        [n, N, row_length] fp32.
    """
    channels = grid.channels
    if convention == "videomae":
        mean, std = (0.0,) * channels, (1.0,) * channels
    if normalised:
        true = gather_patches_reference(pixels, None, patch=grid.patch, mean=mean, std=std)
        if convention == "videomae":  # each channel of a patch by itself
            true, rows = true.unflatten(-1, (-1, channels)), rows.unflatten(-1, (-1, channels))
            rows = (rows * (true.var(-2, keepdim=True).sqrt() + eps) + true.mean(-2, keepdim=True)).flatten(-2)
        else:
            rows = rows * (true.var(-1, keepdim=True) + eps).sqrt() + true.mean(-1, keepdim=True)
    values = rows.unflatten(-1, (-1, channels))
    return (values * values.new_tensor(std) + values.new_tensor(mean)).flatten(-2)


def from_patches(rows: Tensor, grid: TokenGrid) -> Tensor:
    """The inverse of :func:`cohobate.models.pixels.patch_rows`: [n,N,row_length] -> [n,T,H,W,C]."""
    whole = rows.reshape(len(rows), *grid.shape, *grid.patch, grid.channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return whole.reshape(len(rows), *grid.pixel_shape)


@torch.no_grad()
def neighbours(
    extractor: Extractor, memory: ImageSource, queries: ImageSource, *, device: torch.device, k: int = NEIGHBOURS
) -> dict[str, Any]:
    """The images of ``memory`` nearest to each query, by the cosine of their mean patch tokens; never itself.

    Returns:
        ``queries``, ``neighbours``, ``similarity`` and, with labels, ``same`` and ``label`` (of the first kind).

    Raises:
        UserError: a memory without any other image.
    """
    images, features, names = _read(extractor, memory, device)
    asked, wanted, own_names = _read(extractor, queries, device)
    similarity, places = (x.cpu() for x in nearest(features, wanted, min(k + 1, len(features))))
    other = np.array([[names[place] != name for place in row] for row, name in zip(places.tolist(), own_names)])
    k = min(k, int(other.sum(axis=1).min()))
    if k < 1:
        raise UserError("images: expected at least two images to find the nearest ones among, got one")
    # Stable: the others first, the nearest of them first.
    kept = torch.from_numpy((~other).argsort(axis=1, kind="stable")[:, :k].copy())
    places = places.gather(1, kept)
    found: dict[str, Any] = {
        "queries": timeless(rgb(asked)).numpy(),
        "neighbours": torch.stack([timeless(rgb(images[row])) for row in places]).numpy(),
        "similarity": similarity.gather(1, kept).numpy(),
    }
    known, mine = memory.manifest, queries.manifest
    if known.labels is not None and mine.labels is not None and known.label_names == mine.label_names:
        labels = {known.paths[n]: known.labels[n, 0] for n in range(len(known))}
        own_labels = {mine.paths[n]: mine.labels[n, 0] for n in range(len(mine))}
        pairs = [[labels[names[n]] == own_labels[name] for n in row] for row, name in zip(places.tolist(), own_names)]
        found |= {"same": np.array(pairs), "label": known.label_names[0]}
    return found


def _read(extractor: Extractor, source: ImageSource, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 on the CPU, their features on ``device``, and their paths."""
    pixels, features, paths = [], [], []
    for batch, places in source.batches(device):
        features.append(extractor(batch).mean)
        pixels.append(batch.cpu())
        paths += [source.manifest.paths[place] for place in places.tolist()]
    return torch.cat(pixels), torch.cat(features), paths


def in_raster_order(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """Rows [n,m,D] of the tokens ``places`` [n,m] as [n,count,D], zero elsewhere."""
    index = places.long().unsqueeze(-1).expand_as(rows)
    return rows.new_zeros(len(rows), count, rows.shape[-1]).scatter_(1, index, rows)


def on_grid(tokens: Tensor, grid: TokenGrid) -> Tensor:
    """[n,N,...] -> [n,t,h,w,...], an image's without t."""
    shape = grid.shape if grid.frames > 1 else grid.shape[1:]
    return tokens.reshape(len(tokens), *shape, *tokens.shape[2:])


def timeless(clips: Tensor) -> Tensor:
    """[n,T,H,W,C], images of one frame as [n,H,W,C]."""
    return clips[:, 0] if clips.shape[1] == 1 else clips


def rgb(pixels: Tensor) -> Tensor:
    """[...,C] -> [...,3]: the first three channels, or the first one as grey."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].expand(*pixels.shape[:-1], 3)
