"""take and put: every implementation moves the same bits, forward and backward; each is the other's gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.tokens import put, take

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]


def literal_take(x: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([torch.stack([x[b, int(i)] for i in index]) for b, index in enumerate(rows)])


def literal_put(x: Tensor, rows: Tensor, length: int) -> Tensor:
    out = x.new_zeros(x.shape[0], length, x.shape[-1])
    for b, index in enumerate(rows):
        for j, i in enumerate(index):
            out[b, int(i)] = x[b, j]
    return out


def orders(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=generator).argsort(dim=1).int()


def strided(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> Tensor:
    """Random values of this shape, laid out in memory in several ways."""
    batch, rows, width = shape
    if kind == "transposed":  # batch and rows
        return torch.randn(rows, batch, width).to(dtype).transpose(0, 1)
    if kind == "sliced":
        return torch.randn(batch + 1, rows + 2, width + 3).to(dtype)[1:, 1:-1, 2:-1]
    if kind == "expanded":
        return torch.randn(1, rows, width).to(dtype).expand(shape)
    if kind == "columns":  # values of a row are not adjacent
        return torch.randn(batch, width, rows).to(dtype).transpose(1, 2)
    return torch.randn(shape).to(dtype)


KINDS = ("packed", "transposed", "sliced", "expanded", "columns")
cases = st.tuples(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(0, 70),
    st.sampled_from([1, 3, 16, 33, 64, 192]),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
)


def check(case: tuple[int, int, int, int, str, torch.dtype], backend: str) -> None:
    batch, length, count, width, kind, dtype = case
    count = max(1, min(count, length))
    rows = orders(batch, length + 1)[:, :count]  # a slice: strided as a plan's visible part is
    x = strided((batch, length + 1, width), kind, dtype)
    picked = take(x, rows, backend=backend)
    assert picked.dtype == dtype and picked.is_contiguous()
    assert torch.equal(picked, literal_take(x, rows))
    y = strided((batch, count, width), kind, dtype)
    assert torch.equal(put(y, rows, length + 1, backend=backend), literal_put(y, rows, length + 1))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases)
def test_moves_the_rows_of_the_formula(backend: str, case: tuple[int, int, int, int, str, torch.dtype]) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_reference_s(backend: str, dtype: torch.dtype) -> None:
    rows = orders(3, 50)[:, :20]
    for call, shape in ((take, (3, 50, 24)), (put, (3, 20, 24))):
        extra = (50,) if call is put else ()
        grads = []
        for name in ("reference", backend):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            out = call(x, rows, *extra, backend=name)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_gradcheck_of_first_and_second_order(backend: str) -> None:
    rows = orders(2, 5)[:, :3]
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: take(x, rows, backend=backend), x)
    torch.autograd.gradcheck(lambda y: put(y, rows, 5, backend=backend), y)
    torch.autograd.gradgradcheck(lambda x: take(x, rows, backend=backend) ** 2, x)
    torch.autograd.gradgradcheck(lambda y: put(y, rows, 5, backend=backend) ** 2, y)


@pytest.mark.parametrize("backend", FAST)
def test_gradient_may_have_any_strides(backend: str) -> None:
    rows = orders(2, 9)[:, :4]
    x = torch.randn(2, 9, 6, requires_grad=True)
    take(x, rows, backend=backend).sum().backward()  # the gradient of a sum is one expanded number
    assert x.grad is not None
    assert torch.equal(x.grad, literal_put(torch.ones(2, 4, 6), rows, 9))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_empty(backend: str, shape: tuple[int, int, int, int]) -> None:
    batch, length, count, width = shape
    rows = orders(batch, length)[:, :count]
    x = torch.randn(batch, length, width, requires_grad=True)
    out = take(x, rows, backend=backend)
    assert out.shape == (batch, count, width)
    back = put(out, rows, length, backend=backend)
    assert torch.equal(back, torch.zeros_like(back) if count == 0 else back)
    assert back.shape == x.shape
    back.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("backend", FAST)
def test_round_trip_of_a_whole_order(backend: str) -> None:
    order = orders(2, 31)
    x = torch.randn(2, 31, 8)
    assert torch.equal(put(take(x, order, backend=backend), order, 31, backend=backend), x)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck() -> None:
    rows = orders(2, 6)[:, :4].contiguous()
    torch.library.opcheck(torch.ops.cohobate.take.default, (torch.randn(2, 6, 3), rows, "native"))
    torch.library.opcheck(torch.ops.cohobate.put.default, (torch.randn(2, 4, 3), rows, 6, "native"))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_gives_the_same(backend: str) -> None:
    def call(x: Tensor, rows: Tensor) -> Tensor:
        return put(take(x, rows, backend=backend) * 2, rows, x.shape[1], backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch, length, count in ((2, 11, 5), (3, 13, 6), (4, 17, 7)):  # sizes that change become symbolic
        rows = orders(batch, length)[:, :count]
        results = []
        for function in (call, compiled):
            x = torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
            out = function(x, rows)
            out.square().sum().backward()
            results.append((out, x.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


ROWS = torch.zeros(2, 3, dtype=torch.int32)
X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: take(X[0], ROWS), ValueError, r"x: expected shape \[any, any, any\], got \[3, 4\]"),
        (lambda: take(X.int(), ROWS), TypeError, "x: expected dtype float32 .*, got int32"),
        (lambda: take(X, ROWS.long()), TypeError, "rows: expected dtype int32, got int64"),
        (lambda: take(X, ROWS[:1]), ValueError, r"rows: expected shape \[2, any\], got \[1, 3\]"),
        (lambda: take(X, ROWS.to("meta")), ValueError, "rows: expected device cpu, got meta"),
        (lambda: take(X.tolist(), ROWS), TypeError, "x: expected a tensor, got list"),
        (lambda: put(X, ROWS[:, :2], 5), ValueError, r"rows: expected shape \[2, 3\], got \[2, 2\]"),
        (lambda: put(X, ROWS, 2), ValueError, r"length: expected at least 3 \(the rows to place\), got 2"),
        (lambda: take(X, ROWS, backend="fast"), ValueError, "backend: expected one of auto, .*; got 'fast'"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        call()  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu(dtype: torch.dtype, kind: str) -> None:
    for batch, length, count, width in ((4, 196, 49, 768), (2, 1568, 392, 384), (3, 50, 50, 33), (2, 7, 3, 1)):
        rows = orders(batch, length)[:, :count].cuda()
        x, y = (strided((batch, n, width), kind, dtype).cuda() for n in (length, count))
        assert torch.equal(take(x, rows, backend="triton"), take(x, rows, backend="reference"))
        assert torch.equal(put(y, rows, length, backend="triton"), put(y, rows, length, backend="reference"))


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    storage = torch.zeros(1 << 32, dtype=torch.bfloat16, device="cuda")
    x = storage.view(2, 1 << 11, 1 << 20)[:, :, :64]
    x[1, 2047] = torch.arange(64, device="cuda")
    rows = torch.tensor([[0], [2047]], dtype=torch.int32, device="cuda")
    assert torch.equal(take(x, rows, backend="triton")[1, 0], torch.arange(64, device="cuda").bfloat16())
