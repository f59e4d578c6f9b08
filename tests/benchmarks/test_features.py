"""``cohobate bench features``: the answer is the original's, and features that are wrong cannot win."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cohobate.benchmarks import command, features, machine
from cohobate.benchmarks.harness import QUICK
from cohobate.evaluation import Extractor

pytest.importorskip("transformers")
SMALL = features.Shape("tiny", 32, 2)


@pytest.fixture
def setting() -> command.Setting:
    ceilings = machine.Ceilings("cpu", ((1024, 1.0),), {"fp32": 1.0, "bf16": 2.0})
    effort = dataclasses.replace(QUICK, most=3)
    return command.Setting("cpu", machine.environment("cpu"), ceilings, effort)


def test_all_providers_agree(setting: command.Setting) -> None:
    rows = {row.provider: row for row in features.run(SMALL, setting, compiled=False)}
    assert list(rows) == ["transformers fp32", "transformers bf16", "engine fp32", "engine bf16"]
    assert all(row.agrees and row.p50_ms is not None for row in rows.values())
    bf16 = rows["engine bf16"].max_rel_err
    assert bf16 is not None and 1e-4 < bf16 <= (
        rows["engine bf16"].tolerance or 0
    )  # it is bf16, and within twice its own
    assert rows["engine fp32"].flops == rows["transformers fp32"].flops


def test_wrong_features_get_no_ratio(setting: command.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Extractor.tokens
    monkeypatch.setattr(Extractor, "tokens", lambda self, pixels: right(self, torch.zeros_like(pixels)))
    for row in features.run(SMALL, setting, compiled=False):
        assert row.agrees == (row.role != "ours") and (row.agrees or row.ratio_vs_eager is None)


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert features.main(["--batch", "0"]) == 2
    assert "--batch: expected at least 1, got 0" in capsys.readouterr().err
