"""What a plain pre-norm ViT is made of, whoever wrote it: the form in which sources hand their weights to the runtime.

    x = [prefix; patches E^T + b + positions]            then the embedding's norm, where there is one (CLIP)
    x = x + s1 * (softmax(q k^T / sqrt(d) + r) v W_o^T + b_o),   q, k, v = norm1(x) W_qkv^T + b_qkv
    x = x + s2 * mlp(norm2(x))
    mlp(y) = act(y W_1^T + b_1) W_2^T + b_2,   swiglu: (silu(gate) * value) W_2^T + b_2,  [gate; value] = y W_1^T + b_1
    features = x, or norm(x), or norm(x) W_head^T where there is a head (CLIP's projection)

:meth:`Anatomy.forward` is the specification in plain PyTorch, to which :class:`cohobate.teacher.FrozenTeacher` is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.models.pixels import project
from cohobate.models.positions import bias_of_patches
from cohobate.tokens import TokenGrid

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}

T = TypeVar("T")


class Affine(NamedTuple):
    """Weight and bias of a LayerNorm, [D] each."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """One block. Matrices are [out, in]; qkv has the rows of q, of k, of v, heads contiguous inside each.

    With "swiglu", ``fc1`` has the rows of the gate first and those of the value behind them. ``scale1`` and ``scale2``
    are layer scales.
    """

    norm1: Affine
    qkv: Tensor  # [3D, D]
    qkv_bias: Tensor | None
    proj: Tensor  # [D, D]
    proj_bias: Tensor | None
    norm2: Affine
    fc1: Tensor  # [hidden, D], or [2 hidden, D]
    fc1_bias: Tensor | None
    fc2: Tensor  # [D, hidden]
    fc2_bias: Tensor | None
    scale1: Tensor | None = None  # [D]
    scale2: Tensor | None = None


@dataclass(frozen=True)
class Anatomy:
    """A plain pre-norm ViT: numbers that describe it, and its weights.

    ``patch`` is [D, row_length] with columns ordered (frame, row, column, channel), for pixels normalised by ``mean``
    and ``std`` (in units of [0, 1] pixels). ``prefix`` [P, D] are the class and register tokens, their positions added.
    ``positions`` [N, D] belong to the patches. ``relative`` [heads, P + N, P + N] is added to the scores of every block
    (a shared relative position bias). ``head`` [D_T, D] is what its features are projected by, behind the final norm.
    ``name`` says where it came from.

    Raises:
        UserError: parts that do not fit each other; the message names them.
    """

    name: str
    grid: TokenGrid
    heads: int
    patch: Tensor
    patch_bias: Tensor | None
    prefix: Tensor
    positions: Tensor | None
    blocks: tuple[BlockWeights, ...]
    norm: Affine | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: str = "gelu"
    eps: float = 1e-6
    embed_norm: Affine | None = None
    relative: Tensor | None = None
    head: Tensor | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        if self.width % self.heads:
            raise UserError(f"heads: expected a divisor of the width {self.width}, got {self.heads}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.grid.channels:
                raise UserError(f"{name}: expected {self.grid.channels} numbers, got {len(getattr(self, name))}")
        _check("patch", self.patch, self.width, self.grid.row_length)
        _check("prefix", self.prefix, self.prefix.shape[0], self.width)
        if self.positions is not None:
            _check("positions", self.positions, self.grid.size, self.width)
        if self.relative is not None:
            length = len(self.prefix) + self.grid.size
            _check("relative", self.relative, self.heads, length, length)
        if self.head is not None:
            _check("head", self.head, self.head.shape[0], self.width)
        gates = 2 if self.activation == "swiglu" else 1
        for i, block in enumerate(self.blocks):
            _check(f"blocks[{i}].qkv", block.qkv, 3 * self.width, self.width)
            _check(f"blocks[{i}].proj", block.proj, self.width, self.width)
            _check(f"blocks[{i}].fc1", block.fc1, gates * block.fc2.shape[1], self.width)
            _check(f"blocks[{i}].fc2", block.fc2, self.width, block.fc2.shape[1])

    @property
    def width(self) -> int:
        """D."""
        return self.patch.shape[0]

    @property
    def out(self) -> int:
        """Width of the features: D_T where there is a head, else D."""
        return self.width if self.head is None else self.head.shape[0]

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    def to(self, **where: Any) -> Anatomy:
        """The same with every tensor moved (``device=``, ``dtype=``)."""
        return _moved(self, where)

    def resized(self, grid: TokenGrid) -> Anatomy:
        """The same for input of another size, cut by the same patches: the table of positions is interpolated.

        Bicubic between the patches of a frame, antialiased, in fp32, as timm's ``resample_abs_pos_embed`` and DINOv2
        with registers do it (DINOv2 without registers and the other transformers models do not antialias). Prefix
        tokens keep their positions.

        Raises:
            UserError: another patch size, number of channels or number of frames; or relative positions, which are not
                interpolated.
        """
        if (grid.patch, grid.channels, grid.frames) != (self.grid.patch, self.grid.channels, self.grid.frames):
            raise UserError(f"grid: expected {self.grid} in another height and width, got {grid}")
        if self.relative is not None and grid.shape != self.grid.shape:
            raise UserError(f"grid: expected {self.grid.shape} tokens for relative positions, got {grid.shape}")
        table = self.positions
        if table is not None and grid.shape != self.grid.shape:
            frames, rows, columns = self.grid.shape
            x = table.float().view(frames, rows, columns, -1).permute(0, 3, 1, 2)
            x = F.interpolate(x, size=grid.shape[1:], mode="bicubic", antialias=True)
            table = x.permute(0, 2, 3, 1).reshape(grid.size, -1).to(table.dtype)
        return replace(self, grid=grid, positions=table)

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, layers: Sequence[int], rows: Tensor | None = None, *, norm: bool = False
    ) -> list[Tensor]:
        """Features after the blocks ``layers`` (1-based; 0 is the embedding), eagerly, in the weights' dtype.

        Args:
            pixels: [B, T, H, W, C], uint8, or floating and normalised by ``mean`` and ``std`` already.
            layers: ascending numbers in [0, depth].
            rows: [B, n] int32, the patches that are seen; None for all N.
            norm: apply the final norm to each residual stream. Where there is a head, norm and head always are.

        Returns:
            One [B, P + n, D] a layer, [B, P + n, D_T] where there is a head.
        """
        if pixels.is_floating_point():
            x = project(pixels, rows, self.patch, self.patch_bias, self.grid)
            if self.positions is not None:
                x = x + (self.positions if rows is None else self.positions[rows.long()])
        else:
            x = tokens.embed_patches(
                pixels, rows, self.patch, self.patch_bias, self.positions,
                patch=self.grid.patch, mean=self.mean, std=self.std, dtype=self.patch.dtype, backend="reference",
            )  # fmt: skip
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if self.embed_norm is not None:
            x = self._norm(x, self.embed_norm)
        bias = self.relative
        if bias is not None and rows is not None:
            bias = bias_of_patches(bias, rows, len(self.prefix))
        found = [x] if 0 in layers else []
        for i, block in enumerate(self.blocks[: max(layers)], start=1):
            x = self._block(x, block, bias)
            if i in layers:
                found.append(x)
        if self.norm is not None and (norm or self.head is not None):
            found = [self._norm(x, self.norm) for x in found]
        return found if self.head is None else [F.linear(x, self.head) for x in found]

    def _block(self, x: Tensor, block: BlockWeights, bias: Tensor | None) -> Tensor:
        qkv = F.linear(self._norm(x, block.norm1), block.qkv, block.qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        branch = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), block.proj, block.proj_bias)
        x = x + (branch if block.scale1 is None else branch * block.scale1)
        hidden = ACTIVATIONS[self.activation](F.linear(self._norm(x, block.norm2), block.fc1, block.fc1_bias))
        branch = F.linear(hidden, block.fc2, block.fc2_bias)
        return x + (branch if block.scale2 is None else branch * block.scale2)

    def _norm(self, x: Tensor, affine: Affine) -> Tensor:
        return F.layer_norm(x, (self.width,), affine.weight, affine.bias, self.eps)


def _check(name: str, matrix: Tensor, *shape: int) -> None:
    if tuple(matrix.shape) != shape:
        raise UserError(f"{name}: expected shape {list(shape)}, got {list(matrix.shape)}")


def _moved(part: T, where: dict[str, Any]) -> T:
    """``part`` with every tensor inside it, at any depth, moved."""
    if isinstance(part, Tensor):
        return part.to(**where)  # type: ignore[return-value]
    if isinstance(part, Affine):
        return Affine(*(x.to(**where) for x in part))  # type: ignore[return-value]
    if isinstance(part, tuple):
        return tuple(_moved(x, where) for x in part)  # type: ignore[return-value]
    if isinstance(part, (Anatomy, BlockWeights)):
        return replace(part, **{f.name: _moved(getattr(part, f.name), where) for f in fields(part)})
    return part
