"""Vision transformers: the encoder, the decoder, their sizes."""

from cohobate.models.decoder import Decoder
from cohobate.models.layers import Precision
from cohobate.models.sizes import SIZES, build
from cohobate.models.vit import Features, VisionTransformer

__all__ = ["SIZES", "Decoder", "Features", "Precision", "VisionTransformer", "build"]
