"""What a run was made with: versions, devices, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cohobate import __version__
from cohobate.data import Manifest, VideoManifest
from cohobate.data.video.decode import describe_decoder
from cohobate.kernels import native
from cohobate.training.distributed import Ranks

_PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "simplejpeg", "pillow")


def environment(ranks: Ranks, files: Manifest) -> dict[str, Any]:
    """Plain values for ``environment.json``; where ``files`` are videos with what decodes them."""
    versions = {"cohobate": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = str(ranks.device)
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": versions,
        "device": device,
        "ranks": ranks.world,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set(),
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
    } | ({"video_decoder": describe_decoder()} if isinstance(files, VideoManifest) and not files.stills else {})


def _commit() -> str | None:
    """The source tree's commit, with ``+`` when files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
