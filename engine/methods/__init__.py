"""Methods: the same parts, put together per paper."""

from cohobate.methods.amd import AMD, Alignment, AMDOptions
from cohobate.methods.dbot import DBOT, DBOTOptions
from cohobate.methods.mae import MAE, MAEOptions
from cohobate.methods.objective import AlignTerm, HasPixels, PixelTerm, StepLoss, objective
from cohobate.methods.symmetric import SymmetricDBOT

__all__ = [
    "AMD", "DBOT", "MAE", "AMDOptions", "AlignTerm", "Alignment", "DBOTOptions", "HasPixels", "MAEOptions", "PixelTerm",
    "StepLoss", "SymmetricDBOT", "objective",
]  # fmt: skip
