"""The switches of a training step on a GPU: the whole update as a CUDA graph, the teacher ahead and in fp8."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate import data
from cohobate.config import Config, load
from cohobate.training import train
from cohobate.training.distributed import Ranks
from cohobate.training.feed import Feed
from cohobate.training.graphs import WARM_UP
from cohobate.training.metrics import Clock, Meter
from cohobate.training.stages import Stage, StageManager
from cohobate.training.step import Step

pytestmark = pytest.mark.gpu

UPDATES = 10
SMALL = [
    "data.generate=null",
    "data.image_size=32",
    "data.batch_size=16",
    "data.workers=0",
    "data.loader=torch",
    "model={width: 64, depth: 2, heads: 2, patch: 4, drop_path: 0.2}",
    "decoder={width: 32, depth: 2, heads: 2}",
    "optimizer.warmup_epochs=1",
    "optimizer.clip=1.0",
    "evaluate.enabled=false",
    "evaluate.samples=2",
    "log.every=2",
    "log.tensorboard=false",
    "device=cuda",
]
OTHER = "random:vit_tiny?image_size=32&patch=4&width=96&depth=4&heads=3"
METHODS = {
    "mae": [f"stages=[{{name: only, method: mae, steps: {UPDATES}}}]"],
    "dbot": [f"stages=[{{name: only, method: dbot, steps: {UPDATES}, teacher: {{source: random}}}}]"],
    "momentum": [
        f"stages=[{{name: only, method: dbot, steps: {UPDATES}, teacher: {{source: random, momentum: 0.9}}}}]"
    ],
    "amd": [
        f"stages=[{{name: only, method: amd, steps: {UPDATES}, teacher: {{source: model, spec: '{OTHER}'}}}}]",
        "amd={direct: [[2, 3]], generation: [[1, 3], [2, 4]]}",
        "mask.teacher_ratio=0.5",
    ],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_images(tmp_path_factory.mktemp("images") / "set", train=64, test=32, processes=1)


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> Any:
    """Makes configurations of a small run."""
    return lambda *words: load("demo", [*SMALL, f"data.root={images}", f"run={tmp_path / 'run'}", *words])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> list[str]:
    return METHODS[request.param]


def prepared(config: Config) -> tuple[Stage, Step, Meter]:
    """The first stage and its step, fed with two batches in turn that lie on the device already."""
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    stage, meter, feed = StageManager(config, ranks, Path(config.run), 4).enter(0), Meter(), Feed(config, ranks)
    feed.open(0)
    turn = itertools.cycle([feed.next()[0] for _ in range(2)])
    feed.close()
    return stage, Step(stage, ranks, Clock(ranks.device), meter, lambda: (next(turn), 0)), meter


def run(config: Config) -> tuple[Step, list[dict[str, float]], list[torch.Tensor]]:
    """Metrics of every update, signals in each third, and the weights behind the last."""
    stage, step, meter = prepared(config)
    rows = []
    for number in range(UPDATES):
        step(number, signals=number % 3 == 2)
        rows.append(meter.read() | {"norm": float(stage.updater.norm)})
    return step, rows, [parameter.detach().clone() for parameter in stage.method.parameters()]


def agree(one: list[dict[str, float]], other: list[dict[str, float]], rel: float) -> None:
    assert len(one) == len(other) == UPDATES
    for row, twin in zip(one, other, strict=True):
        assert row.keys() == twin.keys() and row == pytest.approx(twin, rel=rel)


# fp32 sums in another order, ten updates long (attention's backward pass may add in any); in bf16 a rounding of each.
@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_replays_are_the_eager_updates(settings: Any, method: list[str], precision: str, rel: float) -> None:
    words = [*method, f"precision.compute={precision}", f"precision.teacher={precision}"]
    step, graphed, weights = run(settings(*words, "execution.cuda_graph=on"))
    assert step.graph is not None and len(step.graph._captured) == 2
    other, eager, expected = run(settings(*words, "execution.cuda_graph=off"))
    assert other.graph is None
    agree(graphed, eager, rel)
    for found, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=rel, atol=rel)


@pytest.mark.parametrize("kind", ["operations", "blocks"])
def test_a_checkpointed_step_is_captured(settings: Any, kind: str) -> None:
    words = [*METHODS["dbot"], "precision.compute=fp32", "execution.cuda_graph=on"]
    agree(run(settings(*words, f"execution.checkpointing={kind}"))[1], run(settings(*words))[1], 1e-3)


def test_a_compiled_step_is_captured(settings: Any) -> None:
    words = [*METHODS["mae"], "precision.compute=fp32", "execution.cuda_graph=on"]
    agree(run(settings(*words, "execution.compile=true"))[1], run(settings(*words))[1], 1e-3)


@pytest.fixture
def no_sync() -> Iterator[Any]:
    """Makes every wait for the device an error from the call on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graph", ["on", "off"])
def test_no_update_waits_for_the_device(settings: Any, method: list[str], graph: str, no_sync: Any) -> None:
    _, step, _ = prepared(settings(*method, f"execution.cuda_graph={graph}"))
    for number in range(WARM_UP + 1):
        step(number, signals=True)
    torch.cuda.synchronize()
    no_sync()
    step(WARM_UP + 1)
    step(WARM_UP + 2, signals=True)


def test_a_graph_needs_no_more_memory_than_the_updates_before_it(settings: Any) -> None:
    """The memory of the eager updates is given back before the capture, and both graphs share one pool."""
    _, step, _ = prepared(settings(*METHODS["dbot"], "execution.cuda_graph=on", "data.batch_size=64"))
    for number in range(WARM_UP):
        step(number)
    torch.cuda.synchronize()
    eager = torch.cuda.memory_reserved()
    step(WARM_UP)
    step(WARM_UP + 1, signals=True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= 1.5 * eager + 64 * 2**20


@pytest.mark.parametrize("name", ["dbot", "amd"])
def test_features_computed_ahead_are_those_of_the_step(settings: Any, name: str) -> None:
    words = [*METHODS[name], "precision.compute=fp32", "precision.teacher=fp32"]
    agree(run(settings(*words, "execution.ahead=true"))[1], run(settings(*words, "execution.cuda_graph=off"))[1], 1e-3)


def test_a_run_with_every_switch(settings: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Two stages, the second stage's teacher ahead; the reason why there is no graph is said once."""
    second = f"{{name: second, steps: 5, teacher: {{source: model, spec: '{OTHER}'}}}}"
    words = [f"stages=[{{name: first, method: mae, steps: 5}}, {second}]"]
    words += ["execution.cuda_graph=auto", "execution.ahead=true", "execution.checkpointing=operations"]
    if torch.cuda.get_device_capability() >= (8, 9):
        words.append("precision.teacher=fp8")
    config = settings(*words)
    assert train(config)[1] == 0
    said = capfd.readouterr().err
    assert said.count("execution.cuda_graph: off, for execution.ahead is true") == 1
    if "precision.teacher=fp8" in words:
        assert (Path(config.run) / "teacher-fp8-2.json").is_file() and "teacher in fp8 in" in said


def test_a_run_of_graphs(settings: Any) -> None:
    """Stage after stage, each with graphs of its own; evaluated and exported in between."""
    stages = "[{name: first, method: mae, steps: 8}, {name: second, steps: 8, teacher: {source: previous}}]"
    config = settings(f"stages={stages}", "execution.cuda_graph=on", "evaluate.enabled=true", "evaluate.linear=false")
    assert train(config)[1] == 0
