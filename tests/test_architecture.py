"""The arrows between rooms, kept by reading every import statement in the tree.

``benchmarks -> engine -> kernels``; inside engine ``cli -> training -> methods -> {models, teacher}``, with ``data``
beside them. Each room lists what it may import; an import that is not listed means a file is in the wrong room.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"engine": "cohobate", "kernels": "cohobate.kernels", "benchmarks": "cohobate.benchmarks"}

# Foundations that know nothing of each other's rooms: every room of the engine may import them.
BASE = {"errors", "tokens", "masking"}
PARTS = BASE | {"kernels", "models", "teacher", "methods", "data"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "tokens": {"errors"},
    "masking": {"errors", "tokens", "kernels"},
    "models": BASE | {"kernels"},
    "data": BASE | {"kernels"},
    "teacher": BASE | {"kernels", "models"},
    "methods": BASE | {"kernels", "models", "teacher"},
    "interop": BASE | {"kernels", "models", "teacher", "methods"},
    "evaluation": BASE | {"kernels", "models", "teacher", "data"},
    "report": {"errors"},
    "config": PARTS,
    "training": PARTS | {"evaluation", "config"},
    "planning": PARTS | {"config", "training"},
    "cli": PARTS | {"planning", "interop", "evaluation", "config", "training", "report", "benchmarks"},
    "__main__": {"cli"},
    "__init__": set(),
}
# Importing these costs time or needs hardware: only inside functions, in the files that are about them.
LAZY_EVERYWHERE = {
    "nvidia",
    "xformers",
    "flash_attn",
    "flash_attn_interface",
    "apex",
    "amp_C",
    "timm",
    "transformers",
    "av",
    "torchcodec",
}


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    """The first part of the path inside its folder: ``engine/models/vit.py`` -> ``models``."""
    first = path.relative_to(ROOT).parts[1]
    return first.removesuffix(".py")


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest])


def imports(path: Path, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each thing imported; ``from a.b import c`` gives ``a.b.c``."""
    package = module_name(path).split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in _outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *(node.module or "").split("."), alias.name]).replace("..", ".")


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported; ``if TYPE_CHECKING:`` bodies do not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def our_room(name: str) -> str | None:
    """The room of an imported name: ``cohobate.kernels.tokens`` -> ``kernels``; None for other people's packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "cohobate" and len(parts) > 1 else None


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_short_names(folder: str) -> None:
    """The folder names are not import names: ``kernels`` belongs to another project."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(folder)
        for line, name in imports(path)
        if name.split(".")[0] in (*FOLDERS, "tests")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_from_the_engine() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("kernels")
        for line, name in imports(path)
        if our_room(name) not in (None, "kernels")
    ]
    assert not wrong, "\n".join(wrong)


def test_engine_rooms_import_only_what_they_may() -> None:
    wrong = []
    for path in sources("engine"):
        room = room_of(path)
        assert room in MAY_IMPORT, f"{path.relative_to(ROOT)}: a new room; say in this test what it may import"
        allowed = MAY_IMPORT[room] | {room, "__version__"}
        for line, name in imports(path):
            target = our_room(name)
            if target is not None and target not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} must not import {name}")
    assert not wrong, "\n".join(wrong)


def test_the_rooms_have_no_cycle() -> None:
    """The table above is itself layered: following it from any room never comes back."""

    def reachable(room: str, seen: frozenset[str]) -> None:
        assert room not in seen, f"{room} can be reached from itself"
        for other in MAY_IMPORT.get(room, ()):
            reachable(other, seen | {room})

    for room in MAY_IMPORT:
        reachable(room, frozenset())


@pytest.mark.parametrize("folder", FOLDERS)
def test_optional_packages_are_imported_inside_functions(folder: str) -> None:
    """DALI and the optional back ends are never imported by importing a module of ours."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name} at import time"
        for path in sources(folder)
        for line, name in imports(path, top_level_only=True)
        if name.split(".")[0] in LAZY_EVERYWHERE
    ]
    assert not wrong, "\n".join(wrong)


def test_the_tree_is_there() -> None:
    """An empty tree would pass everything above."""
    assert len(sources("engine")) > 2 and len(sources("kernels")) > 3
