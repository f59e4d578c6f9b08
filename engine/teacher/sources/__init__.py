"""Sources of teachers: any ViT, as the weights that the runtime rebuilds it from, or as it is with the reason why."""

from cohobate.teacher.sources.grids import Match, fit, match_grid, resize_pixels
from cohobate.teacher.sources.loading import load_source
from cohobate.teacher.sources.source import TOLERANCE, Original, Source, TeacherModule, agreement

__all__ = [
    "TOLERANCE", "Match", "Original", "Source", "TeacherModule", "agreement", "fit", "load_source", "match_grid",
    "resize_pixels",
]  # fmt: skip
