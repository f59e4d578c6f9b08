"""Choice of an implementation: argument > use_backend > COHOBATE_BACKEND > auto, and a constant when compiled."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from cohobate.kernels import OPS, Cost, choose, native, registry, tokens, use_backend, why_not
from cohobate.kernels.registry import Op, check_tensor, dtype_limit

needs_native = pytest.mark.skipif(bool(native.why_not()), reason="the native library is not built")
CPU = torch.zeros(1)
META = torch.zeros(1, device="meta")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op that native serves in fp32 alone."""
    op = Op("toy", ("reference", "native"), lambda: Cost(0, 0), {"native": dtype_limit("native", torch.float32)})
    monkeypatch.setitem(OPS, "toy", op)
    monkeypatch.setattr(registry, "_logged", set())
    return "toy"


@needs_native
def test_auto_takes_the_fast_one_of_the_device() -> None:
    assert choose("take", CPU) == "native"


@needs_native
def test_argument_wins_over_context_over_environment_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_environment", "reference")
    assert choose("take", CPU) == "reference"
    with use_backend("native"):
        assert choose("take", CPU) == "native"
        assert choose("take", CPU, "reference") == "reference"
        with use_backend("reference"):
            assert choose("take", CPU) == "reference"
        assert choose("take", CPU) == "native"
        assert choose("take", CPU, "auto") == "native"
    assert choose("take", CPU) == "reference"


@needs_native
def test_context_for_some_ops_leaves_the_others() -> None:
    with use_backend("reference", "take", "put"):
        assert (choose("take", CPU), choose("put", CPU), choose("assemble", CPU)) == (
            "reference",
            "reference",
            "native",
        )
        with use_backend("native", "put"):  # the inner block is about one of them
            assert (choose("take", CPU), choose("put", CPU)) == ("reference", "native")
        with use_backend("native"):  # and this one about all
            assert choose("take", CPU) == "native"
        keys = {registry.asked()}
        with use_backend("native", "put"):
            keys.add(registry.asked())
        assert len(keys) == 2 and None not in keys
    assert choose("take", CPU) == "native" and registry.asked() is None
    with pytest.raises(ValueError, match=r"ops: expected some of .*take.*; got 'tkae'"), use_backend("native", "tkae"):
        pass


def test_context_is_left_when_its_block_raises() -> None:
    before = choose("take", CPU)
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose("take", CPU) == before


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference reference"),
        ("", f"{choose('take', CPU)} reference"),
        ("cuda", "COHOBATE_BACKEND: expected one of auto, reference, native, triton; got 'cuda'"),
        ("triton", "COHOBATE_BACKEND: 'triton' cannot run take: "),
    ],
)
def test_environment_variable(value: str, expected: str) -> None:
    code = (
        "import torch; from cohobate.kernels import choose\n"
        "try: print(choose('take', torch.zeros(1)), choose('take', torch.zeros(1), 'reference'))\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COHOBATE_BACKEND": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(expected)


def test_unknown_names_are_errors() -> None:
    message = r"backend: expected one of auto, reference, native, triton; got 'cuda'"
    with pytest.raises(ValueError, match=message):
        choose("take", CPU, "cuda")
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass


def test_a_named_backend_that_cannot_run_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: ("no library",))
    with pytest.raises(ValueError) as caught:
        choose("take", META, "native")
    assert str(caught.value) == (
        "backend: 'native' cannot run take: no library; native runs on the CPU, the tensors are on meta"
    )


def test_triton_needs_cuda() -> None:
    pytest.importorskip("triton")
    assert why_not("take", "triton", "cpu") == [
        "triton runs on CUDA (or anywhere under TRITON_INTERPRET=1), the tensors are on cpu"
    ]


@needs_native
def test_limits_look_at_the_facts_of_the_call(toy: str) -> None:
    assert choose(toy, CPU, dtype=torch.float32) == "native"
    with pytest.raises(ValueError, match=r"cannot run toy: native computes in float32, not float16$"):
        choose(toy, CPU, "native", dtype=torch.float16)
    assert why_not(toy, "native", "cpu") == []
    assert why_not(toy, "triton", "cpu") == ["toy has no triton implementation"]


@needs_native
def test_fallback_is_logged_once_for_each_reason(toy: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cohobate.kernels"):
        assert [choose(toy, CPU, dtype=torch.float16) for _ in range(3)] == ["reference"] * 3
    assert caplog.messages == ["toy runs as reference on cpu: native computes in float32, not float16"]


def test_an_op_without_a_fast_implementation_is_its_reference_and_says_nothing(
    toy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cohobate.kernels"):
        assert choose(toy, META, dtype=torch.float32) == "reference"
    assert caplog.messages == []


@needs_native
def test_a_backend_asked_for_is_used_in_the_backward_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 3, requires_grad=True)
    with use_backend("native"):
        out = tokens.take(x, torch.tensor([[2, 0]], dtype=torch.int32))
    with use_backend("reference"):
        out.sum().backward()
    assert "_Take" in type(out.grad_fn).__name__
    assert x.grad is not None
    assert torch.equal(x.grad[0, :, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]))


@needs_native
def test_compiled_code_sees_a_constant() -> None:
    x, rows = torch.randn(2, 6, 4), torch.tensor([[5, 1], [0, 3]], dtype=torch.int32)
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph)
        return graph.forward

    def call(backend: str | None) -> torch.Tensor:
        return tokens.take(x * 1, rows, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for name in (None, "reference", "native"):
        assert torch.equal(compiled(name), call(name))
    assert len(seen) == 3
    with use_backend("reference"):  # another context is another constant, not a stale one
        assert torch.equal(compiled(None), call(None))
    assert len(seen) == 4
    assert "gather" in seen[3].code and "gather" not in seen[0].code
    with use_backend("reference", "take"):  # and so is one for this op alone
        assert torch.equal(compiled(None), call(None))
    assert "gather" in seen[-1].code
    with use_backend("reference", "put"):
        assert torch.equal(compiled(None), call(None))
    assert "gather" not in seen[-1].code


def test_importing_the_package_lists_every_op() -> None:
    """``cohobate info`` reads the table after this import alone."""
    code = "import cohobate.kernels as k; print(*k.OPS)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"take", "align_loss", "add_norm", "bias_gelu", "short_attention", "quantise_fp8"} <= set(listed)


def test_every_op_says_what_it_costs() -> None:
    for name, op in OPS.items():
        assert op.name == name
        assert "reference" in op.implementations
        assert callable(op.cost)


@pytest.mark.parametrize(
    ("tensor", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x: expected a tensor, got list"),
        (CPU, {"dtypes": (torch.int32, torch.int64)}, TypeError, "x: expected dtype int32 or int64, got float32"),
        (torch.zeros(2, 3), {"shape": (None, 4)}, ValueError, r"x: expected shape \[any, 4\], got \[2, 3\]"),
        (torch.zeros(2, 3), {"shape": (2, 3, None)}, ValueError, r"x: expected shape \[2, 3, any\], got \[2, 3\]"),
        (META, {"like": CPU}, ValueError, "x: expected device cpu, got meta"),
    ],
)
def test_check_tensor_names_argument_expected_and_got(
    tensor: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        check_tensor("x", tensor, **options)  # type: ignore[arg-type]


def test_check_tensor_accepts_what_fits() -> None:
    check_tensor("x", torch.zeros(2, 3), dtypes=(torch.float32,), shape=(None, 3), like=CPU)
