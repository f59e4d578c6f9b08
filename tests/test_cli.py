"""The command line, mostly when it is used wrongly: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cohobate import cli, data
from cohobate.cli import info
from cohobate.errors import UserError

SMALL = ["data.generate=null", "data.workers=0", "log.tensorboard=false", "device=cpu", "data.batch_size=16"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_images(tmp_path_factory.mktemp("cli") / "set", train=40, test=16, processes=1)


def complaint(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a wrong command prints."""
    assert cli.main(list(words)) == 2
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("cohobate: ") and captured.out == "", captured
    return lines[0]


WRONG_WORDS = {
    ("tran", "demo"): [
        "verb: expected one of train, eval, data, report, viz, bench, plan, convert, info; got 'tran'",
        "did you mean 'train'?",
    ],
    ("train",): ["recipe: expected one of", "got none"],
    ("train", "dmo"): ["recipe: expected one of", "got 'dmo'", "did you mean 'demo'?"],
    ("train", "demo", "optimzer.blr=1"): ["optimzer.blr: unknown key", "did you mean 'optimizer.blr'?"],
    ("train", "demo", "--optimzer.blr", "1"): ["optimzer.blr: unknown key", "did you mean 'optimizer.blr'?"],
    ("train", "demo", "--seed"): ["seed: expected a value after --seed, got none"],
    ("train", "demo", "seed=many"): ["seed: expected a whole number, got 'many'"],
    ("train", "demo", "mask.ratio=0.99"): ["mask.ratio", "keeps 1 to 63 of 64 tokens", "0.99, which keeps 0"],
    ("train", "demo", "data.image_size=33"): ["data.image_size: expected a height that model.patch=4 divides, got 33"],
    ("train", "demo", "data.image_size=[32,34]"): ["expected a width that model.patch=4 divides, got 34"],
    ("eval",): ["eval: the following arguments are required: metric, weights, data"],
    ("eval", "kn", "a", "b"): ["eval: argument metric: invalid choice: 'kn'"],
    ("eval", "knn", "/nowhere", "/nowhere"): ["weights: expected a run folder or an export", "'/nowhere'"],
    ("data", "mak", "x"): ["data: argument action: invalid choice: 'mak'"],
    ("data", "inspect", "/nowhere"): ["source: expected a folder of images", "/nowhere"],
    ("report", "/nowhere"): ["run folder: expected an existing folder, got '/nowhere'"],
    ("bench", "kernel"): ["bench: expected one of", "got 'kernel'", "did you mean 'kernels'?"],
    ("info", "--loud"): ["info: unrecognized arguments: --loud"],
}


@pytest.mark.parametrize("words", WRONG_WORDS, ids=" ".join)
def test_wrong_words(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    line = complaint(capfd, *words)
    for part in WRONG_WORDS[words]:
        assert part in line


def test_data_that_are_not_there(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.md").write_text("no image")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"")
    cases = {
        "": "data.root: expected a folder of images or a text file that lists them, got nothing",
        str(tmp_path / "missing"): "data.root: expected an existing folder or file list, got",
        str(tmp_path / "empty"): "found an empty folder",
        str(tmp_path / "text"): "found 1 files, but none named like an image",
        str(broken): "no usable image",
    }
    for root, expected in cases.items():
        line = complaint(capfd, "train", "demo", *SMALL, f"data.root={root}", f"run={tmp_path / 'run'}")
        assert expected in line, root


def test_too_few_images_for_an_update(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "demo", *SMALL, f"data.root={images}", f"run={tmp_path / 'run'}", "optimizer.accumulate=3"]
    line = complaint(capfd, *words)
    assert "data.batch_size: expected an update of at most 40 images" in line
    assert "got 16 x 3 accumulated x 1 ranks" in line


def test_a_stage_shorter_than_its_warmup(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "demo", *SMALL, f"data.root={images}", f"run={tmp_path / 'run'}", "stages.1.steps=2"]
    line = complaint(capfd, *words, "optimizer.warmup_epochs=1")
    assert "optimizer.warmup_epochs: expected a warm-up shorter than the stage (2 steps), got 2 steps" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_or_a_loader_that_is_not_there(
    tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "demo", f"data.root={images}", f"run={tmp_path / 'run'}", "data.batch_size=16"]
    assert "device: expected one that is available here (cpu), got cuda" in complaint(capfd, *words, "device=cuda")
    assert "dali-gpu" in complaint(capfd, *words, "data.loader=dali-gpu")


def test_weights_that_do_not_fit(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "demo", *SMALL, f"data.root={images}", f"run={tmp_path / 'run'}"]
    teacher = ["stages.1.teacher.source=file", f"stages.1.teacher.path={tmp_path}"]
    assert "weights: expected a run folder or an export" in complaint(capfd, *words, *teacher)


def test_only_the_users_mistakes_are_hushed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> None:
        def verb(_: list[str]) -> int:
            raise error

        monkeypatch.setattr(info, "main", verb)

    fails(UserError("seed: expected\nsomething"))
    assert complaint(capfd, "info") == "cohobate: seed: expected something"
    fails(FileNotFoundError(2, "No such file or directory", "/nowhere"))
    assert "No such file or directory: '/nowhere'" in complaint(capfd, "info")
    fails(KeyboardInterrupt())
    assert cli.main(["info"]) == 130 and capfd.readouterr().err == "cohobate: interrupted\n"
    fails(ValueError("raised in this test, which is no part of the package"))
    with pytest.raises(ValueError, match="no part of the package"):
        cli.main(["info"])


def test_an_ops_complaint_is_one_line_too(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cohobate.kernels import tokens

    def verb(_: list[str]) -> int:
        tokens.take(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.int64))
        return 0

    monkeypatch.setattr(info, "main", verb)
    assert "int32" in complaint(capfd, "info")


def test_help_names_every_verb_and_every_key(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    usage = capfd.readouterr().out
    for verb in cli.VERBS:
        assert f"cohobate {verb}" in usage
    assert cli.main(["train", "--help"]) == 0
    assert "recipes: " in capfd.readouterr().out
    assert cli.main(["train", "demo", "--help"]) == 0
    keys = capfd.readouterr().out
    for key in ("--optimizer.blr", "--stages.1.teacher.source", "--data.image-size", "--compat.keep-optimizer"):
        assert key in keys
    assert cli.main(["bench"]) == 0 and "kernels" in capfd.readouterr().out
    for verb in ("eval", "data", "report", "info"):
        assert cli.main([verb, "--help"]) == 0 and f"usage: cohobate {verb}" in capfd.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    script = """import sys
from cohobate.cli import main
main(["--help"])
print([name for name in ("torch", "yaml", "rich", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_info_says_what_works_and_why_the_rest_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    table = " ".join(capfd.readouterr().out.split())
    for word in ("gather_patches", "align_loss", "native library", "dali-gpu", "torch", "sm90"):
        assert word in table


def test_data_make_and_inspect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    assert cli.main(["data", "make", str(folder), "--train", "12", "--test", "4", "--seed", "3"]) == 0
    assert cli.main(["data", "inspect", str(folder), "--split", "train"]) == 0
    shown = capfd.readouterr().out
    assert "images      12" in shown and "texture" in shown
    assert "holds another generated set" in complaint(capfd, "data", "make", str(folder), "--train", "13")


def test_eval_reads_an_export(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from cohobate.models import build
    from cohobate.training import export

    export(tmp_path / "weights", build(image_size=16, patch=4, width=24, depth=1, heads=2), None, {})
    for metric in ("knn", "linear"):
        words = [
            "eval",
            metric,
            str(tmp_path / "weights"),
            str(images),
            "--k",
            "5",
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
        assert cli.main([*words, "--json", str(tmp_path / "out.jsonl")]) == 0
    assert "effective rank" in capfd.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["metric"] for row in rows] == ["knn"] * 4 + ["linear"] * 4
    assert {row["label"] for row in rows} == {"texture", "shape"}
    assert "k: expected 1 to 40" in complaint(
        capfd, "eval", "knn", str(tmp_path / "weights"), str(images), "--k", "41", "--workers", "0", "--device", "cpu"
    )
    no_parts = complaint(capfd, "eval", "knn", str(tmp_path / "weights"), str(images / "train"), "--workers", "0")
    assert "data: expected a train and a test part" in no_parts
