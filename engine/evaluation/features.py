"""Frozen features of labelled images or videos, computed once an evaluation and shared by every metric."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cohobate import data
from cohobate.errors import UserError
from cohobate.evaluation.extractor import Extractor
from cohobate.models import VisionTransformer

_CACHE_BYTES = 1 << 30  # decoded pixels are kept for the next evaluation up to this size


def check_same_classes(train: data.Manifest, test: data.Manifest) -> None:
    """Raise UserError unless class folders, where the labels come from them, have the same names in both parts."""
    if train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(f"data: expected the same class folders in both parts, but only one has {', '.join(odd[:3])}")


def check_labels(manifest: data.Manifest, part: str) -> None:
    """Raise UserError unless every file has labels and, in the training part, each kind at least two classes."""
    if manifest.labels is None:
        raise UserError(
            f"labels: expected labelled {manifest.UNIT}s in the {part} part (two or more class folders, or a list with "
            f"labels), got none with a label in {manifest.paths.root!r}"
        )
    for kind, name in enumerate(manifest.label_names):
        found = manifest.labels[:, kind]
        if int(found.min()) < 0:
            raise UserError(f"labels: expected classes from 0 of {name!r} in the {part} part, got {int(found.min())}")
        if part == "train" and found.min() == found.max():
            raise UserError(
                f"labels: expected two or more classes of {name!r} in the {part} part, got only class {found[0]} "
                f"for {len(found)} {manifest.UNIT}s"
            )


@dataclass
class ImageSource:
    """Images of one split, resized and centre-cropped; decoded once if they fit into memory.

    Args:
        manifest: which files. image_size: (height, width). limit: most files, spread evenly over the manifest.
        batch_size: samples a pass. centre: share of the central crop's sides, 224/256 by default.
    """

    FLIP: ClassVar[float] = 0.5  # of random crops

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
            raise UserError(f"data: expected at least one {self.manifest.UNIT} to evaluate on, got none")
        if self.limit is not None and self.limit < count:
            self.manifest = self.manifest.subset([index * count // self.limit for index in range(self.limit)])

    @property
    def names(self) -> list[str]:
        """Names of the label kinds; empty without labels."""
        return list(self.manifest.label_names) if self.manifest.labels is not None else []

    def plan(self) -> data.SamplePlan:
        """What is read to be evaluated: every file once, in order."""
        return data.SamplePlan(
            len(self.manifest), 0, self.image_size, interpolation=self.interpolation, train=False, centre=self.centre
        )

    def random_plan(self, seed: int, flip: float, repeats: int) -> data.SamplePlan:
        """What supervised training reads: crops of 8 to 100 % of an image, in random order."""
        if repeats != 1:
            raise UserError(f"repeats: expected 1 with images, got {repeats}: repeated samples are of videos")
        return data.SamplePlan(
            len(self.manifest), seed, self.image_size, scale=(0.08, 1.0), flip=flip, interpolation=self.interpolation
        )

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 [n V, T, H, W, C] on ``device``, a file's V views behind each other, and the files' places in
        the manifest, int64 [n] on the CPU. An image has one view. There are more than ``batch_size`` samples where a
        single file has: :func:`mean_features` and its like take them in parts.
        """
        if self._cache:
            yield from ((pixels.to(device), places) for pixels, places in self._cache)
            return
        plan = self.plan()
        bytes_each = math.prod(plan.size) * self.channels * (plan.frames if isinstance(plan, data.ClipPlan) else 1)
        keep = plan.count * plan.views * bytes_each <= _CACHE_BYTES
        files = min(max(1, self.batch_size // plan.views), plan.count)
        kept: list[tuple[Tensor, Tensor]] = []
        with self._open(plan, files * plan.views, device) as loader:
            for _, batch in zip(range(loader.steps_per_epoch), loader):
                valid = batch.valid  # of all views of a file, or of none
                pixels, places = batch.pixels[valid], batch.places[valid][:: plan.views].cpu()
                if keep:
                    kept.append((pixels.cpu(), places))
                yield pixels, places
        self._cache = kept

    def crops(
        self,
        device: torch.device,
        *,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        flip: float | None = None,
        repeats: int = 1,
    ) -> data.Loader:
        """Batches of random crops without end, in random order, from the first batch of ``epoch`` on.

        ``batch_size`` counts crops; a video has ``repeats`` of them, neighbours in a batch. Half of the images are
        flipped and none of the clips, unless ``flip`` says otherwise. The caller closes the loader.

        Raises:
            UserError: fewer images than a batch has, or repeats of images.
        """
        plan = self.random_plan(seed, self.FLIP if flip is None else flip, repeats)
        return self._open(plan, batch_size, device, start=epoch * plan.steps_per_epoch(batch_size))

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
        """(rest, ``share``) of the files, drawn from ``seed``; each in the manifest's order.

        Raises:
            UserError: too few files to take some away.
        """
        count = len(self.manifest.paths)
        if count < 4:
            raise UserError(
                f"data: expected at least 4 training {self.manifest.UNIT}s, some of them to choose by, got {count}"
            )
        taken = max(1, round(share * count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        rest, held = np.sort(order[taken:]), np.sort(order[:taken])
        return tuple(replace(self, manifest=self.manifest.subset(p), limit=None, _cache=[]) for p in (rest, held))  # type: ignore[return-value]


@dataclass
class ClipSource(ImageSource):
    """Clips of videos in place of images: the middle of each, or several clips and crops spread evenly over it.

    Args:
        frames, stride, sampling, test_views: as in :class:`cohobate.data.ClipPlan`. A video is decoded once for all of
            its views; where they are more than ``batch_size``, they pass the network in several batches.
        centre: the whole short side by default, as usual with videos.
    """

    FLIP: ClassVar[float] = 0.0  # a class may be a direction

    interpolation: str = "bilinear"
    batch_size: int = 16
    centre: float = 1.0
    frames: int = 16
    stride: int = 4
    sampling: str = "contiguous"
    test_views: tuple[int, int] = (1, 1)

    @property
    def short(self) -> int:
        """How many videos are shorter than a clip; frames of theirs come more than once."""
        assert isinstance(self.manifest, data.VideoManifest)
        reach = (self.frames - 1) * (1 if self.sampling == "segments" else self.stride) + 1
        return int((self.manifest.frames < reach).sum())

    def plan(self) -> data.ClipPlan:
        """As of images."""
        return data.ClipPlan(
            len(self.manifest), 0, self.image_size, interpolation=self.interpolation, train=False, centre=self.centre,
            frames=self.frames, stride=self.stride, sampling=self.sampling, test_views=self.test_views,
        )  # fmt: skip

    def random_plan(self, seed: int, flip: float, repeats: int) -> data.ClipPlan:
        """As of images; a box and a flip hold for all frames of a clip."""
        return data.ClipPlan(
            len(self.manifest), seed, self.image_size, scale=(0.08, 1.0), flip=flip, interpolation=self.interpolation,
            frames=self.frames, stride=self.stride, sampling=self.sampling, crop="random_resized", repeats=repeats,
        )  # fmt: skip


def mean_over_views(values: Tensor, files: int) -> Tensor:
    """[n V, ...] -> [n, ...]: the mean over the V views of each of n ``files``, which are neighbours."""
    return values if len(values) == files else values.unflatten(0, (files, -1)).mean(dim=1)


def mean_features(extractor: Extractor, pixels: Tensor, files: int, most: int) -> dict[str, Tensor]:
    """Features by kind, the mean over the views of each of n ``files``; no pass has more than ``most`` samples."""
    found = [extractor(part)._asdict() for part in pixels.split(most)]
    kinds = [name for name, value in found[0].items() if value is not None]
    return {name: mean_over_views(torch.cat([part[name] for part in found]), files) for name in kinds}


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
    """Features of every readable file of ``source``, which is read once; those of a video's views are averaged.

    Args:
        encoder: on ``device``; an encoder is copied into the frozen runtime and left in the mode it came in.

    Raises:
        UserError: weights or features that are not finite.
    """
    extractor = encoder if isinstance(encoder, Extractor) else Extractor(encoder)
    parts: dict[str, list[Tensor]] = {}
    places: list[Tensor] = []
    for pixels, where in source.batches(device):
        for name, value in mean_features(extractor, pixels, len(where), source.batch_size).items():
            parts.setdefault(name, []).append(value)
        places.append(where)
    features = {name: torch.cat(values) for name, values in parts.items()}
    if not all(bool(values.isfinite().all()) for values in features.values()):
        raise UserError(f"weights: expected finite features, got NaN or inf out of {extractor.name}")
    known = source.manifest.labels
    labels = None if known is None else torch.as_tensor(known)[torch.cat(places)].to(device)
    return FeatureSet(features, labels)
