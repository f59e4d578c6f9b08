"""Ahead-of-time compilation of the shipped kernels: what their machine code contains, found out without a GPU.

Every op file with Triton kernels has a function ``aot_cases(architecture: str) -> list[AotCase]`` ("sm80", "sm90",
"sm100") that lists its kernels as the launcher would call them, with the configurations of ``tuning/``::

    def aot_cases(architecture: str) -> list[AotCase]:
        from cohobate.kernels.aot import AotCase, pointer, shipped

        return [
            AotCase(
                kernel=_take_kernel,
                signature={"x_ptr": pointer(dtype), "rows_ptr": "*i32", "n": "i32", "stride_x_b": "i32:16", ...},
                constexprs={"D": width, "BLOCK_D": 1024},
                config=config,
                expects=frozenset({"vector16"}),
                name=f"take {dtype} {width}",
            )
            for dtype, width, config in shipped("take", architecture, dtypes=FLOAT_DTYPES, widths=(768,))
        ]

``signature`` names the parameters that are not constants, in any order, with Triton's type names; a parameter that
takes a tuple of pointers or numbers has a tuple of them. Pointers are taken as 16-byte aligned, as torch allocates
them; an integer that is known to be a multiple of 16 is written ``"i32:16"``. An integer that equals 1 at the call
belongs in ``constexprs``: the launcher turns it into a constant too. ``config`` is passed as the launcher passes it:
names of kernel parameters become constants, the rest (num_warps, ...) options.

``expects`` holds words of :data:`EXPECTATIONS`. That a kernel neither spills nor asks for more shared memory than the
card has is expected of all of them. Op files are found by their place, one folder below this one.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cohobate.kernels import tuning

EXPECTATIONS = {
    "load16": "a 16-byte global load",
    "store16": "a 16-byte global store",
    "vector16": "a 16-byte global load and a 16-byte global store",
    "tensor_core": "a matrix instruction of any generation",
    "wgmma": "HGMMA, Hopper's warp-group matrix instruction (looked for on sm_90 alone)",
}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class AotCase:
    """One kernel as a launcher would call it; see the module's docstring."""

    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    config: dict[str, int]
    expects: frozenset[str]
    name: str

    def key(self) -> str:
        """Equal for cases that compile to the same code."""
        facts = (sorted(table.items()) for table in (self.signature, self.constexprs, self.config))
        return repr((self.kernel.__module__, self.kernel.__name__, *facts))


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel holds."""

    arch: int
    registers: int
    spilled: int  # bytes of stack and local memory a thread
    shared: int  # bytes a block
    instructions: frozenset[str] | None  # mnemonics such as "LDG.E.128"; None: not read, as the case expects none

    def faults(self, expects: frozenset[str]) -> list[str]:
        """Every way in which the code falls short of ``expects``; empty when it does not.

        Raises:
            ValueError: a word that is not in :data:`EXPECTATIONS`.
        """
        if unknown := expects - EXPECTATIONS.keys():
            raise ValueError(f"expects: expected words of {', '.join(EXPECTATIONS)}; got {', '.join(sorted(unknown))}")
        load16, store16 = self._has(r"LDG(STS)?\..*(128|256)"), self._has(r"STG\..*(128|256)")
        met = {
            "load16": load16,
            "store16": store16,
            "vector16": load16 and store16,
            "tensor_core": self._has(r"(HGMMA|HMMA|UTC\w*MMA)\b"),
            "wgmma": self.arch != 90 or self._has(r"HGMMA\b"),
        }
        faults = [f"expected {EXPECTATIONS[word]}, found none" for word in sorted(expects) if not met[word]]
        if self.spilled:
            faults.append(f"{self.spilled} bytes of registers spilled a thread")
        if self.shared > SHARED_LIMIT[self.arch]:
            faults.append(f"{self.shared} bytes of shared memory a block, the card has {SHARED_LIMIT[self.arch]}")
        return faults

    def _has(self, pattern: str) -> bool:
        return any(re.match(pattern, mnemonic) for mnemonic in self.instructions or ())


def pointer(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to ``dtype``: ``*bf16``."""
    return "*" + _TYPES[dtype]


def shipped(
    op: str, architecture: str, *, dtypes: Sequence[torch.dtype], widths: Sequence[int]
) -> Iterator[tuple[torch.dtype, int, dict[str, int]]]:
    """Every different configuration that :func:`tuning.lookup` can answer for ``op`` at these dtypes and widths."""
    ends = {entry["tokens"] for entry in tuning.entries(architecture) if entry["op"] == op}
    for dtype in dtypes:
        for width in widths:
            seen: list[dict[str, int]] = []
            for tokens in sorted(end if end is not None else 1 << 30 for end in ends):
                config = tuning.lookup(op, str(dtype), width, tokens, architecture)
                if config not in seen:
                    seen.append(config)
                    yield dtype, width, config


def modules() -> list[ModuleType]:
    """Every module below ``cohobate.kernels`` that has ``aot_cases``."""
    root = Path(__file__).parent
    files = (path.relative_to(root).with_suffix("") for path in sorted(root.glob("*/*.py")) if path.stem != "__init__")
    found = (importlib.import_module(".".join(("cohobate.kernels", *file.parts))) for file in files)
    return [module for module in found if hasattr(module, "aot_cases")]


def compile_case(case: AotCase, arch: int) -> Report:
    """Compile for compute capability ``arch`` (80, 90, 100) and read the result. Needs Triton's wheel, no GPU.

    Raises:
        ValueError: a parameter of the kernel that the case neither types nor fixes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = case.constexprs | {name: value for name, value in case.config.items() if name in names}
    if missing := [name for name in names if name not in constants and name not in case.signature]:
        raise ValueError(f"signature: {case.name} leaves out {', '.join(missing)}")
    signature: dict[str, str | tuple[str, ...]] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(names):
        kind = "constexpr" if name in constants else case.signature[name]
        if isinstance(kind, str):
            aligned += [(i,)] if _is_aligned(kind) else []
            signature[name] = kind.removesuffix(":16")
        else:
            aligned += [(i, j) for j, member in enumerate(kind) if _is_aligned(member)]
            signature[name] = tuple(member.removesuffix(":16") for member in kind)
    source = ASTSource(case.kernel, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned})
    options = {name: value for name, value in case.config.items() if name not in names}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = {
            key: int(value)
            for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", file.name))
        }
        code = _cuobjdump("-sass", file.name) if case.expects else None
    return Report(
        arch=arch,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        instructions=None
        if code is None
        else frozenset(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ +)?([A-Z][^\s;]*)", code, re.MULTILINE)),
    )


def _is_aligned(kind: str) -> bool:
    return kind.startswith("*") or kind.endswith(":16")


def _cuobjdump(*arguments: str) -> str:
    """What the cuobjdump inside Triton's wheel prints. Disassembly takes 0.2 s a kernel, resource usage 1 ms."""
    from triton import knobs

    return subprocess.run([knobs.nvidia.cuobjdump.path, *arguments], check=True, capture_output=True, text=True).stdout
