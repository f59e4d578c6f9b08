"""Stages, the step, the loop, resume points and exports. :func:`train` carries out a whole run."""

from cohobate.models.exports import export, load_encoder, read_config
from cohobate.training.loop import train

__all__ = ["export", "load_encoder", "read_config", "train"]
