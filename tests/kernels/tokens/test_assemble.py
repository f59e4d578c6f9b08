"""assemble against its formula written out token by token in float64, forward and backward, in every implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.tokens import assemble

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]
HALF = {
    "native": torch.bfloat16,
    "triton": torch.float16,
    "reference": torch.bfloat16,
}  # bf16 rounds wrongly interpreted
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    grid: int  # N
    visible: int  # a
    width: int
    prefix: int
    layout: str
    count: int  # m
    has_positions: bool
    kind: str
    half: bool
    seed: int


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    grid = draw(st.integers(1, 40))
    visible = draw(st.integers(0, grid))
    layout = draw(st.sampled_from(["raster", "visible_first"]))
    return Case(
        batch=draw(st.integers(1, 4)),
        grid=grid,
        visible=visible,
        width=draw(st.sampled_from([1, 3, 16, 33, 64, 192])),
        prefix=draw(st.integers(0, 2)),
        layout=layout,
        count=grid if layout == "raster" else draw(st.integers(max(visible, 1), grid)),
        has_positions=draw(st.booleans()),
        kind=draw(st.sampled_from(["packed", "transposed", "sliced", "expanded", "columns"])),
        half=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x in dtype and the asked layout in memory; mask token and positions in fp32, as parameters are."""
    torch.manual_seed(case.seed)
    seen = case.prefix + case.visible
    if case.kind == "transposed":
        x = torch.randn(seen, case.batch, case.width).to(dtype).transpose(0, 1)
    elif case.kind == "sliced":
        x = torch.randn(case.batch + 1, seen + 2, case.width + 3).to(dtype)[1:, 2:, 1:-2]
    elif case.kind == "expanded":
        x = torch.randn(1, seen, case.width).to(dtype).expand(case.batch, -1, -1)
    elif case.kind == "columns":
        x = torch.randn(case.batch, case.width, seen).to(dtype).transpose(1, 2)
    else:
        x = torch.randn(case.batch, seen, case.width).to(dtype)
    positions = torch.randn(case.prefix + case.grid, case.width) if case.has_positions else None
    order = torch.rand(case.batch, case.grid).argsort(dim=1)
    rows = order.argsort(dim=1).int() if case.layout == "raster" else order.int()[:, : case.count]
    return x, torch.randn(case.width), positions, rows


def literal(x: Tensor, mask_token: Tensor, positions: Tensor | None, rows: Tensor, layout: str, prefix: int) -> Tensor:
    """The formulas of the module's docstring, one token after the other."""
    visible = x.shape[1] - prefix
    samples = []
    for b, index in enumerate(rows.tolist()):
        tokens = [x[b, p] + (0 if positions is None else positions[p]) for p in range(prefix)]
        for j, row in enumerate(index):
            source, place = (row, j) if layout == "raster" else (j, row)
            value = x[b, prefix + source] if source < visible else mask_token
            tokens.append(value + (0 if positions is None else positions[prefix + place]))
        samples.append(torch.stack(tokens) if tokens else x.new_zeros(0, x.shape[-1]))
    return torch.stack(samples)


def check(case: Case, backend: str) -> None:
    dtype = HALF[backend] if case.half else torch.float32
    x, mask_token, positions, rows = inputs(case, dtype)
    shape = (case.batch, case.prefix + case.count, case.width)
    weight = torch.randn(shape).to(dtype)

    def gradients(leaves: list[Tensor | None], out: Tensor) -> list[Tensor]:
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(out, wanted, weight.to(out.dtype), allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted, found)]

    exact = [t if t is None else t.double().requires_grad_() for t in (x, mask_token, positions)]
    truth = literal(exact[0], exact[1], exact[2], rows, case.layout, case.prefix)  # type: ignore[arg-type]
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, mask_token, positions)]
    out = assemble(leaves[0], leaves[1], leaves[2], rows, layout=case.layout, prefix=case.prefix, backend=backend)  # type: ignore[arg-type]
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    # One addition in fp32 and one rounding to the output's dtype.
    assert ((out - truth).abs() <= truth.abs() * (ROUNDOFF[dtype] + ROUNDOFF[torch.float32]) + 1e-6).all()

    found, expected = gradients(leaves, out), gradients(exact, truth)
    assert torch.equal(found[0].double(), expected[0])  # rows are moved, not added
    terms = case.batch * (case.prefix + case.count)
    for got, want in zip(found[1:], expected[1:]):
        assert got.dtype == torch.float32
        # Adding n terms in fp32 errs by at most n * 2^-24 of the sum of their sizes.
        assert ((got - want).abs() <= terms * ROUNDOFF[torch.float32] * weight.double().abs().sum(dim=(0, 1))).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=drawn())
def test_computes_the_formula(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", ["raster", "visible_first"])
def test_more_rows_and_samples_than_one_block(backend: str, layout: str) -> None:
    check(Case(1, 300, 75, 40, 1, layout, 300, True, "packed", False, 3), backend)
    check(Case(70, 4, 2, 3, 1, layout, 4, True, "packed", False, 4), backend)


def test_gradcheck() -> None:
    for layout in ("raster", "visible_first"):
        x, mask_token, positions, rows = inputs(Case(2, 5, 2, 3, 1, layout, 5, True, "packed", False, 5), torch.float64)
        leaves = [t.double().requires_grad_() for t in (x, mask_token, positions)]  # type: ignore[union-attr]
        torch.autograd.gradcheck(lambda *t: assemble(*t, rows, layout=layout, prefix=1), leaves)  # noqa: B023


@pytest.mark.parametrize("backend", FAST)
def test_parameters_may_have_the_dtype_of_x(backend: str) -> None:
    dtype = HALF[backend]
    x, mask_token, positions, rows = inputs(Case(2, 9, 4, 8, 1, "raster", 9, True, "packed", True, 6), dtype)
    assert positions is not None
    leaves = [t.to(dtype).requires_grad_() for t in (x, mask_token, positions)]
    out = assemble(*leaves, rows, prefix=1, backend=backend)
    truth = literal(*[t.double() for t in leaves], rows, "raster", 1)
    assert torch.equal(out, truth.to(dtype))
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [dtype] * 3


@pytest.mark.parametrize("backend", FAST)
def test_sum_is_rounded_once(backend: str) -> None:
    dtype = HALF[backend]
    step = float(torch.finfo(dtype).eps)
    mask_token = torch.tensor([1.0 + 0.3 * step])  # rounded on its own it is 1, and 1 + 0.3 eps rounds to 1
    x, positions = torch.ones(1, 1, 1, dtype=dtype), torch.full((2, 1), 0.3 * step)
    rows = torch.tensor([[0, 1]], dtype=torch.int32)
    assert float(assemble(x, mask_token, positions, rows, backend=backend)[0, 1]) == 1.0 + step


@pytest.mark.parametrize("backend", FAST)
def test_gradients_that_nobody_wants_are_not_made(backend: str) -> None:
    x, mask_token, positions, rows = inputs(
        Case(2, 9, 4, 8, 1, "visible_first", 7, True, "packed", False, 7), torch.float32
    )
    x.requires_grad_()
    assemble(x, mask_token, positions, rows, layout="visible_first", prefix=1, backend=backend).sum().backward()
    assert x.grad is not None and mask_token.grad is None
    assert torch.equal(x.grad, torch.ones_like(x))
    with torch.no_grad():
        assert not assemble(
            x, mask_token, positions, rows, layout="visible_first", prefix=1, backend=backend
        ).requires_grad


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("batch", "width"), [(0, 4), (2, 0)])
def test_empty(backend: str, batch: int, width: int) -> None:
    x, mask_token, positions, rows = inputs(Case(2, 6, 2, 4, 1, "raster", 6, True, "packed", False, 8), torch.float32)
    assert positions is not None
    x, mask_token = x[:batch, :, :width].requires_grad_(), mask_token[:width].requires_grad_()
    positions = positions[:, :width].requires_grad_()
    out = assemble(x, mask_token, positions, rows[:batch], prefix=1, backend=backend)
    assert out.shape == (batch, 7, width)
    found = torch.autograd.grad(out.sum(), (x, mask_token, positions))
    assert [g.shape for g in found] == [x.shape, mask_token.shape, positions.shape]
    assert all(not g.any() for g in found)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_repeats_bit_for_bit_whatever_the_threads() -> None:
    x, mask_token, positions, rows = inputs(
        Case(4, 300, 60, 24, 1, "visible_first", 290, True, "packed", False, 9), torch.float32
    )
    assert positions is not None
    leaves = [t.requires_grad_() for t in (x, mask_token, positions)]
    weight = torch.randn(4, 291, 24)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            out = assemble(*leaves, rows, layout="visible_first", prefix=1, backend="native")
            results.append((out, *torch.autograd.grad(out, leaves, weight)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck() -> None:
    x, mask_token, positions, rows = inputs(Case(2, 6, 2, 4, 1, "raster", 6, True, "packed", False, 8), torch.float32)
    torch.library.opcheck(torch.ops.cohobate.assemble.default, (x, mask_token, positions, rows, True, 1, "native"))
    torch.library.opcheck(torch.ops.cohobate.assemble.default, (x, mask_token, None, rows, False, 1, "native"))
    grad = torch.randn(2, 7, 4)
    for want_mask, want_positions in ((True, True), (False, False)):
        torch.library.opcheck(
            torch.ops.cohobate.assemble_backward.default,
            (grad, rows, 2, 7, True, 1, want_mask, want_positions, "native"),
        )


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_gives_the_same(backend: str, compiler: str) -> None:
    def call(x: Tensor, mask_token: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        return assemble(x * 2, mask_token, positions, rows, layout="visible_first", prefix=1, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    sizes = ((2, 12, 5), (3, 15, 6), (4, 18, 7)) if compiler == "aot_eager" else ((2, 12, 5),)
    for batch, grid, visible in sizes:  # sizes that change become symbolic
        results = []
        for function in (call, compiled):
            x, mask_token, positions, rows = inputs(
                Case(batch, grid, visible, 8, 1, "visible_first", grid - 2, True, "packed", False, 11), torch.float32
            )
            leaves = [t.requires_grad_() for t in (x, mask_token, positions)]  # type: ignore[union-attr]
            out = function(*leaves, rows)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, other in zip(*results):
            torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)  # inductor may fuse a multiply and an add


X, MASK, TABLE = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(7, 4)
ROWS = torch.zeros(2, 6, dtype=torch.int32)
BAD = [
    ((X[0], MASK, TABLE, ROWS), {}, ValueError, r"x: expected shape \[any, any, any\], got \[3, 4\]"),
    ((X, MASK.view(1, 1, 4), TABLE, ROWS), {}, ValueError, r"mask_token: expected shape \[4\], got \[1, 1, 4\]"),
    ((X, MASK.int(), TABLE, ROWS), {}, TypeError, "mask_token: expected dtype .*, got int32"),
    ((X, MASK.to("meta"), None, ROWS), {}, ValueError, "mask_token: expected device cpu, got meta"),
    ((X, MASK, TABLE, ROWS.long()), {}, TypeError, "rows: expected dtype int32, got int64"),
    ((X, MASK, TABLE, ROWS[:1]), {}, ValueError, r"rows: expected shape \[2, any\], got \[1, 6\]"),
    ((X, MASK, None, ROWS[:, :2]), {}, ValueError, r"rows: expected at least 3 a sample .*, got 2"),
    ((X, MASK, TABLE, ROWS), {}, ValueError, r"positions: expected shape \[6, 4\], got \[7, 4\]"),
    ((X, MASK, TABLE[:, :3], ROWS), {"prefix": 1}, ValueError, r"positions: expected shape \[7, 4\], got \[7, 3\]"),
    (
        (X, MASK, TABLE, ROWS),
        {"layout": "visible_first", "prefix": 2},
        ValueError,
        "positions: expected at least 8 rows, got 7",
    ),
    ((X, MASK, None, ROWS), {"layout": "s"}, ValueError, "layout: expected raster or visible_first, got 's'"),
    ((X, MASK, None, ROWS), {"prefix": 4}, ValueError, "prefix: expected a count between 0 and .* 3 rows.*, got 4"),
    ((X.double(), MASK, None, ROWS), {"backend": "native"}, ValueError, "backend: 'native' cannot run .*, not float64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[row[3][:24] for row in BAD])
def test_bad_input_is_named(
    arguments: tuple[Tensor, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        assemble(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["raster", "visible_first"])
def test_gpu(dtype: torch.dtype, layout: str) -> None:
    for batch, grid, visible, width in ((8, 196, 49, 512), (2, 1568, 160, 384), (3, 9, 9, 33), (300, 20, 5, 1)):
        case = Case(batch, grid, visible, width, 1, layout, grid, True, "sliced", False, 12)
        x, mask_token, positions, rows = (t.cuda() for t in inputs(case, dtype))  # type: ignore[union-attr]
        weight = torch.randn(batch, 1 + grid, width, device="cuda").to(dtype)
        results = []
        for backend in ("triton", "triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in (x, mask_token, positions)]
            out = assemble(*leaves, rows, layout=layout, prefix=1, backend=backend)
            results.append((out, *torch.autograd.grad(out, leaves, weight)))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))  # repeats bit for bit
        assert torch.equal(results[0][0], results[2][0]) and torch.equal(results[0][1], results[2][1])
        terms = weight.double().abs().sum(dim=(0, 1)) * batch * grid * ROUNDOFF[torch.float32]
        # The reference adds half-precision gradients in half precision, so both are held to the sum in float64.
        where = rows if layout == "raster" else torch.arange(grid, device="cuda").expand(batch, -1)
        truth = (weight[:, 1:].double() * (where >= visible).unsqueeze(-1)).sum(dim=(0, 1))
        assert ((results[0][2] - truth).abs() <= terms).all()
