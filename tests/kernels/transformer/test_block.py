"""pre_norm_block: a transformer block in one call is its parts in turn, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cohobate.kernels import use_backend, why_not
from cohobate.kernels.backends.attention import use_attention
from cohobate.kernels.transformer import linear
from cohobate.kernels.transformer.block import (
    Parameters,
    in_one_call,
    pre_norm_block,
    pre_norm_block_cost,
    pre_norm_block_reference,
)
from cohobate.models.layers import Block, Linear, Stream, set_checkpointing

FACTS: dict[str, Any] = {"x": torch.float32, "branch": torch.bfloat16, "parameters": frozenset()}
FACTS |= {"heads": 2, "width": 64, "hidden": 256}
REASONS = why_not("pre_norm_block", "native", "cpu", **FACTS)
fast_only = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
HALF = torch.bfloat16
# A block rounds about ten times to bf16, 2^-9 each, one behind the other.
ROUNDED = 10 * 2**-9


def made(width: int = 64, heads: int = 2, seed: int = 0) -> Block:
    """A block whose every parameter does something."""
    generator = torch.Generator().manual_seed(seed)
    block = Block(width, heads)
    for parameter in block.parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() == 1)
    return block


def parameters_of(block: Block) -> Parameters:
    modules: tuple[Any, ...] = (
        block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.fc1, block.mlp.fc2,
    )  # fmt: skip
    return Parameters(*(p for module in modules for p in (module.weight, module.bias)))


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, branch: bool, drop: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "x": draw(*shape).to(dtype).requires_grad_(),
        "branch": draw(*shape).to(HALF).requires_grad_() if branch else None,
        "factor": draw(shape[0]).abs() if branch and drop else None,
        "drop": draw(2, shape[0]).abs() if drop else None,
        "grads": (draw(*shape).to(dtype), draw(*shape).to(HALF)),
    }


def results(block: Block, given: dict[str, Any], run: Callable[[], Stream] | None = None) -> list[Tensor]:
    """Stream, branch, and all gradients."""
    leaves = [x for x in (given["x"], given["branch"]) if x is not None] + list(block.parameters())
    found = block(Stream(given["x"], given["branch"], given["factor"]), HALF, given["drop"]) if run is None else run()
    assert found.branch is not None
    gradients = torch.autograd.grad((found.x, found.branch), leaves, given["grads"])
    return [found.x.detach(), found.branch.detach(), *gradients]


def calls(run: Callable[[], object]) -> set[str]:
    """Names of the torch ops of ours that are called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    return {event.name.partition("::")[2] for event in recorded.events() if event.name.startswith("cohobate::")}


@fast_only
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("branch", "drop"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize(("shape", "heads"), [((3, 17, 64), 2), ((1, 1, 32), 1), ((2, 65, 96), 3)])
def test_the_same_bits_as_its_parts(
    shape: tuple[int, int, int], heads: int, dtype: torch.dtype, branch: bool, drop: bool
) -> None:
    block, given = made(shape[2], heads), inputs(shape, dtype, branch, drop)
    assert "pre_norm_block" in calls(lambda: results(block, given))
    whole = results(block, given)
    with use_backend("reference", "pre_norm_block"):
        assert "pre_norm_block" not in calls(lambda: results(block, given))
        parts = results(block, given)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=fast_only)])
@pytest.mark.parametrize(("branch", "drop"), [(False, False), (True, True)])
def test_against_torchs_own_layer_in_float64(backend: str, branch: bool, drop: bool) -> None:
    block, given = made(), inputs((3, 17, 64), torch.float32, branch, drop)
    p, first, second = parameters_of(block), given["factor"], None if given["drop"] is None else given["drop"][0]

    def run() -> Stream:
        return Stream(*pre_norm_block(given["x"], given["branch"], p, 2, factor=first, drop=second, backend=backend))

    got = results(block, given, run)
    right = results(block, given, lambda: torchs(given, p, first, second))
    for a, b in zip(got, right, strict=True):
        assert float((a - b).norm()) <= ROUNDED * float(b.norm())


def torchs(given: dict[str, Any], p: Parameters, factor: Tensor | None, drop: Tensor | None) -> Stream:
    """nn.TransformerEncoderLayer in float64, on the rows with the branch added; drop path undone by hand."""
    x = given["x"].double()
    if given["branch"] is not None:
        x = x + given["branch"].double() * (1 if factor is None else factor.double()[:, None, None])
    attention = nn.MultiheadAttention(x.shape[2], 2, batch_first=True, dtype=torch.float64)
    normed = nn.functional.layer_norm(x, x.shape[2:], p.norm1_weight.double(), p.norm1_bias.double(), 1e-6)
    weights = {
        "in_proj_weight": p.qkv_weight, "in_proj_bias": p.qkv_bias,
        "out_proj.weight": p.proj_weight, "out_proj.bias": p.proj_bias,
    }  # fmt: skip
    wide = {name: value.double() for name, value in weights.items()}
    branch = torch.func.functional_call(attention, wide, (normed, normed, normed), {"need_weights": False})[0]
    x = x + branch * (1 if drop is None else drop.double()[:, None, None])
    normed = nn.functional.layer_norm(x, x.shape[2:], p.norm2_weight.double(), p.norm2_bias.double(), 1e-6)
    hidden = nn.functional.gelu(nn.functional.linear(normed, p.fc1_weight.double(), p.fc1_bias.double()))
    out = nn.functional.linear(hidden, p.fc2_weight.double(), p.fc2_bias.double())
    return Stream(x.to(given["x"].dtype), out.to(HALF))


@fast_only
def test_without_a_gradient_the_same_and_no_graph() -> None:
    block, given = made(), inputs((2, 9, 64), torch.float32, True, False)
    stream = Stream(given["x"], given["branch"])
    with torch.no_grad():
        quiet = block(stream, HALF)
    loud = block(stream, HALF)
    assert quiet.x.grad_fn is None and torch.equal(quiet.x, loud.x) and torch.equal(quiet.branch, loud.branch)


@fast_only
def test_only_one_of_the_results_is_read() -> None:
    """The other one's gradient is none, and counts as zero."""
    block, given = made(), inputs((2, 9, 64), torch.float32, True, False)
    for which in ("x", "branch"):
        found = []
        for backend in ("native", "reference"):
            with use_backend(backend, "pre_norm_block"):
                out = getattr(block(Stream(given["x"], given["branch"]), HALF), which)
            found.append(
                torch.autograd.grad(out.float().square().sum(), [given["x"], *block.parameters()], allow_unused=True)
            )
        for a, b in zip(*found, strict=True):
            assert (a is None or not a.any()) if b is None else torch.equal(a, b)


class Louder(Linear):
    """Somebody's own layer, such as one with an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * linear(x, self.weight, self.bias)


def adapted(block: Block) -> None:
    other = Louder(64, 192)
    other.load_state_dict(block.attn.qkv.state_dict())
    block.attn.qkv = other


def frozen(block: Block) -> None:
    block.mlp.fc1.weight.requires_grad_(False)


def without_bias(block: Block) -> None:
    block.attn.proj.bias = None


def watched(block: Block) -> None:
    block.seen = []  # type: ignore[assignment]
    block.mlp.fc1.register_forward_hook(lambda module, args, out: block.seen.append(out))  # type: ignore[operator, union-attr]


@fast_only
@pytest.mark.parametrize("change", [adapted, frozen, without_bias, watched])
def test_who_looks_at_a_part_or_exchanges_it_finds_it_in_use(change: Callable[[Block], None]) -> None:
    block, given = made(), inputs((2, 9, 64), torch.float32, False, False)
    before = block(Stream(given["x"]), HALF)
    change(block)
    assert "pre_norm_block" not in calls(lambda: block(Stream(given["x"]), HALF))
    after = block(Stream(given["x"]), HALF)
    assert torch.equal(before.branch, after.branch) == (change in (frozen, watched))
    if change is watched:
        assert [x.shape for x in block.seen] == [(2, 9, 256)] * 2  # type: ignore[union-attr]


@fast_only
@pytest.mark.parametrize("op", ["linear", "add_norm", "bias_gelu", "short_attention", "pre_norm_block"])
def test_a_backend_asked_of_a_part_is_used(op: str) -> None:
    block, given = made(), inputs((2, 9, 64), torch.float32, False, False)
    run = lambda: block(Stream(given["x"]), HALF)  # noqa: E731
    with use_backend("reference", op):
        assert not calls(run) & {op, "pre_norm_block"}
    with use_attention("sdpa"):
        assert not calls(run) & {"short_attention", "pre_norm_block"}
    assert "pre_norm_block" in calls(run)


@fast_only
def test_where_it_is_not_for_the_call_the_parts_run() -> None:
    block, given = made(), inputs((2, 9, 64), torch.float32, False, False)
    p, x = parameters_of(block), given["x"]
    assert in_one_call(x, None, p, 2, eps=1e-6, compute=HALF) is not None
    assert in_one_call(x, None, p, 2, eps=1e-6, compute=torch.float32) is None
    for other in (x.double(), x[:0], x.to("meta")):
        assert in_one_call(other, None, p, 2, eps=1e-6, compute=HALF) is None
    assert in_one_call(x, x, p, 2, eps=1e-6, compute=HALF) is None  # a branch in another dtype
    assert in_one_call(x, None, Parameters(*(t.bfloat16() for t in p)), 2, eps=1e-6, compute=HALF) is None
    queries = torch.zeros(2, 3, dtype=torch.int32)
    assert block(Stream(x), HALF, queries=queries).x.shape == (2, 3, 64)
    scaled = Block(64, 2, layer_scale=0.1)
    assert "pre_norm_block" not in calls(lambda: scaled(Stream(x), HALF))
    set_checkpointing(block, "operations")  # keeps some of its parts' results
    assert "pre_norm_block" not in calls(lambda: block(Stream(x), HALF))
    set_checkpointing(block, "blocks")
    assert "pre_norm_block" in calls(lambda: block(Stream(x), HALF))


@fast_only
def test_the_profiler_sees_the_kernels_inside() -> None:
    block, given = made(), inputs((2, 9, 64), torch.float32, False, False)
    seen = calls(lambda: results(block, given))
    kernels = {"add_norm", "linear", "short_attention", "bias_gelu"}
    assert kernels | {f"{name}_backward" for name in kernels} <= seen


def test_torch_counts_the_operations_of_its_parts() -> None:
    """The counter's hooks look at every module, so that a block is not one call then."""
    block, given = made(), inputs((2, 9, 64), torch.float32, False, False)
    with use_attention("explicit"), FlopCounterMode(display=False) as counter:
        found = block(Stream(given["x"]), HALF)
        assert counter.get_total_flops() == products(2, 9)
        (found.x.sum() + found.branch.float().sum()).backward()
    assert counter.get_total_flops() == 3 * products(2, 9)


def products(batch: int, length: int) -> int:
    """Of the linear layers, 12 D^2 weights, and of the scores and their product with the values."""
    return 2 * batch * length * 12 * 64 * 64 + 4 * batch * length * length * 64


def test_the_floor_is_that_of_its_parts() -> None:
    forward, backward = (pre_norm_block_cost(2, 9, 64, 256, 2, 4, 2, backward=way) for way in (False, True))
    assert products(2, 9) < forward.flops < 1.1 * products(2, 9)  # norms and GELU beside them
    assert 2 * forward.flops < backward.flops < 2.2 * forward.flops and backward.bytes > forward.bytes
    wide = pre_norm_block_cost(2, 9, 64, 256, 2, 4, 4)
    assert wide.flops == forward.flops and forward.bytes < wide.bytes < 2 * forward.bytes  # parameters are fp32 in both


@fast_only
def test_opcheck() -> None:
    block, given = made(), inputs((2, 3, 64), torch.float32, True, True)
    parameters = [p.detach() for p in parameters_of(block)]
    x, branch, factor, drop = given["x"].detach(), given["branch"].detach(), given["factor"], given["drop"][0]
    arguments = (x, branch, factor, drop, parameters, 2, 1e-6, "native")
    torch.library.opcheck(torch.ops.cohobate.pre_norm_block.default, arguments)
    first, kept, total, _ = torch.ops.cohobate.pre_norm_block(*arguments)
    grad_sum, grad_out = given["grads"]
    for given_sum, wants_branch in ((grad_sum, True), (None, False)):
        backward = (given_sum, grad_out, first, total, kept, parameters, factor, drop, 2, wants_branch, "native")
        torch.library.opcheck(torch.ops.cohobate.pre_norm_block_backward.default, backward)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 64)}, ValueError, "x: expected shape"),
        ({"branch": torch.zeros(2, 9, 64)}, TypeError, "branch: expected dtype bfloat16, got float32"),
        ({"branch": torch.zeros(2, 8, 64, dtype=HALF)}, ValueError, "branch: expected shape [2, 9, 64]"),
        ({"heads": 3}, ValueError, "heads: expected a divisor of the width 64, got 3"),
        ({"drop": torch.zeros(3)}, ValueError, "drop: expected shape [2], got [3]"),
        ({"factor": torch.zeros(2)}, ValueError, "factor: expected None without a branch"),
        ({"fc2_weight": torch.zeros(64, 64)}, ValueError, "fc2_weight: expected shape [64, 256], got [64, 64]"),
        ({"qkv_bias": torch.zeros(64)}, ValueError, "qkv_bias: expected shape [192], got [64]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 9, 64), "branch": None, "heads": 2, "factor": None, "drop": None}
    p = parameters_of(made())
    p = p._replace(**{name: value for name, value in change.items() if name in Parameters._fields})
    given |= {name: value for name, value in change.items() if name not in Parameters._fields}
    x, branch, heads = given.pop("x"), given.pop("branch"), given.pop("heads")
    with pytest.raises(error) as caught:
        pre_norm_block(x, branch, p, heads, **given)
    assert words in str(caught.value)


def test_the_reference_is_what_auto_falls_back_to() -> None:
    block, given = made(), inputs((2, 9, 64), torch.float32, False, False)
    p = parameters_of(block)
    with use_backend("reference"):
        found = pre_norm_block(given["x"], None, p, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, pre_norm_block_reference(given["x"], None, p, 2), strict=True))
