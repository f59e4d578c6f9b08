"""Reading files of weights from strangers: tensors come out, and nothing in a file is ever run.

Pickles go through torch's restricted reader, which builds tensors, plain containers and, for the arguments that the
published codes save beside the weights, ``argparse.Namespace``. A pickle that asks for anything else is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models.exports import CONFIG, WEIGHTS

WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of DDP and DeepSpeed, torch.compile, detection code
PREPROCESSOR = "preprocessor_config.json"
SHARDS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class File:
    """Tensors by name, as a file has them once its wrappers are off.

    ``settings``: the config.json beside them, or nothing. ``aside``: what else the file holds, and why it is left out.
    """

    where: str
    weights: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    aside: tuple[tuple[str, str], ...] = ()


def read(path: str | Path) -> File:
    """A .pth, .pt or .bin pickle, a .safetensors file, or a folder with one of them and a config.json.

    Raises:
        UserError: nothing there, or a file that is damaged, runs code, holds no tensors, or holds inf or nan.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"source: expected a file or a folder of weights, found nothing at {str(path)!r}")
    return unwrapped(_tensors(path), str(path))


def unwrapped(content: Any, where: str, settings: dict[str, Any] | None = None) -> File:
    """Tensors out of what a file holds: ``{model: ...}`` and the like opened, ``module.`` and the like taken off.

    Raises:
        UserError: no tensors; a value that is inf or nan; or two tensors of one name.
    """
    aside: list[tuple[str, str]] = []
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        aside += [(str(other), f"beside {key!r} in the file: no weights") for other in content if other != key]
        content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"source: expected weights in {where!r}, found {found or 'nothing'}")
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            aside.append((str(key), f"no tensor but {type(value).__name__}"))
            continue
        name = _stripped(str(key))
        if name in weights:
            raise UserError(f"source: expected one tensor {name!r} in {where!r}, found two, with and without a prefix")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"source: expected finite weights in {where!r}, found inf or nan in {key!r}")
        weights[name] = value.detach()
    return File(where, weights, settings or {}, tuple(aside))


def _stripped(key: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    return key if prefix is None else _stripped(key.removeprefix(prefix))


def _folder(path: Path) -> File:
    exports = sorted(path.glob(f"exports/*/{WEIGHTS}"), key=lambda file: int(file.parent.name.split("-")[0]))
    if exports and not (path / CONFIG).is_file():
        path = exports[-1].parent
    name = next((name for name in SHARDS if (path / name).is_file()), None)
    if name is None:
        raise UserError(f"source: expected one of {', '.join(SHARDS)} in {str(path)!r}, found none")
    settings = _json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if (path / PREPROCESSOR).is_file():
        settings["preprocessor"] = _json(path / PREPROCESSOR)
    names = [name]
    if name.endswith(".index.json"):
        listed = _json(path / name).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"source: expected a weight_map in {str(path / name)!r}, found none")
        names = sorted({Path(str(shard)).name for shard in listed.values()})
    content: dict[str, Any] = {}
    for part in names:
        content |= _tensors(path / part)
    return unwrapped(content, str(path), settings)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"source: cannot read {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"source: expected an object in {str(path)!r}, got {type(found).__name__}")
    return found


def _tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except Exception as error:  # SafetensorError, OSError
            raise UserError(f"source: {str(path)!r} is no complete safetensors file ({_line(error)})") from error
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of another pickle protocol than torch's
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises RuntimeError, EOFError, UnpicklingError and others
        asked = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"class (\S+) ", str(error))
        if asked is not None:
            allowed = "only tensors, plain containers and argparse.Namespace are read"
            raise UserError(f"source: {str(path)!r} asks for {asked.group(1)}: {allowed}") from error
        raise UserError(
            f"source: {str(path)!r} is damaged, cut short or no file of weights ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    """The error's kind, and the first sentence of its message; of torch's restricted reader the reason at its end."""
    said = str(error).strip().rpartition("WeightsUnpickler error:")[2].strip()
    sentence = re.split(r"\n|\. ", said, maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
