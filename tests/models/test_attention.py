"""The models' attention goes through the table of the kernels' backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cohobate.kernels.backends import attention, use_attention
from cohobate.kernels.backends.attention import Backend
from cohobate.models.layers import Attention


@pytest.mark.parametrize("queries", [None, torch.tensor([[0, 3], [1, 4]], dtype=torch.int32)])
def test_the_student_runs_what_the_table_or_the_user_says(
    queries: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def spy(name: str) -> Backend:
        def run(packed: Tensor, heads: int, rows: Tensor | None) -> Tensor:
            seen.append((name, heads))
            return attention.dense.explicit(packed, heads, rows)

        return Backend(run, lambda _: [])

    monkeypatch.setattr(attention, "BACKENDS", {"mine": spy("mine"), "theirs": spy("theirs")})
    monkeypatch.setattr(attention, "rules", lambda: (attention.Rule("mine", "here"),))
    monkeypatch.setattr(attention, "_answers", {})
    monkeypatch.setattr(attention, "_environment", "auto")
    layer = Attention(12, 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 12)
    mine = layer(x, queries)
    with use_attention("theirs"):
        assert torch.equal(layer(x, queries), mine)
    assert seen == [("mine", 3), ("theirs", 3)]
