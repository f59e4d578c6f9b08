"""Every op against float64 over dtypes, strides and odd shapes: one table, run on the CPU and on CUDA where it is.

Rule (as flash-attention's tests have it): the error of an op in a low precision, against the answer in float64, is at
most twice that of plain PyTorch in the same precision plus one rounding of the result, and never above a cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate.benchmarks import cases
from cohobate.benchmarks.cases import Call, KernelCase, Sizes
from cohobate.benchmarks.machine import DTYPES
from cohobate.kernels import tokens, why_not

FAST = {"cpu": "native", "cuda": "triton"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The native kernels take fp32 and bf16; the Triton kernels fp16 as well.
CPU = [("cpu", dtype) for dtype in ("fp32", "bf16")]
CUDA = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("fp32", "bf16", "fp16")]
# An op that changes its own inputs gives another answer at every call: tests/kernels/optimizer.
OPS = [name for name in (*cases.CASES, *cases.MORE) if name != "adamw"]
SIZES = {
    "even": Sizes(batch=2, width=64, image=32, patch=8, decoder=32),
    "odd": Sizes(batch=3, width=33, image=35, patch=5, decoder=17, keep=0.3),
    "one": Sizes(batch=1, width=2, image=4, patch=2, decoder=1, channels=1, keep=0.5),
    "clip": Sizes(batch=2, width=48, image=16, patch=4, decoder=24, frames=4, tubelet=2),
    "channels": Sizes(batch=2, width=20, image=12, patch=3, decoder=12, channels=5),
    "vit-b": Sizes(batch=2),
}
# A Triton kernel is compiled anew for every width and dtype, which takes longer than the test: not every pair on CUDA.
ON_CUDA = {"fp32": tuple(SIZES), "bf16": ("odd", "clip", "vit-b"), "fp16": ("odd", "vit-b")}
TABLE = [("cpu", dtype, size) for _, dtype in CPU for size in SIZES] + [
    pytest.param("cuda", dtype, size, marks=pytest.mark.gpu) for dtype, sizes in ON_CUDA.items() for size in sizes
]
# Caps on the relative Frobenius error: a few roundings of the dtype, and for fp32 a few thousand additions.
CAPS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
# One rounding of the result; for fp32 also what adding in another order may change.
ROUNDING = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}
LOSS_SCALE = 4096.0


def fast(call: Call, device: str) -> Call:
    return Call(lambda *values: call.function(*values, backend=FAST[device]), call.arguments)


def reference(call: Call) -> Call:
    return Call(lambda *values: call.function(*values, backend="reference"), call.arguments)


def restride(x: Tensor, kind: str) -> Tensor:
    """The same values in other memory: rows apart and shifted ("sliced"), or the last dimension not the fastest one."""
    if kind == "dense" or x.dim() == 0:
        return x
    if kind == "sliced":
        wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 7)
        view = wide[..., 3 : 3 + x.shape[-1]]
        return view.copy_(x)
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x


def poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations get, so that a value nobody wrote shows."""
    for size in (2**10, 2**14, 2**18, 2**22):
        torch.full((size,), float("nan"), device=device)


def run(kernel: KernelCase, call: Call, dtype: str, kind: str = "dense") -> Mapping[str, Tensor]:
    """Output and gradients of one call, with floats, indices and the incoming gradient in memory of that kind.

    Pixels are contiguous by contract. A loss in fp16 gets a loss scale, as in training: its gradient would underflow.
    """
    values: dict[str, Any] = {}
    for name, value in call.cast(DTYPES[dtype]).arguments.items():
        if isinstance(value, Tensor) and value.dtype is not torch.uint8:
            value = restride(value, kind).detach().requires_grad_(name in kernel.leaves)
        values[name] = value
    out = call.function(*values.values())
    results = {"out": out.detach()}
    if kernel.leaves:
        scale = LOSS_SCALE if kernel.upstream is None and dtype == "fp16" else 1.0
        upstream = torch.full_like(out, scale) if kernel.upstream is None else kernel.upstream.to(out.dtype)
        gradients = torch.autograd.grad(out, [values[leaf] for leaf in kernel.leaves], restride(upstream, kind))
        results.update({f"grad {leaf}": g.double() / scale for leaf, g in zip(kernel.leaves, gradients, strict=True)})
    return results


def distance(got: Tensor, answer: Tensor) -> float:
    assert got.shape == answer.shape
    assert bool(got.isfinite().all()), "a value that is not a number, or that nobody wrote"
    return float((got.double() - answer).norm() / answer.norm().clamp_min(1e-300))


def check(kernel: KernelCase, device: str, dtype: str, kind: str = "dense") -> None:
    if kernel.compare is not None:
        got = run(kernel, fast(kernel.ours, device), dtype, kind)
        assert kernel.compare(got) == (0.0, None)
        assert torch.equal(got["out"], run(kernel, reference(kernel.ours), dtype)["out"])
        return
    answer = kernel.case(kernel.modes[-1]).expected
    plain = run(kernel, reference(kernel.ours), dtype)
    poison(device)
    got = run(kernel, fast(kernel.ours, device), dtype, kind)
    assert set(got) == set(answer)
    for name, right in answer.items():
        error, eager = distance(got[name], right), distance(plain[name], right)
        assert error <= 2 * eager + ROUNDING[dtype], f"{name}: error {error:.1e}, PyTorch's {eager:.1e}"
        assert error <= CAPS[dtype], f"{name}: error {error:.1e}"


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    if device == "cpu" and why_not("take", "native", "cpu"):
        pytest.skip(why_not("take", "native", "cpu")[0])


@pytest.mark.parametrize(("device", "dtype", "size"), TABLE)
@pytest.mark.parametrize("name", OPS)
def test_against_float64(device: str, name: str, dtype: str, size: str) -> None:
    check(cases.build(name, SIZES[size], device, seed=1), device, dtype)


@pytest.mark.parametrize(("device", "dtype"), [*CPU, *CUDA])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["sliced", "transposed"])
def test_any_strides(device: str, name: str, dtype: str, kind: str) -> None:
    check(cases.build(name, SIZES["odd"], device, seed=2), device, dtype, kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_and_everything_visible(device: str, name: str, keep: float) -> None:
    """Empty index lists are shapes like any other, unless a mean over nothing is asked for."""
    mean_over_nothing = (keep == 1.0 and name.startswith("pixel_loss")) or (
        keep == 0.0 and name.startswith("align_layers")
    )
    if mean_over_nothing:
        pytest.skip("the mean over no row is not defined")
    check(
        cases.build(name, Sizes(batch=2, width=33, image=20, patch=5, decoder=17, keep=keep), device, seed=3),
        device,
        "fp32",
    )


@pytest.mark.parametrize(("device", "dtype"), [*CPU, *CUDA])
@pytest.mark.parametrize("name", OPS)
def test_twenty_runs_give_the_same_bits(device: str, name: str, dtype: str) -> None:
    kernel = cases.build(name, SIZES["odd"], device, seed=4)
    first = run(kernel, fast(kernel.ours, device), dtype)
    if device == "cuda":
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):  # somebody else keeps the card busy
            a = torch.randn(2048, 2048, device=device)
            for _ in range(50):
                a = a @ a / 64
    for _ in range(19):
        again = run(kernel, fast(kernel.ours, device), dtype)
        assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 3, 196, 1568])
def test_random_order_has_the_same_bits_everywhere(device: str, length: int) -> None:
    ids = torch.tensor([0, 1, 2**31, 2**40 + 5, 12345], device=device)
    got = tokens.random_order(ids, length, seed=2**33 + 7, stream=3, backend=FAST[device])
    right = tokens.random_order(ids.cpu(), length, seed=2**33 + 7, stream=3, backend="reference")
    assert torch.equal(got.cpu(), right)
