"""The GPU proof's own logic: budget, records, verdict, and what it says where there is no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def prove(todo: list[Part], seconds: float, tmp_path: Path, **more: Any) -> list[dict[str, Any]]:
    return gpu_proof.prove(todo, seconds, dict(os.environ), tmp_path / "logs", **more)


def test_parts_that_pass_fail_and_run_too_long(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    todo = [
        Part("good", python("print('3 passed')"), 60),
        Part("bad", python("print('1 failed'); raise SystemExit(1)"), 60),
        Part("slow", python("import time; print('begins', flush=True); time.sleep(60)"), 1.0),
        Part("absent", ("no-such-tool",), 60, needs="it is not on PATH"),
    ]
    told: list[dict[str, Any]] = []
    lines = prove(todo, 100, tmp_path, record=told.append)
    assert [line["result"] for line in lines] == ["passed", "failed", "stopped", "skipped"]
    assert [line["note"] for line in lines if line["result"] != "stopped"] == ["3 passed", "1 failed", todo[3].needs]
    assert told == lines
    assert "absent: skipped, it is not on PATH" in capfd.readouterr().out
    assert (tmp_path / "logs" / "bad.log").read_text() == "1 failed\n"


def test_a_part_that_no_longer_fits_is_skipped_and_says_how_to_run_it(tmp_path: Path) -> None:
    (line,) = prove([Part("any", python("print()"), 60)], gpu_proof.LEAST_SECONDS - 1, tmp_path)
    assert line["result"] == "skipped" and line["note"] == "no time left; --only any runs it"


def test_the_budget_cuts_a_share_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof, "LEAST_SECONDS", 0.5)
    sleeper = python("import time; print('begins', flush=True); time.sleep(60)")
    lines = prove([Part("first", sleeper, 60), Part("second", sleeper, 60)], 1.2, tmp_path)
    assert [line["result"] for line in lines] == ["stopped", "skipped"] and lines[0]["seconds"] < 10


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux's /proc")
def test_a_part_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A worker that ignores the request to end would otherwise hold the card."""
    worker = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    starter = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {worker!r}]); print(p.pid, flush=True); time.sleep(60)"  # noqa: E501
    prove([Part("parent", python(starter), 1.5)], 100, tmp_path)
    number = int((tmp_path / "logs" / "parent.log").read_text().split()[0])
    for _ in range(100):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


def test_what_the_tests_are_waited_with_is_run_beside_them_and_again(tmp_path: Path) -> None:
    """Briefly, with its rows thrown away; and only beside the tests."""
    note = tmp_path / "note"
    code = f"import sys; open({str(note)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    wait = f"import os, time\nfor _ in range(400):\n  if os.path.exists({str(note)!r}): break\n  time.sleep(0.05)"
    todo = [
        Part("tests", python(wait), 60),
        Part("step", (*python(code), "--seconds", "4"), 60, warm=True),
        Part("cold", (*python(code), "--cold"), 60),
        Part("absent", (*python(code), "--absent"), 60, needs="it is not here", warm=True),
    ]
    assert [line["result"] for line in prove(todo, 100, tmp_path)] == ["passed", "passed", "passed", "skipped"]
    warm, *measured = note.read_text().splitlines()
    assert warm == f"--seconds 4 --seconds 0.01 --json {os.devnull}" and measured == ["--seconds 4", "--cold"]


def test_a_warm_up_that_does_not_end_is_ended_with_the_share_of_the_tests(tmp_path: Path) -> None:
    endless = ["-c", "import time, sys; time.sleep(60 if '--seconds' in sys.argv else 0)"]
    todo = [Part("tests", python("print('1 passed')"), 1.5), Part("step", (sys.executable, *endless), 60, warm=True)]
    started = time.monotonic()
    assert [line["result"] for line in prove(todo, 100, tmp_path)] == ["passed", "passed"]
    assert time.monotonic() - started < 30


def by_name(folder: str = "x") -> dict[str, Part]:
    return {part.name: part for part in gpu_proof.parts(Path(folder))}


def test_the_most_important_parts_come_first_and_fit() -> None:
    names = list(by_name())
    assert names[:5] == ["tests", "step", "kernels", "teacher", "attention"]
    assert sum(by_name()[name].most for name in names[:5]) <= 600
    assert len(set(names)) == len(names)


def test_every_benchmark_is_written_where_the_report_looks_for_it() -> None:
    files = [part.command[-1] for part in by_name().values() if "--json" in part.command]
    assert len(set(files)) == len(files) and all(Path(file).parent == Path("x") for file in files)
    assert {"step", "step-amd", "teacher", "kernels", "attention", "profile", "ablation"} <= {
        Path(file).stem for file in files
    }


def test_every_command_is_one_that_the_benchmark_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """The options of each part are known to it: the mistake that is reported is that there is no such card here."""
    if torch.cuda.is_available():
        pytest.skip("it would be run")
    for part in by_name().values():
        if "--device" not in part.command or part.needs:
            continue
        module = importlib.import_module(part.command[2])
        assert module.main(list(part.command[3:])) == 2
        assert "--device: expected a device of this machine" in capsys.readouterr().err, part.name


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof.shutil, "which", lambda name: None)
    find = importlib.util.find_spec
    gone = ("pytest", "nvidia.dali", "cohobate.benchmarks.ablation")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    needs = {name: part.needs for name, part in by_name().items() if part.needs}
    assert needs["tests"] == "pytest is not installed" and needs["sanitizer"] == "compute-sanitizer is not on PATH"
    assert needs["data"].startswith("nvidia.dali is not installed (it decodes on the GPU")
    assert needs["ablation"] == "cohobate.benchmarks.ablation is not installed"
    assert "kernels" not in needs


def test_the_tests_are_those_marked_and_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    command = gpu_proof._tests()
    assert "tests/gpu/test_cuda.py" in command and "tests/teacher/test_fp8.py" in command
    assert "tests/test_cli.py" not in command and command[command.index("-n") + 1] == "8"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "-n" not in gpu_proof._tests()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A card, and three parts: one that breaks until the file "mended" is there, two that pass."""
    facts = {"card": "NVIDIA Test 9000", "date": "2026-01-31", "commit": "abc"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "environment", lambda device, seed: facts)
    monkeypatch.setattr(gpu_proof, "ROOT", tmp_path)
    breaks = f"import os; os.path.exists({str(tmp_path / 'mended')!r}) or exit('broken')"
    made = [Part("one", python(breaks), 60), Part("two", python("print(2)"), 60), Part("three", python("print(3)"), 60)]
    monkeypatch.setattr(gpu_proof, "parts", lambda folder: made)
    return facts


def results(tmp_path: Path) -> list[tuple[str, str]]:
    proof = tmp_path / "benchmarks" / "results" / "nvidia-test-9000-2026-01-31" / "proof.jsonl"
    lines = [json.loads(line) for line in proof.read_text().splitlines()]
    return [(line["part"], line["result"]) for line in lines]


def test_it_writes_what_it_says(stub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_proof.main(["--only", "one"]) == 1
    folder = tmp_path / "benchmarks" / "results" / "nvidia-test-9000-2026-01-31"
    assert json.loads((folder / "environment.json").read_text()) == stub
    line = json.loads((folder / "proof.jsonl").read_text())
    assert line["result"] == "failed" and line["note"] == "broken" and line["env"] == stub
    assert f"wrote {folder}: environment.json, proof.jsonl" in capsys.readouterr().out


def test_pieces_are_merged_into_one_folder(stub: dict[str, Any], tmp_path: Path) -> None:
    assert gpu_proof.main(["--only", "three,one"]) == 1
    assert results(tmp_path) == [("one", "failed"), ("three", "passed")]
    (tmp_path / "mended").touch()
    assert gpu_proof.main(["--rest"]) == 0
    assert results(tmp_path)[2:] == [("one", "passed"), ("two", "passed")]
    assert gpu_proof.main(["--rest"]) == 0 and len(results(tmp_path)) == 4
    stub["commit"] = "def"  # what another commit passed proves nothing of this one
    assert gpu_proof.main(["--rest", "--budget", "1"]) == 0
    assert results(tmp_path)[4:] == [("one", "skipped"), ("two", "skipped"), ("three", "skipped")]


def test_a_part_asked_for_by_name_may_take_the_whole_budget(
    stub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its share is meant for a run of all parts, behind warm-ups."""
    slow = Part("slow", python("import time; time.sleep(1.5)"), 0.5)
    monkeypatch.setattr(gpu_proof, "parts", lambda folder: [slow])
    assert gpu_proof.main([]) == 1 and gpu_proof.main(["--only", "slow"]) == 0
    assert results(tmp_path) == [("slow", "stopped"), ("slow", "passed")]


def test_another_folder_and_a_part_that_does_not_exist(
    stub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_proof.main(["--only", "two", "--into", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "proof.jsonl").is_file()
    assert gpu_proof.main(["--only", "two,four"]) == 2
    assert "--only: expected some of one, two, three; got 'two,four'" in capsys.readouterr().err


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
