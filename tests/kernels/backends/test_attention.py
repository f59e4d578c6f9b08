"""attend: every backend that runs here against the formula in float64, and the table that chooses among them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import backends, tuning
from cohobate.kernels.backends import attend, attention, probe, use_attention
from cohobate.kernels.backends.attention import BACKENDS, Backend, Rule, choose
from cohobate.kernels.backends.probe import Call

HEADS, DIM = 3, 16
BF16 = torch.bfloat16
# Relative Frobenius error. 1e-2 is bf16's 2^-8 times a few roundings in a row; the others likewise.
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}
ON_CUDA = {torch.float32: 3e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # fp32 products may be tf32 inside a backend
HERE = [
    (name, dtype) for name in BACKENDS for dtype in DTYPES if not attention.why_not(name, "cpu", dtype, 9, DIM, True)
]


@pytest.fixture(autouse=True)
def unanswered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_answers", {})
    monkeypatch.setattr(attention, "_logged", set())
    yield


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two backends of an invented table: "small" takes 10 keys at most, "any" everything. The list is what ran."""
    ran: list[str] = []

    def toy(name: str, most: int) -> Backend:
        def run(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
            ran.append(name)
            return attention.dense.explicit(qkv, heads, queries)

        return Backend(run, lambda call: [] if call.keys <= most else [f"takes {most} keys", "and is tired"])

    rules = (Rule("small", "a", device="cpu", dtype="float32"), Rule("any", "b"))
    monkeypatch.setattr(attention, "BACKENDS", {"small": toy("small", 10), "any": toy("any", 1 << 30)})
    monkeypatch.setattr(attention, "rules", lambda: rules)
    monkeypatch.setattr(attention, "_environment", "auto")
    return ran


def formula(packed: Tensor, heads: int, queries: Tensor | None) -> Tensor:
    if queries is None:
        queries, packed = packed.split((packed.shape[2] // 3, packed.shape[2] // 3 * 2), dim=2)
    q = queries.unflatten(2, (heads, -1))
    k, v = packed.unflatten(2, (2, heads, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


def inputs(dtype: torch.dtype, keys: int = 9, queries: int | None = None, heads: int = HEADS, dim: int = DIM) -> list:
    g = torch.Generator().manual_seed(0)
    parts = 3 if queries is None else 2
    tensors = [torch.randn(2, keys, parts * heads * dim, generator=g)]
    if queries is not None:
        tensors.append(torch.randn(2, queries, heads * dim, generator=g))
    return [x.to(dtype).requires_grad_() for x in tensors]


def check(name: str, tolerance: float, tensors: list[Tensor], heads: int) -> None:
    """Values and gradients near the formula in float64."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = formula(exact[0], heads, exact[1] if len(exact) > 1 else None)
    out = attend(tensors[0], heads, tensors[1] if len(tensors) > 1 else None, backend=name)
    assert out.dtype == tensors[0].dtype and out.shape == expected.shape
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = (out, *torch.autograd.grad(out, tensors, grad))
    want = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for a, b in zip(got, want, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= tolerance * float(b.detach().norm())


@pytest.mark.parametrize("queries", [None, 1, 5])
@pytest.mark.parametrize(("name", "dtype"), HERE, ids=lambda value: str(value).removeprefix("torch."))
def test_backends_and_their_gradients(name: str, dtype: torch.dtype, queries: int | None) -> None:
    check(name, DTYPES[dtype], inputs(dtype, queries=queries), HEADS)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [None, 37])
@pytest.mark.parametrize("dtype", ON_CUDA, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["auto", *BACKENDS])
def test_backends_on_cuda(name: str, dtype: torch.dtype, queries: int | None) -> None:
    reasons = [] if name == "auto" else attention.why_not(name, "cuda", dtype, 50, 64, True)
    if reasons:
        pytest.skip("; ".join(reasons))
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(dtype, 50, queries, dim=64)]
    check(name, ON_CUDA[dtype], tensors, HEADS)


@settings(max_examples=15, deadline=None)
@given(
    keys=st.integers(2, 20),
    queries=st.none() | st.integers(1, 20),
    heads=st.integers(1, 4),
    dim=st.sampled_from([8, 24, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_sizes(keys: int, queries: int | None, heads: int, dim: int, dtype: torch.dtype) -> None:
    """One key would be a special case: its gradient for q and k is zero, and so is the error's scale."""
    check("auto", DTYPES[dtype], inputs(dtype, keys, queries, heads, dim), heads)


def test_the_torch_backends_run_here() -> None:
    assert {"explicit", "sdpa", "sdpa-flash"} <= {name for name, _ in HERE}


def test_rows_that_are_not_dense() -> None:
    wide = torch.randn(2, 9, 3 * HEADS * DIM + 5)
    sliced = wide[:, ::2, 5:]
    for name in ("explicit", "sdpa", "auto"):
        torch.testing.assert_close(attend(sliced, HEADS, backend=name), attend(sliced.clone(), HEADS, backend=name))


def test_large_scores_do_not_overflow() -> None:
    (qkv,) = inputs(BF16)
    for name, dtype in HERE:
        if dtype == BF16:
            assert bool(attend(qkv * 100, HEADS, backend=name).isfinite().all()), name


def test_empty_inputs() -> None:
    assert attend(torch.zeros(0, 4, 12), 2).shape == (0, 4, 4)
    assert attend(torch.zeros(2, 4, 8), 2, torch.zeros(2, 0, 4)).shape == (2, 0, 4)


# --------------------------------------------------------------------------------------------------------- choice


def test_the_table_is_read_in_order(toys: list[str]) -> None:
    assert choose("cpu", torch.float32, 10, 8, False) == "small"
    assert choose("cpu", BF16, 10, 8, False) == "any"
    assert choose("meta", torch.float32, 10, 8, False) == "any"


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({}, True),
        ({"device": "cuda"}, False),
        ({"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"keys": 50}, True),
        ({"keys": 49}, False),
        ({"head_dim": 64}, True),
        ({"head_dim": 32}, False),
        ({"grad": False}, True),
        ({"grad": True}, False),
    ],
)
def test_what_a_rule_speaks_of(rule: dict, fits: bool) -> None:
    assert Rule("sdpa", "here", **rule).fits(Call("cpu", torch.float32, 50, 64, False)) == fits


def test_argument_over_context_over_environment_over_table(toys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (qkv,) = inputs(torch.float32)
    monkeypatch.setattr(attention, "_environment", "any")
    attend(qkv, HEADS)
    with use_attention("small"):
        attend(qkv, HEADS)
        attend(qkv, HEADS, backend="any")
        with use_attention("any"):
            attend(qkv, HEADS)
        attend(qkv, HEADS)
    with use_attention("auto"):
        attend(qkv, HEADS)
    attend(qkv, HEADS)
    assert toys == ["any", "small", "any", "any", "small", "small", "any"]


def test_the_context_is_left_when_its_block_raises(toys: list[str]) -> None:
    with pytest.raises(KeyError), use_attention("any"):
        raise KeyError
    assert choose("cpu", torch.float32, 9, 8, False) == "small"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("explicit", "explicit"),
        ("", choose("cpu", torch.float32, 9, 64, False)),
        ("flash9", "COHOBATE_ATTENTION: expected one of auto, short, explicit, sdpa"),
        ("sdpa-cudnn", "COHOBATE_ATTENTION: 'sdpa-cudnn' cannot run attention (float32, 9 keys"),
    ],
)
def test_environment_variable(value: str, expected: str) -> None:
    code = (
        "import torch; from cohobate.kernels.backends import attention\n"
        "try: print(attention.choose('cpu', torch.float32, 9, 64, False))\n"
        "except ValueError as error: print(error)"
    )
    environment = os.environ | {"COHOBATE_ATTENTION": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected)


def test_a_backend_asked_for_by_name_lists_every_reason(toys: list[str]) -> None:
    message = r"backend: 'small' cannot run attention \(float32, 11 keys, head dim 16, on cpu, without gradient\): "
    with pytest.raises(ValueError, match=message + "takes 10 keys; and is tired$"):
        attend(torch.zeros(2, 11, 3 * 32), 2, backend="small")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of auto, short, .*xformers; got 'flash9'"):
        attend(torch.zeros(2, 3, 12), 2, backend="flash9")
    with pytest.raises(ValueError, match="got 'flash9'"), use_attention("flash9"):
        pass


def test_a_fallback_is_logged_once(toys: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cohobate.kernels"):
        assert [choose("cpu", torch.float32, keys, 8, True) for keys in (9, 11, 11, 12)] == ["small", *["any"] * 3]
    assert caplog.messages == [
        "attention (float32, 11 keys, head dim 8, on cpu, with gradient) runs as any, not small: "
        "takes 10 keys; and is tired"
    ]


def test_the_second_call_of_a_kind_asks_nothing(toys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    attend(torch.zeros(2, 5, 12), 2)
    monkeypatch.setattr(attention, "_decide", lambda *_: pytest.fail("decided twice"))
    attend(torch.zeros(3, 5, 12), 2)  # another batch is the same kind
    assert toys == ["small", "small"]


def test_a_gradient_is_a_fact_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (Rule("explicit", "a", grad=True), Rule("sdpa", "b"))
    monkeypatch.setattr(attention, "rules", lambda: rules)
    kv, queries = inputs(torch.float32, queries=2)

    def node(*tensors: Tensor) -> set[tuple]:
        attention._answers.clear()
        attend(tensors[0], HEADS, *tensors[1:])
        return {(question[4], name) for question, name in attention._answers.items()}

    assert node(kv.detach(), queries) == {(True, "explicit")}
    assert node(kv, queries.detach()) == {(True, "explicit")}
    assert node(kv.detach(), queries.detach()) == {(False, "sdpa")}
    with torch.no_grad():
        assert node(kv, queries) == {(False, "sdpa")}


# ----------------------------------------------------------------------------------------------------- the table


def test_the_shipped_table_names_what_exists() -> None:
    rows = json.loads(Path(tuning.__file__).with_name("attention.json").read_text())
    assert rows[-1]["backend"] == "sdpa" and {rows[-1][key] for key in ("device", "dtype", "keys", "head_dim")} == {
        None
    }
    for row, rule in zip(rows, attention.rules(), strict=True):
        assert set(row) == {"device", "dtype", "keys", "head_dim", "grad", "backend", "provenance"}
        assert rule.backend in BACKENDS and rule.provenance
        assert rule.device in (None, "cpu", "cuda")
        assert rule.dtype is None or isinstance(getattr(torch, rule.dtype), torch.dtype)


def test_every_rule_can_be_reached() -> None:
    """A rule behind one that takes all its calls, by a backend that runs anywhere, would never be read."""
    rules = attention.rules()
    for index, rule in enumerate(rules):
        for before in rules[:index]:
            wider = all(
                getattr(before, fact) in (None, getattr(rule, fact)) for fact in ("device", "dtype", "head_dim", "grad")
            ) and (before.keys is None or (rule.keys is not None and rule.keys <= before.keys))
            assert not (wider and before.backend in (rule.backend, "explicit", "sdpa")), (before, rule)


def test_what_the_table_says_of_a_device_that_is_not_here() -> None:
    for keys, expected in ((50, "short"), (64, "short"), (65, "sdpa"), (1568, "sdpa")):
        assert attention.by_table(Call("cuda", BF16, keys, 64, True), anywhere=True)[0].backend == expected
    assert attention.by_table(Call("cuda", torch.float32, 50, 64, True), anywhere=True)[0].backend == "sdpa"


def test_bf16_on_the_cpu_is_not_left_to_sdpa() -> None:
    """SDPA takes 2-4 times as long there."""
    for keys in (50, 197, 1024):
        assert choose("cpu", BF16, keys, 64, True) != "sdpa"


# ------------------------------------------------------------------------------------------------- compiled code


@pytest.mark.parametrize("name", [None, "explicit", "sdpa", "sdpa-flash"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(name: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(qkv: Tensor, kv: Tensor, queries: Tensor) -> Tensor:
        return attend(qkv, HEADS, backend=name).sum(1) + attend(kv, HEADS, queries, backend=name).sum(1)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for keys in (9, 12):
        tensors = inputs(torch.float32, keys) + inputs(torch.float32, keys, 4)
        for out in (compiled(*tensors), call(*tensors)):
            out.sum().backward()
        torch.testing.assert_close(compiled(*tensors), call(*tensors))  # fp32: its own default


def test_compiled_code_follows_the_context() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda x: attend(x, HEADS), backend=keep, fullgraph=True)
    (qkv,) = inputs(torch.float32)
    for name in ("explicit", "sdpa"):
        with use_attention(name):
            compiled(qkv)
    assert ["scaled_dot_product_attention" in code for code in graphs] == [False, True]


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("qkv", "heads", "queries", "error", "message"),
    [
        (torch.zeros(3, 12), 2, None, ValueError, r"qkv: expected shape \[any, any, any\], got \[3, 12\]"),
        (torch.zeros(2, 3, 12).int(), 2, None, TypeError, "qkv: expected a floating-point type, got int32"),
        (torch.zeros(2, 3, 14), 2, None, ValueError, r"qkv: expected rows of 3 \* 2 heads \* head dim values, got 14"),
        (torch.zeros(2, 3, 0), 2, None, ValueError, "qkv: expected rows of 3"),
        (torch.zeros(2, 3, 12), 0, None, ValueError, "qkv: expected rows of 3"),
        (torch.zeros(2, 3, 12), 4, torch.zeros(2, 1, 6), ValueError, r"qkv: expected rows of 2 \* 4 heads"),
        (torch.zeros(2, 3, 8), 2, torch.zeros(2, 1, 8), ValueError, r"queries: expected shape \[2, any, 4\]"),
        (torch.zeros(2, 3, 8), 2, torch.zeros(3, 1, 4), ValueError, r"queries: expected shape \[2, any, 4\]"),
        (torch.zeros(2, 3, 8), 2, torch.zeros(2, 1, 4).double(), TypeError, "queries: expected dtype float32"),
        (torch.zeros(2, 3, 8), 2, torch.zeros(2, 1, 4, device="meta"), ValueError, "queries: expected device cpu"),
        ([1.0], 2, None, TypeError, "qkv: expected a tensor, got list"),
    ],
)
def test_what_does_not_fit(qkv: Tensor, heads: int, queries: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attend(qkv, heads, queries)


def test_names_at_the_top() -> None:
    assert backends.attend is attend and set(backends.__all__) == {"adamw", "attend", "layer_norm", "use_attention"}
    assert probe.short(BF16) == "bfloat16"
