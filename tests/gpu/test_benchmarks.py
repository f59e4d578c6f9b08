"""Every benchmark runs on a card and finds its own results right; what it says of times is not looked at."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from cohobate.benchmarks import machine
from cohobate.benchmarks.harness import read_rows

pytestmark = pytest.mark.gpu

COMMANDS = {
    "kernels": ["--ops", "align_loss,embed_patches,short_attention,random_order"],
    "attention": ["--keys", "50,197", "--dims", "64", "--dtypes", "bf16", "--batch", "2"],
    "teacher": [],
    "step": [],
    "step amd": ["--recipe", "amd"],
    "ablation": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_quick_run(name: str, tmp_path: Path) -> None:
    module, path, threads = importlib.import_module(f"cohobate.benchmarks.{name.split()[0]}"), tmp_path / "rows", 1
    before, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    try:
        arguments = ["--device", "cuda", "--quick", "--threads", str(threads), "--json", str(path)]
        assert module.main([*arguments, *COMMANDS[name]]) == 0
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.allow_tf32 = tf32
    rows = read_rows(path)
    ours = [row for row in rows if row.role == "ours" and not row.note.startswith("not measured")]
    assert ours and all(row.device == "cuda" for row in rows)
    wrong = [f"{row.name} {row.mode} {row.provider}: {row.note}" for row in ours if not row.agrees]
    assert not wrong
    left = [f"{row.name} {row.provider}: {row.note}" for row in rows if "cannot be captured" in row.note]
    assert not [text for text in left if "reference" not in text], left


def test_the_ceilings_are_those_of_a_card() -> None:
    ceilings = machine.measure_ceilings("cuda", seconds=0.05)
    assert ceilings.bandwidth(1) > 100  # GB/s
    assert ceilings.matmul["bf16"] > ceilings.matmul["fp32"] > 1  # TFLOP/s, random numbers
    facts = machine.environment("cuda")
    assert facts["kind"] == facts["card"] and facts["l2_mb"] > 1
