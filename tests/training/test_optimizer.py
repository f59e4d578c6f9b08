"""Parameter groups, the learning-rate rule, clipping and skipping."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

from cohobate.errors import UserError
from cohobate.kernels import use_backend
from cohobate.kernels.backends.optimizer import AdamW, why_not
from cohobate.models import Precision
from cohobate.models.layers import Linear, draw
from cohobate.training import checkpoints
from cohobate.training.checkpoints import Checkpoints
from cohobate.training.distributed import Ranks
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


# ------------------------------------------------------------------------------------------ our AdamW in torch's place


ours_only = pytest.mark.skipif(bool(why_not("cohobate", "cpu")), reason="the native library is not built")
ALONE = Ranks(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """Two linear layers of the models, and a norm; bf16 products as in a training step."""

    def __init__(self, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.precision = Precision(compute)
        self.inner, self.norm, self.outer = Linear(24, 40), nn.LayerNorm(40), Linear(40, 6, bias=False)
        draw(self, torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, kind = self.inner(x.to(self.precision.compute)), self.norm.weight.dtype
        out: torch.Tensor = self.outer(self.norm(x.to(kind)).to(x.dtype)).to(kind)
        return out


def descend(model: nn.Module, step: int) -> None:
    """The gradient of a step, of any size: every third one is cut."""
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
    (model(x) - x[:, :6]).pow(2).mean().mul(10.0 ** (step % 3 - 2)).backward()


def update(model: nn.Module, updater: Updater, step: int, bad: float = 0.0, rate: Any = None) -> None:
    updater.zero()
    descend(model, step)
    updater.gradient_norm()
    updater.step(1e-2 / (1 + step) if rate is None else rate, torch.tensor(bad))


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for _, value in sorted(state.items())]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(a.parameters(), b.parameters(), strict=True))


def test_twenty_updates_are_torchs() -> None:
    """Clipping by clip_grad_norm_ and an unfused AdamW, in float64: what is left is rounding."""
    model = Net()
    right = copy.deepcopy(model).double()
    right.precision = Precision(torch.float64, torch.float64)
    updater = Updater(model, clip=1.0)
    plain = torch.optim.AdamW(parameter_groups(right, 0.05), betas=(0.9, 0.95), eps=1e-8, foreach=False)
    cut = []
    for step in range(20):
        plain.zero_grad()
        descend(right, step)
        for ours, theirs in zip(model.parameters(), right.parameters(), strict=True):
            assert theirs.grad is not None
            ours.grad = theirs.grad.float()
        torch.nn.utils.clip_grad_norm_(right.parameters(), 1.0)
        for group in plain.param_groups:
            group["lr"] = 1e-3
        plain.step()
        cut.append(float(updater.gradient_norm()) > 1)
        updater.step(1e-3, torch.zeros(()))
    assert any(cut) and not all(cut)
    for ours, theirs in zip(model.parameters(), right.parameters(), strict=True):
        assert float(((ours.double() - theirs).norm() / theirs.norm()).detach()) <= 1e-6


@ours_only
def test_its_state_is_torchs(tmp_path: Path) -> None:
    """Either optimizer goes on from what the other has written, and ours goes on bit for bit."""
    model = Net()
    updater = Updater(model)
    assert isinstance(updater.optimizer, AdamW) and isinstance(updater.optimizer, torch.optim.AdamW)
    for step in range(3):
        update(model, updater, step)
    path = Checkpoints(tmp_path, 1, ALONE).save(3, checkpoints.training_state({"m": model}, updater.optimizer), {})

    twin, groups = Net(), parameter_groups(Net(), 0.05)
    theirs = torch.optim.AdamW(parameter_groups(twin, 0.05), lr=0.0, betas=(0.9, 0.95), fused=True)
    state = checkpoints.training_state({"m": twin}, theirs)
    assert state["optimizer"].keys() == checkpoints.training_state({"m": model}, updater.optimizer)["optimizer"].keys()
    checkpoints.load(path, state, ALONE)
    checkpoints.restore_optimizer({"m": twin}, theirs, state)
    assert len(groups) == 2 and all(torch.equal(*pair) for pair in zip(tensors(theirs), tensors(updater.optimizer)))

    other = Net()
    resumed = Updater(other)
    state = checkpoints.training_state({"m": other}, resumed.optimizer)
    checkpoints.load(path, state, ALONE)
    checkpoints.restore_optimizer({"m": other}, resumed.optimizer, state)
    plain = copy.deepcopy(theirs.state_dict())
    last = Net()
    last.load_state_dict(twin.state_dict())
    from_torch = Updater(last)
    from_torch.optimizer.load_state_dict(plain)
    for step in range(3, 6):
        for net, its in ((model, updater), (other, resumed), (last, from_torch)):
            update(net, its, step)
    assert same(model, other) and same(model, last)
    assert {float(state["step"]) for state in resumed.optimizer.state.values()} == {6.0}


@ours_only
def test_parameters_may_have_had_different_numbers_of_updates() -> None:
    """Moments that cross a stage boundary for some of them; a gradient that is not always there."""
    model, twin = Net(), Net()
    updater = Updater(model)
    theirs = torch.optim.AdamW(parameter_groups(twin, 0.05), lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        for net, optimizer in ((model, updater.optimizer), (twin, theirs)):
            optimizer.zero_grad()
            descend(net, step)
            net.outer.weight.grad = None if step % 2 else net.outer.weight.grad
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.step()
    counts = {float(state["step"]) for state in updater.optimizer.state.values()}
    assert counts == {2.0, 4.0}
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@ours_only
def test_a_rate_on_the_device() -> None:
    """What a captured step reads; a resume point holds a number all the same."""
    model, other = Net(), Net()
    updater, number = Updater(model, clip=1.0), Updater(other, clip=1.0)
    rate, addresses = torch.zeros(()), []
    for step in range(3):
        update(model, updater, step, rate=rate.fill_(1e-2 / (1 + step)))
        update(other, number, step)
        addresses.append([value.data_ptr() for value in tensors(updater.optimizer)])
    assert addresses[0] == addresses[1] == addresses[2]
    assert same(model, other) and updater.optimizer.param_groups[0]["lr"] == 0.0


def test_sharded_parameters_go_to_torch() -> None:
    """As FSDP's fully_shard leaves them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, model = Net(), Net()
        mesh = init_device_mesh("cpu", (1,))
        for module in (model.inner, model.norm, model.outer):
            distribute_module(module, mesh)
        updaters = [Updater(net, clip=1e-2) for net in (plain, model)]
        assert not isinstance(updaters[1].optimizer, AdamW) and updaters[1].shadowed == []
        for net, updater in zip((plain, model), updaters):
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            updater.gradient_norm()
            updater.step(1e-2, torch.zeros(()))
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b.full_tensor(), rtol=1e-5, atol=1e-6)  # type: ignore[operator]
    finally:
        dist.destroy_process_group()


def test_what_our_kernel_does_not_take_goes_to_torch() -> None:
    model = Net().double()
    assert not isinstance(Updater(model).optimizer, AdamW)
    model.precision = Precision(torch.float64, torch.float64)
    update(model, Updater(model, clip=1.0), 0)


# --------------------------------------------------------------------------------------------------- shadow weights


@ours_only
def test_shadows_change_no_number() -> None:
    with use_backend("reference", "linear"):
        nets = [Net(torch.bfloat16) for _ in range(2)]
        updaters = [Updater(net, clip=1.0, shadow=shadow) for net, shadow in zip(nets, (True, False))]
        assert [len(updater.shadowed) for updater in updaters] == [2, 0]
        for step in range(5):
            for net, updater in zip(nets, updaters):
                update(net, updater, step, bad=float(step == 2))
            copies = [layer.matrix(torch.bfloat16) for layer in updaters[0].shadowed]
            assert all(
                found is not None and found is layer.shadow for found, layer in zip(copies, updaters[0].shadowed)
            )
            assert all(
                torch.equal(found, layer.weight.bfloat16()) for found, layer in zip(copies, updaters[0].shadowed)
            )
        assert same(*nets) and nets[0].state_dict().keys() == nets[1].state_dict().keys()
        assert nets[0].inner.matrix(torch.float32) is None and nets[1].inner.matrix(torch.bfloat16) is None
        x = torch.randn(3, 24).bfloat16()
        for part in (lambda net: net.inner.part(x, 8, 24), lambda net: net.inner.product(x)):
            assert torch.equal(part(nets[0]), part(nets[1]))


@ours_only
def test_a_stale_shadow_is_never_read() -> None:
    with use_backend("reference", "linear"):
        net = Net(torch.bfloat16)
        updater, start = Updater(net), copy.deepcopy(net.state_dict())
        half = torch.bfloat16
        assert net.inner.matrix(half) is not None  # from the first forward pass on
        update(net, updater, 0)
        x = torch.randn(3, 24).bfloat16()
        moved = net(x)
        net.load_state_dict(start)
        assert net.inner.matrix(half) is None and not torch.equal(net(x), moved)
        assert torch.equal(net(x), Net(half)(x))
        update(net, updater, 1, bad=1.0)  # skipped: what was stale is written all the same
        assert torch.equal(net.inner.matrix(half), net.inner.weight.bfloat16())  # type: ignore[arg-type]
        assert torch.equal(net(x), Net(half)(x))
        draw(net, torch.Generator().manual_seed(1))
        assert net.inner.matrix(half) is None
        updater.write_shadows()
        assert torch.equal(net.inner.matrix(half), net.inner.weight.bfloat16())  # type: ignore[arg-type]
        copied = copy.deepcopy(net)
        assert copied.inner.shadow is None and torch.equal(copied(x), net(x))
        net.inner.weight.data = net.inner.weight.data.clone()
        assert net.inner.matrix(half) is None
        net.outer.weight.grad = torch.zeros_like(net.outer.weight)
        net.inner.weight.grad = None  # no update of it, and none of its shadow
        updater.step(0.0, torch.zeros(()))
        assert net.inner.matrix(half) is None and net.outer.matrix(half) is not None


@ours_only
def test_compiled_code_casts() -> None:
    torch._dynamo.reset()
    with use_backend("reference", "linear"):
        net = Net(torch.bfloat16)
        updater = Updater(net)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for step in range(2):
            x = torch.randn(3, 24)
            assert torch.equal(compiled(x), net(x))
            update(net, updater, step)
        assert torch.equal(compiled(x), net(x))


@ours_only
def test_a_model_in_fp32_has_none() -> None:
    with use_backend("reference", "linear"):
        assert Updater(Net()).shadowed == []
