"""Activation checkpointing changes what waits in memory, and no bit of the result; compiled blocks compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cohobate import kernels, models, random_plan
from cohobate.errors import UserError
from cohobate.kernels.backends import use_attention
from cohobate.kernels.transformer.linear import is_fast
from cohobate.masking import MaskPlan
from cohobate.models import Decoder, Generator, Precision, VisionTransformer
from cohobate.models.layers import CHECKPOINTING, Block, Stream, compile_blocks, draw, set_checkpointing

BEIT = {"positions": "none", "layer_scale": 0.1, "relative_positions": True, "drop_path": 0.2}
BATCH = 3


class Chain(nn.Module):
    """An encoder, and a decoder and a generator on its tokens: every user of ``run_blocks``."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape: dict[str, Any] = {"image_size": 32, "patch": 8, "width": 48, "depth": 3, "heads": 4, "drop_path": 0.3}
        self.encoder = models.build("tiny", **(shape | changes))
        sizes: dict[str, Any] = {"prefix": 1, "precision": self.encoder.precision}
        self.decoder = Decoder(self.encoder.grid, 48, 24, 32, 2, 4, drop_path=0.2, **sizes)
        self.generator = Generator(self.encoder.grid, 48, 4, **sizes)

    def forward(self, pixels: Tensor, plan: MaskPlan, generator: torch.Generator | None = None) -> Tensor:
        *inner, x = self.encoder.intermediates(pixels, (1, 3), plan.visible, norm=True, generator=generator)
        made = self.decoder(x, plan, self.decoder.masked_rows(plan), generator=generator)
        return sum(((y.float() - 0.3) ** 2).mean() for y in (made, self.generator(x, plan), *inner))  # type: ignore[return-value]


def inputs_of(model: VisionTransformer, batch: int = BATCH) -> tuple[Tensor, MaskPlan]:
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (batch, *model.grid.pixel_shape), dtype=torch.uint8, generator=g)
    plan = random_plan(model.grid, torch.arange(batch), seed=0, stage=0, epoch=0, ratio=0.75, teacher_ratio=0.5)
    return pixels, plan


def step(chain: nn.Module, *inputs: Any) -> list[Tensor]:
    """The loss and every gradient."""
    chain.zero_grad()
    loss = chain(*inputs, generator=torch.Generator().manual_seed(5))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in chain.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", CHECKPOINTING[1:])
@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, "auto"),
        ({"precision": Precision(torch.float32, torch.float32)}, "sdpa"),
        ({"precision": Precision(torch.bfloat16, torch.bfloat16)}, "explicit"),
        (BEIT, "auto"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_bit_changes(backend: str, changes: dict[str, Any], attention: str, kind: str) -> None:
    chain = Chain(**changes)
    inputs = inputs_of(chain.encoder)
    with kernels.use_backend(backend), use_attention(attention):
        expected = step(chain, *inputs)
        set_checkpointing(chain, kind)
        found = step(chain, *inputs)
    assert len(found) == len(expected) > 90
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", CHECKPOINTING[1:])
def test_under_ddp(tmp_path: Path, kind: str) -> None:
    chain = Chain()
    inputs = inputs_of(chain.encoder)
    expected = step(chain, *inputs)
    set_checkpointing(chain, kind)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = step(DistributedDataParallel(chain), *inputs)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class Alive(TorchDispatchMode):
    """Bytes of all that was made inside and still exists."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return out

    def bytes(self, but: nn.Module) -> int:
        own = {StorageWeakRef(p.untyped_storage()) for p in [*but.parameters(), *but.buffers()]}
        return sum(size for made, size in self.made.items() if made not in own and not made.expired())


def test_what_waits_for_the_backward_pass() -> None:
    """ViT-S, 16 images, 50 of 197 tokens, bf16 over an fp32 stream, in bytes a token, channel and block."""
    model = models.build("small", drop_path=0.1)
    pixels, plan = inputs_of(model, 16)
    kept = {}
    for kind in CHECKPOINTING:
        set_checkpointing(model, kind)
        with use_attention("sdpa"), Alive() as alive:
            out = model(pixels, plan.visible)
        kept[kind] = alive.bytes(model) / (16 * 50 * 384 * 12)
        del out
    # Stream, norm, qkv, attention, stream, norm, both sides of GELU: 4 + 2 + 6 + 2 + 4 + 2 + 8 + 8. Embedding and final
    # norm are the rest. torch's own product keeps the weights that it casts, and its LayerNorm more.
    assert kept["none"] == pytest.approx(36, abs=1.4) if is_fast() else kept["none"] > 36
    # Stream, and the results of qkv, attention, projection, and both products of the MLP: 4 + 6 + 2 + 2 + 8 + 2.
    assert kept["operations"] == pytest.approx(24, abs=1.4)
    # The stream and the branch that is to be added to it: 4 + 2.
    assert kept["blocks"] == pytest.approx(6, abs=1.4)


def test_without_gradients_nothing_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cohobate.models.layers.checkpoint", None)  # calling it would fail
    chain = Chain()
    set_checkpointing(chain, "blocks")
    with torch.no_grad():
        assert chain(*inputs_of(chain.encoder)).isfinite()
    with pytest.raises(TypeError):
        chain(*inputs_of(chain.encoder))


def test_a_kind_that_is_none() -> None:
    with pytest.raises(UserError, match="checkpointing: expected one of none, operations, blocks; got 'block'"):
        set_checkpointing(Chain(), "block")


@pytest.mark.parametrize("kind", CHECKPOINTING[:2])
def test_compiled_blocks(kind: str) -> None:
    """Three blocks of one shape, two of them called alike; names stay, and values up to the rounding of bf16."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks = nn.ModuleList(Block(16, 2) for _ in range(3))
    draw(blocks, torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    drop = torch.tensor([[1.25, 0.0], [1.25, 1.25]])
    names = list(blocks.state_dict())

    def gradients() -> list[Tensor]:
        blocks.zero_grad()
        stream = Stream(x.clone().requires_grad_())
        for block in blocks:
            stream = block(stream, torch.bfloat16, drop)
        stream.settled().pow(2).mean().backward()
        return [p.grad.clone() for p in blocks.parameters() if p.grad is not None]

    expected = gradients()
    set_checkpointing(blocks, kind)
    compile_blocks(blocks)
    found = gradients()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # with a branch and without one
    assert list(blocks.state_dict()) == names
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_captured_step(kind: str) -> None:
    """Forward and backward in one CUDA graph: no host sync, and the same bits as without a graph."""
    chain = Chain(drop_path=0.0).cuda().eval()  # eval: drop path would draw
    pixels, plan = inputs_of(chain.encoder)
    pixels, plan = pixels.cuda(), plan.to("cuda")
    set_checkpointing(chain, kind)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step(chain, pixels, plan)
    torch.cuda.current_stream().wait_stream(side)
    chain.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = chain(pixels, plan)
        loss.backward()
    graph.replay()
    found = [loss.detach(), *(p.grad for p in chain.parameters() if p.grad is not None)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
