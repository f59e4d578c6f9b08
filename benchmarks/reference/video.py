"""The literal encoder and decoder of VideoMAE and AMD: every tubelet embedded, rows chosen with booleans.

B clips, N tubelets, D width; masks are bool [B, N], True where a token is hidden, with equal counts in every clip. As
published, the residual stream has the dtype of the convolution, bf16 under autocast, and a table of positions is no
part of its module but an fp32 tensor [1, N, D] on the host: every step expands it to the batch, and copies that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cohobate.benchmarks.reference.vit import Block


class TubeletEmbed(nn.Module):
    """Convolution with kernel = stride = tubelet, over the whole clip."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, patch)

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """ViT over tubelets without a cls token."""

    def __init__(
        self, positions: Tensor, patch: tuple[int, int, int], depth: int, heads: int, channels: int = 3
    ) -> None:
        super().__init__()
        self.positions, width = positions, positions.shape[-1]
        self.patch_embed = TubeletEmbed(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def embed(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] fp32, normalised -> [B, N, D], every tubelet."""
        x = self.patch_embed(video)
        return x + self.positions.expand(len(x), -1, -1).type_as(x)

    def states(self, x: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """[B, n, D] -> the stream behind the blocks ``layers``, 1-based; no block behind the last of them runs."""
        found = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in layers:
                found.append(x)
            if len(found) == len(layers):
                break
        return found

    def visible(self, video: Tensor, mask: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, a, D] behind the final norm, and the streams behind ``layers``, of what ``mask`` leaves."""
        x = chosen(self.embed(video), ~mask)
        *found, last = self.states(x, sorted({*layers, len(self.blocks)}))
        states = [*found, last] if len(self.blocks) in layers else found
        return self.norm(last), states


class Decoder(nn.Module):
    """Visible tokens, mask tokens behind them, positions to match; a head over the mask tokens."""

    def __init__(self, positions: Tensor, encoder_width: int, out: int, depth: int, heads: int) -> None:
        super().__init__()
        self.positions, width = positions, positions.shape[-1]
        self.embed = nn.Linear(encoder_width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, a, D], bool [B, N] -> [B, N - a, out]."""
        x = self.embed(x)
        positions = self.positions.expand(len(x), -1, -1).type_as(x)
        seen, hidden = chosen(positions, ~mask), chosen(positions, mask)
        x = torch.cat([x + seen, self.mask_token.type_as(x) + hidden], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -hidden.shape[1] :]))


def chosen(x: Tensor, rows: Tensor) -> Tensor:
    """[B, N, D] at True of bool [B, N] -> [B, n, D], in raster order."""
    return x[rows].reshape(len(x), -1, x.shape[-1])


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, T, H, W, C] -> fp32 [B, C, T, H, W], what a published loader hands to the model."""
    video = pixels.permute(0, 4, 1, 2, 3).float() / 255
    mean_, std_ = (torch.tensor(x, device=pixels.device).view(1, -1, 1, 1, 1) for x in (mean, std))
    return (video - mean_) / std_
