"""Checkpoints of dBOT, MAE, VideoMAE, AMD, timm and Hugging Face, in and out, with an account of every tensor."""

from cohobate.interop.converting import Converted, convert
from cohobate.interop.coverage import Coverage
from cohobate.interop.formats import choose, formats
from cohobate.interop.methods import gradients, load_amd, load_dbot, load_mae, load_videomae
from cohobate.interop.parts import Hints, Parts
from cohobate.interop.reading import File, read

__all__ = [
    "Converted", "Coverage", "File", "Hints", "Parts", "choose", "convert", "formats", "gradients", "load_amd",
    "load_dbot", "load_mae", "load_videomae", "read",
]  # fmt: skip
