"""The pieces of a pre-norm transformer, with timm's names, and the dtypes they compute in.

Weights are kept in fp32 (a frozen teacher keeps matrices in the compute dtype). A layer computes in the dtype of its
input; the residual stream has a dtype of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.kernels.backends import attend
from cohobate.kernels.transformer import add_norm, bias_gelu, linear
from cohobate.kernels.transformer.block import Parameters, in_one_call
from cohobate.models.positions import bias_of_queries

NORM_EPS = 1e-6
CHECKPOINTING = ("none", "operations", "blocks")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")  # names of ops, torch's and ours
ATTENTION = ("attention", "attn", "flash")  # words in the names of torch's, of ours, and of the other packages' ops
COMPILED_BLOCKS = 64  # kinds of calls of a block that may be compiled
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
    """nn.Linear that computes in its input's dtype, whatever dtype its parameters have.

    Attributes:
        shadow: bf16 copy of the weight that an optimizer keeps (``Updater``), or None; in no state_dict. Products read
            it instead of casting the weight, while it is what the weight is: nothing has changed the weight in place
            since (a change through ``.data``, which torch does not count, goes unnoticed).
    """

    shadow: Tensor | None = None
    _stamp: tuple[int, int] | None = None  # version and address of the weight that the shadow copies

    def reset_parameters(self) -> None:
        """Nothing: whole models are drawn at once, by :func:`draw`, from one generator."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return linear(x, self.weight, self.bias, shadow=self.matrix(x.dtype))

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) alone."""
        bias, shadow = (None if t is None else t[start:stop] for t in (self.bias, self.matrix(x.dtype)))
        return linear(x, self.weight[start:stop], bias, shadow=shadow)

    def product(self, x: Tensor) -> Tensor:
        """Without the bias, for an epilogue that adds it."""
        return linear(x, self.weight, shadow=self.matrix(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor | None:
        """The shadow, where it is the weight in ``dtype``; None in compiled code, which cannot ask."""
        if self.shadow is None or torch.compiler.is_compiling() or self.shadow.dtype != dtype:
            return None
        return self.shadow if self._stamp == (self.weight._version, self.weight.data_ptr()) else None

    @torch.no_grad()
    def write_shadow(self) -> Tensor:
        """Make the shadow, or write it anew, from what the weight is now."""
        if self.shadow is None:
            self.shadow = torch.empty_like(self.weight, dtype=torch.bfloat16, requires_grad=False)
        self.shadow.copy_(self.weight)
        self.mark_shadow()
        return self.shadow

    def mark_shadow(self) -> None:
        """Note that the shadow is what the weight is now."""
        self._stamp = self.weight._version, self.weight.data_ptr()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no optimizer that would keep its shadow."""
        return {key: value for key, value in self.__dict__.items() if key not in ("shadow", "_stamp")}


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
        if x.device.type == "cpu":  # the product adds the bias in its accumulators
            return self.fc2(bias_gelu(self.fc1(x)))
        return self.fc2(bias_gelu(self.fc1.product(x), self.fc1.bias))


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    ``layer_scale``: first value of the layer scales; None leaves them out. ``checkpointing``: see
    :func:`set_checkpointing`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, layer_scale: float | None = None) -> None:
        super().__init__()
        self.checkpointing = "none"
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
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._compute(stream, compute, drop, queries, bias)
        kept: dict[str, Any] = {"context_fn": _keep_products} if self.checkpointing == "operations" else {}
        found: Stream = checkpoint(
            self._compute, stream, compute, drop, queries, bias, use_reentrant=False, preserve_rng_state=False, **kept
        )  # nothing in it is random: drop path was drawn before
        return found

    def _compute(
        self, stream: Stream, compute: torch.dtype, drop: Tensor | None, queries: Tensor | None, bias: Tensor | None
    ) -> Stream:
        if queries is None and bias is None and stream.x.device.type == "cpu" and not torch.compiler.is_compiling():
            found = self._in_one_call(stream, compute, drop)
            if found is not None:
                return found
        stream, normed = self.norm1.add(stream, compute)
        branch = self.ls1(self.attn(normed, queries, bias))
        x = stream.x if queries is None else tokens.take(stream.x, queries)
        stream, normed = self.norm2.add(Stream(x, branch, None if drop is None else drop[0]), compute)
        return Stream(stream.x, self.ls2(self.mlp(normed)), None if drop is None else drop[1])

    def _in_one_call(self, stream: Stream, compute: torch.dtype, drop: Tensor | None) -> Stream | None:
        """The same by one kernel; None where there is none, or where somebody looks at or exchanged a part of it."""
        parameters = None if self.checkpointing == "operations" else _plain_parameters(self)
        if parameters is None:
            return None
        first, second = (None, None) if drop is None else drop
        found = in_one_call(
            stream.x, stream.branch, parameters, self.attn.heads, factor=stream.factor, drop=first, eps=self.norm1.eps,
            compute=compute,
        )  # fmt: skip
        return None if found is None else Stream(*found, second)


def _plain_parameters(block: Block) -> Parameters | None:
    """Of all parts; None unless each is what it was made as, with its biases and without a hook."""
    if _has_any_global_hook():
        return None
    attn, mlp = block.attn, block.mlp
    parts = (attn, mlp, block.ls1, block.ls2, block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
    found: list[Tensor | None] = []
    for part, kind in zip(parts, _KINDS, strict=True):
        state = vars(part)
        if type(part) is not kind or "forward" in state or any(state[hooks] for hooks in _HOOKS):
            return None
        own = state["_parameters"]
        found += [own.get("weight"), own.get("bias")] * (kind in (Norm, Linear))
    if any(p is None for p in found) or block.norm1.eps != block.norm2.eps:
        return None
    return Parameters(*cast(list[Tensor], found))


_KINDS = (Attention, Mlp, nn.Identity, nn.Identity, Norm, Linear, Linear, Norm, Linear, Linear)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


def set_checkpointing(module: nn.Module, kind: str) -> None:
    """Activation checkpointing of every block inside ``module``: what waits in memory for the backward pass.

    Loss and gradients are the same to the last bit. "none": all that the backward pass reads. "operations": the results
    of matrix products and attention; norms, GELU, casts and sums are computed again ("selective activation
    recomputation", Korthikanti et al., MLSys 2023). "blocks": a block's input alone, so its forward pass runs twice
    (Chen et al., "Training deep nets with sublinear memory cost", 2016).

    What ``use_backend`` or ``use_attention`` says around the forward pass has to hold for the backward pass too.

    Raises:
        UserError: another kind.
    """
    if kind not in CHECKPOINTING:
        raise UserError(f"checkpointing: expected one of {', '.join(CHECKPOINTING)}; got {kind!r}")
    for block in module.modules():
        if isinstance(block, Block):
            block.checkpointing = kind


def compile_blocks(module: nn.Module) -> None:
    """torch.compile of every block inside ``module``, in place: names of modules and of weights stay as they are.

    A block is compiled at its first call, and again for every other shape or set of arguments; blocks of one shape
    share the result. Values differ by rounding. Checkpointing goes into what is compiled.
    """
    dynamo = torch._dynamo.config  # torch's 8 are few: encoder, decoder, generators, first and last blocks, evaluation
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_BLOCKS)
    for block in module.modules():
        if isinstance(block, Block):
            block.compile(fullgraph=True, dynamic=False)


def _is_product(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Whether a result is kept: of a matrix product or of attention, by any of its backends, with its statistics."""
    library, _, name = operation.name().partition("::")
    found = name.partition(".")[0] in PRODUCTS or any(word in f"{library} {name}" for word in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = functools.partial(create_selective_checkpoint_contexts, _is_product)


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
