"""dBOT's training loss, literally (Liu et al., ICLR 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.benchmarks.reference.vit import Decoder, Encoder


class DBOT(nn.Module):
    """Student encoder and decoder against a teacher encoder that is frozen but otherwise an ordinary fp32 module.

    Args:
        student, decoder, teacher: see :mod:`cohobate.benchmarks.reference.vit`.
        ratio: share of patches hidden.
        target_norm: apply the teacher's final norm to the target.
        standardise: standardise the target per token (unbiased variance, eps 1e-6 inside the root).
        beta: of the smooth-L1 loss.
    """

    def __init__(
        self,
        student: Encoder,
        decoder: Decoder,
        teacher: Encoder,
        ratio: float = 0.75,
        target_norm: bool = False,
        standardise: bool = True,
        beta: float = 2.0,
    ) -> None:
        super().__init__()
        self.student, self.decoder, self.teacher = student, decoder, teacher.requires_grad_(False)
        self.ratio, self.target_norm, self.standardise, self.beta = ratio, target_norm, standardise, beta

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] fp32, normalised -> 0-d loss over the hidden patches and the cls token."""
        target = self.teacher.whole(images, self.target_norm).detach()
        if self.standardise:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        x, mask, ids_restore = self.student.masked(images, self.ratio, noise)
        prediction = self.decoder(x, ids_restore)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        loss = F.smooth_l1_loss(prediction, target, beta=self.beta, reduction="none").mean(dim=-1)
        return (loss * mask).sum() / mask.sum()
