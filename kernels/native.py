"""The C++ library of the ``native`` implementations: where it is, whether it loaded, and why not.

It is built by ``setup.py`` (or plain CMake) against the libtorch stable ABI, so one build serves every later torch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).with_name("libcohobate_native.so")


@functools.cache
def why_not() -> tuple[str, ...]:
    """Load the library once; reasons why it is not usable, empty when it is."""
    if not LIBRARY_PATH.exists():
        return ("the native library is not built (run `make native`, or reinstall with COHOBATE_NATIVE=1)",)
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return (f"the native library does not load: {error}",)
    return ()


def instruction_set() -> str:
    """Instruction set that the loaded library chose on this machine: avx512bf16, avx512, avx2 or generic."""
    if why_not():
        return "none"
    return ("generic", "avx2", "avx512", "avx512bf16")[torch.ops.cohobate_native.instruction_set()]
