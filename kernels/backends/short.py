"""Our own attention for short sequences, where it has a fast implementation: native on the CPU, Triton on CUDA."""

from __future__ import annotations

from torch import Tensor

from cohobate.kernels import registry
from cohobate.kernels.backends.probe import Call, capability

FAST = {"cpu": "native", "cuda": "triton"}


def why_not(call: Call) -> list[str]:
    """Reasons against a call by :func:`cohobate.kernels.transformer.attention.short_attention`."""
    from cohobate.kernels.transformer.attention import MOST_DIM, MOST_KEYS

    if call.device not in FAST:
        return [f"it runs on {' and '.join(FAST)}"]
    if call.device == "cuda" and capability() is None:
        return ["no CUDA device"]
    wide, odd, long = call.head_dim > MOST_DIM, call.head_dim % 2 == 1, call.keys > MOST_KEYS
    facts = {"dtype": call.dtype, "wide": wide, "odd": odd, "long": long}
    return registry.why_not("short_attention", FAST[call.device], call.device, **facts)


def run(qkv: Tensor, heads: int, queries: Tensor | None) -> Tensor:
    """short_attention, packed in and packed out."""
    from cohobate.kernels.transformer.attention import short_attention

    return short_attention(qkv, heads, queries=queries)
