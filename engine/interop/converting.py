"""From one file to another: read, reshape, write aside, compare, rename."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop import native
from cohobate.interop.coverage import Coverage
from cohobate.interop.formats import Format, choose, formats
from cohobate.interop.parts import Hints, Parts, Sizes
from cohobate.interop.reading import PREPROCESSOR, read
from cohobate.interop.reshape import reshaped
from cohobate.interop.verify import Agreement, compare
from cohobate.models.exports import ALIGNMENT, CONFIG, DECODER, WEIGHTS

FOLDERS = ("cohobate", "hf")  # timm's is one too, unless its name is a file's
FILES = (".pth", ".pt", ".bin", ".safetensors")
OURS = {WEIGHTS, CONFIG, DECODER, ALIGNMENT, PREPROCESSOR}


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` did: the account of both sides, the changes between them, and the two comparisons."""

    read: Coverage
    changes: tuple[str, ...]
    written: Coverage
    before: Agreement | None
    after: Agreement | None

    def text(self) -> str:
        """For a terminal."""
        lines = [self.read.text(), _said("features as read", self.before)]
        lines += [f"changed: {change}" for change in self.changes]
        return "\n".join([*lines, self.written.text(), _said("features as written", self.after)])


def _said(what: str, found: Agreement | None) -> str:
    return f"{what}: {'not compared, its relative positions are in no oracle here' if found is None else found.text()}"


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    form: str | None = None,
    hints: Hints | None = None,
    force: bool = False,
    lenient: bool = False,
) -> Converted:
    """Convert a checkpoint.

    Args:
        source: a file or folder of any format.
        destination: a folder (cohobate, hf; timm unless it ends as a file does), or a file (safetensors by its suffix,
            else a pickle).
        to: name of the format to write.
        form: of the source; None to tell it by its keys.
        hints: see :class:`cohobate.interop.parts.Hints`.
        force: replace what is at the destination.
        lenient: drop keys that nothing explains, instead of refusing them.

    Raises:
        UserError: a source that cannot be read or does not fit, a target that cannot hold the model, features that
            differ, or a destination that is taken. Nothing at the destination has changed then.
    """
    known, destination, hints = formats(), Path(destination), hints or Hints()
    if to not in known:
        raise UserError(f"to: expected one of {', '.join(known)}; got {to!r}")
    folder = to in FOLDERS or (to == "timm" and destination.suffix not in FILES)
    if to in FOLDERS and destination.suffix in FILES:
        raise UserError(f"destination: expected a folder for {to}, got {str(destination)!r}, which is a file's name")
    _check_free(destination, folder, force)
    file = read(source)
    origin, target = choose(file, form), known[to]
    parts, coverage = origin.load(file, hints, lenient=lenient)
    before = compare(origin, file, parts)
    no_cls = to in ("videomae", "amd") or (to == "hf" and (hints.frames or parts.sizes.grid.frames) > 1)
    parts, changes = reshaped(parts, hints, cls=not no_cls)
    weights, sizes, written = target.save(parts)
    aside = destination.with_name(destination.name + ".writing")
    _remove(aside)
    try:
        if folder:
            _write_folder(aside, weights, target, parts, sizes)
        else:
            _write_file(aside, weights, safe=destination.suffix == ".safetensors")
        after = _check_written(aside, destination, target, weights, parts)
        _rename(aside, destination)
    finally:
        _remove(aside)
    return Converted(coverage, tuple(changes), written, before, after)


def _check_free(destination: Path, folder: bool, force: bool) -> None:
    if not destination.parent.is_dir():
        raise UserError(f"destination: expected a folder at {str(destination.parent)!r}, found none")
    if not destination.exists():
        return
    if not force:
        raise UserError(f"destination: expected nothing at {str(destination)!r}, found something; --force replaces it")
    if destination.is_dir() != folder:
        raise UserError(f"destination: expected a {'folder' if folder else 'file'} to replace at {str(destination)!r}")
    if folder:
        strange = sorted(path.name for path in destination.iterdir() if path.name not in OURS)
        if strange:
            raise UserError(
                f"destination: expected only weights and config.json in {str(destination)!r}, got {strange[0]}"
            )


def _write_folder(folder: Path, weights: dict[str, Tensor], target: Format, parts: Parts, sizes: Sizes) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    names = {DECODER: "decoder.", ALIGNMENT: "alignment."} if target.name == native.FORMAT.name else {}
    for name, prefix in names.items():
        inner = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if inner:
            save_file(inner, str(folder / name), metadata={"format": "pt"})
    rest = {key: value for key, value in weights.items() if not key.startswith(tuple(names.values()))}
    save_file(rest, str(folder / WEIGHTS), metadata={"format": "pt"})
    settings = target.settings(parts, sizes) if target.settings is not None else {}
    _write_json(folder / CONFIG, settings)
    if target.name == "hf":
        mean, std = list(parts.student.mean), list(parts.student.std)
        _write_json(folder / PREPROCESSOR, {"do_normalize": True, "image_mean": mean, "image_std": std})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_file(path: Path, weights: dict[str, Tensor], *, safe: bool) -> None:
    if safe:
        from safetensors.torch import save_file

        save_file(weights, str(path), metadata={"format": "pt"})
    else:
        torch.save({"model": weights}, path)


def _check_written(
    aside: Path, destination: Path, target: Format, weights: dict[str, Tensor], parts: Parts
) -> Agreement | None:
    """Read back what was written: the same bits, a strict load, and the same features.

    Raises:
        UserError: any of the three is not so.
    """
    readable = aside
    if not aside.is_dir():  # the reader goes by the suffix
        readable = aside.with_name(f"{aside.name}{destination.suffix}")
        aside.rename(readable)
    try:
        file = read(readable)
        sizes = parts.sizes
        prepared = target.prepare(file)
        if prepared.weights.keys() != weights.keys() or any(
            not torch.equal(prepared.weights[key], value) for key, value in weights.items()
        ):
            raise UserError(f"destination: {str(destination)!r} was not written as it should be; is the disk full?")
        hints = Hints(
            sizes.heads, sizes.decoder.heads if sizes.decoder else None,
            sizes.alignment.heads if sizes.alignment else None,
            (sizes.grid.height, sizes.grid.width), sizes.grid.frames, sizes.grid.patch[0],
        )  # fmt: skip
        target.load(file, hints)
        return compare(target, file, parts)
    finally:
        if readable is not aside:
            readable.rename(aside)


def _rename(aside: Path, destination: Path) -> None:
    """Into place; what stood there goes only when the new one stands."""
    old = destination.with_name(destination.name + ".replaced")
    if destination.is_dir():
        _remove(old)
        destination.rename(old)
    aside.replace(destination)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
