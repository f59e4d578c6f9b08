"""One process or many: who we are, and the few things that ranks say to each other."""

from __future__ import annotations

import datetime
import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cohobate.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers (torchrun's environment; alone without it)."""

    rank: int
    world: int
    device: torch.device
    joined: bool = False  # whether start() made the process group, so that stop() ends it

    @property
    def first(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1


def start(device: str = "auto") -> Ranks:
    """Join the process group if torchrun started us, and choose the device.

    Raises:
        UserError: another kind of device, or CUDA asked for where there is none.
    """
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {device!r}")
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: expected one that is available here (cpu), got {device}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if kind == "cuda" and world > 1:
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = torch.device(kind)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # Rank 0 evaluates while the others wait, so the usual ten minutes can be too few.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return Ranks(rank, world, chosen, joined)


def stop(ranks: Ranks) -> None:
    """Leave the process group, if :func:`start` made it."""
    if ranks.joined and dist.is_initialized():
        dist.destroy_process_group()


def barrier(ranks: Ranks) -> None:
    """Wait for every rank."""
    if ranks.many:
        dist.barrier()


def sum_over_ranks(ranks: Ranks, vector: Tensor) -> Tensor:
    """The elementwise sum over ranks, in place; nothing waits for the device."""
    if ranks.many:
        dist.all_reduce(vector)
    return vector


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for one purpose: a hash of ``seed`` and of what it is for, the same on every rank and machine."""
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
