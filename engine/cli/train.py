"""``cohobate train``: a run."""

from __future__ import annotations

import contextlib
from typing import Any

from cohobate.cli.report import write
from cohobate.errors import UserError


def main(arguments: list[str]) -> int:
    """Carry out the run that a recipe and overrides describe, and write its report; 0, or the signal's exit code."""
    from cohobate import config as configuration

    wants_help = any(word in ("-h", "--help") for word in arguments)
    words = [word for word in arguments if word not in ("-h", "--help")]
    recipe = words[0] if words and not words[0].startswith("-") and "=" not in words[0] else None
    if recipe is None and wants_help:
        print("usage: cohobate train RECIPE [key=value ...] [--key value ...]\n")
        print(f"recipes: {', '.join(configuration.recipes())}, or a YAML file")
        print("`cohobate train RECIPE --help` lists every key with that recipe's value.")
        return 0
    if recipe is None:
        raise UserError(f"recipe: expected one of {', '.join(configuration.recipes())}, or a YAML file; got none")
    config = configuration.load(recipe, _overrides(words[1:]))
    if wants_help:
        return _describe(recipe, config)
    from cohobate.training import train

    finished, code = train(config)
    if finished is not None:
        write(finished)
    return code


def _overrides(words: list[str]) -> list[str]:
    """``key=value``, ``--key=value`` and ``--key value`` as ``key=value``."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            found.append(word)
            continue
        key = word[2:]
        if "=" not in key:
            value = next(rest, None)
            if value is None:
                raise UserError(f"{key}: expected a value after {word}, got none")
            key = f"{key}={value}"
        name, _, value = key.partition("=")
        found.append(f"{name.replace('-', '_')}={value}")
    return found


def _describe(recipe: str, config: Any) -> int:
    """Every key with its type, value and meaning, by tyro from the dataclasses."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(type(config), default=config, args=["--help"], prog=f"cohobate train {recipe}")
    return 0
