"""short_attention against its formula written out head by head in float64, forward and backward, in every backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cohobate.kernels import OPS, native
from cohobate.kernels.transformer.attention import attention_cost, short_attention

WITHOUT = bool(native.why_not())
NATIVE = pytest.param("native", marks=pytest.mark.skipif(WITHOUT, reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]
# bf16 products are wrong in the interpreter
HALF = {"native": torch.bfloat16, "triton": torch.float16, "reference": torch.bfloat16}
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    keys: int  # N
    queries: int | None  # n, or None for packed qkv
    heads: int
    dim: int
    scale: float | None = None
    kind: str = "packed"
    half: bool = False
    seed: int = 0


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    return Case(
        batch=draw(st.integers(1, 3)),
        keys=draw(st.integers(1, 70)),
        queries=draw(st.none() | st.integers(1, 40)),
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([2, 6, 8, 16, 24, 32])),
        scale=draw(st.none() | st.sampled_from([1.0, 0.01])),
        kind=draw(st.sampled_from(["packed", "rows", "transposed", "expanded", "columns"])),
        half=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def laid_out(kind: str, batch: int, rows: int, width: int) -> Tensor:
    """Random [batch, rows, width], in the asked layout in memory."""
    if kind == "rows":
        return torch.randn(batch + 1, rows + 3, width + 5)[1:, 2:-1, 1:-4]
    if kind == "transposed":
        return torch.randn(rows, batch, width).transpose(0, 1)
    if kind == "expanded":
        return torch.randn(1, rows, width).expand(batch, -1, -1)
    if kind == "columns":
        return torch.randn(batch, width, rows).transpose(1, 2)
    return torch.randn(batch, rows, width)


def inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """[qkv], or [kv, queries]; ``to`` keeps the strides."""
    torch.manual_seed(case.seed)
    width = case.heads * case.dim
    if case.queries is None:
        return [laid_out(case.kind, case.batch, case.keys, 3 * width).to(dtype)]
    shapes = ((case.keys, 2 * width), (case.queries, width))
    return [laid_out(case.kind, case.batch, rows, columns).to(dtype) for rows, columns in shapes]


def leaves_of(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def literal(tensors: list[Tensor], heads: int, scale: float | None) -> Tensor:
    """The formula of the module's docstring, one sample and one head after the other."""
    packed, queries = tensors[0], tensors[1] if len(tensors) == 2 else None
    q, k, v = packed.chunk(3, dim=2) if queries is None else (queries, *packed.chunk(2, dim=2))
    dim = q.shape[2] // heads
    samples = []
    for b in range(q.shape[0]):
        columns = []
        for h in range(heads):
            one = slice(h * dim, (h + 1) * dim)
            scores = q[b, :, one] @ k[b, :, one].T * (dim**-0.5 if scale is None else scale)
            columns.append(scores.softmax(dim=1) @ v[b, :, one])
        samples.append(torch.cat(columns, dim=1))
    return torch.stack(samples)


def ours(tensors: list[Tensor], case: Case, backend: str | None) -> Tensor:
    queries = tensors[1] if len(tensors) == 2 else None
    return short_attention(tensors[0], case.heads, queries=queries, scale=case.scale, backend=backend)


def check(case: Case, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> list[Tensor]:
    """Hold the result and its gradients to the formula in float64; they are returned."""
    dtype = dtype or (HALF[backend] if case.half else torch.float32)
    tensors = [t.to(device) for t in inputs(case, dtype)]
    rows = case.keys if case.queries is None else case.queries
    weight = torch.randn(case.batch, rows, case.heads * case.dim).to(device, dtype)

    exact, eager, leaves = leaves_of(tensors, torch.float64), leaves_of(tensors), leaves_of(tensors)
    truth = literal(exact, case.heads, case.scale)
    truths = [truth, *torch.autograd.grad(truth, exact, weight.double())]
    plain = literal(eager, case.heads, case.scale)
    plains = [plain, *torch.autograd.grad(plain, eager, weight)]
    out = ours(leaves, case, backend)
    found = [out, *torch.autograd.grad(out, leaves, weight)]

    assert out.dtype == dtype and out.shape == weight.shape and out.is_contiguous()
    # In dS two numbers of the size of g.v cancel, each with an fp32 error, and dS is multiplied by q or k.
    factor = case.dim**-0.5 if case.scale is None else abs(case.scale)
    cancelled = (
        ROUNDOFF[torch.float32] * factor * float(weight.norm()) * max(float(t.detach().norm()) for t in exact) ** 2
    )
    for got, want, other in zip(found, truths, plains):
        assert got.dtype == dtype and got.shape == want.shape
        slack = ROUNDOFF[dtype] * want.norm() + (0 if want is truth else cancelled)
        assert (got - want).norm() <= 2 * (other - want).norm() + slack
    return [t.detach() for t in found]


@pytest.mark.parametrize("backend", ["reference", *FAST])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=drawn())
@example(case=Case(2, 1, None, 1, 2, half=True))
@example(case=Case(1, 64, 64, 2, 16, half=True))
def test_computes_the_formula(backend: str, case: Case) -> None:
    check(case, backend)


# Sizes around every tile, so that each kernel runs with one block and with several, whole and partial.
SIZES = [(50, None, 64), (65, None, 48), (128, None, 16), (197, None, 32), (256, None, 8), (40, 130, 24), (160, 9, 128)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("keys", "queries", "dim"), SIZES)
def test_size_classes(backend: str, half: bool, keys: int, queries: int | None, dim: int) -> None:
    check(Case(1, keys, queries, 2, dim, half=half, seed=3), backend)


@pytest.mark.skipif(WITHOUT, reason="native library not built")
@pytest.mark.parametrize("half", [False, True])
def test_native_has_no_longest_sequence(half: bool) -> None:
    check(Case(1, 700, None, 1, 32, half=half, seed=4), "native")
    check(Case(1, 5, 300, 1, 32, half=half, seed=4), "native")


def test_gradcheck() -> None:
    for case in (Case(2, 5, None, 2, 3), Case(2, 4, 3, 2, 2, scale=0.7)):
        leaves = leaves_of(inputs(case, torch.float64), torch.float64)
        torch.autograd.gradcheck(lambda *t: ours(list(t), case, None), leaves)  # noqa: B023


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("half", [False, True])
def test_scores_of_any_size(backend: str, half: bool) -> None:
    """A key that wins by far gives its value as it is; the others' probabilities underflow, nothing overflows."""
    dtype = HALF[backend] if half else torch.float32
    keys, dim = 150, 16
    signs = torch.tensor([[1.0 if i >> bit & 1 else -1.0 for bit in range(dim)] for i in range(keys)])
    torch.manual_seed(5)
    values, winner = torch.randn(keys, dim).to(dtype), torch.randperm(keys)
    qkv = torch.cat([signs[winner] * 200, signs * 200, values], dim=1).to(dtype).unsqueeze(0).requires_grad_()
    out = short_attention(qkv, 1, backend=backend)
    assert torch.equal(out[0], values[winner])
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(grad, torch.cat([torch.zeros(keys, 2 * dim), torch.ones(keys, dim)], dim=1).to(dtype)[None])


@pytest.mark.skipif(WITHOUT, reason="native library not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "dim"), [(50, 64), (197, 32), (31, 6)])
def test_chosen_rows_equal_the_rows_of_all(dtype: torch.dtype, keys: int, dim: int) -> None:
    """What a teacher's last block computes for some rows is bit for bit what it computes for all."""
    heads = 3
    (qkv,) = inputs(Case(2, keys, None, heads, dim, seed=6), dtype)
    whole = short_attention(qkv, heads, backend="native")
    q, kv = qkv[..., : heads * dim], qkv[..., heads * dim :]
    for count in (1, 2, 5, 7, keys - 1):
        rows = torch.randperm(keys)[:count]
        some = short_attention(kv, heads, queries=q[:, rows], backend="native")
        assert torch.equal(some, whole[:, rows])


@pytest.mark.skipif(WITHOUT, reason="native library not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "step"), [(1, 0), (0, 1), (1, 1), (0, 2)])
def test_rows_may_start_and_step_at_any_value(dtype: torch.dtype, start: int, step: int) -> None:
    """Two bf16 values are read as one where rows lie evenly; where they do not, the result is the same."""
    case = Case(2, 27, None, 2, 16, seed=10)
    (qkv,), grad = inputs(case, dtype), torch.randn(2, 27, 32).to(dtype)

    def moved(x: Tensor) -> Tensor:
        batch, rows, width = x.shape
        room = torch.empty(start + batch * rows * (width + step), dtype=dtype)
        return room.as_strided(x.shape, (rows * (width + step), width + step, 1), start).copy_(x)

    results = []
    for tensor, weight in ((qkv, grad), (moved(qkv), moved(grad))):
        leaf = tensor.requires_grad_()
        out = ours([leaf], case, "native")
        results.append((out, *torch.autograd.grad(out, leaf, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(WITHOUT, reason="native library not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit_whatever_the_threads(dtype: torch.dtype) -> None:
    case = Case(3, 90, None, 4, 32, seed=7)
    tensors, weight = inputs(case, dtype), torch.randn(3, 90, 128).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            leaves = leaves_of(tensors)
            out = ours(leaves, case, "native")
            results.append((out, *torch.autograd.grad(out, leaves, weight)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("queries", [None, 5])
def test_saves_the_inputs_alone_and_gives_packed_gradients(backend: str, queries: int | None) -> None:
    case = Case(2, 9, queries, 2, 8)
    leaves = leaves_of(inputs(case, torch.float32))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ours(leaves, case, backend)
    assert sorted(saved) == sorted(leaf.data_ptr() for leaf in leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == leaf.shape and g.is_contiguous() for g, leaf in zip(grads, leaves))


@pytest.mark.parametrize("backend", FAST)
def test_gradient_goes_where_it_is_wanted(backend: str) -> None:
    case = Case(2, 9, 4, 2, 8)
    both = leaves_of(inputs(case, torch.float32))
    expected = torch.autograd.grad(ours(both, case, backend).sum(), both)
    for wanted in (0, 1):
        tensors = [t.detach() for t in both]
        tensors[wanted].requires_grad_()
        ours(tensors, case, backend).sum().backward()  # an expanded gradient
        assert tensors[1 - wanted].grad is None
        assert torch.equal(tensors[wanted].grad, expected[wanted])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("batch", "keys", "queries"), [(0, 5, None), (2, 0, None), (2, 5, 0), (2, 0, 3), (0, 5, 3)])
def test_empty(backend: str, batch: int, keys: int, queries: int | None) -> None:
    leaves = leaves_of(inputs(Case(batch, keys, queries, 2, 4), torch.float32))
    out = ours(leaves, Case(batch, keys, queries, 2, 4), backend)
    assert out.shape == (batch, keys if queries is None else queries, 8)
    assert not out.any()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_computes_in_the_dtype_it_is_given_whatever_autocast_says(backend: str) -> None:
    case = Case(2, 9, None, 2, 8)
    tensors = inputs(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(tensors, case, backend)
    assert torch.equal(inside, ours(tensors, case, backend))


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.skipif(WITHOUT, reason="native library not built")
def test_opcheck(queries: int | None) -> None:
    tensors = inputs(Case(2, 6, queries, 2, 4), torch.float32)
    packed, chosen = tensors[0], tensors[1] if len(tensors) == 2 else None
    torch.library.opcheck(torch.ops.cohobate.short_attention.default, (packed, chosen, 2, 0.5, "native"))
    grad = torch.randn(2, queries or 6, 8)
    arguments = (grad, packed, chosen, 2, 0.5, "native")
    torch.library.opcheck(torch.ops.cohobate.short_attention_backward.default, arguments)


@pytest.mark.skipif(WITHOUT, reason="native library not built")
@pytest.mark.parametrize(
    ("compiler", "backend"), [("aot_eager", "reference"), ("aot_eager", "native"), ("inductor", "native")]
)
def test_compiled_gives_the_same(compiler: str, backend: str) -> None:
    def call(qkv: Tensor, kv: Tensor, queries: Tensor) -> Tensor:
        out = short_attention(qkv * 2, 2, backend=backend)[:, : queries.shape[1]]
        return out + short_attention(kv, 2, queries=queries * 2, scale=0.3, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    sizes = ((2, 12, 5), (3, 300, 6), (4, 18, 7)) if compiler == "aot_eager" else ((2, 12, 5),)
    for batch, keys, queries in sizes:  # sizes that change become symbolic
        results = []
        for function in (call, compiled):
            leaves = leaves_of(
                inputs(Case(batch, keys, None, 2, 8), torch.float32)
                + inputs(Case(batch, keys, queries, 2, 8), torch.float32)
            )
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, other in zip(*results):
            assert (other - eager).norm() <= 1e-5 * eager.norm()  # inductor may fuse, and reorder sums


@pytest.mark.skipif(WITHOUT, reason="native library not built")
@pytest.mark.parametrize("queries", [None, 3])
def test_flops_are_counted(queries: int | None) -> None:
    case = Case(2, 6, queries, 2, 4)
    leaves = leaves_of(inputs(case, torch.float32))
    sizes = (case.batch, queries or 6, case.keys, case.heads, case.dim, 4)
    with FlopCounterMode(display=False) as counter:
        out = ours(leaves, case, "native")
    assert counter.get_total_flops() == attention_cost(*sizes).flops
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == attention_cost(*sizes, backward=True).flops


def test_cost() -> None:
    # A ViT-B layer at 50 tokens, bf16: q, k, v and out are 50 x 768 values each; two products of 50 x 50 x 64 a head.
    assert attention_cost(1, 50, 50, 12, 64, 2).bytes == 4 * 50 * 768 * 2
    assert attention_cost(1, 50, 50, 12, 64, 2).flops == 2 * 2 * 12 * 50 * 50 * 64
    # Of 10 queries: q, g and dq have 10 rows each; k, v, dk and dv 50.
    assert attention_cost(1, 10, 50, 12, 64, 2, backward=True).bytes == (3 * 10 + 4 * 50) * 768 * 2


def test_limits_say_why() -> None:
    limits = OPS["short_attention"].limits
    facts = {"dtype": torch.bfloat16, "wide": False, "odd": False, "long": True}
    assert limits["native"](**facts) == []
    assert limits["triton"](**facts) == ["triton has tiles for up to 256 keys, there are more"]
    facts = {"dtype": torch.float16, "wide": True, "odd": True, "long": False}
    assert len(limits["native"](**facts)) == 3 and len(limits["triton"](**facts)) == 2


@pytest.mark.parametrize("dim", [130, 7])
def test_a_head_that_the_kernels_cannot_take_falls_back(dim: int) -> None:
    case = Case(1, 4, None, 2, dim)
    tensors = inputs(case, torch.float32)
    assert torch.equal(ours(tensors, case, None), ours(tensors, case, "reference"))


QKV, KV, Q = torch.zeros(2, 5, 24), torch.zeros(2, 5, 16), torch.zeros(2, 3, 8)
BAD = [
    ((QKV[0], 2), {}, ValueError, r"qkv: expected shape \[any, any, any\], got \[5, 24\]"),
    ((QKV.int(), 2), {}, TypeError, "qkv: expected dtype .*, got int32"),
    ((QKV, 0), {}, ValueError, "heads: expected a positive whole number, got 0"),
    ((QKV, 2.0), {}, ValueError, r"heads: expected a positive whole number, got 2\.0"),
    ((QKV, 5), {}, ValueError, r"qkv: expected a multiple of 3 \* 5 \(heads\) channels, got 24"),
    ((QKV[..., :0], 2), {}, ValueError, r"qkv: expected a multiple of 3 \* 2 \(heads\) channels, got 0"),
    ((KV, 2), {"queries": Q[:1]}, ValueError, r"queries: expected shape \[2, any, any\], got \[1, 3, 8\]"),
    ((KV, 2), {"queries": Q.bfloat16()}, TypeError, "queries: expected dtype float32, got bfloat16"),
    ((KV, 2), {"queries": Q.to("meta")}, ValueError, "queries: expected device cpu, got meta"),
    ((KV, 3), {"queries": Q}, ValueError, r"queries: expected a multiple of 3 \(heads\) channels, got 8"),
    ((QKV, 2), {"queries": Q}, ValueError, "qkv: expected 16 channels, k and v of the 8 of queries, got 24"),
    ((QKV, 2), {"scale": 0.0}, ValueError, r"scale: expected a positive finite number, got 0\.0"),
    ((QKV, 2), {"scale": float("nan")}, ValueError, "scale: expected a positive finite number, got nan"),
    ((QKV, 2), {"backend": "cuda"}, ValueError, "backend: expected one of auto, .*; got 'cuda'"),
    ((QKV.double(), 2), {"backend": "native"}, ValueError, "backend: 'native' cannot run .*, not float64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[row[3][:24] for row in BAD])
def test_bad_input_is_named(
    arguments: tuple[Tensor, int], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        short_attention(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "queries", "dim"), [*SIZES, (50, 11, 80), (33, None, 128), (197, 148, 64)])
def test_gpu(dtype: torch.dtype, keys: int, queries: int | None, dim: int) -> None:
    for kind in ("packed", "rows"):
        case = Case(3, keys, queries, 4, dim, kind=kind, seed=8)
        first, again = (check(case, "triton", "cuda", dtype) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again))  # repeats bit for bit


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    (small,) = inputs(Case(2, 100, None, 2, 32, seed=9), torch.float16)
    step = 2**31 + 64
    far = torch.empty(step + small[0].numel(), dtype=torch.float16, device="cuda").as_strided(
        small.shape, (step, small.shape[2], 1)
    )
    far.copy_(small)
    results = []
    for qkv in (far, small.cuda()):
        qkv.requires_grad_()
        out = short_attention(qkv, 2, backend="triton")
        results.append((out, *torch.autograd.grad(out.sum(), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
