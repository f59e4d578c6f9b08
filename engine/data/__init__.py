"""Data: manifests, sample plans, loaders of images and videos, and generated sets of labelled files."""

from cohobate.data.batch import Batch
from cohobate.data.generated import make_images
from cohobate.data.headers import REASONS
from cohobate.data.loader import LOADERS, Loader, load_all, open_loader, resume_step, why_not_loaders
from cohobate.data.manifest import Manifest, build_manifest, describe
from cohobate.data.plan import SamplePlan
from cohobate.data.video.generated import make_videos
from cohobate.data.video.manifest import VideoManifest, build_video_manifest
from cohobate.data.video.plan import ClipPlan
from cohobate.data.video.sharding import make_shards

__all__ = [
    "LOADERS",
    "REASONS",
    "Batch",
    "ClipPlan",
    "Loader",
    "Manifest",
    "SamplePlan",
    "VideoManifest",
    "build_manifest",
    "build_video_manifest",
    "describe",
    "load_all",
    "make_images",
    "make_shards",
    "make_videos",
    "open_loader",
    "resume_step",
    "why_not_loaders",
]
