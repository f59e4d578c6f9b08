"""What the GPU tests share."""

from __future__ import annotations

import pytest
import torch


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Free cuBLAS's workspaces while CUDA is still alive: some torch builds abort at exit if they outlive it."""
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
