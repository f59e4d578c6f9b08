"""LARS against its formula, many rates against one at a time, and probes that find what is there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate import data
from cohobate.errors import UserError
from cohobate.evaluation import Extractor, ImageSource, ProbeRecipe, attentive_probe, evaluate, linear_probe, summary
from cohobate.evaluation.lars import Lars
from cohobate.evaluation.probe import LINEAR, AttentiveProbe, LinearProbe, _Adam, _loss
from cohobate.models import Precision, build


def literal_lars(weight: Tensor, gradients: list[Tensor], rate: float, trusted: bool) -> Tensor:
    """You et al. 2017 with momentum 0.9, trust 0.001 and no decay, one tensor, in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        step = gradient.double()
        if trusted and float(weight.norm()) > 0 and float(step.norm()) > 0:
            step = step * (0.001 * weight.norm() / step.norm())
        momentum = 0.9 * momentum + step
        weight = weight - rate * momentum
    return weight


def test_lars_is_the_formula_for_every_rate_at_once() -> None:
    draw = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.1, 3.0, 40.0])
    weight = torch.randn(3, 4, 5, generator=draw).requires_grad_()
    bias = torch.zeros(3, 4).requires_grad_()
    gradients = [(torch.randn(3, 4, 5, generator=draw), torch.randn(3, 4, generator=draw)) for _ in range(4)]
    begin = weight.detach().clone()
    optimizer = Lars([weight, bias])
    for for_weight, for_bias in gradients:
        weight.grad, bias.grad = for_weight.clone(), for_bias.clone()
        optimizer.step(rates)
    for r in range(3):
        wanted = literal_lars(begin[r], [g[r] for g, _ in gradients], float(rates[r]), trusted=True)
        torch.testing.assert_close(weight[r].detach().double(), wanted, rtol=1e-5, atol=1e-6)  # fp32 rounding
        wanted = literal_lars(torch.zeros(4), [b[r] for _, b in gradients], float(rates[r]), trusted=False)
        torch.testing.assert_close(bias[r].detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_adam_is_torchs_for_every_rate_at_once() -> None:
    draw = torch.Generator().manual_seed(0)
    rates = [1e-3, 1e-1]
    mine = torch.nn.Parameter(torch.randn(2, 3, 4, generator=draw))
    theirs = [torch.nn.Parameter(mine.detach()[r].clone()) for r in range(2)]
    optimizer = _Adam([mine])
    others = [torch.optim.AdamW([p], lr=rate, weight_decay=0.01) for p, rate in zip(theirs, rates)]
    for _ in range(5):
        gradient = torch.randn(2, 3, 4, generator=draw)
        mine.grad = gradient.clone()
        optimizer.step(torch.tensor(rates))
        for r, other in enumerate(others):
            theirs[r].grad = gradient[r].clone()
            other.step()
    for r in range(2):
        torch.testing.assert_close(mine.detach()[r], theirs[r].detach(), rtol=1e-5, atol=1e-6)  # fp32 rounding


def test_rates_do_not_know_of_each_other() -> None:
    """Three rates trained together are three single ones."""
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(64, 6, generator=draw), torch.randint(3, (64,), generator=draw)

    def train(rates: list[float]) -> LinearProbe:
        probe = LinearProbe(6, [3], len(rates))
        optimizer = Lars(list(probe.parameters()))
        for _ in range(10):
            _loss(probe(features)[0], labels).backward()
            optimizer.step(torch.tensor(rates))
        return probe

    together = train([0.5, 5.0, 50.0])
    for r, rate in enumerate((0.5, 5.0, 50.0)):
        alone = train([rate])
        torch.testing.assert_close(together.weights[0][r], alone.weights[0][0], rtol=1e-4, atol=1e-6)
    standard = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    wanted = F.cross_entropy(F.linear(standard, together.weights[0][1], together.biases[0][1]), labels)
    logits = together(features)[0]
    torch.testing.assert_close(F.cross_entropy(logits[:, 1], labels), wanted)
    assert float(_loss(logits, labels).detach()) == pytest.approx(
        sum(float(F.cross_entropy(logits[:, r], labels).detach()) for r in range(3)), rel=1e-5
    )


def test_attentive_pooling_is_cross_attention_with_one_query() -> None:
    """Against torch's scaled_dot_product_attention: keys are the tokens, the query is folded with its projection."""
    probe = AttentiveProbe(12, [5], 2, heads=3).eval()  # BatchNorm is the identity before it has seen anything
    tokens = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(0))
    found = probe(tokens)[0]
    assert found.shape == (4, 2, 5)
    for r in range(2):
        query = probe.queries[0][r].expand(4, 1, 3, 12).transpose(1, 2)  # [B, heads, 1, D]
        keys = tokens.unsqueeze(1).expand(4, 3, 7, 12)
        values = torch.einsum("bnd,hed->bhne", tokens, probe.values[0][r])
        pooled = F.scaled_dot_product_attention(query, keys, values).squeeze(2).flatten(1)
        wanted = F.linear(pooled, probe.weights[0][r], probe.biases[0][r])
        torch.testing.assert_close(found[:, r], wanted, rtol=1e-4, atol=1e-5)


def test_the_schedule() -> None:
    assert [LINEAR.schedule(e) for e in (0, 5, 10, 50, 90)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    for words, message in (
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"warmup": 5}, "warmup: expected 0 to less than 5"),
        ({"rates": (0.1, -1.0)}, "rates: expected numbers above 0"),
    ):
        with pytest.raises(UserError, match=message):
            ProbeRecipe(**({"epochs": 5, "warmup": 1, "batch": 4, "rates": (0.1,)} | words))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are noise, and brighter or not."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("shades")
    draw = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 24)):
        for index in range(count):
            pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            label = index % 2
            pixels += 60 * label
            folder = root / part / ("dark", "light")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    exact = Precision(torch.float32, torch.float32)
    return Extractor(build(image_size=16, patch=4, width=24, depth=2, heads=2, precision=exact))


def sources(root: Path) -> tuple[ImageSource, ImageSource]:
    train, test = (
        ImageSource(data.build_manifest(root, split=part), (16, 16), batch_size=16, workers=0, centre=1.0)
        for part in ("train", "test")
    )
    return train, test


class Counting(Extractor):
    """Counts images that pass the backbone."""

    def __init__(self, other: Extractor) -> None:
        self.__dict__.update(other.__dict__)
        self.images = 0

    def tokens(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return super().tokens(pixels)


@pytest.mark.parametrize("probe", [linear_probe, attentive_probe])
def test_a_probe_learns_and_runs_the_backbone_once(
    probe: type, shades: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ProbeRecipe(30, 3, 16, (0.1, 10.0, 300.0) if probe is linear_probe else (1e-3, 3e-2))
    counting = Counting(extractor)
    rows = probe(counting, *sources(shades), recipe=recipe)
    assert counting.images == 60 + 24  # each image once, whatever the epochs and rates
    best = max(row["value"] for row in rows)
    assert best > 0.9, rows
    assert {row["features"] for row in rows} == ({"cls", "mean"} if probe is linear_probe else {"tokens"})
    assert all(row["rate"] in recipe.rates and row["label"] == "class" and row["batch"] == 16 for row in rows)
    assert rows == probe(extractor, *sources(shades), recipe=recipe)


@pytest.mark.parametrize("augment", [False, True])
def test_a_linear_probe_has_the_effective_rank_of_the_others(shades: Path, extractor: Extractor, augment: bool) -> None:
    """That of kNN's training features: the whole training part's central crops."""
    train, test = sources(shades)
    rows = linear_probe(extractor, train, test, recipe=ProbeRecipe(1, 0, 16, (0.1,)), augment=augment)
    wanted = {row["features"]: row["effective_rank"] for row in evaluate(extractor, train, test, metrics=("knn",))}
    assert {row["features"]: row["effective_rank"] for row in rows} == pytest.approx(wanted, rel=1e-4)  # other order
    assert summary(rows)[-1].split() == f"effective rank cls {wanted['cls']:.1f} mean {wanted['mean']:.1f}".split()


def test_augmented_features_are_new_in_every_epoch(shades: Path, extractor: Extractor) -> None:
    recipe = ProbeRecipe(4, 1, 32, (0.1, 10.0))
    counting = Counting(extractor)
    lines: list[str] = []
    (cls, mean) = linear_probe(counting, *sources(shades), recipe=recipe, augment=True, say=lines.append)
    # 54 images to learn from: 4 epochs of 3 batches of 16, and once for the effective rank; 6 held out and 24 to test.
    assert counting.images == 4 * 3 * 16 + 54 + 6 + 24
    assert cls["augment"] and 0 <= mean["value"] <= 1 and len(lines) == 3


def test_the_rate_is_chosen_without_the_test_part(shades: Path, extractor: Extractor) -> None:
    """Turning the test labels over turns the accuracy over, and nothing else."""
    train, test = sources(shades)
    recipe = ProbeRecipe(10, 1, 16, (1.0, 100.0))
    (cls, _) = linear_probe(extractor, train, test, recipe=recipe)
    assert test.manifest.labels is not None
    test.manifest.labels[:] = 1 - test.manifest.labels
    (turned, _) = linear_probe(extractor, train, test, recipe=recipe)
    assert turned["value"] == pytest.approx(1 - cls["value"])
    assert {k: v for k, v in cls.items() if k != "value"} == {k: v for k, v in turned.items() if k != "value"}


def test_tokens_that_do_not_fit_are_refused(
    shades: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cohobate.evaluation.probe.TOKEN_BYTES", 1000)
    with pytest.raises(UserError, match=r"expected tokens of at most 0 GiB to keep.*--augment"):
        attentive_probe(extractor, *sources(shades))


def test_features_that_are_not_finite_name_the_weights(shades: Path) -> None:
    model = build(image_size=16, patch=4, width=24, depth=2, heads=2)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0, 0] = math.nan  # type: ignore[union-attr, index]
    with pytest.raises(
        UserError, match=r"weights: expected finite numbers in spoiled, got NaN or inf in blocks\.1\.mlp"
    ):
        Extractor(model, name="spoiled")
