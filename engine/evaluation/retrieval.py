"""Nearest images by the cosine of their features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError

_ROWS = 1024  # queries compared at once


@torch.no_grad()
def nearest(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``features`` for each query, the nearest first.

    A query that is itself among ``features`` finds itself first: ask for one more and drop the first column.

    Args:
        features: [N, D] float. queries: [M, D] float, on the same device.

    Returns:
        Cosines [M, k] fp32 and places in ``features`` [M, k] int64.

    Raises:
        UserError: shapes that do not fit, or ``k`` outside 1..N.
    """
    if features.dim() != 2 or queries.dim() != 2 or features.shape[1] != queries.shape[1]:
        raise UserError(f"queries: expected [M, D] beside features [N, D], got {[*queries.shape]}, {[*features.shape]}")
    if not 1 <= k <= len(features):
        raise UserError(f"k: expected 1 to {len(features)}, the number of features, got {k}")
    memory = F.normalize(features.float(), dim=1)
    found = [(F.normalize(rows.float(), dim=1) @ memory.T).topk(k, dim=1) for rows in queries.split(_ROWS)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
