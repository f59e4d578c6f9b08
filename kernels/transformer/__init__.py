"""Transformer pieces for teachers and students: add + LayerNorm, bias + GELU, float8, attention, linear, a block."""

from cohobate.kernels.transformer.activation import bias_gelu, bias_gelu_fp8
from cohobate.kernels.transformer.add_norm import add_norm, add_norm_fp8
from cohobate.kernels.transformer.attention import short_attention
from cohobate.kernels.transformer.block import pre_norm_block
from cohobate.kernels.transformer.fp8 import dequantise_fp8, quantise_fp8
from cohobate.kernels.transformer.linear import linear

__all__ = [
    "add_norm",
    "add_norm_fp8",
    "bias_gelu",
    "bias_gelu_fp8",
    "dequantise_fp8",
    "linear",
    "pre_norm_block",
    "quantise_fp8",
    "short_attention",
]
