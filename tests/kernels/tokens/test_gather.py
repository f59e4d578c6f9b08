"""gather_patches: every implementation gives the formula's rows, whatever the layout, patch, channels or dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.tokens import gather_patches
from cohobate.kernels.tokens.gather import gather_patches_cost

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
FAST = [NATIVE, TRITON]
LAYOUTS = ("packed", "cropped", "time_first", "expanded", "channels_first", "flipped_width")
# Rounding to the result's dtype; fp32 arithmetic is bounded apart from it.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def literal(
    pixels: Tensor, rows: Tensor | None, patch: tuple[int, int, int], mean: list[float], std: list[float]
) -> Tensor:
    """The formula in float64, one patch at a time."""
    batch, frames, height, width, _ = pixels.shape
    pt, ph, pw = patch
    grid = [(t, y, x) for t in range(frames // pt) for y in range(height // ph) for x in range(width // pw)]
    out = []
    for b in range(batch):
        for r in range(len(grid)) if rows is None else rows[b].tolist():
            t, y, x = grid[r]
            block = pixels[b, t * pt : (t + 1) * pt, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw].double() / 255
            out.append(((block - torch.tensor(mean).double()) / torch.tensor(std).double()).flatten())
    length = pt * ph * pw * pixels.shape[-1]
    return torch.stack(out).view(batch, -1, length) if out else torch.empty(batch, 0, length, dtype=torch.float64)


def make_pixels(shape: tuple[int, ...], layout: str, seed: int = 0) -> Tensor:
    """Random bytes of this shape, laid out in memory in several ways."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator)

    batch, frames, height, width, channels = shape
    if layout == "cropped":
        return random(batch + 1, frames + 1, height + 3, width + 5, channels)[1:, 1:, 2:-1, 3:-2]
    if layout == "time_first":
        return random(frames, batch, height, width, channels).transpose(0, 1)
    if layout == "expanded":
        return random(1, frames, height, width, channels).expand(shape)
    if layout == "channels_first":
        return random(batch, frames, channels, height, width).permute(0, 1, 3, 4, 2)
    if layout == "flipped_width":  # every second column: a pixel row is not packed
        return random(batch, frames, height, 2 * width, channels)[:, :, :, ::2]
    return random(*shape)


def make_rows(batch: int, tokens: int, count: int | None, seed: int = 0) -> Tensor | None:
    """Rows as a mask plan's visible part: a strided slice of permutations. None stays None."""
    if count is None:
        return None
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1).int()[:, :count]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, tuple[int, int, int], list[float], list[float]]:
    patch = draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.sampled_from([1, 3, 4, 16])))
    grid = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)))
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 13]))
    tokens = grid[0] * grid[1] * grid[2]
    count = draw(st.none() | st.integers(1, tokens))
    frames, height, width = (g * p for g, p in zip(grid, patch))
    pixels = make_pixels((batch, frames, height, width, channels), draw(st.sampled_from(LAYOUTS)))
    mean = [draw(st.floats(0, 1)) for _ in range(channels)]
    std = [draw(st.floats(0.1, 1)) for _ in range(channels)]
    return pixels, make_rows(batch, tokens, count), patch, mean, std


def check(backend: str, problem: tuple, dtype: torch.dtype) -> None:
    pixels, rows, patch, mean, std = problem
    out = gather_patches(pixels, rows, patch=patch, mean=mean, std=std, dtype=dtype, backend=backend)
    expected = literal(*problem)
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    # Three fp32 roundings of numbers up to (1 + mean) / std, then one to the dtype.
    scale = max((1 + m) / s for m, s in zip(mean, std))
    bound = 3 * 2**-23 * scale + ROUNDING[dtype] * expected.abs()
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_is_the_formula(backend: str, problem: tuple, dtype: torch.dtype) -> None:
    check(backend, problem, dtype if backend != "triton" else torch.float32)


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_is_the_formula_in_fp16(backend: str) -> None:
    problem = (make_pixels((2, 1, 8, 12, 3), "packed"), make_rows(2, 6, 4), (1, 4, 4), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    check(backend, problem, torch.float16)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [(1, 16, 16), (1, 14, 14), (2, 16, 16)])  # the first has a kernel of its own
def test_native_at_real_sizes(patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    pt, ph, pw = patch
    rows = make_rows(2, 3 * 4, 5)
    check("native", (make_pixels((2, pt, 3 * ph, 4 * pw, 3), "cropped"), rows, patch, [0.5] * 3, [0.25] * 3), dtype)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rows_may_repeat(backend: str) -> None:
    pixels = make_pixels((1, 1, 4, 4, 3), "packed")
    rows = torch.tensor([[3, 3, 0]], dtype=torch.int32)
    check(backend, (pixels, rows, (1, 2, 2), [0.0] * 3, [1.0] * 3), torch.float32)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("batch", "count"), [(0, None), (0, 2), (2, 0)])
def test_empty(backend: str, batch: int, count: int | None) -> None:
    pixels, rows = make_pixels((batch, 1, 4, 6, 3), "packed"), make_rows(batch, 6, count)
    out = gather_patches(pixels, rows, patch=(1, 2, 2), mean=[0.5] * 3, std=[0.5] * 3, backend=backend)
    assert out.shape == (batch, 6 if count is None else count, 12)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_does_not_depend_on_the_thread_count() -> None:
    pixels, rows = make_pixels((3, 1, 64, 64, 3), "packed"), make_rows(3, 16, 7)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                gather_patches(pixels, rows, patch=(1, 16, 16), mean=[0.5] * 3, std=[0.2] * 3, backend="native")
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("rows", [None, make_rows(2, 6, 3)])
def test_opcheck(rows: Tensor | None) -> None:
    pixels = make_pixels((2, 1, 4, 6, 3), "packed")
    arguments = (pixels, rows, [1, 2, 2], [0.5] * 3, [0.5] * 3, torch.bfloat16, "native")
    torch.library.opcheck(torch.ops.cohobate.gather_patches.default, arguments)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_gives_the_same(backend: str) -> None:
    def call(pixels: Tensor, rows: Tensor) -> Tensor:
        return gather_patches(pixels, rows, patch=(1, 2, 2), mean=[0.5] * 3, std=[0.5] * 3, backend=backend) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch, width, count in ((2, 6, 3), (3, 8, 4), (4, 10, 5)):  # sizes that change become symbolic
        pixels, rows = make_pixels((batch, 1, 4, width, 3), "packed"), make_rows(batch, width, count)
        assert torch.equal(compiled(pixels, rows), call(pixels, rows))


def test_auto_on_a_cpu_computes_fp16_by_the_reference() -> None:
    pixels = make_pixels((2, 1, 4, 6, 3), "packed")
    arguments = {"patch": (1, 2, 2), "mean": [0.5] * 3, "std": [0.5] * 3, "dtype": torch.float16}
    auto, reference = (gather_patches(pixels, None, backend=name, **arguments) for name in ("auto", "reference"))
    assert torch.equal(auto, reference)


def test_cost_counts_bytes_once() -> None:
    cost = gather_patches_cost(batch=2, count=49, width=768, itemsize=2)
    assert cost.bytes == 2 * 49 * (768 + 768 * 2 + 4)
    assert cost.flops == 2 * 2 * 49 * 768


PIXELS = torch.zeros(2, 1, 4, 6, 3, dtype=torch.uint8)
ROWS = torch.zeros(2, 3, dtype=torch.int32)
GOOD = {"pixels": PIXELS, "rows": ROWS, "patch": (1, 2, 2), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixels": PIXELS.float()}, TypeError, "pixels: expected dtype uint8, got float32"),
        ({"pixels": PIXELS[0]}, ValueError, r"pixels: expected shape \[any, any, any, any, any\], got \[1, 4, 6, 3\]"),
        ({"pixels": PIXELS[:, :0]}, ValueError, r"pixels: expected frames, .* above 0, got \[2, 0, 4, 6, 3\]"),
        ({"pixels": PIXELS.tolist()}, TypeError, "pixels: expected a tensor, got list"),
        ({"rows": ROWS.long()}, TypeError, "rows: expected dtype int32, got int64"),
        ({"rows": ROWS[:1]}, ValueError, r"rows: expected shape \[2, any\], got \[1, 3\]"),
        ({"rows": ROWS.to("meta")}, ValueError, "rows: expected device cpu, got meta"),
        ({"patch": (1, 3, 2)}, ValueError, "patch: expected sizes that divide 1x4x6 pixels, got 1x3x2"),
        ({"patch": (2, 2)}, ValueError, r"patch: expected three positive sizes .*, got \(2, 2\)"),
        ({"patch": (1, 0, 2)}, ValueError, r"patch: expected three positive sizes .*, got \(1, 0, 2\)"),
        ({"mean": (0.5,)}, ValueError, "mean: expected 3 values, one a channel of pixels, got 1"),
        ({"std": (0.5,) * 4}, ValueError, "std: expected 3 values, one a channel of pixels, got 4"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, r"std: expected positive values, got \(0.5, 0.0, 0.5\)"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected a floating-point type, got int8"),
        ({"backend": "fast"}, ValueError, "backend: expected one of auto, .*; got 'fast'"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        gather_patches(**(GOOD | change))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize("bad", [6, -1, 2**31 - 1])
def test_native_refuses_rows_that_do_not_exist(bad: int) -> None:
    rows = ROWS.clone()
    rows[1, 2] = bad
    low, high = min(0, bad), max(0, bad)
    with pytest.raises(ValueError, match=rf"^rows: expected values in \[0, 6\), got {low} to {high} in sample 1$"):
        gather_patches(**(GOOD | {"rows": rows, "backend": "native"}))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_native_asked_for_fp16_says_why_not() -> None:
    with pytest.raises(ValueError, match="'native' cannot run gather_patches: native computes float32 and bfloat16"):
        gather_patches(**GOOD, dtype=torch.float16, backend="native")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu(layout: str, dtype: torch.dtype) -> None:
    for frames, patch, count in ((1, (1, 16, 16), 11), (4, (2, 16, 16), None), (1, (1, 14, 14), 5)):
        pt, ph, pw = patch
        shape = (3, frames, 4 * ph, 3 * pw, 3)
        pixels, rows = make_pixels(shape, layout).cuda(), make_rows(3, frames // pt * 12, count)
        rows = None if rows is None else rows.cuda()
        arguments = {"patch": patch, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "dtype": dtype}
        out = gather_patches(pixels, rows, backend="triton", **arguments)
        reference = gather_patches(pixels, rows, backend="reference", **arguments)
        # One fused rounding against three, on numbers up to 8; then perhaps the neighbouring number of the dtype.
        assert torch.allclose(out.float(), reference.float(), rtol=2 * ROUNDING[dtype], atol=3 * 2**-23 * 8)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    storage = torch.zeros((1 << 32) + 12, dtype=torch.uint8, device="cuda")
    storage[-12:] = 255
    pixels = storage.as_strided((2, 1, 2, 2, 3), (1 << 32, 12, 6, 3, 1))
    out = gather_patches(pixels, None, patch=(1, 2, 2), mean=[0.0] * 3, std=[1.0] * 3, backend="triton")
    assert torch.equal(out[:, 0, 0].cpu(), torch.tensor([0.0, 1.0]))
