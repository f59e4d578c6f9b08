"""One door for every teacher."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from torch import nn

from cohobate.errors import UserError
from cohobate.models import VisionTransformer
from cohobate.teacher.sources import from_timm, from_transformers, own
from cohobate.teacher.sources.source import Source, TeacherModule, from_module

PREFIXES = ("random:", "timm:", "hf:")


def load_source(spec: str | Path | nn.Module, **options: Any) -> Source:
    """A teacher's source.

    Args:
        spec: what it comes from.

            - ``random:vit_small``: freshly drawn weights of a named size; options ``seed``, ``image_size``, ``patch``,
              ``depth`` and the others of :func:`cohobate.models.build`.
            - ``timm:NAME``: ``timm.create_model``; option ``pretrained`` (default true) and timm's own.
            - ``hf:FOLDER_OR_ID``: a transformers model; options of ``from_pretrained``, and ``projection=true`` for
              CLIP's tokens behind its final norm and projection.
            - a path: an export of this package, or a run folder with exports in it.
            - an instance: our encoder, a timm or transformers model, or any ``nn.Module`` that speaks
              :class:`TeacherModule`. It is not changed, and weights that are rebuilt from it are copies.

            Options may be written behind a ``?``: ``random:vit_small?seed=1&image_size=96``.
        options: the same as keywords; for timm and transformers also ``mean`` and ``std``. A transformers instance
            takes ``projection`` too.

    Returns:
        A source on the CPU (of an instance, where that is), its anatomy checked against the original.

    Raises:
        UserError: an unknown prefix, a package that is missing or broken, weights that do not fit, or a module that
            is none of the above; the message names the argument and what came.
    """
    if isinstance(spec, nn.Module):
        return _instance(getattr(spec, "_orig_mod", spec), **options)
    if isinstance(spec, Path):
        return _only(own.from_export(spec), options)
    if not isinstance(spec, str):
        raise UserError(f"source: expected a string, a path or an nn.Module, got {type(spec).__name__}")
    prefix = next((prefix for prefix in PREFIXES if spec.startswith(prefix)), None)
    if prefix is None:
        if ":" in spec.split("/")[0] and not Path(spec).exists():
            raise UserError(f"source: expected one of {', '.join(PREFIXES)} or a path in front, got {spec!r}")
        return _only(own.from_export(spec), options)
    name, _, query = spec.removeprefix(prefix).partition("?")
    if not name:
        raise UserError(f"source: expected a name behind {prefix!r}, got {spec!r}")
    options = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)} | options
    if prefix == "random:":
        return own.from_random(name, **options)
    if prefix == "timm:":
        return from_timm.load(_package("timm", "timm"), name, **options)
    return from_transformers.load(_package("transformers", "hf"), name, **options)


def _instance(module: Any, **options: Any) -> Source:
    """The source of a module, told by the package that its class or one of its bases comes from."""
    homes = {base.__module__.split(".")[0] for base in type(module).__mro__}
    if isinstance(module, VisionTransformer):
        return _only(own.from_encoder(module), options)
    if isinstance(module, TeacherModule):
        return _only(from_module(module, type(module).__name__), options)
    if "timm" in homes:
        return from_timm.from_model(module, **options)
    if "transformers" in homes:
        return from_transformers.from_model(module, **options)
    missing = [name for name in _members() if not hasattr(module, name)]
    raise UserError(
        f"source: {type(module).__name__} is no encoder of this package, timm or transformers, and as a TeacherModule "
        f"it lacks {', '.join(missing)}"
    )


def _members() -> list[str]:
    return ["grid", "width", "depth", "prefix", "mean", "std", "hidden_states"]


def _package(name: str, extra: str) -> Any:
    """An optional package; its absence and its faults are told apart."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f"source: {name} is not installed (pip install 'cohobate[{extra}]')") from error
        reason: Exception = error
    except Exception as error:  # a broken build may raise anything: OSError, RuntimeError, AttributeError
        reason = error
    raise UserError(f"source: {name} is installed but cannot be imported: {type(reason).__name__}: {reason}")


def _only(source: Source, options: dict[str, Any]) -> Source:
    if options:
        raise UserError(f"source: {source.name} takes no options, got {', '.join(options)}")
    return source


def _value(text: str) -> Any:
    """A number, a truth value, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
