"""Quality of features without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from cohobate.errors import UserError


@torch.no_grad()
def effective_rank(features: Tensor, limit: int = 25_000) -> float:
    """exp of the entropy of the normalised singular values (RankMe, Garrido et al., ICML 2023); 1 means collapsed.

    Args:
        features: [N, D] float. limit: rows used, the first ones (the paper finds 25,600 enough).

    Raises:
        UserError: ``features`` is not a non-empty matrix.
    """
    if features.dim() != 2 or features.numel() == 0:
        raise UserError(f"features: expected a non-empty [samples, channels], got {list(features.shape)}")
    values = torch.linalg.svdvals(features[:limit].float()).double()
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return float(entropy.exp())
