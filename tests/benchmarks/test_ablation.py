"""Every switch of the ablation throws what it says and leaves the numbers alone, or says why it cannot be thrown."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cohobate import models
from cohobate.benchmarks import ablation, command, machine
from cohobate.benchmarks.ablation import SHIPPED, SWITCHES, Bench, Switch, Variant
from cohobate.benchmarks.harness import QUICK, Case, Provider, Row, errors, read_rows
from cohobate.benchmarks.twins import LARGER, Shape
from cohobate.config import ExecutionConfig, PrecisionConfig
from cohobate.kernels import native
from cohobate.kernels.transformer.block import PARTS
from cohobate.models import Decoder, PixelDecoder
from cohobate.models.layers import Block
from cohobate.teacher import FrozenTeacher

needs_native = pytest.mark.skipif(bool(native.why_not()), reason="the native library is not built")
BF16 = 3e-2  # two steps in bf16, whose products round at 2^-9, through four blocks and back
ENVIRONMENT = {"kind": "a machine", "commit": "abc", "dirty": False, "torch": "2", "seed": 0}
SETTING = command.Setting(
    "cpu", ENVIRONMENT, machine.Ceilings("cpu", ((1, 1.0),), {"bf16": 1.0}), dataclasses.replace(QUICK, least=1, most=1)
)


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    """A size that is quick to run."""
    whole = Decoder.for_encoder.__func__  # type: ignore[attr-defined]
    small: Any = {"width": 64, "depth": 2, "heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SIZES, "nano", dataclasses.replace(models.SIZES["tiny"], width=64, depth=2, heads=1))
        patch.setitem(LARGER, "nano", "nano")
        for kind in (Decoder, PixelDecoder):
            patch.setattr(kind, "for_encoder", classmethod(lambda cls, e, out=None, **_: whole(cls, e, out, **small)))
        yield


def made(recipe: str) -> Bench:
    return Bench(Shape(recipe, "nano", image=64, batch=2, frames=4), "cpu")


@pytest.fixture(scope="module")
def dbot(nano: None) -> Bench:
    return made("dbot")


@pytest.fixture(scope="module")
def amd(nano: None) -> Bench:
    return made("amd")


def switch(name: str, instead: str = "") -> Switch:
    return next(each for each in SWITCHES if each.name == name and instead in each.instead)


def variant(bench: Bench, name: str, instead: str = "") -> Variant:
    found = switch(name, instead).make(bench)
    assert isinstance(found, Variant), found
    return found


class Ops(TorchDispatchMode):
    """Counts every torch op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def ops(bench: Bench, what: Variant) -> Counter[str]:
    bench.reset()
    with Ops() as seen:
        bench.step(what)
    return seen.count


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seen: list[Any], what: Callable[..., Any]) -> None:
    """Let a method also note ``what`` of its arguments."""
    function = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append(what(*args, **kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)


THROWN = [each for each in SWITCHES if each.name not in ("compile", "ahead", "fp8 teacher")]


@pytest.mark.parametrize("recipe", ["dbot", "amd"])
@pytest.mark.parametrize("each", THROWN, ids=lambda each: each.provider)
def test_no_switch_changes_the_numbers(each: Switch, recipe: str, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(recipe)
    what = each.make(bench)
    if isinstance(what, str):
        pytest.skip(what)
    shipped = {name: value.clone() for name, value in bench.results(Variant()).items()}
    output, gradient = errors(bench.results(what), shipped)
    assert output < BF16 and gradient is not None and gradient < BF16


@needs_native
@pytest.mark.parametrize(
    ("name", "op"),
    [("add + norm kernel", "add_norm"), ("decoder-input kernel", "assemble"), ("loss kernel", "align_loss"),
     ("row kernels", "take"), ("embedding kernel", "embed_patches")],
)  # fmt: skip
def test_a_kernels_row_runs_without_that_kernel_alone(dbot: Bench, name: str, op: str) -> None:
    shipped, without = ops(dbot, Variant()), ops(dbot, variant(dbot, name))
    assert op in dbot.called and shipped[f"cohobate::{op}"] > 0
    gone = {each for each in shipped if each.startswith("cohobate::") and not without[each]}
    gone -= {each for each in gone if "pre_norm_block" in each and op in PARTS}  # its parts one by one then
    assert gone and all(op.partition("_")[0] in each or name == "row kernels" for each in gone)


@needs_native
def test_all_kernels_leaves_none_of_them(dbot: Bench) -> None:
    without = ops(dbot, variant(dbot, "all kernels"))
    assert {each.partition("::")[2] for each in without if each.startswith("cohobate::")} <= {"adamw", "gradient_norm"}


def test_attention_runs_as_sdpa(dbot: Bench) -> None:
    count = ops(dbot, variant(dbot, "attention table"))
    assert sum(n for name, n in count.items() if "scaled_dot_product" in name) >= 6  # teacher, student, decoder
    assert not count["cohobate::short_attention"]


def test_every_patch_is_embedded(dbot: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    spied(monkeypatch, ablation, "embed_patches_reference", seen, lambda pixels, rows, *_, **__: rows)
    dbot.step(variant(dbot, "embedding kernel"))
    assert seen == [None, None]  # teacher and student


@needs_native
def test_every_layer_has_a_launch_of_its_own(amd: Bench, dbot: Bench) -> None:
    shipped = ops(amd, Variant())["cohobate::align_loss"]
    assert (
        ops(amd, variant(amd, "one launch for all terms"))["cohobate::align_loss"] == 4 > shipped
    )  # two pairs, two terms
    assert switch("one launch for all terms").make(dbot) == "dbot has one term"


@pytest.mark.parametrize("recipe", ["dbot", "amd"])
def test_the_ordinary_teacher_replaces_the_runtime(
    recipe: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench: Bench = request.getfixturevalue(recipe)
    seen: list[Any] = []
    spied(monkeypatch, FrozenTeacher, "_compute", seen, lambda *_: 1)
    bench.step(variant(bench, "teacher runtime"))
    assert not seen
    bench.step(Variant())
    assert seen


def test_whole_last_blocks(dbot: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: list[Any] = []
    spied(monkeypatch, FrozenTeacher, "_compute", teacher, lambda self, pixels, rows, queries, norm: queries)
    dbot.step(variant(dbot, "teacher's last block"))
    dbot.step(Variant())
    assert teacher[0] is None and teacher[1] is not None
    decoder: list[Any] = []
    last = dbot.method.decoder.blocks[-1]
    hook = last.register_forward_pre_hook(lambda _, args: decoder.append(args[3]))
    dbot.step(variant(dbot, "decoder's last block"))
    dbot.step(Variant())
    hook.remove()
    assert decoder[0] is None and decoder[1] is not None


@pytest.mark.parametrize("name", ["AdamW kernel", "clipping inside AdamW"])
def test_another_optimizer_ends_in_the_same_weights(name: str) -> None:
    bench = made("mae")
    expected = {k: v.clone() for k, v in bench.results(Variant(), weights=True).items()}
    what = switch(name).make(bench)
    if isinstance(what, str):
        pytest.skip(what)
    bench.reset()
    bench.step(what)
    found = bench.results(what, weights=True)
    assert found.keys() == expected.keys() and any(key.startswith("weight") for key in found)
    assert max(value or 0.0 for value in errors(found, expected)) < 1e-5  # fp32: the order of a sum, a product more
    moved = [key for key in found if key.startswith("weight") and not torch.equal(found[key], bench.initial[key[7:]])]
    assert len(moved) > 10


@pytest.mark.parametrize(("kind", "runs"), [("operations", 2), ("blocks", 2), ("none", 1)])
def test_checkpointing_computes_again(dbot: Bench, kind: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    spied(monkeypatch, Block, "_compute", seen, lambda *_, **__: 1)
    dbot.step(Variant() if kind == "none" else variant(dbot, "checkpointing", kind))
    assert len(seen) == 4 * runs  # two blocks in the student, two in the decoder
    assert {block.checkpointing for block in dbot.method.modules() if isinstance(block, Block)} == {"none"}


def test_compiled_blocks_run_in_their_row_alone(dbot: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []

    def stand_in(module: nn.Module) -> None:
        for block in module.modules():
            if isinstance(block, Block):
                block._compiled_call_impl = lambda *a, _block=block, **k: (
                    seen.append(_block),
                    _block._call_impl(*a, **k),
                )[1]

    monkeypatch.setattr(ablation, "compile_blocks", stand_in)
    what = variant(dbot, "compile")
    dbot.step(Variant())
    assert not seen
    dbot.step(what)
    assert len(seen) == 4
    assert all(b._compiled_call_impl is None for b in dbot.method.modules() if isinstance(b, Block))


def test_ahead_asks_the_teacher_between_backward_and_optimizer(dbot: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {name: value.clone() for name, value in dbot.results(Variant()).items()}
    events: list[Any] = []
    spied(monkeypatch, FrozenTeacher, "_compute", events, lambda *_: "teacher")
    spied(monkeypatch, torch.Tensor, "backward", events, lambda *_: "backward")
    spied(monkeypatch, dbot.updater, "step", events, lambda *_: "optimizer")
    what = ablation.ahead(dbot)
    dbot.step(what)
    events.clear()
    dbot.reset()
    dbot.step(what)
    assert events == ["backward", "teacher", "optimizer"]
    assert errors(dbot.results(what), shipped) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "why"),
    [("fp8 teacher", "no fp8 products on a CPU"), ("ahead", "one stream"), ("CUDA graph", "CUDA's"),
     ("shadow weights", "off CUDA"), ("one launch", "dbot has one term")],
)  # fmt: skip
def test_what_cannot_be_thrown_here_says_why(dbot: Bench, name: str, why: str) -> None:
    each = next(found for found in SWITCHES if found.name.startswith(name))
    reason = each.make(dbot)
    assert isinstance(reason, str) and why in reason
    row = ablation._unmeasured("dbot_ablation", "train", each.provider, dbot, SETTING, reason)
    assert row.note == f"not measured: {reason}" and row.p50_ms is row.peak_mb is row.max_rel_err is None
    assert row.env == ENVIRONMENT


def test_masks_share_one_call_of_the_teacher(dbot: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    spied(monkeypatch, FrozenTeacher, "_compute", calls, lambda *_: 1)
    passes: list[int] = []
    step = dbot.step

    def counted(what: Variant) -> Any:
        before = len(calls)
        loss = step(what)
        passes.append(len(calls) - before)
        return loss

    monkeypatch.setattr(dbot, "step", counted)
    first, second = ablation.masks(dbot, SETTING, BF16)
    assert set(passes) == {1, 4}
    assert first.agrees and second.agrees and second.grad_rel_err is not None
    assert second.p50_ms is not None and "4 masks" in second.mode


def test_masks_are_dbots(amd: Bench) -> None:
    rows = ablation.masks(amd, SETTING, BF16)
    assert [row.p50_ms for row in rows] == [None, None] and "only dBOT's teacher" in rows[0].note


def test_a_wrong_variant_gets_no_ratio() -> None:
    wrong = Switch("wrong", True, "a loss of its own", lambda bench: Variant(loss=lambda: 2 * bench.loss()))
    right = Switch("right", True, "the same", lambda bench: Variant())
    rows = ablation.run(Shape("mae", "nano", image=64, batch=2), SETTING, switches=(wrong, right))
    found = {row.provider.partition(":")[0]: row for row in rows}
    assert not found["wrong"].agrees and found["wrong"].ratio_vs_best_other is None
    assert "numerics disagree" in found["wrong"].note
    assert found["right"].agrees and found["right"].best_other == SHIPPED
    exact = found["all of it in fp32"]
    assert exact.p50_ms is None and 0 < max(exact.max_rel_err or 0, exact.grad_rel_err or 0) < BF16


def test_on_a_card_each_is_timed_beside_the_shipped_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step keeps its memory, and twenty of them would not fit."""
    groups: list[list[str]] = []

    def measured(case: Case, providers: Sequence[Provider], **_: Any) -> list[Row]:
        groups.append([provider.name for provider in providers])
        return [Row("x", provider.name, "ours", "train", "cuda", "bf16", "") for provider in providers]

    monkeypatch.setattr(ablation, "measure", measured)
    names = (SHIPPED, "one", "two")
    found: list[Any] = [Provider(name, "train", dict) for name in names]
    found.insert(2, Row("x", "none", "ours", "train", "cuda", "bf16", ""))
    rows = ablation._timed(Case("x", "", "cuda", {}), found, SETTING)
    assert groups == [[SHIPPED, "one"], [SHIPPED, "two"]]
    assert [row.provider for row in rows] == [SHIPPED, "one", "none", "two"]


def test_torchs_adamw_can_be_captured(dbot: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses to step inside a capture that it was not made for, and the row would be timed call by call."""
    made: list[bool] = []
    real = torch.optim.AdamW

    def adamw(*arguments: Any, capturable: bool, **options: Any) -> Any:
        made.append(capturable)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(dbot, "device", device)
        variant(dbot, "clipping inside AdamW")
    assert made == [False, True]


def test_what_ships_is_what_a_run_has() -> None:
    """The step is timed as one CUDA graph, which a run is not by default: the table says both."""
    execution, precision = ExecutionConfig(), PrecisionConfig()
    ships = {each.name: each.ships for each in SWITCHES}
    assert ships["CUDA graph of the step"] == f"on here, {execution.cuda_graph} in a run"
    flags = {"compile": execution.compile, "ahead": execution.ahead, "shadow weights": execution.shadow}
    flags |= {"checkpointing": execution.checkpointing != "none", "fp8 teacher": precision.teacher == "fp8"}
    assert {name: ships[name] for name in flags} == {name: "on" if flag else "off" for name, flag in flags.items()}


def test_the_table_says_what_a_row_may_say() -> None:
    def row(provider: str, **values: Any) -> Row:
        base = {"p50_ms": 1200.0, "max_rel_err": 1e-4, "grad_rel_err": 1e-2, "tolerance": 2e-2}
        return Row("dbot_ablation", provider, "ours", "train", "cpu", "bf16", "ViT", **{**base, **values})

    names = [each.provider for each in SWITCHES]
    rows = [
        row(SHIPPED, p50_ms=1000.0),
        row(names[0], ratio_vs_best_other=1 / 1.2),
        row(names[1], note="no ratio vs best other: spread 5% exceeds the difference 2%"),
        row(names[2], note="no ratio: numerics disagree (output error 1)"),
        row(names[3], note="no ratio: other processes used 1.0 cores meanwhile"),
        row(names[-1], p50_ms=None, max_rel_err=None, grad_rel_err=None, note="not measured: no fp8 products on a CPU"),
    ]
    lines = ablation.table(rows).splitlines()
    cells = {line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")] for line in lines[4:]}
    column = [cell.strip(" |") for cell in lines[2].split(" | ")].index("time, shipped = 1")
    said = [cells[name][column] for name in (SHIPPED, *(each.name for each in SWITCHES[:4]))]
    assert said == ["-", "1.20", "within noise", "numerics disagree", "disturbed"]
    assert cells[SWITCHES[-1].name][1:5] == ["off", SWITCHES[-1].instead, "-", "-"]
    assert cells[SWITCHES[-1].name][-1] == "not measured: no fp8 products on a CPU"
    assert cells[SWITCHES[0].name][1:3] == ["on", SWITCHES[0].instead]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def few(shape: Shape, setting: command.Setting, *, seed: int) -> list[Row]:
        row = Row("dbot_ablation", SHIPPED, "other", "train", "cpu", "bf16", str(shape))
        none = Row(
            "dbot_ablation", "fp8 teacher: x", "other", "train", "cpu", "bf16", str(shape), note="not measured: no"
        )
        return [row, none]

    monkeypatch.setattr(ablation, "run", few)
    file = tmp_path / "rows.jsonl"
    assert ablation.main(["--quick", "--threads", "1", "--json", str(file)]) == 0
    rows = read_rows(file)
    assert [row.provider for row in rows] == [SHIPPED, "fp8 teacher: x"]
    assert '"p50_ms": null' in file.read_text() and json.loads(file.read_text().splitlines()[-1])["note"]
    assert ablation.main(["--batch", "0"]) == 2
    assert "--batch: expected at least 1, got 0" in capsys.readouterr().err
