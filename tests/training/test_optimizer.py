"""Parameter groups, the learning-rate rule, clipping and skipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cohobate.errors import UserError
from cohobate.training.optimizer import Updater, parameter_groups
from cohobate.training.schedule import Schedule, peak_rate


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4), requires_grad=False)
        self.layer = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.layer(x + self.cls_token[0]))
        return out


def names(model: nn.Module, group: dict[str, list[nn.Parameter]]) -> set[str]:
    held = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def test_groups_of_both_rules() -> None:
    model = Tiny()
    decay, keep = parameter_groups(model, 0.05, "mae")
    assert names(model, decay) == {"cls_token", "layer.weight"} and decay["weight_decay"] == 0.05
    assert names(model, keep) == {"layer.bias", "norm.weight", "norm.bias"} and keep["weight_decay"] == 0.0
    decay, keep = parameter_groups(model, 0.05, "videomae")
    assert names(model, decay) == {"layer.weight"} and "cls_token" in names(model, keep)
    with pytest.raises(UserError, match=r"optimizer\.decay"):
        parameter_groups(model, 0.05, "none")


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_an_update_is_clip_then_adamw(clip: float | None) -> None:
    """Clipping inside the fused kernel equals torch's own clipping followed by an unfused AdamW."""
    ours, theirs = Tiny(), Tiny()
    updater = Updater(ours, clip=clip)
    groups = parameter_groups(theirs, 0.05)
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model.zero_grad()
            (model(x) ** 3).sum().backward()
        norm = updater.gradient_norm()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if clip is None else clip)
        torch.testing.assert_close(norm, expected)
        updater.step(1e-2, torch.zeros(()))
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # two orders of the same fp32 operations


def test_a_bad_update_leaves_weights_moments_and_step_count_alone() -> None:
    model = Tiny()
    updater = Updater(model, clip=1.0)

    def update(poison: float) -> None:
        model.zero_grad()
        (model(torch.ones(2, 4)).sum() * poison).backward()
        norm = updater.gradient_norm()
        updater.step(1e-2, 1.0 - norm.isfinite().float())

    def state() -> list[torch.Tensor]:
        held = [value for entry in updater.optimizer.state.values() for value in entry.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *held)]

    update(1.0)
    before = state()
    for poison in (math.nan, math.inf):
        update(poison)
        assert all(torch.equal(a, b) for a, b in zip(before, state()))
    assert updater.streak.item() == 2 and updater.skipped.item() == 2
    update(1.0)
    assert updater.streak.item() == 0 and updater.skipped.item() == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, state()))


def test_the_rate_of_each_step() -> None:
    """lr(e) of MAE and dBOT: lr e/w in the warm-up, min + (lr - min)/2 (1 + cos(pi (e-w)/(E-w))) after it."""
    schedule = Schedule(steps=100, warmup=10, peak=2.0, floor=0.5)
    assert schedule.rate(0) == 0.0 and schedule.rate(5) == 1.0 and schedule.rate(10) == 2.0
    assert schedule.rate(55) == pytest.approx(1.25) and schedule.rate(100) == pytest.approx(0.5)
    assert Schedule(steps=10, warmup=0, peak=1.0).rate(0) == 1.0
    assert peak_rate(None, 1.5e-4, 4096) == pytest.approx(2.4e-3) and peak_rate(0.1, 1.5e-4, 4096) == 0.1


@pytest.mark.parametrize(
    "warmup, floor, key", [(10, 0.0, "warmup_epochs"), (12, 0.0, "warmup_epochs"), (1, 3.0, "min_lr")]
)
def test_a_schedule_that_cannot_be(warmup: float, floor: float, key: str) -> None:
    with pytest.raises(UserError, match=f"optimizer.{key}: expected"):
        Schedule(steps=10, warmup=warmup, peak=2.0, floor=floor)
