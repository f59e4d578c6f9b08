"""From images on disk to rows of results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cohobate import data
from cohobate.errors import UserError
from cohobate.evaluation import ImageSource, check_same_classes, evaluate, extract, held_out_split
from cohobate.models import Precision, VisionTransformer, build


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_images(tmp_path_factory.mktemp("evaluate") / "set", train=48, test=24, processes=1)


def encoder(cls_token: bool = True) -> VisionTransformer:
    torch.manual_seed(0)
    precision = Precision(torch.float32, torch.float32)
    return build(
        image_size=16, patch=4, width=24, depth=2, heads=2, cls_token=cls_token, drop_path=0.5, precision=precision
    )


def source(images: Path, split: str, **words: object) -> ImageSource:
    return ImageSource(data.build_manifest(images, split=split), (16, 16), batch_size=20, workers=0, **words)  # type: ignore[arg-type]


def test_features_do_not_depend_on_the_batch_nor_on_the_cache(images: Path) -> None:
    model, device = encoder(), torch.device("cpu")
    reader = source(images, "train")
    first, cached = extract(model, reader, device), extract(model, reader, device)
    other = source(images, "train")
    other.batch_size = 7
    split = extract(model, other, device)
    for name in ("cls", "mean"):
        assert first.features[name].shape == (48, 24)
        assert torch.equal(first.features[name], cached.features[name])
        # Another batch size takes another route through the matrix product: rounding only.
        torch.testing.assert_close(first.features[name], split.features[name], rtol=1e-4, atol=1e-5)
    assert first.labels is not None and torch.equal(first.labels, torch.as_tensor(reader.manifest.labels))


def test_the_encoder_is_evaluated_without_drop_path_and_left_as_it_was(images: Path) -> None:
    model, device = encoder(), torch.device("cpu")
    model.train()
    reader = source(images, "test")
    first, second = extract(model, reader, device), extract(model, reader, device)
    assert torch.equal(first.features["cls"], second.features["cls"]) and model.training


def test_a_limit_takes_images_from_the_whole_range(images: Path) -> None:
    reader = source(images, "train", limit=8)
    labels = extract(encoder(), reader, torch.device("cpu")).labels
    everything = data.build_manifest(images, split="train").labels
    assert labels is not None and everything is not None
    assert torch.equal(labels, torch.as_tensor(everything[::6]))


def test_rows_name_every_feature_label_and_metric(images: Path) -> None:
    rows = evaluate(encoder(), source(images, "train"), source(images, "test"), k=5)
    found = {(row["features"], row["label"], row["metric"]) for row in rows}
    assert found == {(f, n, m) for f in ("cls", "mean") for n in ("texture", "shape") for m in ("knn", "linear")}
    assert all(0 <= row["value"] <= 1 and 1 <= row["effective_rank"] <= 24 for row in rows)


def test_without_a_class_token_or_without_labels(images: Path) -> None:
    rows = evaluate(encoder(cls_token=False), source(images, "train"), source(images, "test"), metrics=("knn",), k=5)
    assert {(row["features"], row["metric"]) for row in rows} == {("mean", "knn")}
    plain = ImageSource(data.build_manifest(images / "train"), (16, 16), workers=0)
    (cls, mean) = evaluate(encoder(), plain, None)
    assert cls["metric"] == mean["metric"] == "effective_rank" and mean["value"] == mean["effective_rank"] > 1


def test_parts_by_other_names_and_with_other_classes(tmp_path: Path) -> None:
    for place in ("train/cat", "train/dog", "val/cat", "val/owl"):
        data.make_images(tmp_path / "made", train=1, test=1, processes=1)
        (tmp_path / "set" / place).mkdir(parents=True)
        (tmp_path / "set" / place / "a.jpg").write_bytes((tmp_path / "made" / "train" / "000000.jpg").read_bytes())
    root = str(tmp_path / "set")
    assert held_out_split(root) == "val" and held_out_split(str(tmp_path)) is None
    train, val = (data.build_manifest(root, split=name) for name in ("train", "val"))
    check_same_classes(train, train)
    with pytest.raises(
        UserError, match="data: expected the same class folders in both parts, but only one has dog, owl"
    ):
        check_same_classes(train, val)
