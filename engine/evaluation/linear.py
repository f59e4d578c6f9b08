"""Linear probe on frozen features: standardise (BatchNorm without affine), then one linear layer fitted to the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.evaluation.knn import check_labelled


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    decay: float = 1e-4,
    iterations: int = 200,
) -> list[float]:
    """Test accuracy of multinomial logistic regression, for each label kind.

    The mean cross-entropy plus ``decay``/2 |W|^2 is convex, so full-batch L-BFGS from zero finds its only minimum: no
    learning rate, no seed, the same number every time. The kinds are separate problems solved together.

    Args:
        train: [N, D] float. test: [M, D] float. train_labels: [N, K] int64, from 0. test_labels: [M, K] int64.
        decay: weight of the penalty; the bias has none.
        iterations: upper bound of L-BFGS iterations.

    Raises:
        UserError: shapes that do not fit.
    """
    check_labelled(train, train_labels, test, test_labels)
    train, test = train.float(), test.float()
    mean, deviation = train.mean(dim=0), (train.var(dim=0, correction=0) + 1e-6).sqrt()
    inputs, queries = (train - mean) / deviation, (test - mean) / deviation
    kinds = train_labels.shape[1]
    sizes = [int(max(train_labels[:, kind].max(), test_labels[:, kind].max())) + 1 for kind in range(kinds)]
    weight = torch.zeros(sum(sizes), inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(sum(sizes), device=inputs.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = F.linear(inputs, weight, bias).split(sizes, dim=1)
        terms = [F.cross_entropy(part, train_labels[:, kind]) for kind, part in enumerate(logits)]
        loss = torch.stack(terms).sum() + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    with torch.no_grad():
        logits = F.linear(queries, weight, bias).split(sizes, dim=1)
        right = [(part.argmax(dim=1) == test_labels[:, kind]).float().mean() for kind, part in enumerate(logits)]
    return torch.stack(right).tolist()
