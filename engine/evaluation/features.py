"""Frozen features of labelled images, computed once an evaluation and shared by every metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cohobate import data
from cohobate.errors import UserError
from cohobate.models import VisionTransformer

_CACHE_BYTES = 1 << 30  # decoded images are kept for the next evaluation up to this size


def check_same_classes(train: data.Manifest, test: data.Manifest) -> None:
    """Raise UserError unless class folders, where the labels come from them, have the same names in both parts."""
    if train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(f"data: expected the same class folders in both parts, but only one has {', '.join(odd[:3])}")


@dataclass
class ImageSource:
    """Images of one split, resized and centre-cropped; decoded once if they fit into memory.

    Args:
        manifest: which files. image_size: (height, width). limit: most images, spread evenly over the manifest.
    """

    manifest: data.Manifest
    image_size: tuple[int, int]
    interpolation: str = "bicubic"
    channels: int = 3
    batch_size: int = 256
    loader: str = "auto"
    workers: int = 2
    limit: int | None = None
    _cache: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        count = len(self.manifest.paths)
        if count == 0:
            raise UserError("data: expected at least one image to evaluate on, got none")
        if self.limit is not None and self.limit < count:
            self.manifest = self.manifest.subset([index * count // self.limit for index in range(self.limit)])

    @property
    def names(self) -> list[str]:
        """Names of the label kinds; empty without labels."""
        return list(self.manifest.label_names) if self.manifest.labels is not None else []

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 [B,T,H,W,C] on ``device`` and the images' places in the manifest, int64 [B] on the CPU."""
        if self._cache:
            yield from ((pixels.to(device), places) for pixels, places in self._cache)
            return
        count = len(self.manifest.paths)
        height, width = self.image_size
        keep = count * height * width * self.channels <= _CACHE_BYTES
        plan = data.SamplePlan(
            count=count, seed=0, image_size=self.image_size, interpolation=self.interpolation, flip=0.0, train=False
        )
        loader = data.open_loader(
            self.manifest,
            plan,
            batch_size=min(self.batch_size, count),
            loader=self.loader,
            device=str(device),
            workers=self.workers,
            channels=self.channels,
        )
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for _, batch in zip(range(loader.steps_per_epoch), loader):
                valid = batch.valid
                pixels, places = batch.pixels[valid], batch.sample_ids[valid].cpu()
                if keep:
                    kept.append((pixels.cpu(), places))
                yield pixels, places
        finally:
            loader.close()
        self._cache = kept


def held_out_split(root: str) -> str | None:
    """Name of the part of a data set that accuracy is counted on: test, val, valid or validation; None without one."""
    return next((name for name in ("test", "val", "valid", "validation") if has_split(root, name)), None)


def has_split(root: str, split: str) -> bool:
    """Whether a data set keeps ``split`` apart, as a folder or as a list."""
    return (Path(root) / split).is_dir() or (Path(root) / f"{split}.txt").is_file()


@dataclass(frozen=True)
class FeatureSet:
    """Features by kind ("cls", "mean"), [N, D] fp32 on the encoder's device, and labels [N, K] int64 or None."""

    features: dict[str, Tensor]
    labels: Tensor | None


@torch.no_grad()
def extract(encoder: VisionTransformer, source: ImageSource, device: torch.device) -> FeatureSet:
    """Run the encoder in eval mode over every readable image of ``source``."""
    training = encoder.training
    encoder.eval()
    parts: dict[str, list[Tensor]] = {}
    places: list[Tensor] = []
    try:
        for pixels, where in source.batches(device):
            found = encoder.features(pixels)
            for name, value in found._asdict().items():
                if value is not None:
                    parts.setdefault(name, []).append(value)
            places.append(where)
    finally:
        encoder.train(training)
    features = {name: torch.cat(values) for name, values in parts.items()}
    known = source.manifest.labels
    labels = None if known is None else torch.as_tensor(known)[torch.cat(places)].to(device)
    return FeatureSet(features, labels)
