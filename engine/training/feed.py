"""The run's images or clips: manifests, the training loader at its place, and the sources that evaluation reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cohobate import data
from cohobate.config import Config
from cohobate.config.schema import DataConfig
from cohobate.errors import UserError
from cohobate.evaluation import ClipSource, ImageSource, check_same_classes, has_split, held_out_split
from cohobate.training.distributed import Ranks, barrier


class Feed:
    """Endless micro-batches of one rank, from any place on.

    Args:
        config: the run's. ranks: who takes part.

    Raises:
        UserError: no such data, or too few images or videos for one update.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.root = find_data(config, ranks)
        self.train = self._manifest("train")
        test = held_out_split(self.root)
        self.test = None if test is None else self._manifest(test)
        if self.test is not None and config.evaluate.enabled:
            check_same_classes(self.train, self.test)
        repeats = config.data.repeats
        count, update = len(self.train.paths), config.data.batch_size * config.optimizer.accumulate * ranks.world
        if count * repeats < update:
            one = f"{config.data.batch_size} x {config.optimizer.accumulate} accumulated x {ranks.world} ranks"
            most = f"{count} {self.train.UNIT}s" if repeats == 1 else f"{count} {self.train.UNIT}s x {repeats} repeats"
            raise UserError(f"data.batch_size: expected an update of at most {most}, as many as there are, got {one}")
        self.loader: Any = None
        self.taken = 0

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one rank in an epoch; the tail that fills none is dropped."""
        return self._plan().steps_per_epoch(self.config.data.batch_size * self.ranks.world)

    def _plan(self) -> data.SamplePlan:
        return training_plan(self.config.data, len(self.train.paths), self.config.seed)

    def _manifest(self, split: str) -> data.Manifest:
        """The manifest of a split, or of everything where the data set has no parts; kept in the run folder."""
        cache = Path(self.config.run) / f"manifest-{split}.npz"
        named = split if has_split(self.root, split) else None
        if not self.ranks.first:
            barrier(self.ranks)  # the first rank reads the headers, the others its result
        build = data.build_video_manifest if self.config.data.frames > 1 else data.build_manifest
        manifest = build(self.root, split=named, cache=cache)
        if self.ranks.first:
            barrier(self.ranks)
        return manifest

    def open(self, taken: int) -> None:
        """Start the loader after ``taken`` micro-batches of this rank."""
        settings = self.config.data
        self.loader = self._loader(taken, self.ranks.rank, loader=settings.loader, workers=settings.workers)
        self.taken = taken
        self._batches = iter(self.loader)

    def glance(self, taken: int) -> tuple[data.Batch, int]:
        """The first rank's micro-batch after ``taken`` others, and its epoch: the same on every rank, taken from none.

        Pixels are on the device.
        """
        loader = self._loader(taken, 0, loader="torch", workers=0)
        try:
            return next(iter(loader)), taken // self.batches_per_epoch
        finally:
            loader.close()

    def _loader(self, taken: int, rank: int, **how: Any) -> Any:
        settings = self.config.data
        return data.open_loader(
            self.train,
            self._plan(),
            batch_size=settings.batch_size,
            device=str(self.ranks.device),
            rank=rank,
            world_size=self.ranks.world,
            start=taken,
            channels=settings.channels,
            max_bad=settings.max_bad,
            **how,
        )

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
        """What evaluation reads: the training files, their centres, and the test files if there are any."""
        settings, limits = self.config.data, self.config.evaluate

        def source(manifest: data.Manifest, limit: int | None) -> ImageSource:
            given: dict[str, Any] = {
                "interpolation": settings.interpolation,
                "channels": settings.channels,
                "batch_size": limits.batch_size,
                "loader": settings.loader,
                "workers": settings.workers,
                "limit": limit,
            }
            if settings.frames == 1:
                return ImageSource(manifest, settings.image_size, **given)
            clips: dict[str, Any] = {key: getattr(settings, key) for key in ("frames", "stride", "sampling")}
            return ClipSource(manifest, settings.image_size, **given, **clips)

        test = None if self.test is None else source(self.test, limits.test_limit)
        return source(self.train, limits.train_limit), test

    def samples(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` test samples (of training without a test part), [n,T,H,W,C] uint8, and ids to draw masks for."""
        train, test = self.sources()
        source = train if test is None else test
        pixels, places = next(iter(source.batches(self.ranks.device)))
        return pixels[:count], places[:count].to(self.ranks.device)


def training_plan(settings: DataConfig, count: int, seed: int) -> data.SamplePlan:
    """What a training step reads of ``count`` images or videos."""
    crops: dict[str, Any] = {
        "image_size": settings.image_size,
        "scale": settings.scale,
        "ratio": settings.ratio,
        "flip": settings.flip,
        "interpolation": settings.interpolation,
    }
    if settings.frames == 1:
        return data.SamplePlan(count, seed, **crops)
    return data.ClipPlan(
        count,
        seed,
        **crops,
        frames=settings.frames,
        stride=settings.stride,
        sampling=settings.sampling,
        crop=settings.crop,
        repeats=settings.repeats,
    )


def find_data(config: Config, ranks: Ranks) -> str:
    """``data.root``; where it is missing and ``data.generate`` says so, the generated set is made there first.

    Raises:
        UserError: no root given, or nothing there.
    """
    root, variant = config.data.root, config.data.generate
    if not root:
        files = "images" if config.data.frames == 1 else "videos"
        raise UserError(f"data.root: expected a folder of {files} or a text file that lists them, got nothing")
    if not Path(root).exists():
        if variant is None:
            raise UserError(f"data.root: expected an existing folder or file list, got {root!r}")
        if ranks.first:
            if variant == "video":
                data.make_videos(root)
            else:
                data.make_images(root, variant=variant)
        barrier(ranks)
    return root
