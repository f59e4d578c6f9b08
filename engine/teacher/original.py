"""A teacher that runs as it is: a module that could not be rebuilt, behind the interface of the runtime."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.teacher.sources import Source
from cohobate.teacher.targets import check_finite, target_layers


class OriginalTeacher(nn.Module):
    """Features of a frozen module through its own forward, with what :class:`cohobate.teacher.FrozenTeacher` offers.

    Nothing is skipped: it computes every patch, row and layer, in the dtype of its weights. It has no parameters, no
    buffers and no entry in any ``state_dict``; the module is copied, so that its owner may go on training it.

    Args:
        source: with an ``original``.
        layers: which blocks' outputs are targets, 1-based and ascending; 0 is the embedding. Default: the last block.

    Attributes:
        name, grid, width, prefix, mean, std: of the module. layers, depth: the targets, and the last of them.

    Raises:
        UserError: a source without its module, or layers that are not ascending inside [0, depth].
    """

    def __init__(self, source: Source, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        if source.original is None:
            raise UserError(f"source: expected one that has its own module, got {source.name}")
        self.layers = target_layers(layers, source.depth)
        self.name, self.grid, self.width, self.prefix = source.name, source.grid, source.width, source.prefix
        self.mean, self.std, self.depth = source.mean, source.std, self.layers[-1]
        self.reasons = source.reasons
        module = copy.deepcopy(source.original.module).eval().requires_grad_(False)
        self._original = source.original.with_module(module)  # no nn.Module, so none of its weights is registered here
        self._fingerprint = self._digest()
        self._flops: int | None = None
        self._checked = False
        self.train(False)

    def train(self, mode: bool = True) -> OriginalTeacher:
        """Always eval."""
        return super().train(False)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from the module's tensors and the layers; the same on every device."""
        return self._fingerprint

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, rows: Tensor | None = None, *, queries: Tensor | None = None, norm: bool = False
    ) -> list[Tensor]:
        """Targets, one a layer.

        Args:
            pixels: [B, T, H, W, C], uint8, or floating and normalised by ``mean`` and ``std`` already.
            rows: None alone: the module sees every patch.
            queries: [B, q] int32 in [0, P + N), the rows that are returned; None for all.
            norm: False alone: which norm is the final one is not known.

        Returns:
            [B, q or P + N, D_T] each, in the module's dtype, without a graph.

        Raises:
            UserError: rows or norm, which only a rebuilt teacher can serve; pixels of another shape; or, in the first
                call, a layer whose features are not finite.
        """
        if rows is not None or norm:
            name, wanted = ("rows", "None, all patches") if rows is not None else ("norm", "False")
            reasons = "; ".join(self.reasons)
            raise UserError(f"{name}: expected {wanted}, for {self.name} runs as it is ({reasons})")
        found = self._original.hidden_states(pixels, self.layers)
        if not self._checked and not torch.compiler.is_compiling():
            check_finite(found, self.layers, self.name)
            self._checked = True
        return found if queries is None else [tokens.take(x, queries) for x in found]

    def flops(self, queries: int | None = None, patches: int | None = None) -> int:
        """Multiply-adds x 2 of one sample, counted once while the module runs; it skips nothing, whatever is asked."""
        if self._flops is None:
            blank = torch.zeros(1, *self.grid.pixel_shape, dtype=torch.uint8, device=self._original.device)
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused ones are not counted
                self._original.hidden_states(blank, self.layers)
            self._flops = counter.get_total_flops()
        return self._flops

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OriginalTeacher:
        """Move to a device; a change of dtype is not taken over."""
        device = fn(torch.empty(0, device=self._original.device)).device
        self._original = self._original.with_module(self._original.module.to(device))
        super()._apply(fn, recurse)
        return self

    def _digest(self) -> str:
        original = self._original
        digest = hashlib.sha256(repr((self.layers, original.mean, original.std)).encode())
        for name, tensor in sorted(original.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]
