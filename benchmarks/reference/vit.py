"""A literal vision transformer encoder and masked decoder: every patch embedded, explicit softmax attention.

Tensors are fp32 unless the caller runs them under autocast. B samples, N patches, D width, K patches kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, the [B, heads, N, N] scores materialised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1)) * self.scale
        scores = scores.softmax(dim=-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(batch, length, width))


class FusedAttention(Attention):
    """The same weights through scaled_dot_product_attention, as timm and transformers run them today."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


def fuse(module: nn.Module) -> None:
    """Exchange every attention inside for the fused one, in place; the parameters and their names stay."""
    for block in [part for part in module.modules() if isinstance(part, Block)]:
        plain = block.attn
        block.attn = FusedAttention(plain.proj.in_features, plain.heads)
        block.attn.qkv, block.attn.proj = plain.qkv, plain.proj


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, fused: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = FusedAttention(width, heads) if fused else Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch, over the whole image."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """ViT with a cls token; ``grid`` is (rows, columns) of tokens. Positions come from the weights copied in."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        channels: int = 3,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, fused=fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def masked(self, images: Tensor, ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] -> (tokens [B, 1 + K, D], mask [B, N] with 1 where hidden, ids_restore [B, N] int64).

        ``noise`` [B, N]: the K smallest of a sample are kept, in that order; None draws it.
        """
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        batch, length, width = x.shape
        keep = int(length * (1 - ratio))
        noise = torch.rand(batch, length, device=x.device) if noise is None else noise
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, :keep]
        x = x.gather(1, ids_keep.unsqueeze(-1).repeat(1, 1, width))
        mask = torch.ones(batch, length, device=x.device)
        mask[:, :keep] = 0
        mask = mask.gather(1, ids_restore)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = torch.cat((cls, x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def whole(self, images: Tensor, norm: bool) -> Tensor:
        """Images [B, C, H, W] -> tokens [B, 1 + N, D] of the unmasked image, with or without the final norm."""
        x = self.states(images, (len(self.blocks),))[0]
        return self.norm(x) if norm else x

    def states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Images [B, C, H, W] -> tokens [B, 1 + N, D] of the unmasked image behind ``layers``; 0 is the embedding.

        All blocks run, as in a published forward that keeps intermediate states.
        """
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat((cls, x), dim=1)
        found = [x] if 0 in layers else []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in layers:
                found.append(x)
        return found


class Decoder(nn.Module):
    """Mask tokens put back in raster order, blocks over all tokens, a linear head over all tokens."""

    def __init__(self, tokens: int, encoder_width: int, out: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out)

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """[B, 1 + K, D], [B, N] -> [B, 1 + N, out]."""
        x = self.embed(x)
        batch, length = ids_restore.shape
        hidden = self.mask_token.repeat(batch, length + 1 - x.shape[1], 1)
        body = torch.cat([x[:, 1:], hidden], dim=1)
        body = body.gather(1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], body], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, 1, H, W, C] -> fp32 [B, C, H, W], what a published loader hands to the model."""
    images = pixels[:, 0].permute(0, 3, 1, 2).float() / 255
    mean_, std_ = (torch.tensor(x, device=pixels.device).view(1, -1, 1, 1) for x in (mean, std))
    return (images - mean_) / std_
