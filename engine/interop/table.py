"""A format is a table: one line for each tensor of ours, naming the tensors of theirs that it is made of.

Every line copies or concatenates, so one table serves three ways: join loads a checkpoint, split writes one, and split
also carries gradients over, being the transpose of join.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop.coverage import Coverage

KEY_BIAS = "a key bias adds one number to all scores of a query, which the softmax takes out again"


class Entry(NamedTuple):
    """One tensor of ours.

    ``how``: "same"; "rows", theirs stacked along dim 0 (q, k, v); "qv", the biases of q and v with zeros for k between
    them; "patches", a position table without the row of the cls token, which is zero. Without ``theirs`` their side
    has no such tensor; ``reason`` says where its values come from, and ``lost``, where that differs, why it is not
    written.
    """

    ours: str
    theirs: tuple[str, ...]
    how: str = "same"
    reason: str = ""
    lost: str = ""

    @property
    def kept(self) -> bool:
        """Whether the tensor has the same name and layout on both sides; ``student.`` stands in no file."""
        return self.how == "same" and self.theirs == (self.ours.removeprefix("student."),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours out of theirs."""
        if self.how == "rows":
            return torch.cat(list(parts))
        if self.how == "qv":
            return torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
        if self.how == "patches":
            return torch.cat([torch.zeros_like(parts[0][:, :1]), parts[0]], dim=1)
        return parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        """Theirs out of ours."""
        if self.how == "rows":
            return list(whole.chunk(len(self.theirs)))
        if self.how == "qv":
            q, _, v = whole.chunk(3)
            return [q, v]
        return [whole[:, 1:] if self.how == "patches" else whole]


Table = list[Entry]
Reasons = Sequence[tuple[str, str]]


def same(ours: str, theirs: str, *names: str) -> Iterator[Entry]:
    """``ours + name`` is ``theirs + name``."""
    for name in names:
        yield Entry(ours + name, (theirs + name,))


def affine(ours: str, theirs: str) -> Iterator[Entry]:
    """A layer's weight and bias."""
    return same(ours, theirs, ".weight", ".bias")


def blocks(
    ours: str, theirs: str, depth: int, *, bias: str = "fused", scale: tuple[str, str] | None = None
) -> Iterator[Entry]:
    """Blocks with timm's names on both sides.

    ``bias``: "fused" for qkv.bias, "qv" for q_bias and v_bias, "none". ``scale``: the names of the layer scales.
    """
    for i in range(depth):
        a, b = f"{ours}{i}.", f"{theirs}{i}."
        yield from affine(f"{a}norm1", f"{b}norm1")
        yield Entry(f"{a}attn.qkv.weight", (f"{b}attn.qkv.weight",))
        if bias == "qv":
            yield Entry(f"{a}attn.qkv.bias", (f"{b}attn.q_bias", f"{b}attn.v_bias"), "qv")
        elif bias == "none":
            yield Entry(f"{a}attn.qkv.bias", (), reason="the file's qkv has no bias: zeros")
        else:
            yield Entry(f"{a}attn.qkv.bias", (f"{b}attn.qkv.bias",))
        for name in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            yield from affine(a + name, b + name)
        for mine, other in zip(("ls1.gamma", "ls2.gamma"), scale or (), strict=False):
            yield Entry(a + mine, (b + other,))


def take(
    weights: Mapping[str, Tensor], table: Table, surplus: Reasons, coverage: Coverage, *, lenient: bool = False
) -> dict[str, Tensor]:
    """Our tensors out of theirs, fp32; the account goes into ``coverage``.

    Args:
        weights: theirs.
        table: of the format.
        surplus: (pattern, reason) of keys that have no place here.
        lenient: drop keys that nothing explains, instead of refusing them.

    Raises:
        UserError: a tensor of the table that is not there, or one that nothing explains; the message lists them. Or one
            that is not floating.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    absent: list[str] = []
    for entry in table:
        if not entry.theirs:
            coverage.missing.append((entry.ours, entry.reason))
            continue
        gone = [key for key in entry.theirs if key not in weights]
        used.update(entry.theirs)
        if gone:
            absent += gone
            continue
        for key in entry.theirs:
            if not weights[key].is_floating_point():
                raise UserError(f"source: expected floating weights, got {weights[key].dtype} in {key!r}")
        found[entry.ours] = entry.join([weights[key].float() for key in entry.theirs])
        if entry.kept:
            coverage.loaded.append(entry.theirs[0])
        else:
            coverage.renamed.append((" + ".join(entry.theirs), entry.ours))
    strange = []
    for key in weights:
        if key not in used:
            reason = why(key, surplus) or ("nothing here takes it (lenient)" if lenient else None)
            if reason is None:
                strange.append(key)
            else:
                coverage.dropped.append((key, reason))
    problems = [
        f"{what}: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
        for what, keys in (("missing", absent), ("surplus", strange))
        if keys
    ]
    if problems:
        raise UserError(f"source: {coverage.title} does not fit: {'; '.join(problems)}")
    return found


def give(weights: Mapping[str, Tensor], table: Table, lost: Reasons, coverage: Coverage) -> dict[str, Tensor]:
    """Their tensors out of ours; the account goes into ``coverage``.

    Raises:
        UserError: a tensor of ours that the format cannot hold and no reason explains.
    """
    made: dict[str, Tensor] = {}
    entries = {entry.ours: entry for entry in table}
    strange = []
    for key, value in weights.items():
        entry = entries.get(key)
        if entry is None or not entry.theirs:
            reason = why(key, lost) if entry is None else entry.lost or entry.reason
            if reason is None:
                strange.append(key)
            else:
                coverage.dropped.append((key, reason))
            continue
        parts = entry.split(value.detach().float().cpu())
        made |= {name: part.contiguous().clone() for name, part in zip(entry.theirs, parts, strict=True)}
        if entry.kept:
            coverage.loaded.append(entry.theirs[0])
        else:
            coverage.renamed.append((key, " + ".join(entry.theirs)))
    if strange:
        raise UserError(f"to: {coverage.title} has no place for {', '.join(strange[:8])}")
    return made


def why(key: str, reasons: Reasons) -> str | None:
    """The reason of the first pattern that the key begins with."""
    return next((reason for pattern, reason in reasons if re.match(pattern, key)), None)
