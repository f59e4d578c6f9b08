"""Documents and figures say what the stored results say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cohobate.benchmarks import profile, report, summary, tables
from cohobate.benchmarks.harness import Row, write_rows
from cohobate.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENV = {"kind": "A card", "date": "2026-01-31", "torch": "2.13.0", "commit": "abc", "dirty": False, "seed": 0}
BASE = Row("op", "literal", "eager", "fwd+bwd", "cpu", "fp32", "8 rows", p20_ms=11, p50_ms=12, p80_ms=13, env=ENV)
ROWS = [
    dataclasses.replace(BASE, mode="fwd", p50_ms=99.0),
    BASE,
    dataclasses.replace(BASE, provider="compile", role="compile", p50_ms=6.0, ratio_vs_eager=2.0),
    dataclasses.replace(
        BASE, provider="native", role="ours", p50_ms=1.5, ratio_vs_eager=8.0, ratio_vs_compile=4.0,
        ratio_vs_best_other=4.0, best_other="compile", pct_of_floor=62.5, max_rel_err=2e-7, grad_rel_err=3e-6,
    ),
    dataclasses.replace(
        BASE, provider="native bf16", role="ours", dtype="bf16", p50_ms=1.0, max_rel_err=2e-3,
        note="no ratio vs eager: spread 40% exceeds the difference 20%",
    ),
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "a\n<!-- bench:kernels-cpu -->\nold\n<!-- /bench -->\nb\n<!-- bench:kernels-cuda -->\n<!-- /bench -->\n"
    )
    (tmp_path / "docs" / "page.md").write_text(
        "<!-- bench:kernels-cpu-full -->\n<!-- /bench -->\n![](figures/summary-cpu.png)"
    )
    (tmp_path / "docs" / "plain.md").write_text("no block")
    write_rows(
        tmp_path / "benchmarks/results/here-2026-01-31/kernels.jsonl",
        [{"name": "ceiling.copy", "bytes": 2**20, "gb_s": 40.0}, *ROWS],
    )
    return tmp_path


def test_the_committed_documents_match_the_committed_results() -> None:
    assert report.stale(ROOT) == [], "run `python -m cohobate.benchmarks.report`"


def test_the_headline_has_one_line_a_case_with_both_ratios(root: Path) -> None:
    text = report.render(root, "kernels-cpu")
    line = "| op (fwd+bwd) | 12 ms | 6 ms | 1.5 ms | **8.00x** | 4.00x | 62 | 1 ms | within noise | 3e-06 / 2e-03 |"
    assert text.splitlines()[2:] == [line]


def test_a_refused_ratio_is_said_in_words() -> None:
    row = dataclasses.replace(BASE, role="ours")
    assert (
        tables.ratio(dataclasses.replace(row, note="no ratio: numerics disagree (...)"), "eager") == "numerics disagree"
    )
    assert (
        tables.ratio(dataclasses.replace(row, note="no ratio: baseline missing (compile)"), "eager")
        == "baseline missing"
    )
    assert tables.ratio(dataclasses.replace(row, note="failed: RuntimeError: x"), "eager") == "failed"
    assert tables.ratio(None, "eager") == "-"
    note = "no ratio vs eager: spread 53% exceeds 50%; no ratio vs compile: spread 30% exceeds the difference 20%"
    row = dataclasses.replace(row, note=note)
    assert [tables.ratio(row, against) for against in ("eager", "compile")] == ["unsteady", "within noise"]


def test_every_row_and_the_machine(root: Path) -> None:
    full = report.render(root, "kernels-cpu-full")
    assert full.count("**op, ") == 2 and "| native | 1.5 ms |" in full and "4.00x (compile)" in full
    machine = report.render(root, "kernels-cpu-machine")
    assert (
        "A card, 2026-01-31" in machine
        and "copy 40 GB/s at 1 MB" in machine
        and "here-2026-01-31/kernels.jsonl" in machine
    )


def test_what_is_not_measured_says_so(root: Path) -> None:
    assert report.render(root, "kernels-cuda").startswith("not measured (`make gpu-proof`")
    assert report.render(root, "step-cpu") == "not measured (`cohobate bench step` measures it)\n"
    with pytest.raises(UserError, match="expected FILE-DEVICE"):
        report.render(root, "kernels")


def test_the_newest_folder_counts(root: Path) -> None:
    newer = [dataclasses.replace(row, p50_ms=77.0) for row in ROWS]
    write_rows(root / "benchmarks/results/a-2026-02-01/kernels.jsonl", newer)
    write_rows(root / "benchmarks/results/z-2025-12-31/kernels.jsonl", ROWS)
    assert "77 ms" in report.render(root, "kernels-cpu")


def test_rewriting_changes_only_blocks_and_settles(root: Path) -> None:
    old = (root / "README.md").read_text()
    new = report.rewrite(root, old)
    assert new.startswith("a\n<!-- bench:kernels-cpu -->\n\n|  | literal") and "<!-- /bench -->\nb\n" in new
    assert "\nold\n" not in new
    assert report.rewrite(root, new) == new
    assert [page.name for page in report.documents(root)] == ["README.md", "page.md"]


def test_stale_text_and_stale_figures_are_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.stale(root) == ["README.md", "docs/page.md", "docs/figures/summary-cpu.png (missing)"]
    monkeypatch.setattr(report, "ROOT", root)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    drawn = (root / "docs/figures/summary-cpu.png").read_bytes()
    assert report.main([]) == 0 and (root / "docs/figures/summary-cpu.png").read_bytes() == drawn
    path = root / "benchmarks/results/here-2026-01-31/kernels.jsonl"
    path.write_text(path.read_text().replace('"p50_ms": 1.5', '"p50_ms": 1.6'))
    assert report.stale(root) == ["README.md", "docs/page.md", "docs/figures/summary-cpu.png (drawn from other data)"]


def test_quality_is_a_table_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "some-cpu-2026-01-02"
    folder.mkdir(parents=True)
    row = {"recipe": "demo", "settings": [], "stage": 1, "stage_name": "mae", "features": "mean", "label": "texture"}
    lines = [
        {**row, "seed": seed, "metric": metric, "value": value, "env": {"commit": "abc"}}
        for seed, metric, value in ((0, "knn", 0.5), (1, "knn", 0.7), (0, "linear", 0.8), (1, "linear", 0.8))
    ]
    lines.append({**lines[0], "label": "shape", "value": 0.1})
    (folder / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = report.render(tmp_path, "quality")
    assert "| demo | 1 mae | 0.600 ± 0.141 | 0.800 ± 0.000 | 2 |" in text
    assert "quality.jsonl" in text and "abc" in text
    assert "not measured" in report.render(tmp_path / "nowhere", "quality")


def test_the_teacher_has_a_table_for_each_machine(tmp_path: Path) -> None:
    assert report.render(tmp_path, "teacher") == "not measured (`cohobate bench teacher` measures it)\n"

    def stored(folder: str, kind: str, p50: float) -> None:
        row = dataclasses.replace(
            BASE, name="teacher", mode="fwd", p50_ms=p50, flops=2 * 10**9, env={**ENV, "kind": kind}
        )
        ours = dataclasses.replace(
            row, provider="engine bf16", role="ours", dtype="bf16", ratio_vs_eager=4.0, ratio_vs_compile=3.0,
            ratio_vs_best_other=1.5, best_other="compile bf16", pct_of_floor=77.0, max_rel_err=3e-3, tolerance=8e-3,
        )  # fmt: skip
        ceiling = {"name": "ceiling.matmul", "dtype": "bf16", "tflop_s": 0.9}
        write_rows(tmp_path / "benchmarks" / "results" / folder / "teacher.jsonl", [ceiling, row, ours])

    stored("one-2026-01-01", "A card", 11.0)
    stored("one-2026-01-02", "A card", 22.0)
    stored("other-2025-12-31", "Another", 33.0)
    text = report.render(tmp_path, "teacher")
    assert text.index("**A card**") < text.index("**Another**") and text.count("**A card**") == 1
    assert "matrix product 0.9 TFLOP/s bf16; rows: `benchmarks/results/one-2026-01-02/teacher.jsonl`" in text
    assert (
        "| engine bf16 | 22 ms | 2.0 | 77 | **4.00x** | 3.00x | **1.50x** (compile bf16) | 3e-03 | 8e-03 | - |" in text
    )
    assert "33 ms" in text and "11 ms" not in text


def test_the_large_and_the_small_teacher_stand_in_the_same_table(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "one-2026-01-01"
    for stem, shape in (("teacher", "ViT-B"), ("teacher-large", "ViT-L"), ("teacher-small", "ViT-S")):
        write_rows(folder / f"{stem}.jsonl", [dataclasses.replace(BASE, name="teacher", mode="fwd", shape=shape)])
    text = report.render(tmp_path, "teacher")
    assert text.index("ViT-B\n") < text.index("ViT-L\n") < text.index("ViT-S\n") and text.count("**A card**") == 1


STEP = dataclasses.replace(BASE, name="dbot_step", mode="train", shape="ViT-base, batch 8; more", p50_ms=40.0)
STEPS = [
    dataclasses.replace(STEP, provider="engine fp32", role="ours", p50_ms=None),  # checked, not timed
    STEP,
    dataclasses.replace(
        STEP, provider="literal bf16 autocast", role="other", dtype="bf16", p50_ms=20.0, ratio_vs_eager=2.0,
        max_rel_err=1e-2, tolerance=2e-2,
    ),
    dataclasses.replace(
        STEP, provider="compiled bf16", role="compile", dtype="bf16", p50_ms=16.0, max_rel_err=9e-2, tolerance=2e-2
    ),
    dataclasses.replace(
        STEP, provider="compiled bf16, max-autotune", role="compile", dtype="bf16", p50_ms=18.0, max_rel_err=1e-2,
        tolerance=2e-2,
    ),
    dataclasses.replace(
        STEP, provider="engine bf16", role="ours", dtype="bf16", p50_ms=10.0, ratio_vs_eager=4.0,
        ratio_vs_best_other=1.8, best_other="compiled bf16, max-autotune",
    ),
    dataclasses.replace(STEP, provider="engine fp8", role="ours", dtype="bf16", p50_ms=5.0, ratio_vs_eager=8.0),
]  # fmt: skip


def test_the_summary_has_a_line_a_thing(root: Path) -> None:
    """The fastest compiled form that is right, and never one of ours that is not exact."""
    write_rows(root / "benchmarks/results/here-2026-01-31/step.jsonl", STEPS)
    text = report.render(root, "summary-cpu")
    assert text.splitlines()[2:4] == [
        "| dBOT step: ViT-base, batch 8 | 40 ms | 20 ms | 18 ms | 10 ms | **4.00x** "
        "| 1.80x (compiled bf16, max-autotune) |",
        "| 1 kernels in fp32, forward and backward | - | - | - | - | 8.00x | 4.00x |",
    ]
    assert "A card" in text
    names = [path.name for path in summary.sources(root, "cpu")]
    assert names == ["step.jsonl", "kernels.jsonl"]
    assert report.render(root, "summary-cuda").startswith("not measured (`make gpu-proof`")
    labels = [label.get_text() for ax in summary.figure(root, "cpu").axes for label in ax.texts]
    assert labels == ["2.00x", "-", "4.00x", "2.00x", "8.00x", "within noise"]


def test_kernels_whose_ratios_are_refused_are_counted() -> None:
    ours = [dataclasses.replace(BASE, role="ours", ratio_vs_eager=value) for value in (3.0, None, 12.0)]
    assert summary._range(ours, "eager") == "3.00x to 12.0x; 1 refused as noise"
    assert summary._range(ours[1:2], "eager") == "-"


def profile_line(provider: str, part: str, kind: str, ms: float, flops: float | None = None) -> dict[str, Any]:
    return {
        "name": profile.NAME, "case": "dbot_step", "provider": provider, "device": "cpu", "dtype": "bf16",
        "shape": "ViT-base", "part": part, "kind": kind, "ms": ms, "share": ms / 10, "step_ms": 10.0, "flops": flops,
        "product_tflop_s": 1.0, "note": "", "env": ENV,
    }  # fmt: skip


def test_the_profile_has_a_table_and_a_picture(root: Path) -> None:
    lines = [
        profile_line("engine bf16", "teacher", "matrix products", 4.0, 2e9),
        profile_line("engine bf16", "teacher", "norm", 1.0),
        profile_line("engine bf16", "AdamW", "optimizer", 3.0),
        profile_line("engine bf16", profile.MISSING, "rest", 2.0),
        profile_line("eager bf16", "teacher", "matrix products", 6.0, 2e9),
        profile_line("eager bf16", profile.MISSING, "rest", 4.0),
    ]
    assert report.render(root, "profile-cpu") == "not measured (`cohobate bench step --profile` measures it)\n"
    write_rows(root / "benchmarks/results/here-2026-01-31/profile.jsonl", lines)
    text = report.render(root, "profile-cpu")
    assert "figures/profile-cpu.png" in text and "profile.jsonl" in text
    assert "| teacher | 5.0 | 50% | 40 | 6.0 |" in text  # 2 GFLOP in 5 ms are 0.4 TFLOP/s of 1
    assert "| optimizer | 3.0 | 30% | - | 0.0 |" in text
    assert text.count("| **the step, not profiled** | **10.0** | 100% | - | 10.0 |") == 2
    (root / "docs" / "profile.md").write_text("<!-- bench:profile-cpu -->\n<!-- /bench -->\n")
    (root / "docs" / "profile.md").write_text(report.rewrite(root, (root / "docs" / "profile.md").read_text()))
    assert root / "docs/figures/profile-cpu.png" in report.figures(root)


def test_attention_is_a_table_of_backends_by_length(root: Path) -> None:
    row = dataclasses.replace(BASE, name="attention", mode="fwd", max_rel_err=0.0, tolerance=1e-5)
    rows = [
        dataclasses.replace(row, provider=name, shape=f"8 x {keys} keys, 12 heads of 64", p50_ms=p50, max_rel_err=error)
        for keys, name, p50, error in (
            (50, "explicit", 2.0, 0.0), (50, "short", 1.0, 0.0), (50, "sdpa", 0.5, 1.0), (197, "explicit", 3.0, 0.0)
        )
    ]  # fmt: skip
    write_rows(root / "benchmarks/results/here-2026-01-31/attention.jsonl", rows)
    text = report.render(root, "attention-cpu")
    assert "**fp32, 12 heads of 64, fwd**, ms" in text and "|  | explicit | short | sdpa |" in text
    assert "| 8 x 50 keys | 2 | **1** | - |\n| 8 x 197 keys | **3** | - | - |" in text


def test_the_ablation_is_its_own_table(root: Path) -> None:
    assert report.render(root, "ablation-cuda").startswith("not measured (`make gpu-proof`")
    row = dataclasses.replace(BASE, name="dbot_ablation", mode="train", provider="as it ships", role="other")
    write_rows(root / "benchmarks/results/here-2026-01-31/ablation.jsonl", [row])
    text = report.render(root, "ablation-cpu")
    assert "| as it ships |" in text and "ablation.jsonl" in text


def test_all_of_the_gpu_proof_in_one_block(root: Path) -> None:
    assert report.render(root, "cuda") == "not measured (`make gpu-proof` on a machine with a GPU measures it)\n"
    write_rows(
        root / "benchmarks/results/card-2026-02-01/step.jsonl", [dataclasses.replace(r, device="cuda") for r in STEPS]
    )
    text = report.render(root, "cuda")
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### At a glance", "### dBOT, ViT-B"]
    assert text.endswith("Where the time of a step goes, Files to batches.\n") and "| engine bf16 | 10 ms |" in text


def test_scaling_has_a_table_and_a_picture(root: Path) -> None:
    line = {
        "name": "scaling", "device": "cpu", "axis": "batch", "value": 8.0, "p20_ms": 9.0, "p50_ms": 10.0,
        "p80_ms": 11.0, "planned_ms": 12.0, "peak_mb": None, "note": "linear", "others_cores": None, "env": ENV,
    }  # fmt: skip
    write_rows(root / "benchmarks/results/here-2026-01-31/scaling.jsonl", [line, {**line, "value": 16.0}])
    text = report.render(root, "scaling-cpu")
    assert "figures/scaling-cpu.png" in text and "| 8 | 10 ms | 9 to 11 | 12 ms |" in text
    (root / "docs" / "scaling.md").write_text(f"<!-- bench:scaling-cpu -->\n{text}<!-- /bench -->\n")
    drawing = report.figures(root)[root / "docs/figures/scaling-cpu.png"]
    assert drawing.make() is not None
