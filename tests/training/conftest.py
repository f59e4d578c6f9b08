"""A run small enough to train in a second: 64 generated images of 16 pixels, two stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cohobate import data
from cohobate.config import Config, load
from cohobate.training.distributed import Ranks
from cohobate.training.feed import Feed
from cohobate.training.metrics import Clock, Meter
from cohobate.training.stages import Stage, StageManager
from cohobate.training.step import Step

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

OTHER = "random:vit_tiny?image_size=16&patch=4&width=48&depth=1&heads=4"
METHODS = {
    "mae": [],
    "dbot": ["stages.0.method=dbot", "stages.0.teacher={source: random}"],
    "block masks": ["mask.kind=block", "mask.count=6"],
    "momentum": ["stages.0.method=dbot", "stages.0.teacher={source: random, momentum: 0.9}"],
    "amd": [
        f"stages=[{{name: only, method: amd, steps: 6, teacher: {{source: model, spec: '{OTHER}'}}}}]",
        "amd={direct: [[2, 1]], generation: [[1, 1], [2, 1]]}",
        "mask.teacher_ratio=0.5",
    ],
    "symmetric": [
        f"stages=[{{name: only, method: dbot, steps: 6, teacher: {{source: model, spec: '{OTHER}'}}}}]",
        "dbot={student: symmetric, loss: cosine, standardise: false, final_norm: true, cls: false}",
        "model.positions=none",
        "model.relative_positions=true",
        "model.layer_scale=0.1",
    ],
}


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

    def prepared(self, config: Config) -> tuple[Stage, Step, Meter]:
        """The first stage of a run and its step, fed with two batches in turn, over and over."""
        ranks = Ranks(0, 1, torch.device("cpu"))
        stage, meter, feed = StageManager(config, ranks, Path(config.run), 4).enter(0), Meter(), Feed(config, ranks)
        feed.open(0)
        batches = [feed.next()[0] for _ in range(2)]
        feed.close()
        turn = itertools.cycle(batches)
        return stage, Step(stage, ranks, Clock(ranks.device), meter, lambda: (next(turn), 0)), meter


@pytest.fixture
def tiny(images: Path, tmp_path: Path) -> Tiny:
    return Tiny(images, tmp_path)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> list[str]:
    """Settings of a method whose step is to be looked at."""
    return METHODS[request.param]
