"""The study's arms, what an interrupted one still trains, and what its tables and figures say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cohobate import config as configuration
from cohobate.benchmarks import quality, report, study
from cohobate.config import Config
from cohobate.errors import UserError

MEAN_KNN = ("texture", "mean", "knn")


def loaded(name: str) -> Config:
    """An arm's configuration as its run would have it."""
    arm = study.ARMS[name]
    return configuration.load(study.RECIPE, [*arm.settings, *(["stages.0.teacher.path=x"] if arm.teacher else [])])


def differing(one: Config, other: Config) -> set[str]:
    a, b = configuration.bound(one), configuration.bound(other)
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def trained(arm: str, seed: int, values: Sequence[float], settings: Sequence[str] = ()) -> dict[str, Any]:
    """A run whose accuracies after the stages 0, 1, ... are ``values``; each judge adds a little of its own."""
    rows = [
        {"stage": stage, "stage_name": f"s{stage}", "label": label, "features": features, "metric": metric,
         "value": value + 0.01 * place, "effective_rank": 9.0}
        for stage, value in enumerate(values)
        for place, (label, features, metric) in enumerate(study.JUDGES)
    ]  # fmt: skip
    run = {"arm": arm, "seed": seed, "settings": list(settings), "seconds": 60, "evaluations": rows}
    return {**run, "env": {"kind": "A machine", "commit": "abc", "dirty": False}}


RUNS = [
    trained("copied", 0, [0.1, 0.2, 0.3, 0.4]),
    trained("copied", 1, [0.2, 0.4, 0.3, 0.4]),
    trained("mae", 0, [0.1, 0.7]),
    trained("mae", 1, [0.2, 0.9]),
    trained("pretrained", 1, [0.2, 0.6, 0.7, 0.8]),
    trained("pretrained", 0, [0.1, 0.6, 0.7, 0.8]),
]


def test_arms_differ_from_the_published_one_where_they_should_and_nowhere_else() -> None:
    published = loaded("copied")
    assert [stage.teacher.source for stage in published.stages] == ["random", "previous", "previous"]
    assert published.stages[0].teacher.init == "copy" and {s.student.init for s in published.stages} == {"fresh"}
    expected = {
        "independent": {"stages.0.teacher.init"},
        "depth-0": {"stages.0.teacher.depth"},
        "pretrained": {"stages.0.teacher.source", "stages.0.teacher.path"},
    }
    assert {name: differing(published, loaded(name)) for name in expected} == expected
    assert differing(published, loaded("mask-0.75")) == {"mask.ratio"} == differing(published, loaded("mask-0.9"))
    assert differing(published, loaded("continued")) == {"stages.1.student.init", "stages.2.student.init"}
    mae, long, one = loaded("mae"), loaded("long-mae"), loaded("one-stage")
    assert mae.model == published.model and mae.stages[0].epochs == published.stages[0].epochs
    assert [[stage.method for stage in config.stages] for config in (mae, long, one)] == [["mae"], ["mae"], ["dbot"]]
    assert one.stages[0].epochs == long.stages[0].epochs == sum(stage.epochs for stage in published.stages)
    assert one.stages[0].teacher == published.stages[0].teacher


def test_every_arm_stands_behind_its_teacher_and_every_part_names_arms() -> None:
    order = list(study.ARMS)
    assert all(order.index(arm.teacher) < order.index(arm.name) for arm in study.ARMS.values() if arm.teacher)
    assert {name for part in study.PARTS.values() for name in part} | {"mae"} == set(order)


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_scale_is_a_configuration(scale: str) -> None:
    for arm in study.ARMS.values():
        path = ["stages.0.teacher.path=x"] if arm.teacher else []
        configuration.load(study.RECIPE, [*study.SCALES[scale], *arm.settings, *path])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Runs that would have been trained, as (folder's name, settings); training is replaced by a stored result."""
    made: list[tuple[str, list[str]]] = []

    def run(recipe: str, seed: int, settings: Sequence[str], folder: Path) -> list[dict[str, Any]]:
        assert recipe == study.RECIPE and folder.name.endswith(f"-{seed}")
        for word in settings:
            if word.startswith("stages.0.teacher.path="):
                assert Path(word.partition("=")[2]).is_dir(), "a student began before its teacher was there"
        time.sleep(0.1 * folder.name.startswith("mae"))  # so that others could overtake a teacher
        folder.mkdir(parents=True, exist_ok=True)
        made.append((folder.name, list(settings)))
        return [{**row, "recipe": recipe} for row in trained("any", seed, [0.1, 0.5])["evaluations"]]

    monkeypatch.setattr(quality, "run", run)
    return made


def test_an_interrupted_study_trains_what_is_missing(tmp_path: Path, calls: list[tuple[str, list[str]]]) -> None:
    file = tmp_path / "new" / "study.jsonl"
    words = ["--json", str(file), "--folder", str(tmp_path / "runs"), "--seeds", "0", "1"]
    assert study.main([*words, "--only", "teachers", "--jobs", "2"]) == 0
    arms = ("mae", "copied", "pretrained", "independent", "depth-0")
    assert sorted(name for name, _ in calls) == sorted(f"{arm}-{seed}" for arm in arms for seed in (0, 1))
    assert all(run["evaluations"] and "commit" in run["env"] for run in study.read(file))

    calls.clear()
    assert study.main([*words, "--only", "teachers"]) == 0 and calls == []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if (json.loads(line)["arm"], json.loads(line)["seed"]) != ("pretrained", 1)]
    file.write_text("".join(kept), encoding="utf-8")
    assert study.main([*words, "--only", "teachers"]) == 0
    assert [name for name, _ in calls] == ["pretrained-1"] and len(study.read(file)) == 10

    calls.clear()
    assert study.main([*words, "--only", "reset"]) == 0  # what it is compared with was trained for the teachers
    assert [name for name, _ in calls] == ["continued-0", "continued-1"]


def test_a_teacher_whose_weights_are_gone_is_trained_again(tmp_path: Path, calls: list[tuple[str, list[str]]]) -> None:
    file = tmp_path / "study.jsonl"
    file.write_text(json.dumps(trained("mae", 0, [0.1, 0.5])) + "\n", encoding="utf-8")
    words = ["--json", str(file), "--folder", str(tmp_path / "runs"), "--seeds", "0", "--only", "teachers"]
    assert study.main(words) == 0
    assert [name for name, _ in calls] == ["mae-0", "copied-0", "pretrained-0", "independent-0", "depth-0-0"]
    assert sorted(run["arm"] for run in study.read(file)) == ["copied", "depth-0", "independent", "mae", "pretrained"]


def test_a_file_of_other_settings_is_refused(
    tmp_path: Path, calls: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.jsonl"
    file.write_text(json.dumps(trained("copied", 0, [0.1], ["optimizer.lr=1e-3"])) + "\n", encoding="utf-8")
    assert study.main(["--json", str(file), "--folder", str(tmp_path)]) == 2
    assert "--json: expected runs with the settings" in capsys.readouterr().err and not calls


def test_a_failed_run_ends_the_study_but_keeps_what_was_finished(
    tmp_path: Path,
    calls: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fine = quality.run

    def run(recipe: str, seed: int, settings: Sequence[str], folder: Path) -> list[dict[str, Any]]:
        if folder.name == "depth-0-0":
            raise UserError("study, seed 0: no space left")
        return fine(recipe, seed, settings, folder)

    monkeypatch.setattr(quality, "run", run)
    file = tmp_path / "study.jsonl"
    assert study.main(["--json", str(file), "--folder", str(tmp_path), "--only", "teachers"]) == 2
    assert "no space left" in capsys.readouterr().err
    stored = sorted(f"{run['arm']}-{run['seed']}" for run in study.read(file))
    assert stored == sorted(name for name, _ in calls) == ["copied-0", "independent-0", "mae-0", "pretrained-0"]


def test_stage_0_is_the_first_teacher_itself() -> None:
    assert study.curve(RUNS, "copied", MEAN_KNN)[0] == pytest.approx([0.1, 0.2])  # a copy of the untrained student
    assert study.curve(RUNS, "pretrained", MEAN_KNN)[0] == pytest.approx([0.7, 0.9])  # MAE after its only stage
    assert study.curve(RUNS, "pretrained", MEAN_KNN)[3] == pytest.approx([0.8, 0.8])
    assert study.curve([trained("depth-0", 0, [0.1, 0.2])], "depth-0", MEAN_KNN).keys() == {1}
    assert study.curve(RUNS, "independent", MEAN_KNN) == {}
    long = study.curve([trained("one-stage", 0, [0.1, 0.6])], "one-stage", MEAN_KNN)
    assert long == {0: [0.1], 3: [0.6]}  # one stage of three stages' length
    assert study.untrained(RUNS, MEAN_KNN) == pytest.approx([0.1, 0.2])


def test_the_table_has_means_deviations_and_what_the_teacher_is_still_worth() -> None:
    lines = study.table(RUNS, "teachers").splitlines()
    assert lines[0].endswith("| the first teacher itself | after stage 1 | after stage 2 | after stage 3 |")
    copied, pretrained, deviation = lines[2:5]
    assert copied.startswith("| texture: knn, mean | random, the student's copy")
    assert copied.endswith("| 0.150 ± 0.071 | 0.300 ± 0.141 | 0.300 ± 0.000 | 0.400 ± 0.000 |")
    assert pretrained.startswith("|  | pretrained by MAE | 0.800 ± 0.141 | 0.600 ± 0.000 |")
    assert deviation.endswith("|  | 0.212 | 0.283 | 0.283 |")  # of 0.3 and 0.6, 0.3 and 0.7, 0.4 and 0.8
    assert len(lines) == 2 + 3 * len(study.JUDGES) and "independently" not in "".join(lines)


def test_figures_hold_every_arm_with_its_deviations_and_seeds() -> None:
    left = study.figure(RUNS, ["teachers"]).axes[0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "untrained", "random, the student's copy (as published)", "pretrained by MAE"
    ]  # fmt: skip
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["first\nteacher", "stage 1", "stage 2", "stage 3"]
    copied = left.containers[0].lines[0]
    assert copied.get_ydata() == pytest.approx([0.15, 0.3, 0.3, 0.4])
    bars = [segment[:, 1] for segment in left.containers[0].lines[2][0].get_segments()]
    assert bars[1] == pytest.approx([0.3 - 0.02**0.5, 0.3 + 0.02**0.5]) and bars[2] == pytest.approx([0.3, 0.3])
    seeds = [line for line in left.get_lines() if line.get_marker() == "."]
    assert len(seeds) == 8 and seeds[1].get_ydata() == pytest.approx([0.2, 0.4])
    assert len(study.figure(RUNS, ["mask", "reset"]).axes) == 4


def test_documents_hold_the_tables_and_figures_of_the_newest_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "study.md"
    page.write_text(
        "<!-- bench:study-teachers -->\n<!-- /bench -->\n![](figures/study-mask-reset.png)\n", encoding="utf-8"
    )
    assert report.render(tmp_path, "study-mask").startswith("not measured")
    for folder, runs in (("a-2026-01-01", RUNS[:2]), ("a-2026-01-02", RUNS)):
        file = tmp_path / "benchmarks" / "results" / folder / "study.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    assert report.stale(tmp_path) == ["docs/study.md", "docs/figures/study-mask-reset.png (missing)"]
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main([]) == 0 and report.stale(tmp_path) == []
    text = page.read_text(encoding="utf-8")
    assert "pretrained by MAE" in text and re.search(
        r"a-2026-01-02/study.jsonl`; 6 runs, seeds 0, 1, 0.1 hours on A machine", text
    )
    file.write_text(file.read_text(encoding="utf-8").replace("0.7", "0.6"), encoding="utf-8")
    assert "docs/figures/study-mask-reset.png (drawn from other data)" in report.stale(tmp_path)
