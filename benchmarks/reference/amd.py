"""AMD's training loss on clips, literally (Zhao et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.benchmarks.reference.video import Decoder, Encoder, chosen
from cohobate.benchmarks.reference.videomae import VideoMAE
from cohobate.benchmarks.reference.vit import Block

Pairs = Sequence[tuple[int, int]]


class Generator(nn.Module):
    """Blocks of the teacher's width over projected tokens and mask tokens; all rows through all blocks."""

    def __init__(self, positions: Tensor, depth: int, heads: int) -> None:
        super().__init__()
        self.positions, width = positions, positions.shape[-1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor, teacher_mask: Tensor) -> Tensor:
        """[B, a, D_T] -> [B, b - a, D_T]: what only the teacher sees."""
        positions = self.positions.expand(len(x), -1, -1).type_as(x)
        between = mask & ~teacher_mask
        hidden = self.mask_token.type_as(x) + chosen(positions, between)
        x = torch.cat([x + chosen(positions, ~mask), hidden], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, -hidden.shape[1] :]


class Alignment(nn.Module):
    """A projection and a generator an aligned layer."""

    def __init__(self, width: int, teacher_width: int, generators: Sequence[Generator]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, teacher_width, bias=False) for _ in generators)
        self.generators = nn.ModuleList(generators)


class AMD(VideoMAE):
    """VideoMAE, and a student that follows a frozen teacher: an ordinary fp32 module that embeds every tubelet.

    ``pairs``: (student block, teacher block), for both alignments; l2, mean over the layers, all weights 1. ``terms``:
    the last loss' three parts, which the published loop writes into its log.
    """

    def __init__(
        self,
        student: Encoder,
        decoder: Decoder,
        teacher: Encoder,
        alignment: Alignment,
        pairs: Pairs,
        patch: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__(student, decoder, patch, mean, std)
        self.alignment, self.pairs = alignment, tuple(pairs)
        self.teacher = teacher.requires_grad_(False)
        self.terms: tuple[Tensor, ...] = ()

    def forward(self, video: Tensor, mask: Tensor, teacher_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Clips [B, C, T, H, W] fp32, normalised; what each model does not see, bool [B, N] -> 0-d loss."""
        tokens, states = self.student.visible(video, mask, [s for s, _ in self.pairs])
        direct = [project(state) for project, state in zip(self.alignment.projections, states)]
        generated = [
            generate(project(state), mask, teacher_mask)
            for generate, project, state in zip(self.alignment.generators, self.alignment.projections, states)
        ]
        with torch.no_grad():
            x, between = self.teacher.embed(video), mask & ~teacher_mask
            x = torch.cat([chosen(x, ~mask), chosen(x, between)], dim=1)
            targets = self.teacher.states(x, [t for _, t in self.pairs])
        count = between[0].sum()  # a tensor on the device: every slice that ends at it waits
        aligned = torch.stack([F.mse_loss(guess, t[:, :-count]) for guess, t in zip(direct, targets)]).mean()
        imagined = torch.stack([F.mse_loss(guess, t[:, -count:]) for guess, t in zip(generated, targets)]).mean()
        pixels = self.pixel_loss(tokens, video, mask)
        self.terms = (pixels.detach(), aligned.detach(), imagined.detach())
        return pixels + aligned + imagined
