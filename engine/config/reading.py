"""Recipes in, YAML out, and what a checkpoint is tied to."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cohobate.config.checking import check
from cohobate.config.conversion import assign, convert, flatten, suggestion, to_dict
from cohobate.config.schema import Config
from cohobate.errors import UserError

# Changing these does not change what is computed, beyond rounding, so a checkpoint does not bind them.
FREE_KEYS = (
    "run",
    "device",
    "resume",
    "data.root",
    "data.generate",
    "data.loader",
    "data.workers",
    "data.max_bad",
    "execution",
    "evaluate",
    "checkpoint",
    "log",
)


def recipes() -> list[str]:
    """Names of the recipes shipped in the package."""
    folder = importlib.resources.files("cohobate") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """A checked :class:`Config` from a shipped recipe's name or a YAML file, then ``key=value`` overrides in order.

    Raises:
        UserError: unknown recipe, unknown key, a value of the wrong type, or settings that cannot go together.
    """
    tree = _read(recipe)
    config = from_dict(tree)
    for override in overrides:
        config = assign(config, *_split(override))
    return check(config)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a :class:`Config` from nested dictionaries, unchecked beyond keys and types.

    Raises:
        UserError: unknown key or a value of the wrong type.
    """
    return typing.cast(Config, convert(tree, Config, ""))


def dump(config: Config) -> str:
    """The whole configuration as YAML; it is a recipe itself."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)
    return text


def bound(config: Config) -> dict[str, Any]:
    """The dotted keys that decide what is computed: what a checkpoint is tied to."""
    flat = flatten(to_dict(config))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    }


def fingerprint(config: Config, data_hash: str, ranks: int) -> str:
    """Short hash of :func:`bound`, the data set's hash and the number of ranks."""
    text = json.dumps([bound(config), data_hash, ranks], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"expected key=value, got {override!r}")
    return key.strip(), value


def _read(recipe: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The YAML tree of a recipe laid over the one that its ``base`` names."""
    path = Path(recipe)
    known = recipes()
    if recipe in known:
        text = (importlib.resources.files("cohobate") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        hint = suggestion(recipe, known)
        raise UserError(f"recipe: expected one of {', '.join(known)} or an existing YAML file, got {recipe!r}{hint}")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe: {recipe} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe: expected a mapping of keys in {recipe}, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or base in seen:
        raise UserError(f"base: expected the name of another recipe in {recipe}, got {base!r}")
    return _merge(_read(base, (*seen, recipe)), tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
