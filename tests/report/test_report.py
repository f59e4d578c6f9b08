"""The report page: what a run folder's files become, and that a poor or broken run still gets one."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohobate.errors import UserError
from cohobate.report import plots, read_run, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(stages: int = 2, lines: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "step": 10 * (lines * (stage - 1) + line + 1),
            "stage": stage,
            "epoch": line // 10,
            "loss/total": 1 / (line + 1),
            "lr": 1e-3 * (1 - line / lines),
            "grad_norm": 1.0,
            "perf/samples_s": 500.0 + line,
            "perf/data_wait": 0.05,
            "target/std": 1.0,
        }
        for stage in range(1, stages + 1)
        for line in range(lines)
    ]


def evaluations(stages: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "stage_name": ["untrained", "mae", "dbot"][stage],
            "features": features,
            "label": "texture",
            "metric": metric,
            "value": 0.25 + 0.125 * stage,
            "effective_rank": 20.0 + stage,
        }
        for stage in range(stages + 1)
        for features in ("cls", "mean")
        for metric in ("knn", "linear")
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete run of two stages, in a folder whose name needs escaping."""
    run = tmp_path / "a run <b>&"
    run.mkdir()
    write_lines(run / "metrics.jsonl", metrics())
    write_lines(run / "evaluations.jsonl", evaluations())
    rng = np.random.default_rng(0)
    for stage, name in ((1, "1 mae"), (2, "2 dbot")):
        images = rng.integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
        arrays = {"images": images, "visible": rng.random((3, 6, 8)) < 0.25}
        if stage == 2:
            arrays |= {"target_pca": rng.random((3, 6, 8, 3)), "prediction_pca": rng.random((3, 6, 8, 3))}
            arrays |= {"attention": rng.random((3, 3, 6, 8)), "attention_heads": np.array([0, 5])}
        np.savez(run / f"samples-{stage}.npz", stage=name, **arrays)
    shown = {"queries": images, "neighbours": np.stack([images, images]).swapaxes(0, 1)}
    np.savez(run / "retrieval-2.npz", stage="2 dbot", similarity=rng.random((3, 2)), **shown)
    (run / "timing.json").write_text(json.dumps({"1": {"data": 2.0, "step": 9.5}, "2": {"data": 2.5, "step": 12.0}}))
    bad = {"skipped": {"truncated": 2}, "files": [["a<b>.jpg", "truncated"]]}
    (run / "data_report.json").write_text(json.dumps(bad))
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "cpu": {"threads": 2}}))
    (run / "config.yaml").write_text("seed: 7\nmodel:\n  size: tiny\n")
    return run


class Outline(HTMLParser):
    """Headings, images and everything that would be loaded from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.images: list[bytes] = []
        self.outside: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name in ("src", "href"):
            if values.get(name, "data:").startswith("data:image/png;base64,"):
                self.images.append(base64.b64decode(values[name].partition(",")[2]))
            elif name in values:
                self.outside.append(values[name])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_holds_everything_and_loads_nothing(folder: Path) -> None:
    page = write_report(folder)
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert page == folder / "report.html"
    assert outline.outside == [] and "url(" not in text and "<script" not in text
    assert len(outline.images) == 9 and all(image.startswith(PNG) for image in outline.images)
    assert {image.read_bytes() for image in (folder / "report").glob("*.png")} == set(outline.images)
    assert outline.headings[:3] == ["What the features are worth", "Loss", "What a stage sees and asks for"]
    assert outline.headings[3:5] == ["Where the student looks", "Nearest images"]
    assert outline.headings[5:] == ["Speed", "Signals", "Data", "Environment", "Configuration"]
    assert "seed: 7" in text and "cpu.threads" in text and "skipped.truncated" in text
    assert "a&lt;b&gt;.jpg: truncated" in text and "a run &lt;b&gt;&amp;" in text


def test_the_table_gives_values_and_gains(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    row = next(line for line in text.split("<tr>") if "<td>linear</td><td>texture</td><td>cls</td>" in line)
    assert re.findall(r"[+-]?\d+\.\d%?", row) == ["25.0%", "37.5%", "+12.5", "50.0%", "+25.0"]


def test_a_run_of_one_stage_without_evaluations(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "stage": 1, "loss/total": 0.5}])
    outline = Outline(write_report(tmp_path).read_text(encoding="utf-8"))
    assert outline.headings == ["Loss"] and len(outline.images) == 1


def test_losses_that_are_not_finite_are_told(tmp_path: Path) -> None:
    rows = metrics(stages=1)
    for row in rows[20:]:
        row["loss/total"] = math.nan
    rows[5]["loss/total"] = None  # how a strict JSON writer spells it
    rows[6]["loss/total"] = math.inf
    write_lines(tmp_path / "metrics.jsonl", rows)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "loss/total was not finite on 12 of 30 log lines, first at step 60" in text


def test_a_loss_that_never_was_finite(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "stage": 1, "loss/total": math.nan} for step in range(3)])
    assert len(Outline(write_report(tmp_path).read_text(encoding="utf-8")).images) == 1


def test_a_line_cut_short_is_left_out(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(read_run(folder).metrics) == 59
    write_report(folder)


def test_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an existing folder, got '.*missing'"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match=r"expected a metrics.jsonl with at least one line in '.*', found none"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(UserError, match="found none"):
        read_run(tmp_path)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0, math.inf])
    np.testing.assert_array_equal(plots.smoothed(values, 1), [1, math.nan, 3, 5, math.nan])
    np.testing.assert_array_equal(plots.smoothed(values, 3), [1, math.nan, 4, 4, math.nan])


def test_small_activities_are_counted_together() -> None:
    timing = {"1": {"step": 98.0, "log": 0.5, "save": 0.5}, "2": {"step": 99.0, "log": 0.5}}
    assert plots._small_together(timing) == {"1": {"step": 98.0, "other": 1.0}, "2": {"step": 99.0, "other": 0.5}}


def test_alarms_are_told_once(folder: Path) -> None:
    rows = metrics()
    rows[3]["alarm"] = "a single <one>"
    for place, rank in ((40, 1.4), (41, 1.2), (50, 1.1)):
        rows[place]["alarm"] = f"collapse: the student gives one feature: rank {rank}"
    write_lines(folder / "metrics.jsonl", rows)
    text = write_report(folder).read_text(encoding="utf-8")
    box = text.partition('<div class="warning">')[2].partition("</div>")[0]
    assert box.split("<br>") == [
        "1 mae: a single &lt;one&gt; (at step 40).",
        "2 dbot: collapse: the student gives one feature: rank 1.4 (at step 410, and on 2 later log lines).",
    ]


def test_signals_of_a_collapse_are_drawn(folder: Path) -> None:
    rows = metrics()
    for row in rows[::10]:
        row["features/rank"], row["features/spread"] = 20.0 - row["step"] / 100, 0.5
    write_lines(folder / "metrics.jsonl", rows)
    figure = plots.signals(read_run(folder))
    assert figure is not None
    shown = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert len(shown) == 5
    first, second, *_ = shown["effective rank of features"].get_lines()
    np.testing.assert_allclose(first.get_xydata(), [[10, 19.9], [110, 18.9], [210, 17.9]])
    np.testing.assert_allclose(second.get_xdata(), [310, 410, 510])


def test_samples_of_an_older_run_are_read(folder: Path) -> None:
    """Files with images, visible and stage alone, without a time axis."""
    first, second = read_run(folder).samples
    assert first.images.shape == (3, 1, 24, 32, 3) and first.visible.shape == (3, 1, 6, 8)
    assert first.stage == "1 mae" and first.target_pca is first.attention is first.reconstruction is None
    assert second.attention is not None and second.attention.shape == (3, 3, 1, 6, 8)
    (found,) = read_run(folder).retrieval
    assert found.queries.shape == (3, 1, 24, 32, 3) and found.neighbours.shape == (3, 2, 1, 24, 32, 3)
    assert found.same is None


def test_clips_are_called_clips(folder: Path) -> None:
    """By what is shown, and by the configuration before anything is shown."""
    assert read_run(folder).unit == "image"
    samples = {"images": np.zeros((2, 4, 8, 8, 3), np.uint8), "visible": np.ones((2, 2, 2, 2), bool)}
    for stage in (1, 2):
        np.savez(folder / f"samples-{stage}.npz", stage="1 amd", **samples)
    shown = {"queries": samples["images"], "neighbours": np.zeros((2, 3, 4, 8, 8, 3), np.uint8)}
    np.savez(folder / "retrieval-2.npz", stage="2 amd", similarity=np.ones((2, 3)), **shown)
    assert read_run(folder).unit == "clip"
    text = write_report(folder).read_text(encoding="utf-8")
    body = text[text.index("<main>") :]
    assert "Nearest clips" in Outline(text).headings and "held-out clips" in body and "The clips whose features" in body
    assert "image" not in re.sub(r'data:image/png;base64,[^"]*', "", body)
    for file in folder.glob("*.npz"):
        file.unlink()
    assert read_run(folder).unit == "image"
    (folder / "config.yaml").write_text("seed: 7\ndata:\n  root: there\n  frames: 8\nmodel:\n  size: tiny\n")
    assert read_run(folder).unit == "clip"


def test_flat_timing_is_one_bar(folder: Path) -> None:
    (folder / "timing.json").write_text(json.dumps({"data": 3.0, "step": 30.0, "broken": None}))
    assert read_run(folder).timing == {"whole run": {"data": 3.0, "step": 30.0}}
    figure = plots.time_spent(read_run(folder))
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3.0, 30.0]


def test_the_quality_lines_carry_the_evaluations(folder: Path) -> None:
    figure = plots.quality(read_run(folder))
    assert figure is not None
    knn, linear, rank = figure.axes
    for line in [*knn.get_lines(), *linear.get_lines()]:
        np.testing.assert_array_equal(line.get_xydata(), [[0, 0.25], [1, 0.375], [2, 0.5]])
    np.testing.assert_array_equal(rank.get_lines()[0].get_ydata(), [20, 21, 22])


def test_torch_is_not_needed(folder: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; import cohobate.report as r; r.write_report(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=folder)


def test_matplotlibs_settings_are_left_alone(folder: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(folder)
    assert dict(matplotlib.rcParams) == before


def test_one_point_a_stage_is_seen(tmp_path: Path) -> None:
    """A line of one point shows nothing; a stage begins where the one before it ended."""
    rows = [{"step": 16 * stage, "stage": stage, "perf/samples_s": 100.0 * stage} for stage in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    figure = plots.throughput(read_run(tmp_path))
    assert figure is not None
    lines = figure.axes[0].get_lines()
    assert [line.get_marker() for line in lines if line.get_linewidth() == 2] == ["o", "o"]
    assert [line.get_xdata() for line in lines if line.get_linestyle() == ":"] == [[16.0, 16.0]]
