"""Every Triton kernel in every shipped configuration compiles for sm_80, sm_90 and sm_100, without a GPU.

What the machine code holds is read from the cubin: no spill, shared memory that fits, 16-byte loads and stores, matrix
instructions. Compiled kernels stay in Triton's own cache, so a second run only reads them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from cohobate.kernels import aot, tuning

pytest.importorskip("triton")
import triton
import triton.language as tl

ARCHES = (80, 90, 100)
CASES = [(arch, case) for arch in ARCHES for module in aot.modules() for case in module.aot_cases(f"sm{arch}")]
NAMES = [f"{case.kernel.__name__}-{case.name}-sm{arch}".replace(" ", "-") for arch, case in CASES]

_reports: dict[tuple[str, int, frozenset[str]], aot.Report] = {}


@pytest.mark.parametrize(("arch", "case"), CASES, ids=NAMES)
def test_compiles_and_meets_expectations(arch: int, case: aot.AotCase) -> None:
    # Reading instructions takes longer than compiling, so it is done where the machine code matters most.
    expects = case.expects if arch == 90 else frozenset()
    key = (case.key(), arch, expects)
    if key not in _reports:
        _reports[key] = aot.compile_case(dataclasses.replace(case, expects=expects), arch)
    assert _reports[key].faults(expects) == []


FIRST = {case.kernel.__name__: case for arch, case in reversed(CASES) if arch == 90}


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
def test_compiles_where_a_size_is_one(case: aot.AotCase) -> None:
    """A launcher turns an integer that equals 1 into a constant, which the code around it must accept."""
    fixed = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize}
    for one in case.kernel.arg_names:
        kind = case.signature.get(one)
        if isinstance(kind, str) and kind.startswith("i") and one not in fixed and one not in case.constexprs:
            signature = {name: kind for name, kind in case.signature.items() if name != one}
            constexprs = {**case.constexprs, one: 1}
            aot.compile_case(
                dataclasses.replace(case, signature=signature, constexprs=constexprs, expects=frozenset()), 90
            )


def test_every_kernel_has_a_case_on_every_architecture() -> None:
    kernels = {
        f"{module.__name__}.{name}"
        for module in aot.modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    for arch in ARCHES:
        covered = {f"{c.kernel.__module__}.{c.kernel.__name__}" for a, c in CASES if a == arch}
        assert kernels - covered == set()


@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_tuning_entries_are_well_formed(architecture: str) -> None:
    from cohobate.kernels import OPS

    for entry in tuning.entries(architecture):
        assert set(entry) == {"op", "dtype", "width", "tokens", "config", "provenance"}
        assert any(entry["op"] == op or entry["op"].startswith(f"{op}_") for op in OPS)
        assert entry["config"]["num_warps"] in (1, 2, 4, 8, 16)
        assert all(isinstance(value, int) for value in entry["config"].values())
    with_triton = {name for name, op in OPS.items() if "triton" in op.implementations}
    assert with_triton <= {entry["op"] for entry in tuning.entries(architecture)}


def test_lookup_prefers_the_tightest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(width: int | None, tokens: int | None, warps: int) -> dict[str, Any]:
        return {"op": "x", "dtype": None, "width": width, "tokens": tokens, "config": {"num_warps": warps}}

    table = [entry(None, None, 1), entry(768, None, 2), entry(768, 64, 4), entry(768, 256, 8)]
    monkeypatch.setattr(tuning, "entries", lambda architecture: table)
    found = [
        tuning.lookup.__wrapped__("x", "float32", width, n, "sm90")["num_warps"]
        for width, n in ((64, 8), (768, 64), (768, 65), (768, 999))
    ]
    assert found == [1, 4, 8, 2]
    with pytest.raises(LookupError, match=re.escape("no launch configuration for y (float32, width 8, 8 tokens)")):
        tuning.lookup.__wrapped__("y", "float32", 8, 8, "sm90")


@triton.jit
def _greedy(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keeps every value until their sum is known."""
    index = tl.arange(0, N)
    value = tl.load(x_ptr + index)
    tl.store(out_ptr + index, value - tl.sum(value))


@triton.jit
def _narrow(x_ptr, out_ptr, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Moves rows whose length is known only at run time, which forbids wide loads."""
    index = tl.arange(0, N)
    row = tl.program_id(0) * n
    tl.store(out_ptr + row + index, tl.load(x_ptr + row + index))


def _case(kernel: object, constexprs: dict[str, int], **signature: str) -> aot.AotCase:
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    return aot.AotCase(kernel, pointers | signature, constexprs, {"num_warps": 1}, frozenset(), "probe")


def test_report_sees_spills() -> None:
    case = _case(_greedy, {"N": 4096})
    assert aot.compile_case(case, 90).faults(frozenset()) == []
    found = aot.compile_case(dataclasses.replace(case, config={"num_warps": 1, "maxnreg": 32}), 90)
    assert found.spilled > 0
    assert any("spilled" in fault for fault in found.faults(frozenset()))


def test_report_sees_the_width_of_loads() -> None:
    wide = frozenset({"vector16"})
    faults = [
        aot.compile_case(dataclasses.replace(_case(_narrow, {"N": 256}, n=kind), expects=wide), 90).faults(wide)
        for kind in ("i32", "i32:16")
    ]
    assert faults == [[f"expected {aot.EXPECTATIONS['vector16']}, found none"], []]


def test_case_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="signature: probe leaves out n"):
        aot.compile_case(_case(_narrow, {"N": 256}), 90)
    report = aot.Report(arch=90, registers=32, spilled=0, shared=0, instructions=frozenset({"HMMA.16816.F32"}))
    assert report.faults(frozenset({"tensor_core"})) == []
    assert report.faults(frozenset({"wgmma"})) != []
    with pytest.raises(ValueError, match="got vectorised"):
        report.faults(frozenset({"vectorised"}))
