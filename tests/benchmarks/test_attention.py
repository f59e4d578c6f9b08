"""The attention benchmark: every backend that runs is checked against float64, and a mistake in the call is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cohobate.benchmarks import attention
from cohobate.benchmarks.harness import read_rows

SMALL = ["--quick", "--keys", "5", "--dims", "64", "--batch", "1"]


def test_every_backend_that_runs_has_a_row_that_agrees(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert attention.main([*SMALL, "--json", str(file)]) == 0
    rows = read_rows(file)
    assert {row.dtype for row in rows} == {"bf16", "fp32"} and {row.mode for row in rows} == {"fwd", "fwd+bwd"}
    assert {"explicit", "sdpa"} <= {row.provider for row in rows}
    assert all(row.agrees for row in rows), [(row.provider, row.note) for row in rows if not row.agrees]
    assert all(json.loads(line)["env"] for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keys", "0"], "--keys: expected positive numbers with commas between, got '0'"),
        (["--keys", "a,5"], "--keys: expected positive numbers"),
        (["--dims", "50"], "--dims: expected divisors of 768, got '50'"),
        (["--dtypes", "int8"], "--dtypes: expected any of bf16, fp16, fp32; got 'int8'"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
    ],
)
def test_a_mistake_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err
