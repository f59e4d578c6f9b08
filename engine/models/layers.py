"""The pieces of a pre-norm transformer, with timm's names, and the dtypes they compute in.

Weights are kept in fp32 (a frozen teacher keeps matrices in the compute dtype). A layer computes in the dtype of its
input; the residual stream has a dtype of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.kernels.backends import attend
from cohobate.kernels.transformer import add_norm, bias_gelu, linear
from cohobate.models.positions import bias_of_queries

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
    """nn.Linear that computes in its input's dtype, whatever dtype its parameters have."""

    def reset_parameters(self) -> None:
        """Nothing: whole models are drawn at once, by :func:`draw`, from one generator."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return linear(x, self.weight, self.bias)

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) alone."""
        return linear(x, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def product(self, x: Tensor) -> Tensor:
        """Without the bias, for an epilogue that adds it."""
        return linear(x, self.weight)


class Norm(nn.LayerNorm):
    """LayerNorm of the residual stream, statistics in fp32, result in the dtype that the next product wants."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., D] -> [..., D] in ``dtype`` (default x's)."""
        return self.add(Stream(x), dtype)[1]

    def add(self, stream: Stream, dtype: torch.dtype | None = None) -> tuple[Stream, Tensor]:
        """The stream with its branch added, and its norm: one pass over both."""
        x, normed = add_norm(
            stream.x,
            stream.branch,
            weight=self.weight,
            bias=self.bias,
            factor=stream.factor,
            eps=self.eps,
            dtype=dtype or stream.x.dtype,
        )
        return Stream(x), normed


class Stream(NamedTuple):
    """The residual stream [B, N, D] and a branch that is not added to it yet: the next norm does both in one pass.

    ``factor`` [B] fp32 scales a sample's branch (drop path), None for none.
    """

    x: Tensor
    branch: Tensor | None = None
    factor: Tensor | None = None

    def settled(self) -> Tensor:
        """The sum, in x's dtype."""
        if self.branch is None:
            return self.x
        branch = self.branch if self.factor is None else self.branch * self.factor[:, None, None]
        return (self.x + branch).to(self.x.dtype)


class LayerScale(nn.Module):
    """A branch times one learned number a channel, in the branch's dtype (CaiT, Touvron et al., ICCV 2021)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gamma.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection, rows q, k, v and heads contiguous inside each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, queries: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, n, D] when only the rows ``queries`` [B, n] int32 are asked for.

        ``bias`` [H, N, N] or [B, H, N, N] is added to the scores of all rows; None for none.
        """
        width = x.shape[-1]
        if queries is None:
            return self.proj(attend(self.qkv(x), self.heads, bias=bias))
        q = self.qkv.part(tokens.take(x, queries), 0, width)
        bias = None if bias is None else bias_of_queries(bias, queries)
        return self.proj(attend(self.qkv.part(x, width, 3 * width), self.heads, q, bias=bias))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.device.type == "cpu":  # the product adds the bias in its accumulators, and torch's GELU is the fastest
            return self.fc2(F.gelu(self.fc1(x)))
        return self.fc2(bias_gelu(self.fc1.product(x), self.fc1.bias))


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    ``layer_scale``: first value of the layer scales; None leaves them out.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = Norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self,
        stream: Stream,
        compute: torch.dtype,
        drop: Tensor | None = None,
        queries: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Stream:
        """The residual stream [B, N, D] behind the block, or [B, n, D]: the rows ``queries`` alone, exactly.

        ``drop`` [2, B]: factors of the two branches (drop path), None for none. ``bias``: as in :class:`Attention`.
        """
        stream, normed = self.norm1.add(stream, compute)
        branch = self.ls1(self.attn(normed, queries, bias))
        x = stream.x if queries is None else tokens.take(stream.x, queries)
        stream, normed = self.norm2.add(Stream(x, branch, None if drop is None else drop[0]), compute)
        return Stream(stream.x, self.ls2(self.mlp(normed)), None if drop is None else drop[1])


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
        """Factors [depth, 2, batch] for both branches of every block; None when nothing can be dropped."""
        if not self.training or self.rate == 0:
            return None
        depth = self.keep.shape[0]
        uniform = torch.rand(depth, 2, batch, generator=generator, device=self.keep.device)
        return (uniform < self.keep) / self.keep


def run_blocks(
    blocks: nn.ModuleList,
    stream: Stream,
    compute: torch.dtype,
    drop: Tensor | None = None,
    queries: Tensor | None = None,
    bias: Tensor | None = None,
) -> Stream:
    """Every block in turn; the last one only for the rows ``queries`` when they are given. All share ``bias``."""
    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        stream = block(stream, compute, None if drop is None else drop[i], queries if i == last else None, bias)
    return Stream(tokens.take(stream.settled(), queries)) if queries is not None and last < 0 else stream


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
    """Draw every Linear (Xavier uniform, bias 0) and reset every Norm (1, 0) and LayerScale, in order of their names.

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
        elif isinstance(child, LayerScale):
            child.gamma.fill_(child.value)


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
