"""From images on disk to rows of results."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from cohobate import cli, data
from cohobate.errors import UserError
from cohobate.evaluation import (
    Extractor,
    ImageSource,
    check_same_classes,
    evaluate,
    extract,
    held_out_split,
    nearest,
)
from cohobate.evaluation.extractor import BF16
from cohobate.models import Precision, VisionTransformer, build
from cohobate.models.exports import export
from cohobate.teacher import load_source


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


def test_features_are_the_encoders_own(images: Path) -> None:
    """In fp32 to the last bit; in bf16 as near to fp32 as the encoder itself in bf16, twice its error at most."""
    exact, (pixels, _) = encoder(), next(source(images, "test").batches(torch.device("cpu")))
    half = exact.like(precision=BF16)
    half.load_state_dict(exact.state_dict())
    with torch.no_grad():
        wanted, own = exact.eval().features(pixels), half.eval().features(pixels)
    found, runtime = Extractor(exact)(pixels), Extractor(half)(pixels)
    for name in ("cls", "mean"):
        truth = getattr(wanted, name)
        assert torch.equal(getattr(found, name), truth)
        error, allowed = ((getattr(x, name) - truth).norm() / truth.norm() for x in (runtime, own))
        assert 0 < error <= 2 * allowed < 0.02
    assert found.cls is not None and found.cls.untyped_storage().nbytes() == 24 * 4 * len(
        pixels
    )  # no view of all tokens
    assert Extractor(load_source(exact), exact.precision)(pixels).mean.allclose(wanted.mean, rtol=1e-4, atol=1e-5)


def test_nearest_images_against_every_cosine() -> None:
    draw = torch.Generator().manual_seed(0)
    features, queries = torch.randn(50, 6, generator=draw), torch.randn(7, 6, generator=draw)
    cosines, places = nearest(features, queries, 4)
    for q in range(7):
        every = [float(torch.cosine_similarity(queries[q], row, dim=0)) for row in features]
        order = sorted(range(50), key=lambda i: -every[i])[:4]
        assert places[q].tolist() == order and cosines[q].tolist() == pytest.approx([every[i] for i in order], abs=1e-6)
    assert nearest(features, features[3:5], 1)[1].flatten().tolist() == [3, 4]
    with pytest.raises(UserError, match="k: expected 1 to 50, the number of features, got 51"):
        nearest(features, queries, 51)
    with pytest.raises(UserError, match=r"queries: expected \[M, D\] beside features"):
        nearest(features, queries[:, :5], 1)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("weights") / "export", encoder(), None, {})


def call(*words: object) -> int:
    return cli.main(["eval", *map(str, words), "--workers", "0", "--device", "cpu"])


COMMANDS = {
    "knn": (["--k", "5"], {"cls", "mean"}),
    "linear": ([], {"cls", "mean"}),
    "linear --recipe lars_quick": (["--epochs", "2", "--augment"], {"cls", "mean"}),
    "attentive": (["--epochs", "2", "--rates", "1e-3", "1e-2"], {"tokens"}),
    "finetune": (["--epochs", "2", "--label", "shape"], {"finetuned"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_metric_from_the_command_line(
    command: str, images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, features = COMMANDS[command]
    metric, *more = command.split()
    assert call(metric, weights, images, *more, *words, "--json", tmp_path / "rows.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    labels = {"shape"} if metric == "finetune" else {"texture", "shape"}
    assert {(row["features"], row["label"]) for row in rows} == {(f, n) for f in features for n in labels}
    assert all(row["metric"] == metric and 0 <= row["value"] <= 1 and row["weights"] == str(weights) for row in rows)
    assert f"{metric} {min(features)}" in capsys.readouterr().out


def test_any_vit_can_be_compared(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = "random:vit_tiny?image_size=16&patch=4&depth=2&width=24&heads=2"
    assert call("knn", spec, images, "--k", "3") == 0
    assert "knn cls" in capsys.readouterr().out


def test_a_fine_tuned_model_is_kept(images: Path, weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "tuned"
    assert call("finetune", weights, images, "--epochs", 1, "--out", out) == 0
    config = json.loads((out / "config.json").read_text())
    found = load_file(str(out / "model.safetensors"))
    assert config["num_classes"] == found["head.weight"].shape[0] == 8 and config["model_args"]["fc_norm"]
    assert "fc_norm.weight" in found and "norm.weight" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]  # nothing is left of the writing


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured
    return captured.err


@pytest.mark.parametrize("metric", ["knn", "linear", "attentive", "finetune"])
def test_bad_labels_and_weights_overwrite_nothing(
    metric: str, images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine\n")
    more = ["--json", out, *(["--out", tmp_path / "new"] if metric == "finetune" else [])]
    for name, classes in (("none", [""]), ("one", ["cat"])):
        for part in ("train", "test"):
            for kind in classes:
                folder = tmp_path / name / part / kind
                folder.mkdir(parents=True)
                for index in range(3):
                    shutil.copy(images / "train" / f"{index:06d}.jpg", folder / f"{index}.jpg")
        line = complaint(capsys, metric, weights, tmp_path / name, *more)
        assert "labels: expected labelled images in the train part (two or more class folders" in line
    single = tmp_path / "single"
    single.mkdir()
    for part in ("train", "test"):
        (single / f"{part}.txt").write_text("".join(f"{images}/train/{i:06d}.jpg 3\n" for i in range(4)))
    line = complaint(capsys, metric, weights, single, *more)
    assert "labels: expected two or more classes of 'label' in the train part, got only class 3 for 4 images" in line
    spoiled = encoder()
    with torch.no_grad():
        spoiled.norm.weight[3] = math.nan
    broken = export(tmp_path / "broken", spoiled, None, {})
    line = complaint(capsys, metric, broken, images, *more)
    assert f"weights: expected finite numbers in {broken}, got NaN or inf in norm.weight" in line
    assert out.read_text() == "mine\n" and not (tmp_path / "new").exists()


def test_options_that_say_nothing_are_refused(
    images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[list[object], str]] = [
        (["knn", "--augment"], "--augment: expected with linear or attentive, got with knn"),
        (["finetune", "--k", 3], "--k: expected with knn or linear, got with finetune"),
        (["linear", "--recipe", "lasr"], "--recipe: expected one of exact, lars, lars_quick with linear, got 'lasr'"),
        (["linear", "--epochs", 3], "--epochs: expected with --recipe lars or lars_quick, got with exact"),
        (["finetune", "--recipe", "lars"], "--recipe: expected one of quick, quick_video, mae_small"),
        (["finetune", "--out", tmp_path], "--out: expected a new folder"),
        (["attentive", "--epochs", 0], "epochs: expected at least 1, got 0"),
        (["knn", "--batch-size", 0], "--batch-size: expected at least 1, got 0"),
        (["knn", "--k", 49], "k: expected 1 to 48"),
    ]
    for (metric, *words), message in cases:
        assert message in complaint(capsys, metric, weights, images, *words)
