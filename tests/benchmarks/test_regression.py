"""What a benchmark is compared with, and that nothing passes because nothing was compared."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate.benchmarks import command, machine, regression
from cohobate.benchmarks.harness import Row, write_rows
from cohobate.errors import UserError

ROW = Row("op", "native", "ours", "fwd", "cpu", "fp32", "64", p50_ms=1.0, spread=0.01, env={"kind": "this"})


def stored(root: Path, folder: str, kind: str, p50: float = 1.0) -> None:
    path = root / "benchmarks" / "results" / folder / "kernels.jsonl"
    write_rows(path, [{"name": "ceiling.copy", "gb_s": 1.0}, dataclasses.replace(ROW, p50_ms=p50, env={"kind": kind})])


def test_the_newest_rows_of_this_kind_of_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    stored(tmp_path, "a-2026-01-01", "this", 3.0)
    stored(tmp_path, "a-2026-01-02", "this", 2.0)
    stored(tmp_path, "b-2026-01-03", "another", 1.0)
    assert [row.p50_ms for row in regression.stored_rows(None, "kernels", "this")] == [2.0]
    with pytest.raises(UserError, match=r"^--against: .*\(a third\), got another, this$"):
        regression.stored_rows(None, "kernels", "a third")
    with pytest.raises(UserError, match="got none"):
        regression.stored_rows(None, "step", "this")


def test_a_file_of_another_kind_of_machine_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, "a-2026-01-01", "another")
    path = tmp_path / "benchmarks/results/a-2026-01-01/kernels.jsonl"
    assert regression.stored_rows(path, "kernels", "another")
    with pytest.raises(UserError, match="this kind of machine"):
        regression.stored_rows(path, "kernels", "this")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cohobate bench kernels")
    command.add_options(parser)
    return parser.parse_args(arguments)


def finish(args: argparse.Namespace, rows: list[Row]) -> int:
    facts: dict[str, Any] = {"kind": "this", "torch": "2", "commit": "abc", "dirty": False, "seed": 0}
    setting = command.Setting("cpu", facts, machine.Ceilings("cpu", ((1, 1.0),), {}), command.QUICK)
    return command.finish(args, setting, rows)


def test_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "measure_ceilings", lambda *_, **__: pytest.fail("measured"))
    stored(tmp_path, "a-2026-01-01", "another")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match="got another"):
            command.prepare(options("--fail-if-slower", "5"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("now", "code"), [(1.02, 0), (1.2, 1)])
def test_the_exit_code(now: float, code: int, tmp_path: Path) -> None:
    args = options("--fail-if-slower", "5", "--json", str(tmp_path / "rows.jsonl"))
    args.stored = [ROW]
    assert finish(args, [dataclasses.replace(ROW, p50_ms=now)]) == code


def test_nothing_compared_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    args = options("--fail-if-slower", "5")
    args.stored = [dataclasses.replace(ROW, shape="another")]
    assert finish(args, [ROW]) == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHOBATE_COMMIT", "0123456789abcdef")
    facts = machine.environment("cpu")
    assert (facts["commit"], facts["dirty"]) == ("0123456789ab", False)
