"""The examples run as they are, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_a_teacher_out_of_hugging_face_weights_agrees_with_the_original(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    script = EXAMPLES / "teacher_features.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 30
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    errors = {key: float(error) for line in lines for key, error in re.findall(r"^(\S+, layer \d), .*: (\S+),", line)}
    assert list(errors) == [f"torch.{dtype}, layer {layer}" for dtype in ("float32", "bfloat16") for layer in (3, 6)]
    assert all("64 of 256 patches" in line for line in lines)
    assert all(0 < errors[key] < 1e-5 for key in errors if "float32" in key)  # sums in another order
    assert all(1e-5 < errors[key] < 1e-2 for key in errors if "bfloat16" in key)  # a few roundings of 2**-9 a block
