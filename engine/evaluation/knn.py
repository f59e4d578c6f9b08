"""Weighted nearest-neighbour vote on frozen features, the DINO convention (Caron et al., ICCV 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError

_VOTE_ELEMENTS = 1 << 24  # largest [rows, k, classes] table held at once


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> list[float]:
    """Share of test samples whose label wins the vote of their ``k`` nearest training samples, for each label kind.

    Features are L2-normalised; a neighbour's vote weighs exp(cosine / temperature).

    Args:
        train: [N, D] float. test: [M, D] float, on the same device.
        train_labels: [N, K] int64, K kinds of label, each from 0. test_labels: [M, K] int64.

    Raises:
        UserError: shapes that do not fit, ``k`` outside 1..N, or a temperature that is not above 0.
    """
    check_labelled(train, train_labels, test, test_labels)
    if not 1 <= k <= len(train):
        raise UserError(f"k: expected 1 to {len(train)}, the number of training samples, got {k}")
    if not temperature > 0:
        raise UserError(f"temperature: expected more than 0, got {temperature}")
    memory = F.normalize(train.float(), dim=1)
    kinds = train_labels.shape[1]
    classes = [int(max(train_labels[:, kind].max(), test_labels[:, kind].max())) + 1 for kind in range(kinds)]
    rows = max(1, min(1024, _VOTE_ELEMENTS // (k * max(classes))))
    right = torch.zeros(kinds, dtype=torch.int64, device=train.device)
    for queries, truths in zip(test.split(rows), test_labels.split(rows)):
        similarity, neighbours = (F.normalize(queries.float(), dim=1) @ memory.T).topk(k, dim=1)
        # The largest possible similarity is taken off so that a small temperature does not overflow.
        weights = ((similarity - 1) / temperature).exp()
        for kind, count in enumerate(classes):
            votes = F.one_hot(train_labels[neighbours, kind], count).to(weights.dtype)
            winner = torch.einsum("mk,mkc->mc", weights, votes).argmax(dim=1)
            right[kind] += (winner == truths[:, kind]).sum()
    return [count / len(test) for count in right.tolist()]


def check_labelled(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raise UserError unless features are [N, D] and [M, D] and labels [N, K] and [M, K], none of them empty."""
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.dim() != 2 or features.shape[1] != train.shape[-1] or len(features) == 0:
            raise UserError(f"{name}: expected features [samples, {train.shape[-1]}], got {list(features.shape)}")
        if labels.shape != (len(features), train_labels.shape[-1]) or labels.shape[1] == 0:
            raise UserError(f"{name}_labels: expected [{len(features)}, kinds], got {list(labels.shape)}")
        if int(labels.min()) < 0:
            raise UserError(f"{name}_labels: expected classes from 0, got {int(labels.min())}")
