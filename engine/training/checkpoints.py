"""Resume points: torch.distributed.checkpoint directories, written aside and renamed: none is ever half there."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cohobate.errors import UserError
from cohobate.training.distributed import Ranks, barrier

_PROGRESS = "progress.json"
_ASIDE = ".writing"


class Checkpoints:
    """The resume points of one run folder.

    Args:
        folder: ``<run>/checkpoints``. keep: how many of the last ones stay. ranks: every rank takes part in a save.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks

    def save(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> Path:
        """Write ``state`` (tensors, nested) and ``progress`` (plain values) as the resume point after update ``step``.

        The directory appears under its name only when every byte of it is written.
        """
        import torch.distributed.checkpoint as dcp

        final = self.folder / f"step_{step:09d}"
        aside = final.with_name(final.name + _ASIDE)
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
        barrier(self.ranks)
        with _quiet():
            dcp.save(state, checkpoint_id=aside, no_dist=not self.ranks.many)
        barrier(self.ranks)
        if self.ranks.first:
            (aside / _PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            for old in self.found()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        barrier(self.ranks)
        return final

    def finish(self) -> None:
        """Note in the newest resume point that nothing is left to do."""
        last = self.last()
        if last is not None and self.ranks.first:
            text = json.dumps(read_progress(last) | {"finished": True}, indent=1)
            aside = last / (_PROGRESS + _ASIDE)
            aside.write_text(text, encoding="utf-8")
            aside.replace(last / _PROGRESS)

    def found(self) -> list[Path]:
        """Complete resume points, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step_*/{_PROGRESS}") if _ASIDE not in path.parent.name)

    def last(self) -> Path | None:
        """The newest complete resume point."""
        found = self.found()
        return found[-1] if found else None


def read_progress(path: Path) -> dict[str, Any]:
    """The plain values of a resume point.

    Raises:
        UserError: ``path`` is no resume point.
    """
    file = path / _PROGRESS
    if not file.is_file():
        raise UserError(f"resume: expected a checkpoint directory with a {_PROGRESS}, got {str(path)!r}")
    progress: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return progress


def load(path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Read a resume point into the tensors of ``state``, in place."""
    import torch.distributed.checkpoint as dcp

    with _quiet():
        dcp.load(state, checkpoint_id=path, no_dist=not ranks.many)


def training_state(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a resume point holds: weights by module, and the optimizer's state by parameter name."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = {name: module.state_dict() for name, module in modules.items()}
    state["optimizer"] = get_optimizer_state_dict(_bundle(modules), optimizer)
    return state


def restore_optimizer(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give the optimizer the state that :func:`load` has read; the weights are already in place."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(_bundle(modules), optimizer, state["optimizer"])


def _bundle(modules: dict[str, nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


class _quiet(warnings.catch_warnings):
    """DCP warns that a single process is a single process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
