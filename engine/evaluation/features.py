"""Frozen features of labelled images, computed once an evaluation and shared by every metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cohobate import data
from cohobate.errors import UserError
from cohobate.evaluation.extractor import Extractor
from cohobate.models import VisionTransformer

_CACHE_BYTES = 1 << 30  # decoded images are kept for the next evaluation up to this size


def check_same_classes(train: data.Manifest, test: data.Manifest) -> None:
    """Raise UserError unless class folders, where the labels come from them, have the same names in both parts."""
    if train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(f"data: expected the same class folders in both parts, but only one has {', '.join(odd[:3])}")


def check_labels(manifest: data.Manifest, part: str) -> None:
    """Raise UserError unless every image has labels and, in the training part, each kind at least two classes."""
    if manifest.labels is None:
        raise UserError(
            f"labels: expected labelled images in the {part} part (two or more class folders, or a list with labels), "
            f"got none with a label in {manifest.paths.root!r}"
        )
    for kind, name in enumerate(manifest.label_names):
        found = manifest.labels[:, kind]
        if int(found.min()) < 0:
            raise UserError(f"labels: expected classes from 0 of {name!r} in the {part} part, got {int(found.min())}")
        if part == "train" and found.min() == found.max():
            raise UserError(
                f"labels: expected two or more classes of {name!r} in the {part} part, got only class {found[0]} "
                f"for {len(found)} images"
            )


@dataclass
class ImageSource:
    """Images of one split, resized and centre-cropped; decoded once if they fit into memory.

    Args:
        manifest: which files. image_size: (height, width). limit: most images, spread evenly over the manifest.
        centre: share of the central crop's sides, 224/256 by default.
    """

    manifest: data.Manifest
    image_size: tuple[int, int]
    interpolation: str = "bicubic"
    channels: int = 3
    batch_size: int = 256
    loader: str = "auto"
    workers: int = 2
    limit: int | None = None
    centre: float = 0.875
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
            count=count,
            seed=0,
            image_size=self.image_size,
            interpolation=self.interpolation,
            flip=0.0,
            train=False,
            centre=self.centre,
        )
        loader = self._open(plan, min(self.batch_size, count), device)
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

    def crops(self, device: torch.device, *, batch_size: int, seed: int, epoch: int = 0) -> data.Loader:
        """Randomly cropped and flipped batches without end, in random order, from the first batch of ``epoch`` on.

        Crops cover 8 to 100 % of an image, as in supervised training. The caller closes the loader.

        Raises:
            UserError: fewer images than a batch has.
        """
        plan = data.SamplePlan(
            count=len(self.manifest.paths),
            seed=seed,
            image_size=self.image_size,
            scale=(0.08, 1.0),
            interpolation=self.interpolation,
        )
        return self._open(plan, batch_size, device, start=epoch * (plan.count // batch_size))

    def _open(self, plan: data.SamplePlan, batch_size: int, device: torch.device, start: int = 0) -> data.Loader:
        return data.open_loader(
            self.manifest,
            plan,
            batch_size=batch_size,
            loader=self.loader,
            device=str(device),
            workers=self.workers,
            channels=self.channels,
            start=start,
        )

    def split(self, share: float, seed: int) -> tuple[ImageSource, ImageSource]:
        """(rest, ``share``) of the images, drawn from ``seed``; each in the manifest's order.

        Raises:
            UserError: too few images to take some away.
        """
        count = len(self.manifest.paths)
        if count < 4:
            raise UserError(f"data: expected at least 4 training images, some of them to choose by, got {count}")
        taken = max(1, round(share * count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        rest, held = np.sort(order[taken:]), np.sort(order[:taken])
        return tuple(replace(self, manifest=self.manifest.subset(p), limit=None, _cache=[]) for p in (rest, held))  # type: ignore[return-value]


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
def extract(encoder: VisionTransformer | Extractor, source: ImageSource, device: torch.device) -> FeatureSet:
    """Features of every readable image of ``source``; the images are read once.

    Args:
        encoder: on ``device``; an encoder is copied into the frozen runtime and left in the mode it came in.

    Raises:
        UserError: weights or features that are not finite.
    """
    extractor = encoder if isinstance(encoder, Extractor) else Extractor(encoder)
    parts: dict[str, list[Tensor]] = {}
    places: list[Tensor] = []
    for pixels, where in source.batches(device):
        for name, value in extractor(pixels)._asdict().items():
            if value is not None:
                parts.setdefault(name, []).append(value)
        places.append(where)
    features = {name: torch.cat(values) for name, values in parts.items()}
    if not all(bool(values.isfinite().all()) for values in features.values()):
        raise UserError(f"weights: expected finite features, got NaN or inf out of {extractor.name}")
    known = source.manifest.labels
    labels = None if known is None else torch.as_tensor(known)[torch.cat(places)].to(device)
    return FeatureSet(features, labels)
