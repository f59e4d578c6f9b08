"""Vision transformers: the encoder, the decoders, AMD's generator, their sizes."""

from cohobate.models.decoder import Decoder, PixelDecoder
from cohobate.models.generator import Generator
from cohobate.models.layers import Precision
from cohobate.models.sizes import SIZES, build
from cohobate.models.symmetric import MaskTokenHead
from cohobate.models.vit import Features, VisionTransformer

__all__ = [
    "SIZES", "Decoder", "Features", "Generator", "MaskTokenHead", "PixelDecoder", "Precision", "VisionTransformer",
    "build",
]  # fmt: skip
