"""MAE's training loss, literally (He et al., CVPR 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from cohobate.benchmarks.reference.vit import Decoder, Encoder


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, patch * patch * C], values ordered (row, column, channel)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, channels, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch**2 * channels)


class MAE(nn.Module):
    """Encoder and decoder; ``norm_pix`` standardises the target patch by patch."""

    def __init__(
        self, student: Encoder, decoder: Decoder, patch: int, ratio: float = 0.75, norm_pix: bool = True
    ) -> None:
        super().__init__()
        self.student, self.decoder, self.patch, self.ratio, self.norm_pix = student, decoder, patch, ratio, norm_pix

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] fp32, normalised -> 0-d loss over the hidden patches."""
        x, mask, ids_restore = self.student.masked(images, self.ratio, noise)
        prediction = self.decoder(x, ids_restore)[:, 1:]
        target = patchify(images, self.patch)
        if self.norm_pix:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((prediction - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()
