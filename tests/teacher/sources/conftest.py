"""What the tests of sources share: weights that show a mistake, and input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate.tokens import TokenGrid


def scrambled(model: Any, seed: int = 0) -> Any:
    """``model`` with no neutral parameter: norms off 1 and 0, layer scales and biases large."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3, generator=generator)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture
def scramble() -> Callable[..., Any]:
    return scrambled


@pytest.fixture
def pixels_of() -> Callable[..., Tensor]:
    def draw(grid: TokenGrid, batch: int = 2, seed: int = 7) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (batch, *grid.pixel_shape), dtype=torch.uint8, generator=generator)

    return draw
