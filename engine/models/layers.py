"""The pieces of a pre-norm transformer, with timm's names, and the dtypes they compute in.

Weights are kept in fp32 (a frozen teacher keeps matrices in the compute dtype). A layer computes in the dtype of its
input; the residual stream has a dtype of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.models.attention import attend

NORM_EPS = 1e-6
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Precision:
    """``compute``: dtype of matrix products and of the branches; ``residual``: dtype of the stream they add to.

    Raises:
        UserError: a dtype that is not floating point.
    """

    compute: torch.dtype = torch.bfloat16
    residual: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("compute", "residual"):
            if getattr(self, name) not in _FLOATS:
                raise UserError(f"{name}: expected float32, bfloat16, float16 or float64, got {getattr(self, name)}")


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype: the weight is cast once a call, the gradient once a call."""

    def reset_parameters(self) -> None:
        """Nothing: whole models are drawn at once, by :func:`draw`, from one generator."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return self.part(x, 0, self.out_features)

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) alone."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if (start, stop) != (0, self.out_features):
            weight, bias = weight[start:stop], None if bias is None else bias[start:stop]
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Norm(nn.LayerNorm):
    """LayerNorm of the residual stream, statistics in fp32, result in the dtype that the next product wants."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., D] -> [..., D] in ``dtype`` (default x's)."""
        out = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return out.to(dtype or x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection, rows q, k, v and heads contiguous inside each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, n, D] when only the rows ``queries`` [B, n] int32 are asked for."""
        batch, length, width = x.shape
        if queries is None:
            q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        else:
            q = self.qkv.part(tokens.take(x, queries), 0, width).view(batch, queries.shape[1], self.heads, -1)
            k, v = self.qkv.part(x, width, 3 * width).view(batch, length, 2, self.heads, -1).unbind(2)
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = Norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, x: Tensor, compute: torch.dtype, drop: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """Residual stream [B, N, D] -> [B, N, D], or [B, n, D]: the rows ``queries`` alone, exactly.

        ``drop`` [2, B, 1, 1]: factors of the two branches (drop path), None for none.
        """
        branch = self.attn(self.norm1(x, compute), queries)
        if queries is not None:
            x = tokens.take(x, queries)
        x = _add(x, branch, None if drop is None else drop[0])
        branch = self.mlp(self.norm2(x, compute))
        return _add(x, branch, None if drop is None else drop[1])


def _add(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    return (x + (branch if factor is None else branch * factor)).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth a sample: rates rise linearly from 0 to ``rate`` over the blocks, survivors scale by 1 / keep.

    Raises:
        UserError: a rate outside [0, 1).
    """

    keep: Tensor

    def __init__(self, rate: float, depth: int) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise UserError(f"drop_path: expected a rate in [0, 1), got {rate}")
        self.rate = rate
        keep = 1 - torch.linspace(0, rate, depth, dtype=torch.float64)
        self.register_buffer("keep", keep.float().view(-1, 1, 1), persistent=False)

    def forward(self, batch: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Factors [depth, 2, batch, 1, 1] for both branches of every block; None when nothing can be dropped."""
        if not self.training or self.rate == 0:
            return None
        depth = self.keep.shape[0]
        uniform = torch.rand(depth, 2, batch, generator=generator, device=self.keep.device)
        return ((uniform < self.keep) / self.keep)[..., None, None]


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    compute: torch.dtype,
    drop: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Every block in turn; the last one only for the rows ``queries`` when they are given."""
    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        x = block(x, compute, None if drop is None else drop[i], queries if i == last else None)
    return tokens.take(x, queries) if queries is not None and last < 0 else x


def blocks_flops(blocks: nn.ModuleList, tokens: int, queries: int) -> int:
    """Multiply-adds x 2 of one sample through the blocks, the last one for ``queries`` rows but all keys and values."""
    total = 0
    for i, block in enumerate(blocks):
        rows = queries if i == len(blocks) - 1 else tokens
        first = cast(Block, block).mlp.fc1
        width, hidden = first.in_features, first.out_features
        total += 4 * width**2 * (tokens + rows) + 4 * rows * tokens * width + 4 * rows * width * hidden
    return total


@torch.no_grad()
def draw(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw every Linear (Xavier uniform, bias 0) and reset every Norm (1, 0) of ``module``, in order of their names.

    Numbers are drawn on the CPU in fp32, so a seeded generator gives the same weights on every device and rank.
    """
    for child in module.modules():
        if isinstance(child, Linear):
            draw_xavier(child.weight, generator)
            if child.bias is not None:
                child.bias.zero_()
        elif isinstance(child, Norm):
            child.weight.fill_(1)
            child.bias.zero_()


@torch.no_grad()
def draw_xavier(weight: Tensor, generator: torch.Generator | None) -> None:
    """Xavier uniform over the matrix [out, everything else]: bound sqrt(6 / (in + out))."""
    draw_uniform(weight, (6 / (weight.shape[0] + weight[0].numel())) ** 0.5, generator)


@torch.no_grad()
def draw_uniform(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Uniform in [-bound, bound)."""
    tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def draw_normal(tensor: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal with mean 0."""
    tensor.copy_(torch.empty(tensor.shape).normal_(0, std, generator=generator))
