"""What is built and installed: names, contents, tags, and the native library's three settings.

Every build runs in a copy of the tree, so nothing is left in the tree itself. The C++ kernels are not compiled here: a
one-line CMakeLists.txt stands in for them, because what is tested is what setup.py does before and after CMake.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = next(path for path in sys.path if path.endswith("site-packages"))
TOP_LEVEL = {"cohobate", "cohobate-0.1.0.dist-info"}
WRITES_A_LIBRARY = """cmake_minimum_required(VERSION 3.22)
project(stand_in LANGUAGES NONE)
file(WRITE "${COHOBATE_OUTPUT_DIR}/libcohobate_native.so" "not a real library")
"""
FAILS = """cmake_minimum_required(VERSION 3.22)
project(stand_in LANGUAGES NONE)
message(FATAL_ERROR "no compiler of yesterday")
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the native library is built on Linux only")


def copy_tree(where: Path) -> Path:
    """The working tree without what git ignores."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "results")
    shutil.copytree(ROOT, where, ignore=ignore)
    return where


def run(*command: str, native: str | None = "0", cwd: Path | None = None, check: bool = True) -> str:
    """Run a command; its output, with COHOBATE_NATIVE set as asked. A failure shows the output."""
    environment = {key: value for key, value in os.environ.items() if key != "COHOBATE_NATIVE"}
    if native is not None:
        environment["COHOBATE_NATIVE"] = native
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, **both)
    assert (done.returncode == 0) == check, f"exit code {done.returncode}:\n{done.stdout}"
    return done.stdout


def build_wheel(source: Path, out: Path, native: str | None, check: bool = True) -> tuple[list[Path], str]:
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    output = run(*pip, "-w", str(out), str(source), native=native, check=check)
    return sorted(out.glob("*.whl")), output


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheels, _ = build_wheel(source, tmp_path_factory.mktemp("wheels"), native="0")
    return wheels[0]


@pytest.fixture
def blank(tmp_path: Path) -> tuple[str, Path]:
    """(python, site-packages) of an environment without cohobate that still sees torch and setuptools."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # A path in a .pth file is searched, but its own .pth files, and so our editable install there, are not read.
    (site / "outer.pth").write_text(SITE + "\n")
    return str(tmp_path / "venv" / "bin" / "python"), site


def test_pure_wheel_is_for_every_platform(wheel: Path) -> None:
    assert wheel.name == "cohobate-0.1.0-py3-none-any.whl"


def test_nothing_else_is_installed_at_the_top(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names(wheel)} == TOP_LEVEL


def test_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    expected = {"cohobate/py.typed"}
    inside_of = {"engine": "cohobate", "kernels": "cohobate/kernels", "benchmarks": "cohobate/benchmarks"}
    for folder, inside in inside_of.items():
        for pattern in ("*.py", "*.yaml", "*.html", "*.css", "*.json"):
            for path in (ROOT / folder).rglob(pattern):
                if "results" not in path.parts and "__pycache__" not in path.parts:
                    expected.add(f"{inside}/{path.relative_to(ROOT / folder)}")
    inside_wheel = {name for name in names(wheel) if name.startswith("cohobate/")}
    assert inside_wheel == expected
    assert any(name.startswith("cohobate/recipes/") and name.endswith(".yaml") for name in inside_wheel)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("cohobate-0.1.0.dist-info/METADATA").decode()
        entries = archive.read("cohobate-0.1.0.dist-info/entry_points.txt").decode()
        licence = archive.read("cohobate-0.1.0.dist-info/licenses/LICENSE").decode()
    torch_lines = [line for line in metadata.splitlines() if re.match(r"Requires-Dist: torch\b", line)]
    assert torch_lines == ["Requires-Dist: torch>=2.11"]  # an upper bound would replace somebody's torch
    assert "cohobate = cohobate.cli:main" in entries
    assert "Apache License" in licence


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    with tarfile.open(tmp_path / "cohobate-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / "cohobate-0.1.0"
    sources = {path.name for path in (ROOT / "kernels" / "csrc").iterdir()}
    assert sources and {path.name for path in (unpacked / "kernels" / "csrc").iterdir()} == sources
    again, _ = build_wheel(unpacked, tmp_path / "wheels", native="0")
    assert names(again[0]) == names(wheel)


def test_wheel_with_the_library_names_its_platform(source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree")
    (tree / "CMakeLists.txt").write_text(WRITES_A_LIBRARY)
    wheels, output = build_wheel(tree, tmp_path / "wheels", native="1")
    assert "native kernels built" in output
    assert wheels[0].name.startswith("cohobate-0.1.0-py3-none-linux_")
    assert "cohobate/kernels/libcohobate_native.so" in names(wheels[0])
    assert {name.split("/")[0] for name in names(wheels[0])} == TOP_LEVEL  # no .data/purelib beside it


def test_a_library_that_does_not_build_is_one_line_or_an_error(source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree")
    (tree / "CMakeLists.txt").write_text(FAILS)
    wheels, output = build_wheel(tree, tmp_path / "wheels", native=None)
    assert "native kernels not built: " in output and "no compiler of yesterday" in output
    assert wheels[0].name.endswith("py3-none-any.whl")
    _, output = build_wheel(tree, tmp_path / "none", native="1", check=False)
    assert "COHOBATE_NATIVE=1, but the library cannot be built" in output and "no compiler of yesterday" in output


def test_without_torch_the_reason_is_told(source: Path, tmp_path: Path) -> None:
    """What an isolated build sees: setuptools, but no torch."""
    script = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "torch" else find(name)
sys.argv = ["setup.py", "build_native", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    output = run(sys.executable, "-c", script, native=None, cwd=source)
    assert "native kernels not built: torch is not importable here" in output
    assert not (source / "kernels" / "libcohobate_native.so").exists()


def test_an_unknown_setting_is_refused(source: Path) -> None:
    output = run(sys.executable, "setup.py", "build_native", native="yes", cwd=source, check=False)
    assert "COHOBATE_NATIVE must be 0, 1 or unset, got 'yes'" in output


def test_editable_install(source: Path, blank: tuple[str, Path], tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree")
    (tree / "CMakeLists.txt").write_text(WRITES_A_LIBRARY)
    python, _ = blank
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-build-isolation", "--no-deps"]
    run(*pip, "--no-index", "-e", str(tree), native="1")
    assert (tree / "kernels" / "libcohobate_native.so").is_file()  # in place: where an editable install looks for it
    show = "import cohobate, cohobate.kernels, cohobate.benchmarks as b; print(cohobate.__file__, b.__path__[0])"
    assert run(python, "-c", show, cwd=tmp_path).split() == [f"{tree}/engine/__init__.py", f"{tree}/benchmarks"]
    (tree / "engine" / "later.py").write_text("value = 5\n")  # a new file needs no new install
    assert run(python, "-c", "import cohobate.later as m; print(m.value)", cwd=tmp_path).strip() == "5"
    for name in ("kernels", "engine", "benchmarks", "tests"):
        where = run(python, "-c", f"import importlib.util as u; print(u.find_spec({name!r}))", cwd=tmp_path)
        assert str(tree) not in where, f"`import {name}` finds this project"


def test_installed_wheel_runs(wheel: Path, blank: tuple[str, Path], tmp_path: Path) -> None:
    python, site = blank
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel))
    place = "import cohobate, cohobate.kernels; print(cohobate.__file__)"
    assert run(python, "-c", place, cwd=tmp_path).strip() == str(site / "cohobate" / "__init__.py")
    script = site.parents[2] / "bin" / "cohobate"
    assert "train" in run(str(script), "--help", cwd=tmp_path)
