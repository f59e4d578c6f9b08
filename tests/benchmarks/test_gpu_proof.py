"""The GPU proof's own logic: budget, records, verdict, and what it says where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cohobate.benchmarks import gpu_proof, machine
from cohobate.benchmarks.gpu_proof import Part

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_is_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cohobate.benchmarks.gpu_proof"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu-proof: expected a CUDA device") and done.stderr.count("\n") == 1


def test_parts_that_pass_fail_and_run_too_long(capfd: pytest.CaptureFixture[str]) -> None:
    todo = [
        Part("good", python("print('3 passed')"), 60),
        Part("bad", python("print('1 failed'); raise SystemExit(1)"), 60),
        Part("slow", python("import time; print('begins', flush=True); time.sleep(60)"), 1.0),
        Part("absent", ("no-such-tool",), 60, needs="it is not on PATH"),
    ]
    records = gpu_proof.prove(todo, 100, dict(os.environ))
    assert [record["result"] for record in records] == ["passed", "failed", "stopped", "skipped"]
    assert [record["note"] for record in records] == ["3 passed", "1 failed", "begins", "it is not on PATH"]
    assert "absent: skipped, it is not on PATH" in capfd.readouterr().out


def test_a_part_that_no_longer_fits_is_skipped() -> None:
    records = gpu_proof.prove([Part("any", python("print()"), 60)], gpu_proof.LEAST_SECONDS - 1, dict(os.environ))
    assert records[0]["result"] == "skipped" and records[0]["note"] == "no time left"


def test_the_shares_fit_into_ten_minutes_of_what_always_runs() -> None:
    shares = {part.name: part.most for part in gpu_proof.parts(Path("x"))}
    assert shares["tests"] + shares["kernels"] + shares["step"] <= 600


def test_the_teacher_is_measured_where_the_report_looks_for_it() -> None:
    commands = {part.name: part.command for part in gpu_proof.parts(Path("x"))}
    assert commands["teacher"][-1] == str(Path("x") / "teacher.jsonl")
    assert commands["teacher"][5:9] == ("--size", "large", "--batch", "256")
    assert commands["teacher of a small batch"][-1] == str(Path("x") / "teacher-batch16.jsonl")


def test_it_writes_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"card": "NVIDIA Test 9000", "date": "2026-01-31"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "environment", lambda device, seed: facts)
    monkeypatch.setattr(gpu_proof, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_proof, "parts", lambda folder: [Part("bad", python("raise SystemExit('broken')"), 60)])
    assert gpu_proof.main([]) == 1
    folder = tmp_path / "benchmarks" / "results" / "nvidia-test-9000-2026-01-31"
    assert json.loads((folder / "environment.json").read_text()) == facts
    record = json.loads((folder / "proof.jsonl").read_text())
    assert record["result"] == "failed" and record["note"] == "broken" and record["env"] == facts
    assert (
        "wrote benchmarks/results/nvidia-test-9000-2026-01-31: environment.json, proof.jsonl" in capsys.readouterr().out
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_script_works_where_nothing_is_installed(tmp_path: Path) -> None:
    """-S hides site-packages and with them the installed package; torch alone is put back."""
    site = Path(torch.__file__).resolve().parents[1]
    hide = tmp_path / "hide.py"
    hide.write_text(
        "import importlib.machinery, sys\n"
        f"sys.path.append({str(site)!r})\n"
        "sys.argv = sys.argv[1:]\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", str(hide), str(ROOT / "benchmarks" / "gpu_proof.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.startswith("gpu-proof: expected a CUDA device"), done.stderr
