"""Loaders: the same batches whatever the executor, the ranks, the workers and the first step; bad files survived."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cohobate import data
from cohobate.data import Batch, Loader, Manifest, SamplePlan, torch_executor
from cohobate.data import loader as module
from cohobate.data.decode import render
from cohobate.errors import UserError


def dali_is_there() -> bool:
    return not module.why_not("dali-cpu", torch.device("cpu"))


needs_dali = pytest.mark.skipif(not dali_is_there(), reason="DALI is not installed")
EXECUTORS = ["torch", pytest.param("dali-cpu", marks=needs_dali)]


@pytest.fixture
def manifest(small_set: Path) -> Manifest:
    return data.build_manifest(small_set, split="train")


def plan_of(manifest: Manifest, **changes: Any) -> SamplePlan:
    return SamplePlan(**({"count": len(manifest), "seed": 3, "image_size": 32} | changes))


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader, count))


def open_(manifest: Manifest, plan: SamplePlan | None = None, **options: Any) -> Loader:
    options = {"batch_size": 16, "workers": 0, "loader": "torch"} | options
    options["workers"] = max(options["workers"], 0 if options["loader"] == "torch" else 1)
    return data.open_loader(manifest, plan or plan_of(manifest), **options)


def same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.valid, b.valid)
        assert torch.equal(a.pixels, b.pixels)
        assert (a.labels is None and b.labels is None) or torch.equal(a.labels, b.labels)  # type: ignore[arg-type]


# -- what a batch is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_contract(manifest: Manifest, executor: str) -> None:
    with open_(manifest, loader=executor) as loader:
        assert loader.name == executor and loader.steps_per_epoch == 6
        batch = next(loader)
        assert loader.step == 1 and loader.data_wait_s > 0
        assert loader.counters["batches"] == 1 and loader.counters["samples"] == 16
    assert batch.pixels.shape == (16, 1, 32, 32, 3) and batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous() and batch.pixels.device.type == "cpu"
    assert batch.sample_ids.dtype == torch.int64 and batch.valid.dtype == torch.bool and bool(batch.valid.all())
    assert manifest.labels is not None and batch.labels is not None and batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels, torch.from_numpy(manifest.labels)[batch.sample_ids])
    with pytest.raises(StopIteration):
        next(loader)  # closed


def test_epochs_go_on_and_each_has_every_image_once(manifest: Manifest) -> None:
    batches = take(open_(manifest, batch_size=32), 6)
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat([batch.sample_ids for batch in epoch]).tolist()) == list(range(96))
    assert not torch.equal(batches[0].sample_ids, batches[3].sample_ids)


def test_pixels_are_the_plans_crops(manifest: Manifest) -> None:
    """Against Pillow alone: crop, resize, mirror, as torchvision does it."""
    from PIL import Image, ImageOps

    for interpolation in ("bilinear", "bicubic"):
        plan = plan_of(manifest, interpolation=interpolation)
        batch = take(open_(manifest, plan), 1)[0]
        boxes, flips = plan.crops(0, batch.sample_ids.numpy(), *(np.full(16, 40, dtype=np.int32),) * 2)
        assert 0 < flips.sum() < 16
        for row, (sample, box, flip) in enumerate(zip(batch.sample_ids.tolist(), boxes.tolist(), flips)):
            top, left, height, width = box
            image = Image.open(manifest.paths[sample]).convert("RGB").crop((left, top, left + width, top + height))
            image = image.resize((32, 32), Image.Resampling[interpolation.upper()])
            expected = np.asarray(ImageOps.mirror(image) if flip else image).astype(int)
            difference = np.abs(batch.pixels[row, 0].numpy() - expected)
            assert difference.mean() < 0.3 and difference.max() <= 3  # fixed-point weights of another width


# -- the same batches, however they are made ---------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_resume_at_every_step(manifest: Manifest, executor: str) -> None:
    whole = take(open_(manifest, loader=executor), 14)
    for start in range(14):
        same(take(open_(manifest, loader=executor, start=start), 2 if start < 13 else 1), whole[start : start + 2])


def test_resume_from_a_state(manifest: Manifest) -> None:
    plan = plan_of(manifest)
    whole = take(open_(manifest, workers=2), 9)
    loader = open_(manifest, workers=2)
    same(take(loader, 4), whole[:4])  # closed with more batches fetched than handed out
    state = loader.state()
    assert state["step"] == 4
    start = data.resume_step(state, manifest, plan, global_batch=16)
    same(take(open_(manifest, start=start), 5), whole[4:])
    for changed, message in (
        ((manifest.subset(range(50)), plan, 16), "the manifest was"),
        ((manifest, plan_of(manifest, seed=4), 16), "the plan was"),
        ((manifest, plan, 32), "the global batch was 16, now it is 32"),
    ):
        with pytest.raises(UserError, match=message):
            data.resume_step(state, changed[0], changed[1], global_batch=changed[2])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_one(manifest: Manifest, executor: str, ranks: int) -> None:
    whole = take(open_(manifest), 8) if executor == "torch" else take(open_(manifest, loader=executor), 8)
    parts = [
        take(open_(manifest, loader=executor, batch_size=16 // ranks, rank=rank, world_size=ranks), 8)
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        for name in ("pixels", "sample_ids", "valid", "labels"):
            assert torch.equal(torch.cat([getattr(part[step], name) for part in parts]), getattr(batch, name)), name


def test_workers_change_nothing(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does shared memory that is too small."""
    whole = take(open_(manifest), 8)
    for workers in (1, 2):
        same(take(open_(manifest, workers=workers), 8), whole)
    monkeypatch.setattr(torch_executor, "_room", lambda needed: False)
    same(take(open_(manifest, workers=2), 8), whole)


def test_batches_that_are_kept_do_not_change(manifest: Manifest) -> None:
    """A worker fills its slots in shared memory again and again; what was handed out is not among them."""
    same(take(open_(manifest, workers=1, batch_size=4), 40), take(open_(manifest, batch_size=4), 40))


def test_opening_draws_no_random_numbers(manifest: Manifest) -> None:
    """Workers get seeds from somewhere: not from the generator that the training's own randomness comes from."""
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    take(open_(manifest, workers=1), 1)
    assert torch.equal(torch.rand(4), expected)


@needs_dali
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_executors_agree(manifest: Manifest, interpolation: str, channels: int) -> None:
    """Ids, labels and boxes exactly; pixels to half a level on average over a batch."""
    plan = plan_of(manifest, interpolation=interpolation)
    one = take(open_(manifest, plan, channels=channels), 12)
    other = take(open_(manifest, plan, channels=channels, loader="dali-cpu"), 12)
    for a, b in zip(one, other):
        same([Batch(a.pixels, a.sample_ids, a.valid, a.labels)], [Batch(a.pixels, b.sample_ids, b.valid, b.labels)])
        difference = (a.pixels.int() - b.pixels.int()).abs().float()
        assert a.pixels.shape == b.pixels.shape == (16, 1, 32, 32, channels)
        assert difference.mean() < 0.5 and difference.mean((1, 2, 3, 4)).max() < 0.5
        assert difference.max() <= (4 if interpolation == "bilinear" else 12)  # a box off by one differs by dozens


@needs_dali
@pytest.mark.parametrize("channels", [3, 1])
def test_executors_agree_on_every_kind_of_file(good: dict[str, bytes], write: Callable, channels: int) -> None:
    manifest = data.build_manifest(write(good))
    for train in (False, True):
        plan = plan_of(manifest, train=train, interpolation="bilinear")
        options: dict[str, Any] = {"batch_size": len(manifest), "channels": channels}
        one, other = (take(open_(manifest, plan, loader=name, **options), 1)[0] for name in ("torch", "dali-cpu"))
        assert bool(one.valid.all()) and bool(other.valid.all())
        difference = (one.pixels.int() - other.pixels.int()).abs().float().mean((1, 2, 3, 4))
        wrong = {manifest.paths.relative(i): float(difference[i]) for i in range(len(manifest)) if difference[i] > 0.5}
        assert not wrong


# -- bad files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_files_that_go_bad_later_are_replaced_and_counted(
    bad: dict[str, tuple[bytes, str]], encode: Callable, make_picture: Callable, write: Callable, executor: str
) -> None:
    """Every kind of damage, after the manifest was made."""
    folder = write({f"{index:02}.jpg": encode(make_picture(48, 64, index)) for index in range(40)})
    manifest = data.build_manifest(folder)
    expected: dict[str, str] = {}
    for index, (body, reason) in enumerate(bad.values()):
        (folder / f"{index:02}.jpg").write_bytes(body)
        expected[f"{index:02}.jpg"] = reason
    (folder / "20.jpg").unlink()
    (folder / "21.jpg").write_bytes(encode(make_picture(64, 48)))
    expected |= {"20.jpg": "missing", "21.jpg": "changed"}
    broken = {int(name[:2]) for name in expected}
    loader = open_(manifest, loader=executor, batch_size=10, max_bad=1.0)
    batches = take(loader, 4)
    assert torch.cat([batch.sample_ids for batch in batches]).shape == (40,)
    planned = plan_of(manifest).order(0, np.arange(40))
    for row, (sample, valid) in enumerate(
        zip(
            torch.cat([batch.sample_ids for batch in batches]).tolist(),
            torch.cat([batch.valid for batch in batches]).tolist(),
        )
    ):
        assert sample not in broken
        assert valid == (planned[row] not in broken) and (not valid or sample == planned[row])
    assert {Path(path).name: reason for path, reason in loader.bad_files()} == expected
    assert loader.counters["substituted"] >= len(expected)
    assert sum(loader.counters[reason] for reason in data.REASONS) >= len(expected)
    report = loader.report()
    assert report["images"] == 40 and len(report["bad_files"]) == len(expected) and report["loader"] == executor


@needs_dali
def test_executors_replace_alike(encode: Callable, make_picture: Callable, write: Callable) -> None:
    folder = write({f"{index:02}.jpg": encode(make_picture(40, 40, index)) for index in range(32)})
    manifest = data.build_manifest(folder)
    for index in range(0, 32, 3):
        (folder / f"{index:02}.jpg").write_bytes(b"")
    one, other = (take(open_(manifest, loader=name, batch_size=8, max_bad=1.0), 8) for name in ("torch", "dali-cpu"))
    for a, b in zip(one, other):
        assert torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.valid, b.valid)
        assert (a.pixels.int() - b.pixels.int()).abs().float().mean() < 0.5
    again = take(open_(manifest, workers=2, batch_size=4, rank=1, world_size=2, max_bad=1.0), 8)
    for a, c in zip(one, again):
        assert torch.equal(a.sample_ids[4:], c.sample_ids) and torch.equal(a.pixels[4:], c.pixels)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_whole_batches_of_bad_files_in_a_row(
    encode: Callable, make_picture: Callable, write: Callable, executor: str
) -> None:
    """Five steps of an epoch with not one planned file readable."""
    folder = write({f"{index:03}.jpg": encode(make_picture(32, 32, index)) for index in range(120)})
    manifest = data.build_manifest(folder)
    planned = plan_of(manifest).order(0, np.arange(120))
    for sample in planned[8:28]:  # steps 2 to 6 of 4 images
        (folder / f"{sample:03}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    batches = take(open_(manifest, loader=executor, batch_size=4, max_bad=0.5), 10)
    gone = set(planned[8:28].tolist())
    for step, batch in enumerate(batches):
        assert bool(batch.valid.any()) == (step not in range(2, 7)) == bool(batch.valid.all())
        assert not gone.intersection(batch.sample_ids.tolist())
        assert all(float(pixels.float().std()) > 1 for pixels in batch.pixels)


def test_too_many_bad_files_end_the_run(encode: Callable, make_picture: Callable, write: Callable) -> None:
    folder = write({f"{index:03}.jpg": encode(make_picture(16, 16, index)) for index in range(100)})
    manifest = data.build_manifest(folder)
    for index in range(12):
        (folder / f"{index:03}.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"max_bad: \d+ of 100 images .* more than max_bad=0.05 allows; such as .*empty"
    ):
        take(open_(manifest, max_bad=0.05), 6)
    assert len(take(open_(manifest, max_bad=0.2), 6)) == 6
    for index in range(12, 100):
        (folder / f"{index:03}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="not one image of step 0 could be read"):
        take(open_(manifest, max_bad=1.0), 6)


@needs_dali
def test_dali_failing_on_a_batch_costs_nothing_but_time(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that pass every check and still make DALI raise: one batch, then five in a row, then all of them."""
    from cohobate.data.dali_executor import DaliExecutor

    expected = take(open_(manifest), 14)
    prepare = DaliExecutor._prepare

    def failing(steps: set[int]) -> Callable:
        def broken(self: DaliExecutor, step: int) -> Any:
            prepared = prepare(self, step)
            if step in steps:
                prepared.encoded[5] = prepared.encoded[5][:300]
            return prepared

        return broken

    for steps in ({3}, {0}, {4, 5, 6, 7, 8}):
        monkeypatch.setattr(DaliExecutor, "_prepare", failing(steps))
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            batches = take(open_(manifest, loader="dali-cpu"), 14)
        assert sum("DALI failed on step" in record.message for record in caplog.records) == len(steps)
        for step, (a, b) in enumerate(zip(batches, expected)):
            assert torch.equal(a.sample_ids, b.sample_ids) and bool(a.valid.all())
            assert (a.pixels.int() - b.pixels.int()).abs().float().mean() < 0.5, step
            assert torch.equal(a.pixels, b.pixels) == (step in steps)  # those steps are the plain decoder's
    monkeypatch.setattr(DaliExecutor, "_prepare", failing(set(range(100))))
    with pytest.raises(RuntimeError, match="8 batches in a row; try loader=torch"):
        take(open_(manifest, loader="dali-cpu"), 14)


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_pass_padded_at_the_end(manifest: Manifest, executor: str) -> None:
    plan = plan_of(manifest, train=False)
    with open_(manifest, plan, loader=executor, batch_size=40) as loader:
        assert loader.steps_per_epoch == 3
        batches = list(loader)
    assert [int(batch.valid.sum()) for batch in batches] == [40, 40, 16]
    ids = torch.cat([batch.sample_ids[batch.valid] for batch in batches])
    assert ids.tolist() == list(range(96))


def test_load_all(manifest: Manifest) -> None:
    plan = plan_of(manifest, train=False, centre=0.8)
    everything = data.load_all(manifest, plan, workers=1)
    assert everything.pixels.shape == (96, 1, 32, 32, 3) and bool(everything.valid.all())
    assert manifest.labels is not None and everything.labels is not None
    assert torch.equal(everything.labels, torch.from_numpy(manifest.labels))
    from PIL import Image

    with Image.open(manifest.paths[50]) as image:
        np.testing.assert_array_equal(everything.pixels[50, 0].numpy(), np.asarray(image)[4:36, 4:36])
    with pytest.raises(UserError, match="plan: expected train=False"):
        data.load_all(manifest, plan_of(manifest))


# -- what cannot be opened ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 97}, "batch_size: expected at most 96 images a step, .* got 97"),
        ({"batch_size": 50, "world_size": 2}, "got 100"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"loader": "dali"}, "loader: expected one of auto, torch, dali-cpu, dali-gpu, got 'dali'"),
        ({"loader": "dali-gpu"}, "loader: 'dali-gpu' cannot be used: .*decodes on a GPU, but the device is cpu"),
        ({"channels": 4}, "channels: expected 3 or 1"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"rank": 1}, "rank: expected 0 to world_size - 1 = 0, got 1"),
        ({"start": -1}, "start: expected 0 or more"),
        ({"max_bad": 2.0}, "max_bad: expected 0 to 1"),
    ],
)
def test_arguments(manifest: Manifest, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.open_loader(manifest, plan_of(manifest), **({"batch_size": 8} | options))


def test_plan_of_another_size(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="plan: expected one of the manifest's 96 images, got count=95"):
        open_(manifest, plan_of(manifest, count=95))


def test_auto_says_why(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_(manifest, loader="auto")
    loader.close()
    assert loader.name == "torch" and "no GPU" in loader.why
    cuda = torch.device("cuda")
    monkeypatch.setattr(module, "why_not", lambda name, device, reader: ["DALI is not installed"])
    assert module.choose("auto", cuda) == ("torch", "DALI is not installed")
    monkeypatch.setattr(module, "why_not", lambda name, device, reader: [])
    assert module.choose("auto", cuda)[0] == "dali-gpu"


@needs_dali
def test_the_probe_reports_a_failure() -> None:
    """Here there may be no GPU: then the test program must fail, and say why in one line."""
    from cohobate.data.dali_executor import probe, self_test

    self_test(None)
    if not torch.cuda.is_available():
        reason = probe(0)
        assert "GPU 0 failed" in reason and "\n" not in reason
    assert set(data.why_not_loaders()) == {"torch", "dali-cpu", "dali-gpu"}


def test_dali_is_imported_only_when_chosen(small_set: Path) -> None:
    code = f"""
import sys
from cohobate import data
manifest = data.build_manifest({str(small_set)!r}, split="test")
with data.open_loader(manifest, data.SamplePlan(len(manifest), 0, 32), batch_size=4, workers=0) as loader:
    next(loader)
assert not [name for name in sys.modules if name.startswith("nvidia.dali")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_render_is_torchvisions_resized_crop(make_picture: Callable) -> None:
    """A constant stays constant, a crop of the very size is copied, and a mirror mirrors."""
    flat = np.full((20, 30, 3), 77, dtype=np.uint8)
    assert bool((render(flat, (3, 4, 11, 7), True, (16, 16), "bicubic") == 77).all())
    image = make_picture(20, 30)
    copied: Tensor = render(image, (2, 5, 16, 16), False, (16, 16), "bilinear")
    np.testing.assert_array_equal(copied.numpy(), image[2:18, 5:21])
    np.testing.assert_array_equal(
        render(image, (2, 5, 16, 16), True, (16, 16), "bilinear").numpy(), image[2:18, 20:4:-1]
    )
