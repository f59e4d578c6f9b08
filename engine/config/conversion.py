"""Plain values into annotated dataclasses, by dotted key: knows types, never what a key means."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

import yaml

from cohobate.errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries and lists, ready for YAML or JSON."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def assign(config: T, key: str, value: Any) -> T:
    """``config`` with the dotted ``key`` set; strings are read as YAML scalars where the type asks for more than text.

    Raises:
        UserError: unknown key, or a value of the wrong type.
    """
    return typing.cast(T, _assign(config, type(config), key.split("."), value, key, config))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` -> ``{"a.b": [1]}``; lists of dictionaries are opened by index."""
    if isinstance(tree, Mapping) and tree:
        pairs = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list) and tree and all(isinstance(item, Mapping) for item in tree):
        pairs = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in pairs:
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def suggestion(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _assign(node: Any, kind: Any, parts: list[str], value: Any, key: str, root: Any) -> Any:
    """``node`` (of annotated type ``kind``) with the value at the remaining path ``parts`` replaced."""
    if not parts:
        return convert(_scalar(value, kind), kind, key)
    name, rest = parts[0], parts[1:]
    if dataclasses.is_dataclass(node):
        hints = _hints(type(node))
        if name not in hints:
            raise _unknown(key, root)
        return dataclasses.replace(node, **{name: _assign(getattr(node, name), hints[name], rest, value, key, root)})  # type: ignore[type-var]
    if isinstance(node, tuple) and node and dataclasses.is_dataclass(node[0]):
        if not name.isdigit() or int(name) >= len(node):
            raise UserError(f"{key}: expected an index from 0 to {len(node) - 1}, got {name!r}")
        place = int(name)
        changed = _assign(node[place], type(node[place]), rest, value, key, root)
        return (*node[:place], changed, *node[place + 1 :])
    if isinstance(node, dict):
        return node | {".".join(parts): yaml.safe_load(value) if isinstance(value, str) else value}
    raise _unknown(key, root)


def _scalar(value: Any, kind: Any) -> Any:
    """Text from the command line as YAML reads it, unless text is what is wanted."""
    if not isinstance(value, str) or kind is str:
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    wants_text = str in _members(kind) and not isinstance(read, (dict, list)) and read is not None
    return value if wants_text else read


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def convert(value: Any, kind: Any, key: str) -> Any:
    """``value`` as the annotated type, or a UserError that names ``key``."""
    if dataclasses.is_dataclass(kind):
        if isinstance(value, str) and hasattr(kind, "from_word"):  # a section that a single word may fill
            return kind.from_word(value)
        if not isinstance(value, Mapping):
            raise _wrong(key, "a section of keys", value)
        hints = _hints(kind)
        for name in value:
            if name not in hints:
                path = f"{key}.{name}" if key else str(name)
                near = suggestion(str(name), list(hints))
                raise UserError(f"{path}: unknown key{near}")
        made = {name: convert(item, hints[name], f"{key}.{name}" if key else name) for name, item in value.items()}
        return kind(**made)  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, key)
    if origin is Literal:
        if isinstance(value, bool) and "on" in arguments:  # YAML reads the words on and off as true and false
            value = "on" if value else "off"
        if value not in arguments:
            near = suggestion(str(value), [str(word) for word in arguments])
            raise UserError(f"{key}: expected one of {', '.join(map(str, arguments))}; got {value!r}{near}")
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, "a mapping of keys", value)
        return flatten({str(name): item for name, item in value.items()}) if value else {}
    return _convert_plain(value, kind, key)


def _convert_union(value: Any, arguments: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    (inner,) = (argument for argument in arguments if argument is not type(None))
    return convert(value, inner, key)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    endless = len(arguments) == 2 and arguments[1] is Ellipsis
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value] * (1 if endless else len(arguments))
    if not isinstance(value, (list, tuple)) or (not endless and len(value) != len(arguments)):
        raise _wrong(key, "a list" if endless else f"a list of {len(arguments)}", value)
    kinds = [arguments[0]] * len(value) if endless else arguments
    return tuple(
        convert(item, kind, f"{key}.{index}") for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _convert_plain(value: Any, kind: Any, key: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is Any:
        return value
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise _wrong(key, names[kind], value) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise _wrong(key, names.get(kind, str(kind)), value)
    if kind is float and math.isnan(value):
        raise _wrong(key, "a number", value)
    return value


def _wrong(key: str, expected: str, value: Any) -> UserError:
    return UserError(f"{key}: expected {expected}, got {value!r}")


def _unknown(key: str, root: Any) -> UserError:
    known = list(flatten(to_dict(root)))
    sections = {".".join(name.split(".")[:count]) for name in known for count in range(1, name.count(".") + 1)}
    return UserError(f"{key}: unknown key{suggestion(key, sorted({*known, *sections}))}")
