"""``cohobate data`` for videos: make, inspect, shard."""

from __future__ import annotations

from pathlib import Path

import pytest

from cohobate.cli import main


def test_make_shard_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, shards = str(tmp_path / "v"), str(tmp_path / "s")
    assert main(["data", "make", made, "--kind", "video", "--codec", "mjpeg", "--train", "5", "--test", "2"]) == 0
    (tmp_path / "v" / "train" / "000003.avi").write_bytes(b"")
    assert main(["data", "inspect", made, "--kind", "video", "--split", "train"]) == 0
    text = capsys.readouterr().out
    assert "videos      4" in text and "stored as   mjpeg: 4" in text and "empty: 1" in text
    assert main(["data", "shard", made, shards, "--split", "train", "--short-side", "32", "--per-shard", "3"]) == 0
    assert "videos: 4 in" in capsys.readouterr().out
    assert main(["data", "inspect", shards, "--kind", "video", "--split", "train", "--verify"]) == 0
    text = capsys.readouterr().out
    assert "stored as   shard: 4" in text and "32 wide, 32 high" in text and "motion: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["make", "{}", "--kind", "video", "--variant", "large"],
            "variant: expected none for --kind video, got 'large'",
        ),
        (["make", "{}", "--codec", "vp9"], "codec: expected none for --kind image"),
        (["inspect", "{}/none", "--kind", "video"], "source: expected a folder of videos"),
        (["shard", "{}/none", "{}/s"], "source: expected a folder of videos"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *(word.format(tmp_path) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
