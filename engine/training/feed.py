"""The run's images: manifests, the training loader at its place, and the sources that evaluation reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cohobate import data
from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.evaluation import ImageSource, check_same_classes, has_split, held_out_split
from cohobate.training.distributed import Ranks, barrier


class Feed:
    """Endless micro-batches of one rank, from any place on.

    Args:
        config: the run's. ranks: who takes part.

    Raises:
        UserError: no such data, or too few images for one update.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.root = find_data(config, ranks)
        self.train = self._manifest("train")
        test = held_out_split(self.root)
        self.test = None if test is None else self._manifest(test)
        if self.test is not None and config.evaluate.enabled:
            check_same_classes(self.train, self.test)
        count, update = len(self.train.paths), config.data.batch_size * config.optimizer.accumulate * ranks.world
        if count < update:
            one = f"{config.data.batch_size} x {config.optimizer.accumulate} accumulated x {ranks.world} ranks"
            raise UserError(
                f"data.batch_size: expected an update of at most {count} images, as many as there are, got {one}"
            )
        self.loader: Any = None
        self.taken = 0

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one rank in an epoch; the tail that fills none is dropped."""
        return len(self.train.paths) // (self.config.data.batch_size * self.ranks.world)

    def _manifest(self, split: str) -> data.Manifest:
        """The manifest of a split, or of everything where the data set has no parts; kept in the run folder."""
        cache = Path(self.config.run) / f"manifest-{split}.npz"
        named = split if has_split(self.root, split) else None
        if not self.ranks.first:
            barrier(self.ranks)  # the first rank reads the headers, the others its result
        manifest = data.build_manifest(self.root, split=named, cache=cache)
        if self.ranks.first:
            barrier(self.ranks)
        return manifest

    def open(self, taken: int) -> None:
        """Start the loader after ``taken`` micro-batches of this rank."""
        settings = self.config.data
        plan = data.SamplePlan(
            count=len(self.train.paths),
            seed=self.config.seed,
            image_size=settings.image_size,
            scale=settings.scale,
            ratio=settings.ratio,
            flip=settings.flip,
            interpolation=settings.interpolation,
            train=True,
        )
        self.loader = data.open_loader(
            self.train,
            plan,
            batch_size=settings.batch_size,
            loader=settings.loader,
            device=str(self.ranks.device),
            workers=settings.workers,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
            start=taken,
            channels=settings.channels,
            max_bad=settings.max_bad,
        )
        self.taken = taken
        self._batches = iter(self.loader)

    def next(self) -> tuple[data.Batch, int]:
        """The next micro-batch on the device, and the epoch it belongs to."""
        epoch = self.taken // self.batches_per_epoch
        batch = next(self._batches)
        self.taken += 1
        return batch, epoch

    def report(self) -> dict[str, Any]:
        """For ``data_report.json``: the loader that was chosen and why, counters, bad files."""
        return dict(self.loader.report())

    def close(self) -> None:
        """Stop the loader's workers."""
        if self.loader is not None:
            self.loader.close()

    def sources(self) -> tuple[ImageSource, ImageSource | None]:
        """What evaluation reads: the training images uncropped, and the test images if there are any."""
        settings, limits = self.config.data, self.config.evaluate

        def source(manifest: data.Manifest, limit: int | None) -> ImageSource:
            return ImageSource(
                manifest,
                settings.image_size,
                interpolation=settings.interpolation,
                channels=settings.channels,
                batch_size=limits.batch_size,
                loader=settings.loader,
                workers=settings.workers,
                limit=limit,
            )

        test = None if self.test is None else source(self.test, limits.test_limit)
        return source(self.train, limits.train_limit), test

    def samples(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` test images (training images without a test part), [n,T,H,W,C] uint8, and ids to draw masks for."""
        train, test = self.sources()
        source = train if test is None else test
        pixels, places = next(iter(source.batches(self.ranks.device)))
        return pixels[:count], places[:count].to(self.ranks.device)


def find_data(config: Config, ranks: Ranks) -> str:
    """``data.root``; where it is missing and ``data.generate`` says so, the generated set is made there first.

    Raises:
        UserError: no root given, or nothing there.
    """
    root, variant = config.data.root, config.data.generate
    if not root:
        raise UserError("data.root: expected a folder of images or a text file that lists them, got nothing")
    if not Path(root).exists():
        if variant is None:
            raise UserError(f"data.root: expected an existing folder or file list, got {root!r}")
        if ranks.first:
            data.make_images(root, variant=variant)
        barrier(ranks)
    return root
