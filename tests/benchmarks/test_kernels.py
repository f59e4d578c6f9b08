"""``cohobate bench kernels``: the command, its verdicts, and that a wrong kernel cannot win."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cohobate.benchmarks import cases, command, kernels, machine
from cohobate.benchmarks.harness import QUICK, errors, read_rows
from cohobate.kernels import OPS, alignment, optimizer, tokens, transformer

SMALL = cases.Sizes(batch=2, width=16, image=16, patch=4, decoder=8)
EVERY_CASE = {*cases.CASES, *cases.MORE, *cases.SOMEWHERE}


@pytest.fixture
def setting() -> command.Setting:
    return command.Setting("cpu", machine.environment("cpu"), machine.Ceilings("cpu", ((1024, 1.0),), {}), QUICK)


def test_every_public_op_has_a_case() -> None:
    families = (tokens, alignment, transformer, optimizer)
    public = {name for name in OPS if any(hasattr(family, name) for family in families)}
    # Two that share their kernel with the case without _fp8, quantise_fp8 read backwards, and a part of adamw's case.
    without = {"add_norm_fp8", "bias_gelu_fp8", "dequantise_fp8", "gradient_norm"}
    assert public - without <= EVERY_CASE and set(cases.CASES) <= public and len(public) >= 14


@pytest.mark.parametrize("name", sorted(EVERY_CASE))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_providers_of_every_case_agree(name: str, dtype: str) -> None:
    """Literal, reference and native compute the same thing; compile is left to the slower test below."""
    kernel = cases.build(name, SMALL, "cpu", seed=1)
    for mode in kernel.modes:
        case = kernel.case(mode)
        for provider in cases.providers(kernel, mode, dtypes=tuple(dict.fromkeys(("fp32", dtype)))):
            if "compile" in provider.name:
                continue
            results = provider.results(provider.function())
            if case.compare is not None:
                assert case.compare(results) == (0.0, None), provider.name
                continue
            assert set(results) == set(case.expected), provider.name
            assert max(e or 0.0 for e in errors(results, case.expected)) <= provider.limit, provider.name


def test_the_floor_of_both_directions_is_more_than_of_one() -> None:
    for name in EVERY_CASE:
        kernel = cases.build(name, SMALL, "cpu", seed=0)
        costs = [kernel.cost(mode, 4) for mode in kernel.modes]
        assert costs[0].bytes > 0, name
        assert all(b.bytes > a.bytes for a, b in itertools.pairwise(costs)), name


def test_what_others_offer_is_timed_too() -> None:
    names = [p.name for p in cases.providers(cases.build("short_attention", SMALL, "cpu", seed=0), "fwd")]
    assert names == [
        "literal", "compile", "reference", "sdpa", "native", "literal bf16", "compile bf16", "sdpa bf16", "native bf16",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(cases.SOMEWHERE))
def test_the_fast_form_is_left_out_where_it_cannot_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These have one for bf16 on some processors; asked for by name elsewhere, it would raise."""
    monkeypatch.setattr(cases, "why_not", lambda *_, **__: [])
    there = cases.providers(cases.build(name, SMALL, "cpu", seed=0), "fwd")
    assert [p.name for p in there if p.role == "ours"] == ["native bf16"]
    monkeypatch.setattr(cases, "why_not", lambda *_, **__: ["another processor"])
    elsewhere = cases.providers(cases.build(name, SMALL, "cpu", seed=0), "fwd")
    assert [p for p in elsewhere if p.role == "ours"] == [] and len(elsewhere) == len(there) - 1


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    arguments = ["--quick", "--ops", "take", "--threads", "1", "--json", str(path)]
    threads = torch.get_num_threads()
    try:
        assert kernels.main(arguments) == 0
        assert kernels.main([*arguments, "--fail-if-slower", "100000", "--against", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "take fwd+bwd" in printed and "% of floor" in printed and "compared" in printed
    rows = read_rows(path)
    assert {row.role for row in rows} == {"eager", "compile", "other", "ours"}
    assert all(row.p50_ms is not None and row.agrees and row.env["seed"] == 0 for row in rows)
    assert sum(line.startswith('{"name": "ceiling.') for line in path.read_text().splitlines()) >= 2


def test_a_wrong_kernel_gets_no_ratio(setting: command.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by one row in its gradient alone."""
    right = tokens.take

    def wrong(x: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
        out = right(x, rows, backend=backend)
        if backend == "native":
            out.register_hook(lambda gradient: gradient.roll(1, dims=1)) if out.requires_grad else None
        return out

    monkeypatch.setattr(tokens, "take", wrong)
    rows = kernels.measure_op("take", SMALL, setting, seed=0, dtypes=("fp32",))
    (forward, backward) = (row for row in rows if row.role == "ours")
    assert forward.agrees and not backward.agrees
    assert backward.ratio_vs_eager is None and "numerics disagree" in backward.note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "take,nonsense"], "--ops: expected all, or some of"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--dtypes", "fp8"], "--dtypes: expected fp32"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--seconds", "-1"], "--seconds: expected more than 0"),
        (["--against", "rows.jsonl"], "--against: expected --fail-if-slower PERCENT beside it"),
        (["--fail-if-slower", "5", "--against", "absent.jsonl"], "expected a file of JSON lines"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_asking_for_a_card_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cuda"]) == 2
    assert "--device: expected a device of this machine" in capsys.readouterr().err
