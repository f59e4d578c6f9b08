"""What a format is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop.coverage import Coverage
from cohobate.interop.parts import FP32, Hints, Parts, Sizes, build
from cohobate.interop.reading import File
from cohobate.interop.table import Reasons, Table, give, take
from cohobate.models import Precision
from cohobate.models.exports import fill


@dataclass(frozen=True)
class Format:
    """One way to lay out weights.

    Attributes:
        name: on the command line.
        matches: whether a file looks like it, told by its keys.
        sizes: of the model in a file.
        table: keys, as a function of the sizes.
        surplus: (pattern, reason) of their keys that have no place here.
        lost: (pattern, reason) of our keys that have no place there.
        fit: the sizes it would have as this format; raises a UserError for a model that the format cannot hold.
        extra: tensors that the format wants and we have not, with the reason of their values.
        settings: config.json beside the weights, of the formats that have one.
        notes: what a reader should know, of a file and its model.
        prepare: brings the keys of a file into one spelling first.
    """

    name: str
    matches: Callable[[File], bool]
    sizes: Callable[[File, Hints], Sizes]
    table: Callable[[Sizes], Table]
    fit: Callable[[Parts], Sizes]
    surplus: Reasons = ()
    lost: Reasons = ()
    extra: Callable[[Sizes], dict[str, tuple[Tensor, str]]] = lambda sizes: {}
    settings: Callable[[Parts, Sizes], dict[str, Any]] | None = None
    notes: Callable[[File, Sizes], list[str]] = lambda file, sizes: []
    prepare: Callable[[File], File] = lambda file: file

    def load(
        self, file: File, hints: Hints | None = None, *, lenient: bool = False, precision: Precision = FP32
    ) -> tuple[Parts, Coverage]:
        """The model of a file, with fp32 weights, and the account.

        Raises:
            UserError: a file that does not fit this format.
        """
        file, hints = self.prepare(file), hints or Hints()
        sizes = self.sizes(file, hints)
        given = {key: getattr(hints, key) for key in ("mean", "std") if getattr(hints, key) is not None}
        sizes = replace(sizes, **given)
        coverage = Coverage(f"{file.where} as {self.name}")
        coverage.dropped += file.aside
        found = take(file.weights, self.table(sizes), self.surplus, coverage, lenient=lenient)
        parts = build(sizes, precision)
        kept = {key: value for key, value in parts.state_dict().items() if key not in found}
        fill(parts, kept | found, file.where)
        coverage.notes += self.notes(file, sizes)
        if (
            hints.heads is None and not file.settings and not sizes.relative_positions
        ):  # whose table has a column a head
            coverage.notes.append(f"attention heads are in no such file: {sizes.heads}, by the width")
        low = {value.dtype for value in file.weights.values() if value.is_floating_point()} - {torch.float32}
        if low:
            coverage.notes.append(f"weights of {', '.join(sorted(map(str, low)))} there are fp32 here")
        return parts, coverage

    def save(self, parts: Parts) -> tuple[dict[str, Tensor], Sizes, Coverage]:
        """Their tensors, what the file's sizes are, and the account.

        Raises:
            UserError: a model that this format cannot hold.
        """
        sizes = self.fit(parts)
        coverage = Coverage(f"written as {self.name}")
        made = give(parts.state_dict(), self.table(sizes), self.lost, coverage)
        for key, (value, reason) in self.extra(sizes).items():
            made[key] = value
            coverage.missing.append((key, reason))
        return made, sizes, coverage


def formats() -> dict[str, Format]:
    """By name, the more particular ones first."""
    from cohobate.interop import amd, clip_students, dbot, huggingface, mae, native, timm, videomae

    modules = (native, huggingface, amd, videomae, clip_students, dbot, mae, timm)
    return {module.FORMAT.name: module.FORMAT for module in modules}


def choose(file: File, name: str | None = None) -> Format:
    """The format of a file: the one named, or the first that its keys look like.

    Raises:
        UserError: an unknown name, or keys that look like no format.
    """
    known = formats()
    if name is not None:
        if name not in known:
            raise UserError(f"format: expected one of {', '.join(known)}; got {name!r}")
        return known[name]
    found = next((form for form in known.values() if form.matches(file)), None)
    if found is None:
        keys = ", ".join(list(file.weights)[:4])
        raise UserError(f"source: expected keys of {', '.join(known)} in {file.where!r}, found {keys}, ...")
    return found
