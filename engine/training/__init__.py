"""Stages, the step, the loop, resume points and exports. :func:`train` carries out a whole run."""

from cohobate.training.exports import export, find_export, load_encoder
from cohobate.training.loop import train

__all__ = ["export", "find_export", "load_encoder", "train"]
