"""The update of the parameters: global gradient norm, and AdamW with clipping and bf16 copies in one pass."""

from cohobate.kernels.optimizer.adamw import adamw, gradient_norm

__all__ = ["adamw", "gradient_norm"]
