"""kNN, linear probe and effective rank against answers known beforehand or computed another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.evaluation.knn import knn_accuracy
from cohobate.evaluation.linear import linear_accuracy
from cohobate.evaluation.quality import effective_rank


def clusters(count: int, seed: int, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Points around 4 centres in 8 dimensions; labels: the centre, and a coin toss that no feature tells."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    which = torch.randint(4, (count,), generator=draw)
    points = centres[which] + spread * torch.randn(count, 8, generator=draw)
    return points, torch.stack([which, torch.randint(2, (count,), generator=draw)], dim=1)


def vote_by_hand(train: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float) -> int:
    """The DINO vote for one query, in float64 and plain Python."""
    unit = [row / row.norm() for row in train.double()]
    cosines = [(float(row @ (query.double() / query.double().norm())), int(label)) for row, label in zip(unit, labels)]
    votes: dict[int, float] = {}
    for cosine, label in sorted(cosines, reverse=True)[:k]:
        votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
    return max(votes, key=lambda label: votes[label])


def test_knn_is_the_vote_by_hand() -> None:
    train, labels = clusters(60, 1, spread=1.5)
    test, truths = clusters(40, 2, spread=1.5)
    accuracies = knn_accuracy(train, labels, test, truths, k=7, temperature=0.07)
    for kind in range(2):
        right = sum(vote_by_hand(train, labels[:, kind], q, 7, 0.07) == int(t) for q, t in zip(test, truths[:, kind]))
        assert accuracies[kind] == right / 40
    assert 0.3 < accuracies[0] < 1.0  # the task is neither hopeless nor trivial, so the comparison says something


def test_a_closer_neighbour_outweighs_two_far_ones() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([[0], [1], [1]])
    query, truth = torch.tensor([[1.0, 0.01]]), torch.tensor([[0]])
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=0.07) == [1.0]
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=100.0) == [0.0]  # all votes nearly equal


def test_a_tiny_temperature_does_not_overflow() -> None:
    train, labels = clusters(50, 3)
    assert knn_accuracy(train, labels, train, labels, k=1, temperature=1e-3)[0] == 1.0


def test_linear_separates_what_is_separable_and_not_what_is_not() -> None:
    train, labels = clusters(600, 4)
    test, truths = clusters(300, 5)
    known, coin = linear_accuracy(train, labels, test, truths)
    assert known > 0.97
    assert 0.4 < coin < 0.6  # a coin of 300 tosses: 3.5 standard deviations


def test_linear_repeats_and_ignores_scale_and_offset() -> None:
    train, labels = clusters(300, 6, spread=1.5)
    test, truths = clusters(200, 7, spread=1.5)
    first = linear_accuracy(train, labels, test, truths)
    assert first == linear_accuracy(train, labels, test, truths)
    moved = linear_accuracy(train * 40 + 3, labels, test * 40 + 3, truths)
    # Standardisation takes both out; what is left is rounding that may turn over one or two undecided samples.
    assert moved == pytest.approx(first, abs=0.011)


def test_linear_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels = clusters(300, 8, spread=2.0)
    test, truths = clusters(400, 9, spread=2.0)
    mean, deviation = train.mean(0), train.var(0, correction=0).sqrt()
    # scikit-learn minimises the summed loss plus |W|^2 / (2C); ours the mean plus decay/2 |W|^2.
    other = linear_model.LogisticRegression(C=1 / (1e-4 * 300), max_iter=2000, tol=1e-8)
    other.fit(((train - mean) / deviation).numpy(), labels[:, 0].numpy())
    expected = other.score(((test - mean) / deviation).numpy(), truths[:, 0].numpy())
    assert linear_accuracy(train, labels, test, truths)[0] == pytest.approx(expected, abs=0.006)  # 2 samples of 400


def test_effective_rank_of_known_spectra() -> None:
    basis = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(0))).Q
    assert effective_rank(basis) == pytest.approx(6.0, rel=1e-4)  # six equal singular values
    assert effective_rank(basis[:, :1] @ torch.ones(1, 6)) == pytest.approx(
        1.0, abs=1e-3
    )  # fp32 noise in the other five
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = values / values.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert effective_rank(basis[:, :4] * values) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.zeros(4, 3)) == 1.0


def test_wrong_arguments_are_named() -> None:
    train, labels = clusters(10, 0)
    cases = [
        (lambda: knn_accuracy(train, labels, train, labels, k=11), "k: expected 1 to 10"),
        (lambda: knn_accuracy(train, labels, train, labels, k=1, temperature=0.0), "temperature: expected more than 0"),
        (lambda: knn_accuracy(train, labels[:5], train, labels, k=1), r"train_labels: expected \[10, kinds\]"),
        (lambda: knn_accuracy(train, labels, train[:, :3], labels, k=1), r"test: expected features \[samples, 8\]"),
        (lambda: linear_accuracy(train, labels - 5, train, labels), "train_labels: expected classes from 0"),
        (lambda: effective_rank(train[0]), "features: expected a non-empty"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
