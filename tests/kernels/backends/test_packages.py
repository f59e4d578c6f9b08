"""Optional packages as they are met: absent, good, broken, another package of the same name, a namespace, not built.

The stand-ins compute attention on the CPU, and a stand-in card lets the questions get as far as the small run.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate.kernels.backends import attention, dense, flash, probe, xformers

Install = Any
Card = Any

BF16 = torch.bfloat16
COMPUTES = """
import torch
import torch.nn.functional as F

__version__ = "0.0.0"
calls = []

def flash_attn_func(q, k, v, softmax_scale=None, deterministic=False):
    calls.append(("flash_attn_func", deterministic))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
"""
PACKED = """
def flash_attn_qkvpacked_func(qkv, softmax_scale=None, deterministic=False):
    out = flash_attn_func(*qkv.unbind(2))
    calls.append(("flash_attn_qkvpacked_func", deterministic))
    return out
"""
XFORMERS = """
import torch.nn.functional as F
from xformers.ops import fmha

def memory_efficient_attention(query, key, value):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
"""
FMHA = """
from types import SimpleNamespace as Inputs

class FwOp:
    NAME = "cutlassF"

    @classmethod
    def not_supported_reasons(cls, inputs):
        return [] if inputs.query.dtype.itemsize == 2 else ["dtype=torch.float32 (supported: {torch.bfloat16})"]

class BwOp(FwOp):
    NAME = "cutlassB"

    @classmethod
    def not_supported_reasons(cls, inputs):
        return [] if inputs.query.shape[-1] == 64 else ["head dim"]

ALL_FW_OPS, ALL_BW_OPS = [FwOp], [BwOp]
"""
GOOD_XFORMERS = {
    "xformers/__init__.py": "",
    "xformers/_cpp_lib.py": "_cpp_library_load_exception = None",
    "xformers/ops/__init__.py": XFORMERS,
    "xformers/ops/fmha.py": FMHA,
}
ERRORS = ("ImportError", "OSError", "AttributeError", "RuntimeError", "SyntaxError")
PACKAGES: dict[str, tuple[str, str]] = {
    "flash-attn-2": ("flash-attn", "flash_attn/__init__.py"),
    "flash-attn-3": ("flash-attn-3", "flash_attn_interface.py"),
    "flash-attn-4": ("flash-attn-4", "flash_attn/cute/__init__.py"),
    "xformers": ("xformers", "xformers/ops/__init__.py"),
}


def asked(name: str, dtype: torch.dtype = BF16, head_dim: int = 64, grad: bool = True) -> list[str]:
    return attention.why_not(name, "cuda", dtype, 197, head_dim, grad)


def fa3_ops(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.ops, "flash_attn_3", types.SimpleNamespace(**dict.fromkeys(names, 1)), raising=False)


def agrees(run: probe.Run) -> None:
    """The adapter packs and unpacks as the explicit products do, with every row and with chosen ones."""
    g = torch.Generator().manual_seed(0)
    qkv, kv = torch.randn(2, 7, 3 * 12, generator=g), torch.randn(2, 7, 2 * 12, generator=g)
    queries = torch.randn(2, 4, 12, generator=g)
    for packed, rows in ((qkv, None), (kv, queries)):
        torch.testing.assert_close(run(packed, 3, rows), dense.explicit(packed, 3, rows))  # fp32: its own default


@pytest.mark.parametrize("name", PACKAGES)
def test_absent(name: str, install: Install, card: Card) -> None:
    card(9, 0)
    module = PACKAGES[name][1].split("/")[0].removesuffix(".py")
    assert asked(name) in ([f"{PACKAGES[name][0]} is not installed"], [f"{module} is not installed"])


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", PACKAGES)
def test_broken_import(name: str, error: str, install: Install, card: Card) -> None:
    card(9, 0)
    distribution, path = PACKAGES[name]
    install(distribution, {path: f"raise {error}('undefined symbol: _ZN3c10\\nlong story')"})
    (reason,) = asked(name)
    assert f"does not import ({error}: undefined symbol: _ZN3c10)" in reason


@pytest.mark.parametrize("name", PACKAGES)
def test_another_package_of_that_name(name: str, install: Install, card: Card) -> None:
    card(9, 0)
    distribution, path = PACKAGES[name]
    install(distribution, {path: "__version__ = '2.8.3'"})
    (reason,) = asked(name)
    assert " has no " in reason


def test_a_missing_dependency_is_named(install: Install, card: Card) -> None:
    """flash-attn-4 without nvidia-cutlass-dsl: the module that is missing is not the one that was asked for."""
    card(9, 0)
    install("flash-attn-4", {"flash_attn/cute/__init__.py": "import no_cutlass_here"})
    assert asked("flash-attn-4") == [
        "flash_attn.cute does not import (ModuleNotFoundError: No module named 'no_cutlass_here')"
    ]


def test_flash_attn_2_good(install: Install, card: Card) -> None:
    card(8, 0)
    install("flash-attn", {"flash_attn/__init__.py": COMPUTES + PACKED})
    assert asked("flash-attn-2") == []
    agrees(flash.run_2)
    calls = sys.modules["flash_attn"].calls
    assert {("flash_attn_func", True), ("flash_attn_qkvpacked_func", True)} <= set(calls)  # a step repeats bit for bit


def test_flash_attn_4_alone_is_not_flash_attn_2(install: Install, card: Card) -> None:
    card(9, 0)
    install("flash-attn-4", {"flash_attn/cute/__init__.py": COMPUTES})
    assert asked("flash-attn-2") == ["flash-attn is not installed"]
    assert asked("flash-attn-4") == []
    agrees(flash.run_4)
    assert sys.modules["flash_attn"].__file__ is None  # a namespace: importing it says nothing
    install("flash-attn")  # metadata that an uninstall left behind
    assert asked("flash-attn-2") == ["flash_attn is only a namespace here, as flash-attn-4 leaves it"]


def test_flash_attn_2_and_4_together(install: Install, card: Card) -> None:
    card(9, 0)
    install("flash-attn", {"flash_attn/__init__.py": COMPUTES + PACKED})
    install("flash-attn-4", {"flash_attn/cute/__init__.py": COMPUTES})
    assert asked("flash-attn-2") == [] and asked("flash-attn-4") == []


def test_a_release_that_returns_the_log_sum_too(install: Install, card: Card) -> None:
    card(9, 0)
    source = COMPUTES.replace(".transpose(1, 2)\n", ".transpose(1, 2), None\n").replace(", deterministic=False", "")
    install("flash-attn-4", {"flash_attn/cute/__init__.py": source.replace(", deterministic)", ", None)")})
    assert asked("flash-attn-4") == []
    agrees(flash.run_4)


def test_flash_attn_3(install: Install, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card(9, 0)
    install(None, {"flash_attn_interface.py": COMPUTES})
    fa3_ops(monkeypatch)
    registered = "flash_attn_interface registered no torch.ops.flash_attn_3."
    assert asked("flash-attn-3") == [f"{registered}fwd", f"{registered}bwd"]
    fa3_ops(monkeypatch, "fwd")
    assert asked("flash-attn-3") == [f"{registered}bwd"]
    assert asked("flash-attn-3", grad=False) == []
    fa3_ops(monkeypatch, "fwd", "bwd")
    assert asked("flash-attn-3") == []
    agrees(flash.run_3)


def test_xformers_good(install: Install, card: Card) -> None:
    card(8, 0)
    install("xformers", GOOD_XFORMERS)
    assert asked("xformers") == []
    agrees(xformers.run)


def test_xformers_that_imports_and_cannot_run(install: Install, card: Card) -> None:
    card(8, 0)
    install("xformers", GOOD_XFORMERS | {"xformers/_cpp_lib.py": "_cpp_library_load_exception = OSError('no CUDA 12')"})
    assert asked("xformers") == ["xformers imports, but its kernels do not load (OSError)"]


def test_what_xformers_says_itself(install: Install, card: Card) -> None:
    card(8, 0)
    install("xformers", GOOD_XFORMERS)
    assert asked("xformers", torch.float32) == ["cutlassF: dtype=torch.float32 (supported: {torch.bfloat16})"]
    assert asked("xformers", head_dim=32) == ["cutlassB: head dim"]
    assert asked("xformers", head_dim=32, grad=False) == []


def test_xformers_whose_operators_moved(install: Install, card: Card) -> None:
    card(8, 0)
    install("xformers", GOOD_XFORMERS | {"xformers/ops/fmha.py": "from types import SimpleNamespace as Inputs"})
    (reason,) = asked("xformers")
    assert reason.startswith("xformers does not say what it supports (AttributeError")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return torch.zeros_like(q)", "a small run gave wrong values"),
        ("return q + v.detach() - q", "a small run gave wrong values"),  # right values, wrong gradient
        ("raise RuntimeError('no kernel image is available')", "a small run failed (RuntimeError: no kernel image"),
        ("return q.sum()", "a small run failed ("),
    ],
)
def test_good_imports_that_compute_nothing(body: str, expected: str, install: Install, card: Card) -> None:
    card(9, 0)
    source = f"import torch\ndef flash_attn_func(q, k, v):\n    {body}\n"
    install("flash-attn-4", {"flash_attn/cute/__init__.py": source})
    (reason,) = asked("flash-attn-4")
    assert reason.startswith(expected)


def test_one_small_run_for_each_device_dtype_and_head_dim(install: Install, card: Card) -> None:
    card(9, 0)
    install("flash-attn-4", {"flash_attn/cute/__init__.py": COMPUTES})
    for keys in (50, 197):
        assert attention.why_not("flash-attn-4", "cuda", BF16, keys, 64, False) == []
    calls = sys.modules["flash_attn.cute"].calls
    assert len(calls) == 1
    asked("flash-attn-4", torch.float16, grad=False)
    asked("flash-attn-4", head_dim=32, grad=False)
    assert len(calls) == 3


def test_a_small_run_does_not_depend_on_where_it_is_asked(install: Install, card: Card) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    card(9, 0)
    install("flash-attn-4", {"flash_attn/cute/__init__.py": COMPUTES})
    with FakeTensorMode():
        assert asked("flash-attn-4") == []
    with torch.inference_mode():
        assert asked("flash-attn-4", head_dim=32) == []
    with torch.no_grad():
        assert asked("flash-attn-4", head_dim=48) == []


@pytest.mark.parametrize(
    ("name", "major", "dtype", "dim", "expected"),
    [
        ("flash-attn-2", 7, torch.float32, 512, ["8.0 or later, this card has 7.0", "not float32", "up to 256"]),
        ("flash-attn-3", 10, BF16, 64, ["9.0 to 9.x, this card has 10.0"]),
        ("flash-attn-4", 8, torch.float64, 64, ["9.0 or later", "not float64"]),
        ("sdpa-fa3", 8, BF16, 64, ["9.0 to 9.x"]),
        ("sdpa-fa4", 12, BF16, 64, ["9.0 to 10.x"]),
        ("sdpa-cudnn", 9, torch.float64, 64, ["not float64"]),
    ],
)
def test_limits_of_card_dtype_and_size(
    name: str, major: int, dtype: torch.dtype, dim: int, expected: list[str], install: Install, card: Card
) -> None:
    card(major, 0)
    reasons = asked(name, dtype, dim)
    for part in expected:
        assert any(part in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", [name for name in attention.BACKENDS if name not in ("explicit", "sdpa")])
def test_without_a_device(name: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert asked(name)[0] == "no CUDA device"


class Activation:
    """torch.nn.attention's registry of flash attention implementations; active ones compute nothing here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active: str | None = None
        self.seen: list[str | None] = []
        for verb in ("activate", "current", "restore"):
            monkeypatch.setattr(
                dense.torch_attention, f"{verb}_flash_attention_impl", getattr(self, verb), raising=False
            )
        monkeypatch.setattr(dense.torch_attention, "list_flash_attention_impls", lambda: ["FA3"], raising=False)

    def activate(self, impl: str) -> None:
        self.active = impl
        self.seen.append(impl)

    def current(self) -> str | None:
        return self.active

    def restore(self) -> None:
        self.active = None
        self.seen.append(None)


def test_torchs_replacement_of_its_flash_kernel(install: Install, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card(9, 0)
    registry = Activation(monkeypatch)
    assert asked("sdpa-fa3") == ["flash_attn_interface is not installed"]
    install(None, {"flash_attn_interface.py": ""})
    assert asked("sdpa-fa3") == []
    assert registry.seen == ["FA3", None]  # a question leaves the process as it was
    assert asked("sdpa-fa4")[0] == "this torch knows no flash attention named FA4"
    run = attention.BACKENDS["sdpa-fa3"].run
    agrees(run)
    assert registry.seen == ["FA3", None, "FA3"]  # once for the process, not once a call


def test_our_own_kernel_has_the_limits_of_its_op(card: Card) -> None:
    assert attention.why_not("short", "mps", BF16, 50, 64, True) == ["it runs on cpu and cuda"]
    card(9, 0)
    asked_ = [
        attention.why_not("short", "cuda", BF16, keys, dim, True) for keys, dim in ((300, 64), (50, 256), (50, 9))
    ]
    assert all(reasons for reasons in asked_), asked_
    assert attention.why_not("short", "cpu", torch.float64, 50, 64, True)


def test_a_torch_without_that_replacement(install: Install, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card(9, 0)
    monkeypatch.delattr(dense.torch_attention, "activate_flash_attention_impl", raising=False)
    assert "this torch has no activate_flash_attention_impl" in asked("sdpa-fa3")


def test_modules_put_in_place_by_hand(install: Install, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs put their own modules there, or None to forbid one."""
    card(9, 0)

    def computes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense.explicit(torch.stack((q, k, v), 2).flatten(2), q.shape[2], None).unflatten(2, q.shape[2:])

    by_hand: Any = types.ModuleType("flash_attn_interface")
    by_hand.flash_attn_func = computes
    monkeypatch.setitem(sys.modules, "flash_attn_interface", by_hand)
    fa3_ops(monkeypatch, "fwd", "bwd")
    assert asked("flash-attn-3") == []
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert asked("xformers") == ["xformers.ops is not installed"]
