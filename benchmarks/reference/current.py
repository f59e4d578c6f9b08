"""The same four losses as plain PyTorch is written today by someone who cares for speed: the baseline to beat.

Every module takes over a literal one's parts, weights and names, and computes its loss, up to rounding. What differs:
scaled_dot_product_attention; masks as indices [B, n], int64, made outside of the step; only the patches that are seen
are embedded; decoders put the hidden tokens first and predict those alone; losses read only the rows that count; a
frozen teacher's matrices are cast once. No boolean indexing, nothing that waits for the device, one graph to compile.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.benchmarks.reference import amd, dbot, mae, video, videomae, vit


def current(literal: nn.Module, half: bool) -> nn.Module:
    """A copy of a literal step, rewritten; ``half``: to be run under bf16 autocast, and in that only."""
    twin = copy.deepcopy(literal)
    vit.fuse(twin)
    if half and isinstance(twin, (dbot.DBOT, amd.AMD)):
        for part in twin.teacher.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                part.bfloat16()
    for kind, rewritten in KINDS.items():
        if type(twin) is kind:
            return rewritten(twin)
    raise TypeError(f"literal: expected one of {', '.join(kind.__name__ for kind in KINDS)}, got {type(twin).__name__}")


def tubelets(clips: Tensor, index: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, T, H, W], [B, n] -> [B, n, C, pt, ph, pw]: those tubelets, copied straight out of the clips."""
    grid = clips.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
    grid = grid.permute(0, 2, 4, 6, 1, 3, 5, 7)
    height, width = grid.shape[2], grid.shape[3]
    sample = torch.arange(len(clips), device=index.device).unsqueeze(1)
    return grid[sample, index // (height * width), index // width % height, index % width]


def patches(images: Tensor, index: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, H, W], [B, n] -> [B, n, C, 1, ph, pw]."""
    return tubelets(images.unsqueeze(2), index, (1, *patch))


def project(rows: Tensor, convolution: Any) -> Tensor:
    """Rows of pixels [B, n, C, ...] through a patch embedding's convolution, as the one product that it is."""
    return F.linear(rows.flatten(2), convolution.weight.flatten(1), convolution.bias)


# -- images ------------------------------------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """ViT with a cls token on the visible patches."""

    def __init__(self, literal: vit.Encoder) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.norm = literal.patch_embed, literal.blocks, literal.norm
        self.cls_token, self.pos_embed = literal.cls_token, literal.pos_embed

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """Images [B, C, H, W] fp32, normalised -> [B, 1 + K, D]."""
        convolution = self.patch_embed.proj
        x = project(patches(images, visible, convolution.kernel_size), convolution) + self.pos_embed[0, 1:][visible]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageDecoder(nn.Module):
    """cls, mask tokens, visible tokens, in this order: attention does not care, and what is predicted is in front."""

    def __init__(self, literal: vit.Decoder) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm, self.head = literal.embed, literal.blocks, literal.norm, literal.head
        self.mask_token, self.pos_embed = literal.mask_token, literal.pos_embed

    def forward(self, x: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """[B, 1 + K, D] -> predictions of cls and of the hidden patches, [B, 1 + N - K, out]."""
        x, table = self.embed(x), self.pos_embed[0, 1:]
        cls, seen = x[:, :1] + self.pos_embed[:, :1], x[:, 1:] + table[visible]
        x = torch.cat([cls, self.mask_token + table[hidden], seen], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, : 1 + hidden.shape[1]]))


class DBOT(nn.Module):
    """dBOT."""

    def __init__(self, literal: dbot.DBOT) -> None:
        super().__init__()
        self.student, self.decoder = ImageEncoder(literal.student), ImageDecoder(literal.decoder)
        self.teacher, self.target_norm = literal.teacher, literal.target_norm
        self.standardise, self.beta = literal.standardise, literal.beta

    def forward(self, images: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Images [B, C, H, W] fp32, normalised; indices of what the student sees and does not see -> 0-d loss."""
        with torch.no_grad():
            target = self.teacher.whole(images, self.target_norm)
            width = target.shape[-1]
            rows = target[:, 1:].gather(1, hidden.unsqueeze(-1).expand(-1, -1, width))
            target = torch.cat([target[:, :1], rows], dim=1)
            if self.standardise:
                biased = (width - 1) / width  # layer_norm divides by D, the published code by D - 1
                target = F.layer_norm(target, (width,), eps=1e-6 * biased) * biased**0.5
        prediction = self.decoder(self.student(images, visible), visible, hidden)
        return F.smooth_l1_loss(prediction, target, beta=self.beta)


class MAE(nn.Module):
    """MAE."""

    def __init__(self, literal: mae.MAE) -> None:
        super().__init__()
        self.student, self.decoder = ImageEncoder(literal.student), ImageDecoder(literal.decoder)
        self.patch, self.norm_pix = literal.patch, literal.norm_pix

    def forward(self, images: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Images [B, C, H, W] fp32, normalised; indices of what the student sees and does not see -> 0-d loss."""
        target = patches(images, hidden, (self.patch, self.patch)).movedim(2, -1).flatten(2)
        if self.norm_pix:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) * (var + 1e-6).rsqrt()
        prediction = self.decoder(self.student(images, visible), visible, hidden)
        return F.mse_loss(prediction[:, 1:], target)


# -- clips -------------------------------------------------------------------------------------------------------------


class ClipEncoder(nn.Module):
    """ViT on some tubelets; the stream has the dtype of the embedding's product, as in the literal one."""

    positions: Tensor

    def __init__(self, literal: video.Encoder) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.norm = literal.patch_embed, literal.blocks, literal.norm
        self.register_buffer("positions", literal.positions[0])

    def forward(self, clips: Tensor, index: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Clips [B, C, T, H, W] fp32, normalised -> [B, n, D] behind the blocks ``layers``, 1-based, ascending."""
        convolution = self.patch_embed.proj
        x = project(tubelets(clips, index, convolution.kernel_size), convolution)
        x, found = x + self.positions.to(x.dtype)[index], []
        for number, block in enumerate(self.blocks[: layers[-1]], start=1):
            x = block(x)
            if number in layers:
                found.append(x)
        return found


class MaskedBlocks(nn.Module):
    """Mask tokens in front of visible ones, blocks over all of them: AMD's generator, or the inside of a decoder."""

    positions: Tensor

    def __init__(self, literal: Any) -> None:
        super().__init__()
        self.blocks, self.mask_token = literal.blocks, literal.mask_token
        self.register_buffer("positions", literal.positions[0])

    def forward(self, x: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """[B, a, D] -> rows of the hidden ones [B, n, D]."""
        table = self.positions.to(x.dtype)
        x = torch.cat([self.mask_token.to(x.dtype) + table[hidden], x + table[visible]], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, : hidden.shape[1]]


class ClipDecoder(MaskedBlocks):
    """Predicts the hidden tubelets."""

    def __init__(self, literal: video.Decoder) -> None:
        super().__init__(literal)
        self.embed, self.norm, self.head = literal.embed, literal.norm, literal.head

    def forward(self, x: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """[B, a, D] -> [B, N - a, out]."""
        return self.head(self.norm(super().forward(self.embed(x), visible, hidden)))


class VideoMAE(nn.Module):
    """VideoMAE."""

    mean: Tensor
    std: Tensor

    def __init__(self, literal: videomae.VideoMAE) -> None:
        super().__init__()
        self.student, self.decoder = ClipEncoder(literal.student), ClipDecoder(literal.decoder)
        self.patch = literal.patch
        for name, values in (("mean", literal.mean), ("std", literal.std)):
            self.register_buffer(name, torch.tensor(values).unsqueeze(-1))

    def forward(self, clips: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Clips [B, C, T, H, W] fp32, normalised; indices of what the student sees and does not see -> 0-d loss."""
        last = self.student(clips, visible, (len(self.student.blocks),))[-1]
        return self.pixel_loss(last, clips, visible, hidden)

    def pixel_loss(self, last: Tensor, clips: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of the tubelets decoded from the student's last stream."""
        prediction = self.decoder(self.student.norm(last), visible, hidden)
        target = tubelets(clips, hidden, self.patch).flatten(3) * self.std + self.mean
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var.sqrt() + 1e-6)
        return F.mse_loss(prediction, target.transpose(2, 3).flatten(2))


class AMD(VideoMAE):
    """AMD. A layer is projected once for both alignments."""

    def __init__(self, literal: amd.AMD) -> None:
        super().__init__(literal)
        self.alignment, self.pairs, self.teacher = literal.alignment, literal.pairs, ClipEncoder(literal.teacher)
        self.alignment.generators = nn.ModuleList(MaskedBlocks(g) for g in literal.alignment.generators)

    def forward(  # type: ignore[override]
        self, clips: Tensor, visible: Tensor, hidden: Tensor, between: Tensor
    ) -> Tensor:
        """Clips [B, C, T, H, W] fp32, normalised; what the student sees, does not see, only the teacher sees."""
        layers, seen = [s for s, _ in self.pairs], visible.shape[1]
        *states, last = self.student(clips, visible, sorted({*layers, len(self.student.blocks)}))
        states = [*states, last] if len(self.student.blocks) in layers else states
        with torch.no_grad():
            both = torch.cat([visible, between], dim=1)
            targets = self.teacher(clips, both, [t for _, t in self.pairs])
        loss = self.pixel_loss(last, clips, visible, hidden)
        for state, target, projection, generator in zip(
            states, targets, self.alignment.projections, self.alignment.generators
        ):
            x = projection(state)
            direct = F.mse_loss(x, target[:, :seen])
            generated = F.mse_loss(generator(x, visible, between), target[:, seen:])
            loss = loss + (direct + generated) / len(targets)
        return loss


KINDS: dict[type[nn.Module], Any] = {dbot.DBOT: DBOT, mae.MAE: MAE, videomae.VideoMAE: VideoMAE, amd.AMD: AMD}
