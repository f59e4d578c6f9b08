"""The update of the parameters on CUDA: torch's numbers, in a captured graph too, without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cohobate.kernels.backends.optimizer import AdamW
from cohobate.models import Precision
from cohobate.models.layers import Linear, draw
from cohobate.training.optimizer import Updater, parameter_groups

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    """Enough tensors for more than one launch of addresses, some of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = Precision(torch.bfloat16)
        self.layers = nn.ModuleList(Linear(48, 48) for _ in range(40))
        self.scale = nn.Parameter(torch.ones(48 * 701))
        draw(self, torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x.bfloat16()).float()
        return (x.repeat(1, 701) * self.scale).square().mean()


def update(model: Net, updater: Updater, x: Tensor, rate: Tensor, bad: Tensor) -> None:
    model(x).backward()
    updater.gradient_norm()
    updater.step(rate, bad)
    updater.zero()


def test_torchs_numbers() -> None:
    model, twin = Net().cuda(), Net().cuda()
    updater = Updater(model, clip=0.5)
    assert isinstance(updater.optimizer, AdamW) and len(updater.shadowed) == 40
    theirs = torch.optim.AdamW(parameter_groups(twin, 0.05), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    x = torch.randn(16, 48, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for _ in range(5):
        model(x).backward()
        for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            other.grad = ours.grad.clone()
        norm = updater.gradient_norm()
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5), rtol=1e-5, atol=0)
        updater.step(1e-2, torch.zeros((), device="cuda"))
        theirs.step()
        updater.zero()
        for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert float((ours - other).norm() / other.norm()) <= 2e-6  # two orders of the same fp32 operations
        for layer in updater.shadowed:
            assert torch.equal(layer.matrix(torch.bfloat16), layer.weight.bfloat16())  # type: ignore[arg-type]


def test_a_captured_update_repeats_the_eager_one() -> None:
    """Rates and verdicts are read at each replay; gradients are new tensors inside the graph."""
    eager, captured = Net().cuda(), Net().cuda()
    updaters = [Updater(net, clip=0.5) for net in (eager, captured)]
    x, rate, bad = torch.randn(16, 48, device="cuda"), torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for net, updater in zip((eager, captured), updaters, strict=True):
            update(net, updater, x, rate.fill_(1e-3), bad)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        update(captured, updaters[1], x, rate, bad)
    for step, verdict in enumerate((0.0, 1.0, 0.0)):
        rate.fill_(1e-2 / (1 + step))
        bad.fill_(verdict)
        update(eager, updaters[0], x, rate, bad)
        graph.replay()
        for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
            assert torch.equal(a, b)
    assert {float(state["step"]) for state in updaters[1].optimizer.state.values()} == {3.0}


def test_no_update_waits_for_the_device() -> None:
    model = Net().cuda()
    updater, x = Updater(model, clip=0.5), torch.randn(16, 48, device="cuda")
    rate, bad = torch.full((), 1e-2, device="cuda"), torch.zeros((), device="cuda")
    update(model, updater, x, rate, bad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(model, updater, x, rate, bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
