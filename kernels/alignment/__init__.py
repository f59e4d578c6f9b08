"""Multi-layer feature-alignment loss and pixel-target loss, both with their gradient computed in the forward pass."""

from cohobate.kernels.alignment.align import AlignLoss, Standardise, align_loss
from cohobate.kernels.alignment.pixel import pixel_loss

__all__ = ["AlignLoss", "Standardise", "align_loss", "pixel_loss"]
