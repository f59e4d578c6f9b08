"""What ``bench data`` says of loaders: the same picture or no ratio, and which ratio."""

from __future__ import annotations

import pytest

from cohobate import data
from cohobate.benchmarks import data as bench
from cohobate.benchmarks.harness import Row
from cohobate.benchmarks.reference import loader
from cohobate.errors import UserError

CASE = bench.Case("few", 4, 64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> data.Manifest:
    return data.build_manifest(bench.make_photos(tmp_path_factory.mktemp("photos"), 5, seed=0))


def test_our_loader_makes_the_literal_picture(photos: data.Manifest) -> None:
    assert bench.difference(photos, CASE, "torch") < bench._TOLERANCE


def test_another_crop_is_noticed(photos: data.Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loader.image
    monkeypatch.setattr(loader, "image", lambda path, box, flip, size: plain(path, box, not flip, size))
    assert bench.difference(photos, CASE, "torch") > 5 * bench._TOLERANCE


def rows(**times: list[float]) -> list[Row]:
    found = []
    for name, own in times.items():
        role = "eager" if name == "literal" else "ours" if name.startswith("torch") else "other"
        row = Row("few", name, role, "2 workers", "cpu", "uint8", CASE.shape, max_rel_err=0.0, tolerance=0.01)
        row.p50_ms = sorted(own)[len(own) // 2]
        found.append(row)
    return found


def compared(**times: list[float]) -> dict[str, Row]:
    found = rows(**times)
    bench._compare(found, list(times.values()))
    return {row.provider: row for row in found}


def test_ratios_are_taken_within_a_round() -> None:
    """All loaders are twice as slow in the second round; ours is 3 times faster than one, 2 times than the other."""
    found = compared(literal=[6.0, 12.0, 6.0], pillow=[4.0, 8.0, 4.0], torch=[2.0, 4.0, 2.0])
    assert found["torch"].ratio_vs_eager == pytest.approx(3)
    assert found["torch"].best_other == "pillow" and found["torch"].ratio_vs_best_other == pytest.approx(2)
    assert found["pillow"].ratio_vs_eager == pytest.approx(1.5) and found["pillow"].ratio_vs_best_other is None
    assert found["literal"].ratio_vs_eager is None
    assert "ratio to pillow within a round 2.00 to 2.00" in found["torch"].note


def test_rounds_that_disagree_give_no_ratio() -> None:
    found = compared(literal=[6.0, 6.0, 6.0], torch=[5.0, 7.0, 6.0])
    assert found["torch"].ratio_vs_eager is None and "median 1.00" in found["torch"].note
    found = compared(literal=[6.0, 6.0, 6.0], torch=[1.0, 2.0, 4.0])  # faster in every round, but by how much?
    assert found["torch"].ratio_vs_eager is None and "median 3.00" in found["torch"].note


def test_another_picture_gives_no_ratio() -> None:
    found = rows(literal=[6.0], torch=[2.0])
    found[1].max_rel_err = 0.1
    bench._compare(found, [[6.0], [2.0]])
    assert found[1].ratio_vs_eager is None and found[1].ratio_vs_best_other is None


def test_unknown_loaders() -> None:
    with pytest.raises(UserError, match=r"loaders: expected some of literal, pillow, torch, .*got 'pil'"):
        bench.run(cases=["tiny"], loaders=["pil"])
