"""Data: manifests, sample plans, loaders, and a generated set of labelled JPEG files."""

from cohobate.data.generated import make_images

__all__ = ["make_images"]
