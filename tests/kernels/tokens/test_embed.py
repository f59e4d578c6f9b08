"""embed_patches: the formula and its gradients in every implementation, dtype, stride and set of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cohobate.kernels import native
from cohobate.kernels.tokens import embed_patches

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
FAST = [NATIVE, TRITON]
# Caps on the relative Frobenius error; a fast path may also not be twice as wrong as plain PyTorch in the same dtype.
CAP = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Problem:
    pixels: Tensor
    rows: Tensor | None
    weight: Tensor
    bias: Tensor | None
    positions: Tensor | None
    patch: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grad: Tensor  # of the output, fp64

    def parameters(self) -> list[Tensor]:
        return [x for x in (self.weight, self.bias, self.positions) if x is not None]


def make(
    batch: int = 2,
    grid: tuple[int, int, int] = (1, 2, 3),
    patch: tuple[int, int, int] = (1, 4, 4),
    channels: int = 3,
    depth: int = 24,
    count: int | None = 4,
    bias: bool = True,
    positions: bool = True,
    cropped: bool = False,
) -> Problem:
    """Random parameters of the sizes that initialisation gives; a fixed seed, so that a failure repeats."""
    generator = torch.Generator().manual_seed(3)
    frames, height, width = (g * p for g, p in zip(grid, patch))
    size = (batch, frames, height + 3, width + 2, channels) if cropped else (batch, frames, height, width, channels)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    pixels = pixels[:, :, 2:-1, 1:-1] if cropped else pixels
    tokens, length = grid[0] * grid[1] * grid[2], patch[0] * patch[1] * patch[2] * channels
    rows = None
    if count is not None:
        count = min(count, tokens)
        rows = torch.rand(batch, tokens, generator=generator).argsort(1).int()[:, :count]
    weight = torch.randn(depth, length, generator=generator) / length**0.5
    return Problem(
        pixels,
        rows,
        weight,
        torch.randn(depth, generator=generator) if bias else None,
        torch.randn(tokens, depth, generator=generator) if positions else None,
        patch,
        tuple(0.3 + 0.05 * c for c in range(channels)),
        tuple(0.2 + 0.01 * c for c in range(channels)),
        torch.randn(batch, tokens if count is None else count, depth, generator=generator, dtype=torch.float64),
    )


def literal(p: Problem) -> list[Tensor]:
    """Output and gradients of every parameter in float64, through autograd over plain loops."""
    weight, bias, positions = (
        None if x is None else x.double().requires_grad_() for x in (p.weight, p.bias, p.positions)
    )
    batch, frames, height, width, _ = p.pixels.shape
    pt, ph, pw = p.patch
    grid = [(t, y, x) for t in range(frames // pt) for y in range(height // ph) for x in range(width // pw)]
    out = []
    for b in range(batch):
        for r in range(len(grid)) if p.rows is None else p.rows[b].tolist():
            t, y, x = grid[r]
            block = p.pixels[b, t * pt : (t + 1) * pt, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw].double() / 255
            row = weight @ ((block - torch.tensor(p.mean).double()) / torch.tensor(p.std).double()).flatten()
            row = row if bias is None else row + bias
            out.append(row if positions is None else row + positions[r])
    result = torch.stack(out).view(p.grad.shape)
    return [
        result.detach(),
        *torch.autograd.grad(result, [x for x in (weight, bias, positions) if x is not None], p.grad),
    ]


def run(p: Problem, backend: str, dtype: torch.dtype, parameters: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients of one implementation."""
    weight, bias, positions = (
        None if x is None else x.to(parameters).requires_grad_() for x in (p.weight, p.bias, p.positions)
    )
    out = embed_patches(
        p.pixels, p.rows, weight, bias, positions, patch=p.patch, mean=p.mean, std=p.std, dtype=dtype, backend=backend
    )
    assert out.dtype == dtype and out.is_contiguous()
    grads = torch.autograd.grad(out, [x for x in (weight, bias, positions) if x is not None], p.grad.to(dtype))
    assert all(g.dtype == parameters for g in grads)
    return [out.detach(), *grads]


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def check(p: Problem, backend: str, dtype: torch.dtype) -> None:
    exact, fast, eager = literal(p), run(p, backend, dtype), run(p, "reference", dtype)
    for name, e, f, r in zip(("out", "weight", "bias", "positions"), exact, fast, eager):
        assert f.shape == e.shape
        assert error(f, e) <= CAP[dtype], name
        # 1e-6: where the reference happens to be almost exact.
        assert error(f, e) <= 2 * error(r, e) + 1e-6, name


sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "grid": st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
        "patch": st.tuples(st.integers(1, 2), st.integers(2, 4), st.sampled_from([2, 3, 4, 16])),
        "channels": st.sampled_from([1, 3, 4]),
        "depth": st.sampled_from([1, 7, 24, 70]),
        "count": st.none() | st.integers(1, 6),
        "bias": st.booleans(),
        "positions": st.booleans(),
        "cropped": st.booleans(),
    }
)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=sizes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_output_and_gradients_are_the_formula_s(backend: str, size: dict, dtype: torch.dtype) -> None:
    # Triton's interpreter multiplies bf16 operands wrongly, so it proves fp16 instead.
    check(make(**size), backend, torch.float16 if backend == "triton" and dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("backend", FAST)
def test_many_tokens_in_several_partial_sums(backend: str) -> None:
    # 3 x 1024 tokens: two partial weight gradients, twelve partial column sums and then those.
    check(make(batch=3, grid=(1, 32, 32), patch=(1, 2, 2), depth=8, count=None), backend, torch.float32)
    check(make(batch=40, grid=(1, 2, 3), patch=(1, 2, 2), depth=8, count=5), backend, torch.float32)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_at_vit_sizes(dtype: torch.dtype) -> None:
    check(make(batch=2, grid=(1, 14, 14), patch=(1, 16, 16), depth=192, count=49), "native", dtype)
    check(make(batch=1, grid=(2, 3, 4), patch=(2, 16, 16), depth=96, count=7), "native", dtype)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, torch.float64])
def test_parameters_keep_their_dtype(backend: str, parameters: torch.dtype) -> None:
    p = make()
    for fast, exact in zip(run(p, backend, torch.float32, parameters), literal(p)):
        # Half precision parameters are rounded before, and their gradients after.
        assert error(fast, exact) <= (CAP[torch.float16] if parameters == torch.float16 else CAP[torch.float32])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (1, 2), ()])
def test_only_what_is_trained_gets_a_gradient(backend: str, trained: tuple[int, ...]) -> None:
    p = make()
    exact = literal(p)[1:]
    parameters = [x.clone().requires_grad_(i in trained) for i, x in enumerate(p.parameters())]
    out = embed_patches(p.pixels, p.rows, *parameters, patch=p.patch, mean=p.mean, std=p.std, backend=backend)
    assert out.requires_grad == bool(trained)
    if trained:
        out.backward(p.grad.float())
    for i, (parameter, e) in enumerate(zip(parameters, exact)):
        assert (parameter.grad is not None) == (i in trained)
        assert parameter.grad is None or error(parameter.grad, e) <= CAP[torch.float32]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["slice", "expanded", "transposed"])
def test_gradient_may_have_any_strides(backend: str, kind: str) -> None:
    p = make()
    batch, count, depth = p.grad.shape
    if kind == "slice":  # behind a class token
        grad = torch.cat([torch.full((batch, 1, depth), torch.nan), p.grad.float()], dim=1)[:, 1:]
    elif kind == "expanded":  # the gradient of a sum is one number
        grad = torch.ones(()).expand(batch, count, depth)
    else:
        grad = p.grad.float().transpose(0, 2).contiguous().transpose(0, 2)
    p.grad = grad.double()
    weight, bias, positions = (x.clone().requires_grad_() for x in p.parameters())
    out = embed_patches(
        p.pixels, p.rows, weight, bias, positions, patch=p.patch, mean=p.mean, std=p.std, backend=backend
    )
    for g, e in zip(torch.autograd.grad(out, (weight, bias, positions), grad), literal(p)[1:]):
        assert error(g, e) <= CAP[torch.float32]


@pytest.mark.parametrize("backend", FAST)
def test_layout_of_the_parameters_is_free(backend: str) -> None:
    p = make()
    expected = run(p, backend, torch.float32)
    p.weight, p.positions = p.weight.t().contiguous().t(), p.positions.t().contiguous().t()
    p.bias = torch.stack([p.bias, p.bias], dim=1)[:, 0]
    for a, b in zip(run(p, backend, torch.float32), expected):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # the matrix library may sum in another order


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("batch", "count"), [(0, None), (0, 2), (2, 0)])
def test_empty(backend: str, batch: int, count: int | None) -> None:
    p = make(batch=2, count=2)
    rows = None if count is None else torch.zeros(batch, count, dtype=torch.int32)
    parameters = [x.requires_grad_() for x in p.parameters()]
    out = embed_patches(p.pixels[:batch], rows, *parameters, patch=p.patch, mean=p.mean, std=p.std, backend=backend)
    assert out.shape == (batch, 6 if count is None else count, 24)
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in parameters)


@pytest.mark.parametrize("backend", FAST)
def test_repeats_bit_for_bit(backend: str) -> None:
    p = make(batch=3, grid=(1, 4, 4), count=9, depth=70)
    first = run(p, backend, torch.float32)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(p, backend, torch.float32), first))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_sums_do_not_depend_on_the_thread_count() -> None:
    p = make(batch=5, grid=(1, 4, 4), count=9, depth=200)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(p, "native", torch.bfloat16)[2:])  # bias and positions: our own sums
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_autocast_is_not_consulted(backend: str) -> None:
    p = make()
    expected = run(p, backend, torch.float32)
    parameters = [x.requires_grad_() for x in p.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = embed_patches(p.pixels, p.rows, *parameters, patch=p.patch, mean=p.mean, std=p.std, backend=backend)
    grads = torch.autograd.grad(out, parameters, p.grad.float())
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), expected))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(count: int | None, dtype: torch.dtype) -> None:
    p = make(count=count)
    numbers = ([*p.patch], [*p.mean], [*p.std])
    forward = (p.pixels, p.rows, p.weight, p.bias, p.positions, *numbers, dtype, "native")
    torch.library.opcheck(torch.ops.cohobate.embed_patches.default, forward)
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        backward = (p.grad.to(dtype), p.pixels, p.rows, *numbers, 6, *wanted, "native")
        torch.library.opcheck(torch.ops.cohobate.embed_patches_backward.default, backward)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_gives_the_same(backend: str) -> None:
    def call(p: Problem, *parameters: Tensor) -> Tensor:
        out = embed_patches(p.pixels, p.rows, *parameters, patch=p.patch, mean=p.mean, std=p.std, backend=backend)
        return out * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch, width, count in ((2, 3, 4), (3, 4, 5), (4, 5, 6)):  # sizes that change become symbolic
        p = make(batch=batch, grid=(1, 2, width), count=count)
        results = []
        for function in (call, compiled):
            parameters = [x.clone().requires_grad_() for x in p.parameters()]
            out = function(p, *parameters)
            results.append((out, *torch.autograd.grad(out, parameters, p.grad.float())))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_flops_are_counted() -> None:
    p = make()
    parameters = [x.requires_grad_() for x in p.parameters()]
    with FlopCounterMode(display=False) as counter:
        out = embed_patches(p.pixels, p.rows, *parameters, patch=p.patch, mean=p.mean, std=p.std, backend="native")
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * (2 * 4) * 48 * 24
    assert counter.get_total_flops() == 2 * forward


P = make()
GOOD = {
    "pixels": P.pixels, "rows": P.rows, "weight": P.weight, "bias": P.bias, "positions": P.positions,
    "patch": P.patch, "mean": P.mean, "std": P.std,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixels": P.pixels.float()}, TypeError, "pixels: expected dtype uint8, got float32"),
        ({"rows": P.rows.long()}, TypeError, "rows: expected dtype int32, got int64"),
        ({"patch": (1, 4, 5)}, ValueError, "patch: expected sizes that divide 1x8x12 pixels, got 1x4x5"),
        ({"weight": P.weight[:, :-1]}, ValueError, r"weight: expected shape \[any, 48\], got \[24, 47\]"),
        ({"weight": P.weight.int()}, TypeError, "weight: expected dtype float32 .*, got int32"),
        ({"weight": P.weight.to("meta")}, ValueError, "weight: expected device cpu, got meta"),
        ({"bias": P.bias[:-1]}, ValueError, r"bias: expected shape \[24\], got \[23\]"),
        ({"positions": P.positions[:-1]}, ValueError, r"positions: expected shape \[6, 24\], got \[5, 24\]"),
        ({"positions": P.positions[None]}, ValueError, r"positions: expected shape \[6, 24\], got \[1, 6, 24\]"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating-point type, got int32"),
        ({"backend": "fast"}, ValueError, "backend: expected one of auto, .*; got 'fast'"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        embed_patches(**(GOOD | change))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_refuses_rows_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"^rows: expected values in \[0, 6\), got 0 to 9 in sample 0$"):
        embed_patches(**(GOOD | {"rows": torch.tensor([[0, 9], [1, 2]], dtype=torch.int32)}), backend="native")


def on_gpu(p: Problem) -> Problem:
    moved = {name: value.cuda() for name, value in vars(p).items() if isinstance(value, Tensor)}
    return Problem(**(vars(p) | moved))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(dtype: torch.dtype) -> None:
    for size in (
        {"batch": 4, "grid": (1, 14, 14), "patch": (1, 16, 16), "depth": 768, "count": 49},
        {"batch": 2, "grid": (2, 7, 7), "patch": (2, 16, 16), "depth": 384, "count": 20},
        {"batch": 3, "grid": (1, 5, 4), "patch": (1, 14, 14), "depth": 200, "count": None, "cropped": True},
    ):
        p = make(**size)
        gpu = on_gpu(p)
        for e, f, r in zip(literal(p), run(gpu, "triton", dtype), run(gpu, "reference", dtype)):
            assert error(f.cpu(), e) <= 2 * error(r.cpu(), e) + 1e-6
            assert error(f.cpu(), e) <= CAP[dtype]


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit_in_a_graph() -> None:
    p = on_gpu(make(batch=64, grid=(1, 14, 14), patch=(1, 16, 16), depth=768, count=49))
    first = run(p, "triton", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(p, "triton", torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(p, "triton", torch.bfloat16)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first))
