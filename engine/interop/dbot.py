"""Checkpoints of dBOT (Liu et al., ICLR 2024): students with a head for features, and teachers of any depth.

A teacher's file is an encoder alone; of depth 0 it has six tensors. It reads like an MAE encoder, and is one.
"""

from __future__ import annotations

from cohobate.interop import mae
from cohobate.interop.formats import Format
from cohobate.interop.parts import Hints, Parts, Sizes
from cohobate.interop.reading import File
from cohobate.interop.table import Table

HEAD = "decoder_predp"
NO_HEAD = "the file has no head for features: drawn anew from a fixed seed"


def matches(file: File) -> bool:
    """A head called ``decoder_predp``."""
    return f"{HEAD}.weight" in file.weights and "pos_embed" in file.weights


def sizes(file: File, hints: Hints) -> Sizes:
    """As MAE's, with the head's own name."""
    return mae.sizes(file, hints, HEAD, "features")


def table(sizes: Sizes) -> Table:
    """As MAE's, with the head's own name."""
    lines = mae.table(sizes, HEAD)
    return [line._replace(reason=NO_HEAD) if line.reason == mae.NO_HEAD else line for line in lines]


def fit(parts: Parts) -> Sizes:
    """As it is; a head for pixels stays behind."""
    return mae.fit(parts, "dbot", "features")


FORMAT = Format("dbot", matches, sizes, table, fit, mae.SURPLUS, mae.LOST)
