"""How good features are: kNN, linear and attentive probes, effective rank, fine-tuning; and the nearest."""

from __future__ import annotations

from typing import Any

from cohobate.evaluation.extractor import Extractor
from cohobate.evaluation.features import (
    ClipSource,
    FeatureSet,
    ImageSource,
    check_labels,
    check_same_classes,
    extract,
    has_split,
    held_out_split,
)
from cohobate.evaluation.finetune import RECIPES, Classifier, FinetuneRecipe, finetune
from cohobate.evaluation.knn import knn_accuracy
from cohobate.evaluation.linear import linear_accuracy
from cohobate.evaluation.probe import ProbeRecipe, attentive_probe, linear_probe
from cohobate.evaluation.quality import effective_rank
from cohobate.evaluation.retrieval import nearest
from cohobate.models import VisionTransformer

__all__ = [
    "RECIPES",
    "Classifier",
    "ClipSource",
    "Extractor",
    "FeatureSet",
    "FinetuneRecipe",
    "ImageSource",
    "ProbeRecipe",
    "attentive_probe",
    "check_labels",
    "check_same_classes",
    "effective_rank",
    "evaluate",
    "extract",
    "finetune",
    "has_split",
    "held_out_split",
    "knn_accuracy",
    "linear_accuracy",
    "linear_probe",
    "nearest",
    "summary",
]


def evaluate(
    encoder: VisionTransformer | Extractor,
    train: ImageSource,
    test: ImageSource | None,
    *,
    metrics: tuple[str, ...] = ("knn", "linear"),
    k: int = 20,
    temperature: float = 0.07,
) -> list[dict[str, Any]]:
    """One row a (features, label kind, metric): ``features``, ``label``, ``metric``, ``value``, ``effective_rank``.

    Without labels, or without a test part, the only metric is ``effective_rank`` of the training files. Each file is
    read once, whatever the metrics; features of a video's views are averaged, on both sides.

    Args:
        encoder: on the device to compute on; it is left in the mode it came in.
        train: the kNN's memory and the probe's training set. test: where accuracy is counted.

    Raises:
        UserError: a kind of label with one class only, or weights or features that are not finite.
    """
    if train.manifest.labels is not None and test is not None:
        check_labels(train.manifest, "train")
    extractor = encoder if isinstance(encoder, Extractor) else Extractor(encoder)
    device = extractor.device
    memory = extract(extractor, train, device)
    ranks = {name: effective_rank(values) for name, values in memory.features.items()}
    queries = extract(extractor, test, device) if test is not None and memory.labels is not None else None
    if queries is None or queries.labels is None or memory.labels is None:
        return [
            {"features": name, "label": "", "metric": "effective_rank", "value": rank, "effective_rank": rank}
            for name, rank in ranks.items()
        ]
    rows: list[dict[str, Any]] = []
    for name, values in memory.features.items():
        data = (values, memory.labels, queries.features[name], queries.labels)
        found: dict[str, list[float]] = {}
        if "knn" in metrics:
            found["knn"] = knn_accuracy(*data, k=k, temperature=temperature)
        if "linear" in metrics:
            found["linear"] = linear_accuracy(*data)
        for metric, accuracies in found.items():
            for label, value in zip(train.names, accuracies):
                row = {"features": name, "label": label, "metric": metric, "value": value}
                rows.append(row | {"effective_rank": ranks[name]})
    return rows


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of :func:`evaluate` or of a probe for people: a line a label kind, and one for the effective rank."""
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows if row["label"]):
        cells = [f"{r['metric']} {r['features']} {r['value']:.3f}" for r in rows if r["label"] == label]
        lines.append(f"{label:<16}{'   '.join(cells)}")
    ranks = {row["features"]: row["effective_rank"] for row in rows if "effective_rank" in row}
    if not ranks:
        return lines
    lines.append(f"{'effective rank':<16}{'   '.join(f'{name} {value:.1f}' for name, value in ranks.items())}")
    return lines
