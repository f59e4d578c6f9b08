"""Methods: the same parts, put together per paper."""

from cohobate.methods.dbot import DBOT, DBOTOptions
from cohobate.methods.mae import MAE, MAEOptions
from cohobate.methods.objective import AlignTerm, HasPixels, PixelTerm, StepLoss, objective

__all__ = ["DBOT", "MAE", "AlignTerm", "DBOTOptions", "HasPixels", "MAEOptions", "PixelTerm", "StepLoss", "objective"]
