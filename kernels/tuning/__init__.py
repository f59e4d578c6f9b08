"""Launch configurations as data: one JSON file an architecture, a list of entries.

An entry is ``{"op", "dtype", "width", "tokens", "config", "provenance"}``. ``width`` is the row length, ``tokens`` the
upper end of a bucket of rows a sample; either may be ``null`` for any. Batch size is never in a key, so ranks agree.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm80", "sm90", "sm100")


@functools.cache
def entries(architecture: str) -> list[dict[str, Any]]:
    """Every shipped entry for ``architecture`` (sm80, sm90, sm100)."""
    table: list[dict[str, Any]] = json.loads(Path(__file__).with_name(f"{architecture}.json").read_text())
    return table


@functools.cache
def lookup(op: str, dtype: str, width: int, tokens: int, architecture: str) -> dict[str, int]:
    """Launch configuration of the tightest entry that fits; exact width before any width, smaller bucket before larger.

    Raises:
        LookupError: no entry of ``op`` fits, not even the catch-all that every op ships.
    """
    fits = [
        entry
        for entry in entries(architecture)
        if entry["op"] == op
        and entry["dtype"] in (None, dtype)
        and entry["width"] in (None, width)
        and (entry["tokens"] is None or tokens <= entry["tokens"])
    ]
    if not fits:
        call = f"{op} ({dtype}, width {width}, {tokens} tokens)"
        raise LookupError(f"no launch configuration for {call} in {architecture}.json")
    best = min(fits, key=lambda e: (e["width"] is None, e["dtype"] is None, e["tokens"] is None, e["tokens"] or 0))
    config: dict[str, int] = best["config"]
    return config
