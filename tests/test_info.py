"""``cohobate info``: what it says of attention, norm and optimizer backends, and how much it says."""

from __future__ import annotations

import pytest
import rich.console
import torch

from cohobate.cli import info
from cohobate.kernels.backends import attention
from cohobate.kernels.backends.attention import Rule


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", "100")
    info.show()
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def row(lines: list[str], start: str) -> str:
    (found,) = [line for line in lines if line.startswith(start)]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_backends_and_their_reasons(lines: list[str]) -> None:
    for name in attention.BACKENDS:
        assert any(line.startswith(f"attention {name} ") for line in lines), name
    assert row(lines, "attention explicit") == "attention explicit yes untried"
    assert row(lines, "attention sdpa-cudnn") == "attention sdpa-cudnn - untried"
    assert row(lines, "norm torch").startswith("norm torch yes")
    assert row(lines, "optimizer apex").startswith("optimizer apex - no: ")
    assert row(lines, "cuda (not here) float32").startswith("cuda (not here) float32 50-1568 sdpa [")
    assert any(line.startswith("[1] ") for line in lines)


def test_what_decodes_videos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its reason, and which is taken; a forced one that cannot be used says so."""
    pytest.importorskip("av")
    monkeypatch.setattr("cohobate.data.video.torchcodec.why_not", lambda: "it finds no FFmpeg")
    for wanted, pyav, more in (("auto", "yes, and taken", 0), ("pyav", "yes, and taken", 0), ("torchcodec", "yes", 1)):
        monkeypatch.setenv("COHOBATE_VIDEO_DECODER", wanted)
        rich.console.Console(width=200).print(info._loaders())
        said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert "video files by torchcodec no: it finds no FFmpeg" in said and f"video files by pyav {pyav}" in said
        refused = [line for line in said if line.startswith("video files no: COHOBATE_VIDEO_DECODER: 'torchcodec'")]
        assert len(refused) == more


def test_it_fits_on_a_screen(lines: list[str]) -> None:
    assert len(lines) < 66


def test_calls_with_one_answer_share_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rules = (
        Rule("explicit", "measured so", device="cpu", dtype="float32", keys=128, head_dim=64, grad=True),
        Rule("explicit", "measured so", dtype="float16"),
        Rule("sdpa", "not measured"),
    )
    monkeypatch.setattr(attention, "rules", lambda: rules)
    from rich.console import Console

    Console(width=160).print(info._attention())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "cpu bfloat16, float32 (d=32 with gradient, d=32 without gradient, d=64 without gradient) 50-1568 sdpa [2]",
        "cpu float16 50-1568 explicit [1]",
        "cpu float32 (d=64 with gradient) 50-128 explicit [1], 197-1568 sdpa [2]",
        f"cuda{'' if torch.cuda.is_available() else ' (not here)'} bfloat16, float32 50-1568 sdpa [2]",
        f"cuda{'' if torch.cuda.is_available() else ' (not here)'} float16 50-1568 explicit [1]",
        "[1] measured so",
        "[2] not measured",
    ]
