"""``cohobate bench``: the benchmarks that are installed, found by their file names."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from cohobate.cli.parsing import near
from cohobate.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the benchmark that is named."""
    found = importlib.util.find_spec("cohobate.benchmarks")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    names = sorted(info.name for info in pkgutil.iter_modules(folders) if _has_main(Path(folders[0]), info.name))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: cohobate bench NAME [options]\n\nbenchmarks: {', '.join(names) or 'none installed'}")
        return 0
    if arguments[0] not in names:
        raise UserError(f"bench: expected one of {', '.join(names)}; got {arguments[0]!r}{near(arguments[0], names)}")
    module = importlib.import_module(f"cohobate.benchmarks.{arguments[0]}")
    return int(module.main(arguments[1:]) or 0)


def _has_main(folder: Path, name: str) -> bool:
    """Whether a benchmark module has an entry point; its text is read, for importing them all takes seconds."""
    path = folder / f"{name}.py"
    path = path if path.is_file() else folder / name / "__init__.py"
    return path.is_file() and "def main(" in path.read_text(encoding="utf-8")
