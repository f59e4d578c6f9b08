"""Data: manifests, sample plans, loaders, and a generated set of labelled JPEG files."""

from cohobate.data.batch import Batch
from cohobate.data.generated import make_images
from cohobate.data.headers import REASONS
from cohobate.data.loader import LOADERS, Loader, load_all, open_loader, resume_step, why_not_loaders
from cohobate.data.manifest import Manifest, build_manifest, describe
from cohobate.data.plan import SamplePlan

__all__ = [
    "LOADERS",
    "REASONS",
    "Batch",
    "Loader",
    "Manifest",
    "SamplePlan",
    "build_manifest",
    "describe",
    "load_all",
    "make_images",
    "open_loader",
    "resume_step",
    "why_not_loaders",
]
