"""A run small enough to train in a second: 64 generated images of 16 pixels, two stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cohobate import data
from cohobate.config import Config, load

TINY = [
    "data.generate=null",
    "data.image_size=16",
    "data.batch_size=16",
    "data.workers=0",
    "model.width=24",
    "model.depth=2",
    "model.heads=2",
    "decoder.width=16",
    "stages.0.steps=6",
    "stages.1.steps=6",
    "optimizer.warmup_epochs=0.5",
    "evaluate.enabled=false",
    "evaluate.samples=2",
    "log.every=2",
    "log.tensorboard=false",
    "device=cpu",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small lose by threads, and on a busy machine they lose a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 32 test images."""
    return data.make_images(tmp_path_factory.mktemp("images") / "set", train=64, test=32, processes=1)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 8 test videos of 32 frames."""
    return data.make_videos(tmp_path_factory.mktemp("clips") / "set", train=16, test=8, processes=1)


class Tiny:
    """Makes configurations of the tiny run."""

    def __init__(self, images: Path, folder: Path) -> None:
        self.images, self.folder = images, folder

    def words(self, run: str, *overrides: str) -> list[str]:
        """``key=value`` words for the command line, the recipe not among them."""
        return [*TINY, f"data.root={self.images}", f"run={self.folder / run}", *overrides]

    def config(self, run: str, *overrides: str) -> Config:
        return load("demo", self.words(run, *overrides))


@pytest.fixture
def tiny(images: Path, tmp_path: Path) -> Tiny:
    return Tiny(images, tmp_path)
