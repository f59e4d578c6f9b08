"""What only a GPU can show: graph capture, streams, no host sync, offsets beyond 2**31."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate.benchmarks import cases
from cohobate.benchmarks.cases import Call, KernelCase, Sizes, runner
from cohobate.benchmarks.machine import DTYPES
from cohobate.kernels import alignment, tokens

pytestmark = pytest.mark.gpu

# An op that changes its own inputs gives another answer at every call: tests/kernels/optimizer.
OPS = [name for name in (*cases.CASES, *cases.MORE) if name != "adamw"]
SMALL = Sizes(batch=4, width=96, image=32, patch=8, decoder=64)
FAR = 2**31 + 2**10  # elements between two samples: more than 32 bits can count


def call_of(kernel: KernelCase) -> Call:
    return Call(lambda *values: kernel.ours.function(*values, backend="triton"), kernel.ours.arguments)


def runner_of(name: str, dtype: str, seed: int = 0) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and, where there is one, backward of one op on its own inputs."""
    kernel = cases.build(name, SMALL, "cuda", seed)
    upstream = None if kernel.upstream is None else kernel.upstream.to(DTYPES[dtype])
    return runner(call_of(kernel).cast(DTYPES[dtype]), kernel.leaves, kernel.modes[-1], upstream)


def warm_up(function: Callable[[], Any]) -> torch.cuda.Stream:
    """On a side stream, which the capture is to be on too, as CUDA graphs ask; also compiles the kernels."""
    gc.collect()  # nodes of older autograd graphs would run on the stream where they were made
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return side


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_forward_and_backward_are_captured_in_a_graph(name: str, dtype: str) -> None:
    function = runner_of(name, dtype)
    expected = [value.clone() for value in function()]
    side, graph = warm_up(function), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = function()
    for _ in range(3):
        for value in captured:
            value.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got, right) for got, right in zip(captured, expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_no_host_sync(name: str) -> None:
    function = runner_of(name, "fp32")
    function()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPS)
def test_two_streams_at_once(name: str) -> None:
    functions = [runner_of(name, "bf16", seed) for seed in (1, 2)]
    expected = [[value.clone() for value in function()] for function in functions]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in functions]
    found: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(10):
        for function, stream, results in zip(functions, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(function())
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        for got in results:
            assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def needs(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes:g} GB of free GPU memory")


def far_apart(*shape: int) -> Tensor:
    """bf16 [2, ...] whose second sample lies beyond 2**31 elements; random values."""
    needs(6)
    storage = torch.empty(FAR + shape[1] * shape[2], dtype=torch.bfloat16, device="cuda")
    view = storage.as_strided(shape, (FAR, shape[2], 1))
    return view.copy_(torch.randn(shape, device="cuda"))


def order(samples: int, length: int) -> Tensor:
    return torch.rand(samples, length, device="cuda").argsort(dim=1).to(torch.int32)


def test_rows_beyond_2_31_elements() -> None:
    x, rows = far_apart(2, 16, 64), order(2, 16)[:, :5].contiguous()
    assert torch.equal(tokens.take(x, rows, backend="triton"), tokens.take(x.contiguous(), rows, backend="reference"))
    part = x[:, :5]
    assert torch.equal(
        tokens.put(part, rows, 16, backend="triton"), tokens.put(part.contiguous(), rows, 16, backend="reference")
    )


def test_assemble_beyond_2_31_elements() -> None:
    x, where = far_apart(2, 6, 64), order(2, 16).argsort(dim=1).to(torch.int32)
    token = torch.randn(64, device="cuda").bfloat16()
    dense = tokens.assemble(x.contiguous(), token, None, where, prefix=1, backend="reference")
    assert torch.equal(tokens.assemble(x, token, None, where, prefix=1, backend="triton"), dense)


def test_align_loss_beyond_2_31_elements() -> None:
    prediction, target, rows = far_apart(2, 16, 64), far_apart(2, 16, 64), order(2, 16)[:, :5].contiguous()

    def value(p: Tensor, t: Tensor, backend: str) -> Tensor:
        return alignment.align_loss(p, t, prediction_rows=rows, target_rows=rows, backend=backend).total

    right = value(prediction.contiguous().double(), target.contiguous().double(), "reference")
    got = value(prediction, target, "triton")
    assert float((got - right).abs() / right) < 1e-5  # both start from the same bf16 values and add in fp32


def test_pixels_beyond_2_31_bytes() -> None:
    """The last image of a batch of more than 2**31 bytes, against the same image alone."""
    needs(6)
    count = 2**31 // (224 * 224 * 3) + 2
    pixels = torch.randint(0, 256, (count, 1, 224, 224, 3), dtype=torch.uint8, device="cuda")
    rows = order(1, 196)[:, :3].repeat(count, 1).contiguous()
    how: dict[str, Any] = {"patch": (1, 16, 16), "mean": cases.MEAN, "std": cases.STD}
    last, last_rows = pixels[-1:].clone(), rows[-1:].clone()
    many = tokens.gather_patches(pixels, rows, **how, backend="triton")
    assert torch.equal(many[-1:], tokens.gather_patches(last, last_rows, **how, backend="triton"))
    weight, bias = torch.randn(32, 768, device="cuda"), torch.randn(32, device="cuda")
    many = tokens.embed_patches(pixels, rows, weight, bias, None, **how, backend="triton")
    alone = tokens.embed_patches(last, last_rows, weight, bias, None, **how, backend="triton")
    torch.testing.assert_close(many[-1:], alone, rtol=1e-5, atol=1e-4)  # another tile may add in another order
    prediction = torch.randn(count, 3, 768, device="cuda")
    prediction[:-1] = 0
    prediction.requires_grad_(True)
    alignment.pixel_loss(prediction, pixels, rows, **how, backend="triton").backward()
    one = prediction[-1:].detach().clone().requires_grad_(True)
    alignment.pixel_loss(one, last, last_rows, **how, backend="triton").backward()
    assert prediction.grad is not None and one.grad is not None
    torch.testing.assert_close(prediction.grad[-1:] * count, one.grad, rtol=1e-5, atol=1e-8)


def test_outputs_beyond_2_31_elements() -> None:
    """put writes a result of more than 2**31 elements: what lies at the far end is right."""
    needs(12)
    samples = 2**31 // (1024 * 1024) + 1
    x = torch.randn(samples, 1, 1024, device="cuda", dtype=torch.bfloat16)
    rows = torch.full((samples, 1), 1023, dtype=torch.int32, device="cuda")
    out = tokens.put(x, rows, 1024, backend="triton")
    assert out.numel() > 2**31
    assert torch.equal(out[-1, -1], x[-1, 0]) and not bool(out[-1, :-1].any())
