"""Masked-token gathering: image to patch rows, row gather and scatter, decoder input, random orders."""

from cohobate.kernels.tokens.assemble import assemble
from cohobate.kernels.tokens.embed import embed_patches
from cohobate.kernels.tokens.gather import gather_patches
from cohobate.kernels.tokens.order import random_order
from cohobate.kernels.tokens.rows import put, take

__all__ = ["assemble", "embed_patches", "gather_patches", "put", "random_order", "take"]
