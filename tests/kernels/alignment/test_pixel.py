"""pixel_loss: value and gradient of the formula, both conventions, in every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.alignment import pixel_loss
from cohobate.kernels.tokens import embed_patches, gather_patches

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
FAST = [NATIVE, TRITON]
CONVENTIONS = [("mae", True), ("mae", False), ("videomae", True), ("videomae", False)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def literal_target(
    pixels: Tensor,
    rows: Tensor | None,
    patch: tuple[int, int, int],
    mean: Any,
    std: Any,
    convention: str,
    normalise: bool,
) -> Tensor:
    """The formula in float64, one patch at a time."""
    batch, frames, height, width, channels = pixels.shape
    pt, ph, pw = patch
    grid = [(t, y, x) for t in range(frames // pt) for y in range(height // ph) for x in range(width // pw)]
    out = []
    for b in range(batch):
        for r in range(len(grid)) if rows is None else rows[b].tolist():
            t, y, x = grid[r]
            z = pixels[b, t * pt : (t + 1) * pt, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw].double() / 255
            z = z.reshape(-1, channels)
            if convention == "mae":
                z = (z - torch.tensor(mean).double()) / torch.tensor(std).double()
                if normalise:
                    z = (z - z.mean()) / (z.var(correction=1) + 1e-6).sqrt()
            elif normalise:
                z = (z - z.mean(0)) / (z.var(0, correction=1).sqrt() + 1e-6)
            out.append(z.flatten())
    return torch.stack(out).view(batch, -1, pt * ph * pw * channels)


def make_pixels(shape: tuple[int, ...], layout: str = "packed", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    batch, frames, height, width, channels = shape
    if layout == "cropped":
        larger = (batch, frames + 1, height + 3, width + 2, channels)
        return torch.randint(0, 256, larger, dtype=torch.uint8, generator=generator)[:, 1:, 2:-1, 1:-1]
    if layout == "channels_first":
        planes = torch.randint(0, 256, (batch, frames, channels, height, width), dtype=torch.uint8, generator=generator)
        return planes.permute(0, 1, 3, 4, 2)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_rows(batch: int, tokens: int, count: int | None) -> Tensor | None:
    if count is None:
        return None
    return (
        torch.rand(batch, tokens, generator=torch.Generator().manual_seed(5)).argsort(1).int()[:, : min(count, tokens)]
    )


def run(
    prediction: Tensor, backend: str, *arguments: Any, factor: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of ``factor`` times it."""
    leaf = prediction.detach().requires_grad_()
    loss = pixel_loss(leaf, *arguments, backend=backend, **options)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    (grad,) = torch.autograd.grad(loss * factor, leaf)
    assert grad.dtype == prediction.dtype and grad.shape == prediction.shape
    return loss.detach(), grad


problems = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "grid": st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
        "patch": st.tuples(st.integers(1, 2), st.integers(3, 5), st.sampled_from([4, 5, 16])),
        "channels": st.sampled_from([1, 2, 3, 5]),
        "count": st.none() | st.integers(1, 7),
        "layout": st.sampled_from(["packed", "cropped", "channels_first"]),
        "prediction": st.sampled_from(["packed", "sliced", "columns"]),
        "convention": st.sampled_from(CONVENTIONS),
    }
)


def check(backend: str, problem: dict, dtype: torch.dtype) -> None:
    batch, patch, channels = problem["batch"], problem["patch"], problem["channels"]
    frames, height, width = (g * p for g, p in zip(problem["grid"], patch))
    pixels = make_pixels((batch, frames, height, width, channels), problem["layout"])
    tokens, length = (
        problem["grid"][0] * problem["grid"][1] * problem["grid"][2],
        patch[0] * patch[1] * patch[2] * channels,
    )
    rows = make_rows(batch, tokens, problem["count"])
    count = tokens if rows is None else rows.shape[1]
    generator = torch.Generator().manual_seed(1)
    if problem["prediction"] == "sliced":  # behind a class token
        prediction = torch.randn(batch, count + 1, length, generator=generator).to(dtype)[:, 1:]
    elif problem["prediction"] == "columns":
        prediction = torch.randn(batch, length, count, generator=generator).to(dtype).transpose(1, 2)
    else:
        prediction = torch.randn(batch, count, length, generator=generator).to(dtype)
    mean, std = [0.4 + 0.05 * c for c in range(channels)], [0.2 + 0.03 * c for c in range(channels)]
    convention, normalise = problem["convention"]
    target = literal_target(pixels, rows, patch, mean, std, convention, normalise)
    leaf = prediction.double().requires_grad_()
    exact = torch.nn.functional.mse_loss(leaf, target)
    (exact_grad,) = torch.autograd.grad(3 * exact, leaf)
    options = {"patch": patch, "mean": mean, "std": std, "convention": convention, "normalise": normalise}
    loss, grad = run(prediction, backend, pixels, rows, factor=3, **options)
    assert abs(loss.double() - exact) <= 1e-6 * exact  # the sum of squares carries fp32 targets, summed in a tree
    # The error is rounded to the dtype, then its product with the scale. fp32 targets differ by about 1e-6 too.
    rounding = {torch.float32: 0, torch.bfloat16: 2.01 * 2**-8, torch.float16: 2.01 * 2**-11}[dtype]
    tiny = {torch.float16: 2**-24}.get(dtype, 0)  # spacing of fp16 numbers near zero
    scale = 6 / prediction.numel()
    assert ((grad.double() - exact_grad).abs() <= rounding * exact_grad.abs() + 3e-6 * scale + tiny).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_loss_and_gradient_are_the_formula_s(backend: str, problem: dict, dtype: torch.dtype) -> None:
    # Triton's interpreter truncates to bf16 where the card rounds, so it proves fp16 instead.
    check(backend, problem, torch.float16 if backend == "triton" and dtype == torch.bfloat16 else dtype)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("frames", "patch"), [(1, (1, 16, 16)), (2, (2, 16, 16))])
def test_native_at_real_sizes(frames: int, patch: tuple[int, int, int], convention: tuple[str, bool]) -> None:
    sizes = {"batch": 3, "grid": (1, 5, 4), "patch": patch, "channels": 3, "count": 15}
    check("native", sizes | {"layout": "packed", "prediction": "packed", "convention": convention}, torch.bfloat16)


def flat_pixels(channels: int) -> Tensor:
    """Every patch of one colour, each another; the first is black."""
    colours = torch.randint(0, 256, (2, 1, 3, 2, channels), generator=torch.Generator().manual_seed(8)).to(torch.uint8)
    colours[0, 0, 0, 0] = 0
    return colours.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)


@pytest.mark.parametrize("backend", FAST)
def test_flat_patches_have_a_zero_target_by_channel(backend: str) -> None:
    prediction = torch.randn(2, 6, 768, generator=torch.Generator().manual_seed(1))
    options = {"patch": (1, 16, 16), "mean": MEAN, "std": STD, "convention": "videomae"}
    loss, grad = run(prediction, backend, flat_pixels(3), None, **options)
    assert torch.allclose(loss, prediction.square().mean(), rtol=1e-6, atol=0)
    assert torch.allclose(grad, prediction * (2 / prediction.numel()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("channels", "convention"), [(3, "mae"), (1, "mae"), (1, "videomae"), (3, "videomae")])
def test_flat_patches_are_no_worse_than_the_fp32_formula(backend: str, channels: int, convention: str) -> None:
    pixels, mean, std, patch = flat_pixels(channels), MEAN[:channels], STD[:channels], (1, 16, 16)
    zero = torch.zeros(2, 6, 256 * channels)
    options = {"patch": patch, "mean": mean, "std": std, "convention": convention}
    exact = -2 / zero.numel() * literal_target(pixels, None, patch, mean, std, convention, True)
    fast, formula = (run(zero, name, pixels, None, **options)[1].double() - exact for name in (backend, "reference"))
    assert fast.norm() <= formula.norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_gradient_no_work(backend: str) -> None:
    pixels = make_pixels((2, 1, 8, 8, 3))
    prediction = torch.randn(2, 4, 48, requires_grad=True)
    options = {"patch": (1, 4, 4), "mean": MEAN, "std": STD, "backend": backend}
    with torch.no_grad():
        quiet = pixel_loss(prediction, pixels, None, **options)
    assert not quiet.requires_grad
    assert not pixel_loss(prediction.detach(), pixels, None, **options).requires_grad
    assert torch.equal(quiet, pixel_loss(prediction, pixels, None, **options).detach())


@pytest.mark.parametrize("backend", FAST)
def test_backward_twice_gives_the_same(backend: str) -> None:
    prediction = torch.randn(2, 4, 48, requires_grad=True)
    loss = pixel_loss(
        prediction, make_pixels((2, 1, 8, 8, 3)), None, patch=(1, 4, 4), mean=MEAN, std=STD, backend=backend
    )
    first, second = (torch.autograd.grad(loss, prediction, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)  # the saved error was not scaled in place


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_a_second_derivative_is_refused() -> None:
    prediction = torch.randn(2, 4, 48, requires_grad=True)
    loss = pixel_loss(prediction, make_pixels((2, 1, 8, 8, 3)), None, patch=(1, 4, 4), mean=MEAN, std=STD)
    (grad,) = torch.autograd.grad(loss.square(), prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_gradient_that_fp16_could_not_store_unscaled() -> None:
    # 2 / (B n K) is below fp16's smallest number; a loss scale of 2^16 arrives only with the incoming gradient.
    pixels = make_pixels((64, 1, 64, 64, 3))
    prediction = torch.randn(64, 256, 48, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    options = {"patch": (1, 4, 4), "mean": MEAN, "std": STD}
    _, grad = run(prediction, "auto", pixels, None, factor=2.0**16, **options)
    _, exact = run(prediction.float(), "reference", pixels, None, factor=2.0**16, **options)
    assert (grad.float() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("batch", "count"), [(0, None), (0, 2), (2, 0)])
def test_empty_is_a_mean_of_nothing(backend: str, batch: int, count: int | None) -> None:
    pixels, rows = make_pixels((batch, 1, 8, 8, 3)), make_rows(batch, 4, count)
    prediction = torch.randn(batch, 4 if count is None else count, 48)
    loss, grad = run(prediction, backend, pixels, rows, patch=(1, 4, 4), mean=MEAN, std=STD)
    assert loss.isnan() and grad.numel() == 0


@pytest.mark.parametrize("backend", FAST)
def test_repeats_bit_for_bit(backend: str) -> None:
    pixels, rows = make_pixels((3, 1, 24, 24, 3)), make_rows(3, 36, 20)
    prediction = torch.randn(3, 20, 48)
    first = run(prediction, backend, pixels, rows, patch=(1, 4, 4), mean=MEAN, std=STD)
    for _ in range(5):
        again = run(prediction, backend, pixels, rows, patch=(1, 4, 4), mean=MEAN, std=STD)
        assert all(torch.equal(a, b) for a, b in zip(again, first))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_does_not_depend_on_the_thread_count() -> None:
    pixels, prediction = make_pixels((3, 1, 24, 24, 3)), torch.randn(3, 36, 48)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(prediction, "native", pixels, None, patch=(1, 4, 4), mean=MEAN, std=STD))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(gradient: bool) -> None:
    pixels, rows, prediction = make_pixels((2, 1, 8, 8, 3)), make_rows(2, 4, 3), torch.randn(2, 3, 48)
    forward = (prediction, pixels, rows, [1, 4, 4], [*MEAN], [*STD], 1, 1e-6, gradient, "native")
    torch.library.opcheck(torch.ops.cohobate.pixel_loss.default, forward)
    backward = (prediction.bfloat16(), torch.tensor(0.5), 0.1, "native")
    torch.library.opcheck(torch.ops.cohobate.pixel_loss_backward.default, backward)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_gives_the_same(backend: str) -> None:
    def call(prediction: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
        return 2 * pixel_loss(prediction, pixels, rows, patch=(1, 4, 4), mean=MEAN, std=STD, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch, width, count in ((2, 8, 3), (3, 12, 4), (4, 16, 5)):  # sizes that change become symbolic
        pixels, rows = make_pixels((batch, 1, 8, width, 3)), make_rows(batch, width // 2, count)
        results = []
        for function in (call, compiled):
            prediction = torch.randn(batch, count, 48, generator=torch.Generator().manual_seed(2)).requires_grad_()
            loss = function(prediction, pixels, rows)
            results.append((loss, *torch.autograd.grad(loss, prediction)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.slow
@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_inductor_gives_the_same_of_all_three_ops() -> None:
    pixels, rows = make_pixels((2, 1, 8, 8, 3)), make_rows(2, 4, 3)
    options = {"patch": (1, 4, 4), "mean": MEAN, "std": STD, "backend": "native"}

    def call(weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        prediction = embed_patches(pixels, rows, weight, bias, positions, **options)
        loss = pixel_loss(torch.tanh(prediction), pixels, rows, **options)
        return loss + gather_patches(pixels, rows, **options).square().mean()

    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(4)
    parameters = [torch.randn(size, generator=generator) for size in ((48, 48), (48,), (4, 48))]
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in parameters]
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-7)  # inductor has its own tanh and sums


PIXELS = torch.zeros(2, 1, 4, 6, 3, dtype=torch.uint8)
ROWS = torch.zeros(2, 3, dtype=torch.int32)
GOOD = {
    "prediction": torch.zeros(2, 3, 12),
    "pixels": PIXELS,
    "rows": ROWS,
    "patch": (1, 2, 2),
    "mean": MEAN,
    "std": STD,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"prediction": torch.zeros(2, 4, 12)},
            ValueError,
            r"prediction: expected shape \[2, 3, 12\], got \[2, 4, 12\]",
        ),
        ({"prediction": torch.zeros(2, 3, 9)}, ValueError, r"prediction: expected shape \[2, 3, 12\], got \[2, 3, 9\]"),
        ({"prediction": torch.zeros(2, 3, 12).int()}, TypeError, "prediction: expected dtype float32 .*, got int32"),
        ({"rows": None}, ValueError, r"prediction: expected shape \[2, 6, 12\], got \[2, 3, 12\]"),
        ({"rows": ROWS.long()}, TypeError, "rows: expected dtype int32, got int64"),
        ({"pixels": PIXELS.float()}, TypeError, "pixels: expected dtype uint8, got float32"),
        ({"patch": (1, 3, 2)}, ValueError, "patch: expected sizes that divide 1x4x6 pixels, got 1x3x2"),
        ({"mean": MEAN[:2]}, ValueError, "mean: expected 3 values, one a channel of pixels, got 2"),
        ({"convention": "beit"}, ValueError, "convention: expected one of mae, videomae; got 'beit'"),
        ({"eps": -1.0}, ValueError, "eps: expected a finite value of at least 0, got -1.0"),
        ({"backend": "fast"}, ValueError, "backend: expected one of auto, .*; got 'fast'"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        pixel_loss(**(GOOD | change))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_refuses_rows_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"^rows: expected values in \[0, 6\), got 6 to 6 in sample 0$"):
        pixel_loss(**(GOOD | {"rows": ROWS + 6}), backend="native")


@pytest.mark.gpu
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(dtype: torch.dtype, convention: tuple[str, bool]) -> None:
    for frames, patch, count in ((1, (1, 16, 16), 15), (4, (2, 16, 16), None), (1, (1, 14, 14), 7)):
        pt, ph, pw = patch
        pixels, rows = make_pixels((3, frames, 5 * ph, 4 * pw, 3)), make_rows(3, frames // pt * 20, count)
        width = frames // pt * 20 if rows is None else rows.shape[1]
        prediction = (
            torch.randn(3, width, pt * ph * pw * 3, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
        )
        options = {"patch": patch, "mean": MEAN, "std": STD, "convention": convention[0], "normalise": convention[1]}
        arguments = (pixels.cuda(), None if rows is None else rows.cuda())
        loss, grad = run(prediction, "triton", *arguments, factor=100, **options)
        expected, expected_grad = run(prediction, "reference", *arguments, factor=100, **options)
        assert torch.allclose(loss, expected, rtol=1e-6, atol=0)
        # Both round to the dtype, ours once more; fp32 targets differ by about 1e-6.
        bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert (grad.float() - expected_grad.float()).norm() <= bound * expected_grad.float().norm()


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit_in_a_graph() -> None:
    pixels, rows = make_pixels((16, 1, 224, 224, 3)).cuda(), make_rows(16, 196, 147)
    assert rows is not None
    rows, prediction = rows.cuda(), torch.randn(16, 147, 768, device="cuda", dtype=torch.bfloat16)
    first = run(prediction, "triton", pixels, rows, patch=(1, 16, 16), mean=MEAN, std=STD)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(prediction, "triton", pixels, rows, patch=(1, 16, 16), mean=MEAN, std=STD)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(prediction, "triton", pixels, rows, patch=(1, 16, 16), mean=MEAN, std=STD)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first))
