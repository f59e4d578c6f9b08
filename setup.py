"""Build script: folder-to-name mapping and the optional native CPU library (metadata is in pyproject.toml).

The repository keeps short folder names (``engine/``, ``kernels/``, ``benchmarks/``); what is installed is one package:
``cohobate``, ``cohobate.kernels`` and ``cohobate.benchmarks``. No other top-level name is installed.

The native library is compiled by CMake (see CMakeLists.txt) against the torch that is importable here. torch itself is
never imported: its folder is looked up, and its CMake files and headers are used. Environment:

``COHOBATE_NATIVE=0``  do not build the library; the wheel is pure Python
``COHOBATE_NATIVE=1``  fail if it cannot be built
unset                  build it if possible, otherwise say in one line why not
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
FOLDERS = {"cohobate": "engine", "cohobate.kernels": "kernels", "cohobate.benchmarks": "benchmarks"}
LIBRARY = "libcohobate_native.so"


def packages() -> list[str]:
    """Dotted names of every package under the mapped folders (a package is a folder with ``__init__.py``)."""
    found = list(FOLDERS)
    for name, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.append(".".join((name, *init.parent.relative_to(ROOT / folder).parts)))
    return sorted(set(found))


class NativeUnavailable(Exception):
    """The native library cannot be built here; the message says why, in one line."""


def cmake_prefix() -> Path:
    """Folder of torch's CMake package files, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NativeUnavailable("torch is not importable here (install it first and pass --no-build-isolation)")
    prefix = Path(spec.origin).parent / "share" / "cmake"
    if not prefix.is_dir():
        raise NativeUnavailable(f"this torch has no CMake files: {prefix} is missing")
    return prefix


def tool(name: str) -> str | None:
    """Path of a build tool, the one installed beside this Python first."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def build_library(output: Path) -> None:
    """Compile ``kernels/csrc`` and leave the shared library in ``output``."""
    prefix, cmake, ninja = cmake_prefix(), tool("cmake"), tool("ninja")
    if cmake is None:
        raise NativeUnavailable("cmake was not found (pip install cmake ninja)")
    work = ROOT / "build" / "native"
    configure = [cmake, "-S", str(ROOT), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCOHOBATE_OUTPUT_DIR={output}"]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    compile_ = [cmake, "--build", str(work), "--config", "Release"]
    for step, command in (("configure", configure), ("compile", compile_)):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.stderr.write(done.stdout)
            raise NativeUnavailable(f"cmake could not {step} them (its output is above)")
    if not (output / LIBRARY).is_file():
        raise NativeUnavailable(f"CMake finished but left no {LIBRARY} in {output}")


class BuildNative(Command):
    """``setup.py build_native [--inplace]``: compile the native library, into kernels/ or into the wheel's tree."""

    description = "compile the native CPU kernels with CMake"
    user_options = [("inplace", "i", "leave the library in kernels/")]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def output(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / "kernels"
        return Path(str(self.build_lib)).resolve() / "cohobate" / "kernels"

    def run(self) -> None:
        wish = os.environ.get("COHOBATE_NATIVE", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"COHOBATE_NATIVE must be 0, 1 or unset, got {wish!r}")
        if wish == "0":
            print("cohobate: native kernels not built: COHOBATE_NATIVE=0")
            return
        try:
            build_library(self.output())
        except NativeUnavailable as reason:
            if wish == "1":
                raise SystemExit(f"cohobate: COHOBATE_NATIVE=1, but the library cannot be built: {reason}") from None
            print(f"cohobate: native kernels not built: {reason}")
        else:
            print(f"cohobate: native kernels built: {self.output() / LIBRARY}")

    def get_source_files(self) -> list[str]:
        sources = [ROOT / "CMakeLists.txt", *(ROOT / "kernels" / "csrc").rglob("*")]
        return [str(path.relative_to(ROOT)) for path in sources if path.is_file()]

    def get_outputs(self) -> list[str]:
        library = self.output() / LIBRARY
        return [str(library)] if library.is_file() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """The usual build, then the native library."""

    sub_commands = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    """``py3-none-<platform>`` with the library inside (it uses no Python ABI), ``py3-none-any`` without."""

    def run(self) -> None:
        build_lib = Path(self.get_finalized_command("build").build_lib)
        shutil.rmtree(build_lib, ignore_errors=True)  # files deleted from the tree must not come back from an old build
        self.run_command("build")
        if (build_lib / "cohobate" / "kernels" / LIBRARY).is_file():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # type: ignore[method-assign]
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={
        "cohobate": ["py.typed", "**/*.yaml", "**/*.html", "**/*.css"],
        "cohobate.kernels": ["**/*.json"],
    },
    include_package_data=False,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
)
