"""A run folder, read back. Every file but ``metrics.jsonl`` may be missing; a line cut short by a crash is left out.

=======================  =============================================================================================
``metrics.jsonl``        one object a log line: ``step``, ``stage`` (its index, from 1), ``epoch``, ``loss/*``, ``lr``,
                         ``grad_norm``, ``perf/samples_s``, ``perf/data_wait`` (share, 0..1), ``target/std``; perhaps
                         ``alarm``, a sentence on what looks wrong
``evaluations.jsonl``    one object an evaluation: ``stage`` (0 = untrained), ``stage_name``, ``features`` (cls, mean),
                         ``label``, ``metric`` (knn, linear), ``value`` (0..1), ``effective_rank``
``samples-<stage>.npz``  see :class:`Samples`: arrays of its fields' names; those of an image have no time axis
``retrieval-*.npz``      see :class:`Retrieval`, likewise
``timing.json``          seconds by activity, or the same a stage: ``{"stage": {"activity": seconds}}``
``data_report.json``     counters of the input pipeline, bad files among them
``environment.json``     versions, devices, commit
``config.yaml``          the resolved configuration
=======================  =============================================================================================
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohobate.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """One number about the frozen features after a stage (stage 0: before any training)."""

    stage: int
    stage_name: str
    features: str
    label: str
    metric: str
    value: float
    effective_rank: float = math.nan


@dataclass(frozen=True)
class Samples:
    """A few images or clips of one stage: what was seen, what was asked for, what was answered.

    Attributes:
        stage: its number and name.
        images: uint8 [n,T,H,W,3]; an image has one frame.
        visible: bool [n,t,h,w], the tokens that the student saw.
        teacher_visible: those that the teacher saw; None where it saw everything or there is none.
        target: "features" of a teacher, or "pixels".
        target_pca, prediction_pca: [n,t,h,w,3] in 0..1, their first principal components.
        predicted: bool [n,t,h,w], the tokens that have a prediction; None: those that the student did not see.
        reconstruction: uint8 [n,T,H,W,3], predicted pixels where the student saw none; None where none are predicted.
        attention: [n,1+k,t,h,w], shares of the student's last block: the mean over heads, then k single heads.
        attention_heads: int [k], their numbers, from 0.
    """

    stage: str
    images: NDArray[np.uint8]
    visible: NDArray[np.bool_]
    teacher_visible: NDArray[np.bool_] | None = None
    target: str = "features"
    target_pca: NDArray[np.floating[Any]] | None = None
    prediction_pca: NDArray[np.floating[Any]] | None = None
    predicted: NDArray[np.bool_] | None = None
    reconstruction: NDArray[np.uint8] | None = None
    attention: NDArray[np.floating[Any]] | None = None
    attention_heads: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Retrieval:
    """The images or clips nearest to a few queries, by the cosine of their features.

    Attributes:
        stage: number and name of the stage whose features they are.
        queries: uint8 [M,T,H,W,3]. neighbours: uint8 [M,k,T,H,W,3], the nearest first.
        similarity: float [M,k]. same: bool [M,k], whether a neighbour has the query's label; None without labels.
        label: the kind of label.
    """

    stage: str
    queries: NDArray[np.uint8]
    neighbours: NDArray[np.uint8]
    similarity: NDArray[np.floating[Any]]
    same: NDArray[np.bool_] | None = None
    label: str = ""


@dataclass(frozen=True)
class Run:
    """Everything a run folder holds, with names made equal."""

    folder: Path
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    retrieval: list[Retrieval] = field(default_factory=list)
    timing: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds by activity, by stage or "whole run"
    data_report: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""

    @property
    def unit(self) -> str:
        """What a sample of the run is: "image" or "clip"."""
        shown = [found.images for found in self.samples] + [found.queries for found in self.retrieval]
        frames = re.search(r"^data:\n(?: .*\n)*? +frames: (\d+)", self.config, re.MULTILINE)
        known = [array.shape[1] for array in shown] + ([int(frames[1])] if frames else [])
        return "clip" if max(known, default=1) > 1 else "image"

    @property
    def stages(self) -> list[int]:
        """Indices of the stages that logged something, in order."""
        return sorted({int(row.get("stage", 1)) for row in self.metrics})

    def stage_name(self, stage: int) -> str:
        """``2 dbot``, or ``stage 2`` where no evaluation gave it a name."""
        for name in (evaluation.stage_name for evaluation in self.evaluations if evaluation.stage == stage):
            return f"{stage} {name}"
        return "0 untrained" if stage == 0 else f"stage {stage}"

    def series(self, key: str, stage: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of one metric (of one stage); what is missing or not a number becomes NaN."""
        rows = [row for row in self.metrics if key in row and (stage is None or int(row.get("stage", 1)) == stage)]
        steps = np.array([float(row["step"]) for row in rows])
        return steps, np.array([_number(row[key]) for row in rows], dtype=np.float64)

    @property
    def alarms(self) -> list[tuple[int, int, str]]:
        """(stage, step, text) of every alarm that the run logged."""
        rows = [row for row in self.metrics if row.get("alarm")]
        return [(int(row.get("stage", 1)), int(row["step"]), str(row["alarm"])) for row in rows]

    def loss_keys(self, stage: int) -> list[str]:
        """Loss terms that a stage logged, the total first."""
        keys = {key for row in self.metrics if int(row.get("stage", 1)) == stage for key in row}
        return sorted((key for key in keys if key == "loss" or key.startswith("loss/")), key=_total_first)


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises :class:`UserError` if it is none (no folder, or no ``metrics.jsonl`` with a line)."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"run folder: expected an existing folder, got {str(path)!r}")
    metrics = [row for row in _lines(path / "metrics.jsonl") if "step" in row]
    if not metrics:
        raise UserError(f"run folder: expected a metrics.jsonl with at least one line in {str(path)!r}, found none")
    config = path / "config.yaml"
    return Run(
        folder=path,
        metrics=metrics,
        evaluations=[_evaluation(row) for row in _lines(path / "evaluations.jsonl") if "metric" in row],
        samples=[_samples(file) for file in sorted(path.glob("samples*.npz"), key=_file_number)],
        retrieval=[_retrieval(file) for file in sorted(path.glob("retrieval*.npz"), key=_file_number)],
        timing=_timing(_json(path / "timing.json")),
        data_report=_json(path / "data_report.json"),
        environment=_json(path / "environment.json"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _total_first(key: str) -> tuple[bool, str]:
    return key not in ("loss", "loss/total"), key


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run died
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _evaluation(row: dict[str, Any]) -> Evaluation:
    stage = int(row.get("stage", 0))
    return Evaluation(
        stage=stage,
        stage_name=str(row.get("stage_name", "untrained" if stage == 0 else "")),
        features=str(row.get("features", "")),
        label=str(row.get("label", "")),
        metric=str(row["metric"]),
        value=_number(row.get("value")),
        effective_rank=_number(row.get("effective_rank")),
    )


def _samples(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as data:
        known = {field.name: data[field.name] for field in fields(Samples) if field.name in data}
    known["stage"] = str(known.get("stage", path.stem))
    known["target"] = str(known.get("target", "features"))
    ranks = {"images": 5, "reconstruction": 5, "visible": 4, "teacher_visible": 4, "predicted": 4}
    ranks |= {"target_pca": 5, "prediction_pca": 5, "attention": 5}
    return Samples(**{name: _timed(array, ranks.get(name, 0), name == "attention") for name, array in known.items()})


def _retrieval(path: Path) -> Retrieval:
    with np.load(path, allow_pickle=False) as data:
        known = {field.name: data[field.name] for field in fields(Retrieval) if field.name in data}
    known["stage"], known["label"] = str(known.get("stage", path.stem)), str(known.get("label", ""))
    known["queries"], known["neighbours"] = _timed(known["queries"], 5), _timed(known["neighbours"], 6, True)
    return Retrieval(**known)


def _timed(array: Any, rank: int, second: bool = False) -> Any:
    """An image's array with the time axis that it was stored without: the second, or the third one."""
    return np.expand_dims(array, 2 if second else 1) if rank and array.ndim == rank - 1 else array


def _file_number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _timing(raw: dict[str, Any]) -> dict[str, dict[str, float]]:
    nested = {
        str(stage): {str(key): _number(value) for key, value in parts.items() if math.isfinite(_number(value))}
        for stage, parts in raw.items()
        if isinstance(parts, dict)
    }
    flat = {str(key): _number(value) for key, value in raw.items() if math.isfinite(_number(value))}
    return nested or ({"whole run": flat} if flat else {})
