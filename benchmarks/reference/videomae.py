"""VideoMAE's training loss, literally (Tong et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.benchmarks.reference.video import Decoder, Encoder, chosen


class VideoMAE(nn.Module):
    """Encoder and decoder; every tubelet, in [0, 1], is standardised colour by colour, and the hidden ones are kept."""

    def __init__(
        self,
        student: Encoder,
        decoder: Decoder,
        patch: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.student, self.decoder, self.patch, self.mean, self.std = student, decoder, patch, mean, std

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        """Clips [B, C, T, H, W] fp32, normalised, bool [B, N] -> 0-d loss over the hidden tubelets."""
        tokens, _ = self.student.visible(video, mask, ())
        return self.pixel_loss(tokens, video, mask)

    def pixel_loss(self, tokens: Tensor, video: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the decoder's tubelets."""
        prediction = self.decoder(tokens, mask)
        with torch.no_grad():
            shape = (1, -1, 1, 1, 1)
            mean = torch.tensor(self.mean, device=video.device).view(shape)
            std = torch.tensor(self.std, device=video.device).view(shape)
            cubes = tubelets(video * std + mean, self.patch)
            cubes = (cubes - cubes.mean(dim=-2, keepdim=True)) / (cubes.var(dim=-2, keepdim=True).sqrt() + 1e-6)
            target = chosen(cubes.flatten(2), mask)
        return F.mse_loss(prediction, target)


def tubelets(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, N, pt * ph * pw, C]."""
    batch, channels, frames, height, width = video.shape
    pt, ph, pw = patch
    x = video.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, -1, pt * ph * pw, channels)
