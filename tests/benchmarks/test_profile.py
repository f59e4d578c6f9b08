"""Where a step's time goes: times are neither lost nor counted twice, and stand in the part and kind they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cohobate.benchmarks import command, machine, profile, step
from cohobate.benchmarks.harness import QUICK
from cohobate.benchmarks.profile import KINDS, MISSING, PARTS, attribute
from cohobate.benchmarks.twins import MAKERS, Shape, make

SMALL = Shape("dbot", "tiny", image=32, batch=2)


@pytest.fixture
def setting() -> command.Setting:
    ceilings = machine.Ceilings("cpu", ((1024, 1.0),), {"fp32": 0.1, "bf16": 0.4})
    return command.Setting("cpu", machine.environment("cpu"), ceilings, QUICK)


class Recording:
    """Events as the profiler returns them, written down by hand."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(
        self, name: str, us: float, parent: Any = None, number: int = -1, kernels: tuple[float, ...] = ()
    ) -> Any:
        event = SimpleNamespace(
            name=name,
            self_cpu_time_total=us,
            cpu_parent=parent,
            sequence_nr=number,
            device_type="DeviceType.CPU",
            time_range=SimpleNamespace(start=len(self.events)),
            kernels=[SimpleNamespace(duration=duration) for duration in kernels],
        )
        self.events.append(event)
        return event


def test_parts_and_kinds_of_a_recording() -> None:
    record = Recording()
    root = record("part:rest", 100)
    loss = record("part:loss", 1000, root)
    teacher = record("part:teacher", 10, loss)
    product = record("cohobate::linear", 20, teacher, number=1)  # no gradient, so the number goes to the next one
    record("aten::empty", 3, product)  # of its caller's kind
    student = record("part:student", 40, loss)
    heads = record("kind:attention", 5, student)
    record("aten::addmm", 60, heads, number=1)  # a product all the same
    record("aten::mul", 70, heads, number=2)
    record("aten::gelu", 80, student, number=3)
    record("aten::sub", 90, loss, number=4)
    back = "autograd::engine::evaluate_function: "
    backward = (
        (4, "SubBackward0", "aten::neg", 7),
        (1, "AddmmBackward0", "aten::mm", 5),
        (2, "MulBackward0", "aten::mul", 8),
    )
    for number, name, inner, us in backward:
        record(inner, us, record(f"{back}{name}", 1, root, number))
    record("aten::add_", 9, record(f"{back}torch::autograd::AccumulateGrad", 2, root, 999))
    update = record("part:update", 4, root)
    record("cohobate::gradient_norm", 6, update)
    record("aten::mul_", 11, record("Optimizer.step#AdamW.step", 12, update))
    found = {key: round(1000 * ms) for key, ms in attribute(record.events, "cpu").items()}
    assert found == {
        ("rest", "rest"): 100,
        ("loss forward", "loss"): 1000 + 90,
        ("teacher", "rest"): 10,
        ("teacher", "products"): 20 + 3,
        ("student forward", "rest"): 40,
        ("student forward", "attention"): 5 + 70,
        ("student forward", "products"): 60,
        ("student forward", "GELU"): 80,
        ("loss backward", "loss"): 1 + 7,
        ("student backward", "products"): 1 + 5,
        ("student backward", "attention"): 1 + 8,
        ("student backward", "copies"): 2 + 9,
        ("gradient norm", "optimizer"): 4 + 6,
        ("AdamW", "optimizer"): 11 + 12,
    }


def test_on_cuda_the_kernels_count() -> None:
    record = Recording()
    record("aten::mm", 999, record("part:student", 999, record("part:rest", 999)), 1, kernels=(30, 40))
    assert attribute(record.events, "cuda") == {("student forward", "products"): pytest.approx(0.07)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cohobate_native::linear_dx", "products"), ("cohobate_native::linear_packed", "products"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "products"), ("aten::mm", "products"),
        ("aten::bmm", "attention"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("cohobate_native::attention_backward", "attention"), ("aten::_softmax", "attention"),
        ("aten::native_layer_norm_backward", "norm"), ("cohobate::add_norm", "norm"), ("_AddNormBackward", "norm"),
        ("aten::gelu_backward", "GELU"), ("cohobate::bias_gelu", "GELU"),
        ("cohobate::embed_patches", "tokens"), ("aten::convolution", "tokens"), ("aten::index", "tokens"),
        ("cohobate::align_loss", "loss"), ("aten::smooth_l1_loss", "loss"), ("aten::mse_loss", "loss"),
        ("aten::copy_", "copies"), ("aten::add", "copies"), ("aten::sum", "copies"),
        ("aten::addcmul", None), ("aten::view", None), ("aten::linalg_vector_norm", None), ("part:student", None),
    ],
)  # fmt: skip
def test_the_kind_of_an_operation(name: str, kind: str | None) -> None:
    assert next((k for k, pattern in profile._KINDS.items() if pattern.search(name)), None) == kind


@pytest.mark.parametrize("recipe", MAKERS)
def test_the_work_of_the_parts_is_the_methods(recipe: str) -> None:
    twins = make(Shape(recipe, "tiny", image=64, batch=3, frames=4), "cpu", seed=0)
    work = profile.work(twins.method, twins.plan, 3)
    assert sum(work.values()) == 3 * twins.method.flops(twins.plan)
    assert all(flops > 0 and part in PARTS and kind in KINDS for (part, kind), flops in work.items())


def test_a_step_of_both_sides_by_its_parts(setting: command.Setting) -> None:
    """Times waver; where work is done does not."""
    rows = step.run_profile(SMALL, setting)
    found = profile.providers(rows)
    assert list(found) == ["engine bf16", "literal bf16 autocast", "eager bf16"]
    for name, own in found.items():
        cells = {(row["part"], row["kind"]): row["ms"] for row in own}
        for part in ("teacher", "student forward", "decoder forward", "decoder backward", "student backward"):
            for kind in ("products", "attention", "norm"):
                assert cells[part, kind] > 0, (name, part, kind)
        assert cells["gradient norm", "optimizer"] > 0 and cells["AdamW", "optimizer"] > 0
        assert {("loss forward", "loss"), ("loss backward", "loss"), ("student forward", "tokens")} <= cells.keys()
        assert ("student forward", "copies") in cells or name.startswith("engine")
        assert sum(cells.values()) == pytest.approx(own[0]["step_ms"])  # the missing part is one of the cells
        needed = sum(row["flops"] or 0 for row in own if row["kind"] in ("products", "attention"))
        assert needed > 0 and all(row["env"]["threads"] for row in own)


def test_nothing_of_the_watch_is_left_behind(setting: command.Setting) -> None:
    twins = make(SMALL, "cpu", seed=0)
    made = step.engine_step(twins)
    before = {id(m): set(vars(m)) for m in twins.method.modules()}
    loss, update = made.loss, made.update
    profile._profiled(profile.Subject("engine bf16", made, twins.method, "bf16"), "cpu")
    assert (made.loss, made.update) == (loss, update)
    assert {id(m): set(vars(m)) for m in twins.method.modules()} == before


class Scripted:
    """A step whose clock and cells are given."""

    def __init__(self, cells: dict[tuple[str, str], float], wall: float) -> None:
        self.cells, self.wall = cells, wall


def scripted(monkeypatch: pytest.MonkeyPatch, setting: command.Setting, wall: float) -> list[dict[str, Any]]:
    cells = {("teacher", "products"): 30.0, ("student forward", "GELU"): 10.0, ("AdamW", "optimizer"): 60.0}
    monkeypatch.setattr(profile, "_timed", lambda step, device: step.wall)
    monkeypatch.setattr(profile, "_profiled", lambda subject, device: subject.step.cells)
    steps: list[Any] = [Scripted(cells, wall), Scripted({key: 2 * ms for key, ms in cells.items()}, 200.0)]
    subjects = [profile.Subject(name, made, torch.nn.Module(), "bf16") for name, made in zip(("ours", "theirs"), steps)]
    return profile.run("dbot_step", "a shape", subjects, {("teacher", "products"): 6 * 10**9}, setting)


def test_what_is_missing_is_a_row_and_too_much_of_it_is_said(
    monkeypatch: pytest.MonkeyPatch, setting: command.Setting
) -> None:
    rows = scripted(monkeypatch, setting, wall=104.0)
    (missing,) = (row for row in rows if row["part"] == MISSING and row["provider"] == "ours")
    assert missing["ms"] == pytest.approx(4.0) and not any(row["note"] for row in rows)
    rows = scripted(monkeypatch, setting, wall=120.0)
    assert {row["note"] for row in rows if row["provider"] == "ours"} == {
        "does not add up: 20 of 120 ms are not attributed"
    }
    assert not any(row["note"] for row in rows if row["provider"] == "theirs")


def test_tables_say_shares_and_rates(monkeypatch: pytest.MonkeyPatch, setting: command.Setting) -> None:
    rows = scripted(monkeypatch, setting, wall=100.0)
    console = Console(width=112)
    with console.capture() as printed:
        profile.print_tables(rows, console)
    lines = [line.split() for line in printed.get().splitlines()]
    # 6 GFLOP in 30 ms are 0.2 TFLOP/s, half of the rate measured.
    assert ["teacher", "30.0", "30.0%", "50", "30.0"] in lines and ["teacher", "60.0", "30.0%", "25", "60.0"] in lines
    assert ["AdamW", "60.0", "60.0%", "60.0"] in lines


def test_the_picture_shows_every_provider_and_part(monkeypatch: pytest.MonkeyPatch, setting: command.Setting) -> None:
    whole, parts = profile.profile_figure(scripted(monkeypatch, setting, wall=100.0)).axes
    assert [label.get_text() for label in whole.get_yticklabels()] == ["ours", "theirs"]
    assert [label.get_text() for label in parts.get_yticklabels()] == [
        "teacher", "student forward", "AdamW", "everything else",
    ]  # fmt: skip
    widths = sorted(patch.get_width() for patch in whole.patches)  # type: ignore[attr-defined]
    assert widths == [10, 20, 30, 60, 60, 120]
    colours = {patch.get_facecolor() for patch in whole.patches}
    assert len(colours) == 3 and colours == {patch.get_facecolor() for patch in parts.patches}


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: command.Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scripted(monkeypatch, setting, wall=104.0)
    monkeypatch.setattr(step, "run_profile", lambda *_, **__: rows)
    path, picture, threads = tmp_path / "p.jsonl", tmp_path / "p.png", torch.get_num_threads()
    arguments = ["--quick", "--profile", "--threads", "1", "--json", str(path), "--picture", str(picture)]
    try:
        assert step.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "not attributed" in printed and "matrix product" in printed
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["name"] for line in lines} == {"ceiling.copy", "ceiling.matmul", "step_profile"}
    assert sum(line["name"] == "step_profile" for line in lines) == len(rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
