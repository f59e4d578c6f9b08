"""add_norm against its formula written out in float64, forward and backward, in every implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.transformer.add_norm import add_norm, add_norm_cost, add_norm_fp8
from cohobate.kernels.transformer.fp8 import FP8, quantise_fp8

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]
HALF = {"native": torch.bfloat16, "triton": torch.float16, "reference": torch.bfloat16}  # interpreted bf16 truncates
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    width: int
    branch: bool
    affine: bool
    factor: bool
    kind: str
    half: tuple[bool, bool, bool]  # x, branch, normed
    seed: int


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    branch = draw(st.booleans())
    return Case(
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 40)),
        width=draw(st.sampled_from([1, 3, 16, 33, 64, 192])),
        branch=branch,
        affine=draw(st.booleans()),
        factor=branch and draw(st.booleans()),
        kind=draw(st.sampled_from(["packed", "transposed", "sliced", "expanded", "columns"])),
        half=(draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        seed=draw(st.integers(0, 1000)),
    )


def strided(case: Case, dtype: torch.dtype) -> Tensor:
    """Random values of the case's shape, laid out in memory as it says."""
    batch, length, width = case.batch, case.length, case.width
    if case.kind == "transposed":
        return torch.randn(length, batch, width).to(dtype).transpose(0, 1)
    if case.kind == "sliced":
        return torch.randn(batch + 1, length + 2, width + 3).to(dtype)[1:, 2:, 1:-2]
    if case.kind == "expanded":
        return torch.randn(1, length, width).to(dtype).expand(batch, -1, -1)
    if case.kind == "columns":
        return torch.randn(batch, width, length).to(dtype).transpose(1, 2)
    return torch.randn(batch, length, width).to(dtype)


def inputs(case: Case, backend: str) -> tuple[list[Tensor | None], Tensor | None, torch.dtype]:
    """[x, branch, weight, bias], factor, and the dtype of normed."""
    torch.manual_seed(case.seed)
    kinds = [HALF[backend] if half else torch.float32 for half in case.half]
    x, branch = strided(case, kinds[0]), strided(case, kinds[1]) if case.branch else None
    weight, bias = (torch.randn(case.width), torch.randn(case.width)) if case.affine else (None, None)
    factor = torch.tensor([0.0, 1.25, 2.0])[: case.batch] if case.factor else None
    return [x, branch, weight, bias], factor, kinds[2]


def literal(
    leaves: list[Tensor | None], factor: Tensor | None, eps: float, rounded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formulas of the module; ``rounded``: values that the statistics are taken of instead of the exact sum."""
    x, branch, weight, bias = leaves
    assert x is not None
    total = x
    if branch is not None:
        total = x + (branch if factor is None else factor.to(x.dtype)[:, None, None] * branch)
    if rounded is not None:
        total = total + (rounded.to(total.dtype) - total).detach()
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt()
    return total, (normed if weight is None else normed * weight) + (0 if bias is None else bias)


def gradients(leaves: list[Tensor | None], outs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> list[Tensor]:
    wanted = [leaf for leaf in leaves if leaf is not None]
    return list(torch.autograd.grad(outs, wanted, [w.to(o.dtype) for w, o in zip(weights, outs)]))


def near(found: Tensor, truth: Tensor, dtype: torch.dtype, terms: float = 32) -> None:
    """One rounding to ``dtype``, and ``terms`` roundings of fp32 of the largest value of the row."""
    scale = truth.abs().amax(-1, keepdim=True).clamp(min=1)
    bound = truth.abs() * ROUNDOFF[dtype] + terms * ROUNDOFF[torch.float32] * scale
    excess = ((found - truth).abs() - bound).max() if truth.numel() else torch.tensor(-1.0)
    assert excess <= 0, f"{float(excess)} beyond the bound"


def check(case: Case, backend: str) -> None:
    leaves, factor, dtype = inputs(case, backend)
    eps = 1e-2  # narrow rows have variances near zero, where 1 / sqrt(eps) amplifies any rounding
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    x, branch, weight, bias = leaves
    assert x is not None
    total, normed = add_norm(x, branch, weight=weight, bias=bias, factor=factor, eps=eps, dtype=dtype, backend=backend)
    assert total.dtype == x.dtype and normed.dtype == dtype and total.shape == normed.shape == x.shape
    assert normed.is_contiguous()
    exact = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    truths = literal(exact, factor, eps, rounded=total.detach())
    plain, _ = literal(exact, factor, eps)
    near(total.detach().double(), plain.detach(), x.dtype, terms=2)
    near(normed.detach().double(), truths[1].detach(), dtype, terms=64)

    # Autograd rounds the reference's gradient to x's dtype three times: both parts, of size 5 at most, and their sum.
    rough = 15 * ROUNDOFF[x.dtype] / ROUNDOFF[torch.float32] if backend == "reference" else 0
    weights = torch.randn(x.shape).to(x.dtype), torch.randn(x.shape).to(dtype)
    found, expected = gradients(leaves, (total, normed), weights), gradients(exact, truths, weights)
    for leaf, got, want in zip([t for t in leaves if t is not None], found, expected):
        assert got.dtype == leaf.dtype
        if leaf.dim() == 3:  # divided by sqrt(eps) at most: ten times the roundings of normed
            near(got.double(), want, leaf.dtype, terms=640 + rough)
        else:  # adding n terms in fp32 errs by at most n * 2^-24 of their sizes, each wrong by a few roundings itself
            sizes = weights[1].double().abs().sum(dim=(0, 1)) * case.width**0.5
            assert ((got - want).abs() <= (64 + case.batch * case.length) * 2**-24 * sizes).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=drawn())
def test_computes_the_formula(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", FAST)
def test_more_rows_than_one_chunk_and_group(backend: str) -> None:
    # More than 64 partial sums of 16 rows: the tree of the Triton sums has two levels.
    check(Case(3, 400, 5, True, True, True, "packed", (False, True, True), 1), backend)
    check(Case(1, 33, 130, True, True, False, "sliced", (True, True, True), 2), backend)


@pytest.mark.parametrize("has_branch", [True, False])
def test_gradcheck(has_branch: bool) -> None:
    torch.manual_seed(3)
    leaves = [torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4), torch.randn(4)]
    leaves = [t.double().requires_grad_() for t in leaves]
    factor = torch.tensor([0.0, 2.0]) if has_branch else None

    def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, branch if has_branch else None, weight=weight, bias=bias, factor=factor)

    torch.autograd.gradcheck(call, leaves)
    ours, truth = call(*leaves), literal([leaves[0], leaves[1] if has_branch else None, *leaves[2:]], factor, 1e-6)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_statistics_are_those_of_the_rounded_sum(backend: str) -> None:
    dtype = HALF[backend]
    torch.manual_seed(4)
    x, branch = torch.randn(2, 5, 64).to(dtype) * 30, torch.randn(2, 5, 64)
    total, normed = add_norm(x, branch, dtype=torch.float32, backend=backend)
    again = torch.nn.functional.layer_norm(total.double(), (64,), eps=1e-6)
    unrounded = torch.nn.functional.layer_norm(x.double() + branch.double(), (64,), eps=1e-6)
    assert (normed - again).abs().max() < 1e-6
    assert (normed - unrounded).abs().max() > 1e-4  # what the test would not see otherwise


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_without_a_branch_the_sum_is_x(backend: str) -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    total, normed = add_norm(x, backend=backend)
    assert total.data_ptr() == x.data_ptr()
    both = torch.autograd.grad(total.sum() * 3 + normed.square().sum(), x, retain_graph=True)[0]
    alone = torch.autograd.grad(normed.square().sum(), x)[0]
    torch.testing.assert_close(both, alone + 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_result_nobody_uses_adds_nothing(backend: str) -> None:
    x, branch = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    factor = torch.tensor([0.0, 2.0])
    total, _ = add_norm(x, branch, factor=factor, backend=backend)
    dx, dbranch = torch.autograd.grad(total.sum(), (x, branch))
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dbranch, factor[:, None, None].expand(2, 3, 8))


@pytest.mark.parametrize("backend", FAST)
def test_gradients_that_nobody_wants_are_not_made(backend: str) -> None:
    torch.manual_seed(5)
    tensors = {"x": torch.randn(2, 40, 8), "branch": torch.randn(2, 40, 8).to(HALF[backend])}
    tensors |= {"weight": torch.randn(8), "bias": torch.randn(8)}
    for wanted in (("x",), ("branch",), ("weight",), ("bias", "x"), ("weight", "branch")):
        grads = []
        for name in ("reference", backend):
            leaves = {key: t.clone().requires_grad_(key in wanted) for key, t in tensors.items()}
            total, normed = add_norm(leaves.pop("x"), leaves.pop("branch"), **leaves, backend=name)  # type: ignore[arg-type]
            out = total.sin().sum() + normed.sin().sum()
            assert out.requires_grad
            out.backward()
            grads.append([t.grad for t in leaves.values()])
        for expected, got in zip(*grads):
            assert (expected is None) == (got is None)
            if got is not None and expected is not None:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not any(t.requires_grad for t in add_norm(tensors["x"], tensors["branch"], backend=backend))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(backend: str, shape: tuple[int, int, int]) -> None:
    x, branch = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    total, normed = add_norm(x, branch, weight=weight, backend=backend)
    assert total.shape == normed.shape == shape
    (total.sum() + normed.sum()).backward()
    assert x.grad is not None and branch.grad is not None and weight.grad is not None
    assert x.grad.shape == branch.grad.shape == shape and torch.equal(weight.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("backend", FAST)
def test_nan_stays_in_its_row(backend: str) -> None:
    x = torch.randn(2, 3, 8)
    x[1, 2, 5] = float("nan")
    _, normed = add_norm(x, torch.ones_like(x), backend=backend)
    assert normed[1, 2].isnan().all() and not normed[0].isnan().any() and not normed[1, :2].isnan().any()


@pytest.mark.parametrize("backend", FAST)
def test_repeats_bit_for_bit_whatever_the_threads(backend: str) -> None:
    leaves, factor, _ = inputs(Case(2, 70, 33, True, True, True, "packed", (False, True, True), 6), backend)
    leaves = [t.requires_grad_() for t in leaves if t is not None]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            out = add_norm(*leaves[:2], weight=leaves[2], bias=leaves[3], factor=factor, backend=backend)
            results.append((*out, *torch.autograd.grad(out[0].sin().sum() + out[1].sin().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", FAST)
def test_fp8_is_the_quantised_norm(backend: str) -> None:
    torch.manual_seed(7)
    x, branch = torch.randn(2, 9, 48), torch.randn(2, 9, 48).to(HALF[backend])
    weight, bias = torch.randn(48) * 3, torch.randn(48)
    for added in (branch, None):
        for scale in (0.004, 0.5):
            total, quantised = add_norm_fp8(x, added, scale, weight=weight, bias=bias, backend=backend)
            plain, normed = add_norm(x, added, weight=weight, bias=bias, dtype=torch.float32, backend=backend)
            assert quantised.dtype == FP8 and torch.equal(total, plain)
            expected = quantise_fp8(normed, scale, backend="reference")
            assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))
    assert (quantised.float().abs() <= 448).all()


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck() -> None:
    ops, x, branch = torch.ops.cohobate, torch.randn(2, 6, 8), torch.randn(2, 6, 8).bfloat16()
    weight, factor, half = torch.randn(8), torch.tensor([0.0, 2.0]), torch.bfloat16
    forward = (x, branch, weight, weight, factor, 1e-6, 1.0, half, "native")
    torch.library.opcheck(ops.add_norm.default, forward)
    torch.library.opcheck(ops.add_norm.default, (x, None, None, None, None, 1e-6, 0.1, FP8, "native"))
    total, normed, stats = ops.add_norm.default(*forward)
    for wanted in ((True, True), (False, False)):
        arguments = (x, normed, total, stats, weight, factor, half, *wanted, "native")
        torch.library.opcheck(ops.add_norm_backward.default, arguments)
    arguments = (None, normed, total, stats, None, None, half, True, False, "native")
    torch.library.opcheck(ops.add_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_gives_the_same(backend: str, compiler: str) -> None:
    def call(x: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        total, normed = add_norm(x * 2, None, weight=weight, dtype=torch.bfloat16, backend=backend)
        total, again = add_norm(total, branch * normed, weight=weight, dtype=torch.bfloat16, backend=backend)
        return total + again

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for batch, length in ((2, 12), (3, 15), (4, 18)) if compiler == "aot_eager" else ((2, 12),):
        results = []
        for function in (call, compiled):
            torch.manual_seed(8)
            leaves = [torch.randn(batch, length, 8), torch.randn(batch, length, 8).bfloat16(), torch.randn(8)]
            leaves = [t.requires_grad_() for t in leaves]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, other in zip(*results):  # inductor keeps bf16 intermediates of the code around the op in fp32
            torch.testing.assert_close(
                other.float(), eager.float(), rtol=2e-2, atol=2e-2 * float(eager.detach().abs().max())
            )
            if compiler == "aot_eager":
                assert torch.equal(other, eager)


def test_cost_counts_each_tensor_once() -> None:
    # fp32 stream, bf16 branch and result: read 4 + 2, write 4 + 2; backward reads 4 + 4 + 2 and writes 4 + 2.
    assert add_norm_cost(10, 8, 4, 2, branch_itemsize=2).bytes == 80 * 12
    assert add_norm_cost(10, 8, 4, 2, branch_itemsize=2, backward=True).bytes == 80 * 16
    assert add_norm_cost(10, 8, 4, 2).bytes == 80 * 6


X, D = torch.zeros(2, 3, 4), torch.zeros(4)
BAD = [
    ((X[0],), {}, ValueError, r"x: expected shape \[any, any, any\], got \[3, 4\]"),
    ((X.int(),), {}, TypeError, "x: expected dtype .*, got int32"),
    ((X, X[:, :2]), {}, ValueError, r"branch: expected shape \[2, 3, 4\], got \[2, 2, 4\]"),
    ((X, X.to("meta")), {}, ValueError, "branch: expected device cpu, got meta"),
    ((X, X.int()), {}, TypeError, "branch: expected dtype .*, got int32"),
    ((X,), {"weight": D[:3]}, ValueError, r"weight: expected shape \[4\], got \[3\]"),
    ((X,), {"bias": D.int()}, TypeError, "bias: expected dtype .*, got int32"),
    ((X, X), {"factor": D}, ValueError, r"factor: expected shape \[2\], got \[4\]"),
    ((X, X), {"factor": D[:2].half()}, TypeError, "factor: expected dtype float32, got float16"),
    ((X,), {"factor": D[:2]}, ValueError, "factor: expected None without a branch, got a tensor"),
    ((X,), {"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
    ((X,), {"dtype": torch.int8}, TypeError, "dtype: expected float32, .*, got torch.int8"),
    ((X.double(),), {"backend": "native"}, ValueError, "backend: 'native' cannot run add_norm: .*, not float64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[row[3][:28] for row in BAD])
def test_bad_input_is_named(
    arguments: tuple[Tensor, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        add_norm(*arguments, **options)  # type: ignore[arg-type]


def test_bad_scale_is_named() -> None:
    with pytest.raises(ValueError, match=r"^scale: expected a finite number above 0, got 0.0$"):
        add_norm_fp8(X, None, 0.0)
    with pytest.raises(TypeError, match=r"^scale: expected a number .*, got Tensor$"):
        add_norm_fp8(X, None, D[0])  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_gpu(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    stream, half = kinds
    for batch, length, width in ((8, 197, 768), (2, 1568, 384), (3, 9, 33), (300, 5, 1280)):
        torch.manual_seed(9)
        x, branch = torch.randn(batch, length, width).to(stream), torch.randn(batch, length, width).to(half)
        tensors = [t.cuda() for t in (x, branch, torch.randn(width), torch.randn(width))]
        factor = (torch.rand(batch) > 0.2).float().cuda() / 0.8
        results = []
        for backend in ("triton", "triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = add_norm(*leaves[:2], weight=leaves[2], bias=leaves[3], factor=factor, dtype=half, backend=backend)
            grads = torch.autograd.grad((out[0].float().sin() + out[1].float().sin()).sum(), leaves)
            quantised = add_norm_fp8(
                *leaves[:2], 0.01, weight=leaves[2], bias=leaves[3], factor=factor, backend=backend
            )
            results.append((*out, *grads, quantised[1].float()))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))  # repeats bit for bit
        for found, expected in zip(results[0], results[2]):
            relative = (found.double() - expected.double()).norm() / expected.double().norm()
            assert relative < (2e-5 if found.dtype == torch.float32 and stream == torch.float32 else 1e-2)
