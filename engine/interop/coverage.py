"""What became of every tensor of a checkpoint, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Coverage:
    """One conversion's account; every tensor of either side stands in exactly one of the lists.

    Attributes:
        title: what was read or written.
        loaded: keys of tensors that kept their name.
        renamed: (key there, key here), where the name or the layout changed.
        dropped: (key, why it has no place on the other side).
        missing: (key, where its values come from instead).
        notes: what was assumed, one line each.
    """

    title: str
    loaded: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A few lines a list: tensors of all blocks share one where they go the same way, and a weight and its bias."""
        lines = [
            f"{self.title}: {len(self.loaded)} loaded, {len(self.renamed)} renamed, {len(self.dropped)} dropped, "
            f"{len(self.missing)} missing"
        ]
        lines += _grouped("loaded", [(_family(key), "") for key in self.loaded])
        lines += _grouped("renamed", [_move(there, here) for there, here in self.renamed])
        for name in ("dropped", "missing"):
            lines += _grouped(name, [(_family(key), f": {reason}") for key, reason in getattr(self, name)])
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def _move(there: str, here: str) -> tuple[str, str]:
    """``decoder_blocks.*`` to ``decoder.blocks.*`` where only the front changed, else both names without numbers."""
    fronts = _family(there), _family(here)
    if there.removeprefix(fronts[0][:-1]) != here.removeprefix(fronts[1][:-1]):
        fronts = _numberless(there), _numberless(here)
    return fronts[0], f" -> {fronts[1]}"


def _numberless(keys: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", keys)


def _family(key: str) -> str:
    """``blocks.3.attn.qkv.bias`` belongs to ``blocks.*``, ``norm.bias`` to ``norm.*``."""
    return re.sub(r"\.\d+\..*", ".*", re.sub(r"\.(weight|bias)$", ".*", key))


def _grouped(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for pair in pairs:
        counts[pair] = counts.get(pair, 0) + 1
    return [f"  {name:<8} {left}{f' ({n})' if n > 1 else ''}{right}" for (left, right), n in counts.items()]
