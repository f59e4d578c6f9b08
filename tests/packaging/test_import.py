"""``import cohobate`` and everything under it: what is loaded, what may be missing, and that no GPU is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cohobate

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"engine": "cohobate", "kernels": "cohobate.kernels", "benchmarks": "cohobate.benchmarks"}
MAIN_ONLY = {"cohobate.__main__"}  # importing it would run the command line

# Missing, as Python itself marks it: `import` raises ModuleNotFoundError and find_spec() returns None.
OPTIONAL = ("triton", "nvidia", "simplejpeg", "sklearn", "xformers", "flash_attn", "apex", "timm", "transformers")
MISSING = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
GATHER = """
import torch
from cohobate.kernels import tokens
pixels = torch.randint(0, 256, (2, 1, 8, 8, 3), dtype=torch.uint8)
rows = tokens.gather_patches(pixels, None, patch=(1, 4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
print(tuple(rows.shape))
"""


def ours() -> list[str]:
    """Every importable module of the tree, by its installed name."""
    found = []
    for folder, name in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append(".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    return [name for name in found if name not in MAIN_ONLY]


def python(script: str, cwd: Path, **environment: str) -> str:
    """Run a script away from the source tree; its standard output. A failure shows the traceback."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light(tmp_path: Path) -> None:
    heavy = ["torch", "triton", "nvidia", "numpy", "matplotlib", "tensorboard", "tyro", "rich", "yaml", "PIL"]
    script = f"import sys, cohobate; print([m for m in {heavy!r} if m in sys.modules])"
    assert python(script, tmp_path).strip() == "[]"


def test_lazy_attributes_load_on_use(tmp_path: Path) -> None:
    script = "import sys, cohobate; cohobate.TokenGrid; cohobate.kernels; print('torch' in sys.modules, dir(cohobate))"
    loaded, listing = python(script, tmp_path).split(" ", 1)
    assert loaded == "True" and "TokenGrid" in listing


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = cohobate.no_such_thing


def test_versions_agree() -> None:
    assert metadata.version("cohobate") == cohobate.__version__


def test_short_names_are_not_ours(tmp_path: Path) -> None:
    script = "import importlib.util as u; print([n for n in ('kernels', 'engine', 'benchmarks') if u.find_spec(n)])"
    assert str(ROOT) not in python(script, tmp_path) and python(script, tmp_path).strip() == "[]"


def test_ops_work_without_optional_packages(tmp_path: Path) -> None:
    assert python(MISSING + GATHER, tmp_path, PATH="").strip() == "(2, 4, 48)"


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "AttributeError", "OSError"])
def test_ops_work_when_triton_is_broken(error: str, tmp_path: Path) -> None:
    """An installed Triton that fails to import has been seen to raise each of these."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"raise {error}('this Triton is broken')\n")
    assert python(GATHER, tmp_path, PYTHONPATH=str(tmp_path)).strip() == "(2, 4, 48)"


def test_every_module_imports_without_optional_packages(tmp_path: Path) -> None:
    script = f"import importlib\nfor name in {ours()!r}: importlib.import_module(name)"
    python(MISSING + script, tmp_path, PATH="")


def test_no_import_touches_cuda(tmp_path: Path) -> None:
    """Any question put to CUDA while importing fails here, on a machine without a GPU too."""
    script = f"""
import importlib, torch
def refuse(name):
    def call(*args, **kwargs): raise SystemExit(f'torch.cuda.{{name}} was called at import')
    return call
for name in ('is_available', 'device_count', 'get_device_capability', 'get_device_properties', 'current_device',
             'init', '_lazy_init', 'Stream', 'Event', 'synchronize'):
    setattr(torch.cuda, name, refuse(name))
for name in {ours()!r}:
    importlib.import_module(name)
print(torch.cuda.is_initialized())
"""
    assert python(script, tmp_path).strip() == "False"
