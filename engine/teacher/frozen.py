"""The frozen teacher's runtime: the exact features of a ViT, computing only the layers and rows that are read.

Weights are prepared once: the affine part of a norm goes into the product behind it and a layer scale into the product
before it (exact in real arithmetic, done in fp32), matrices are cast to the compute dtype and, on a CPU, laid out for
their kernel. A call embeds the patches asked for straight from uint8, stops behind the last layer asked for, and
in the last block computes queries, projection and MLP for the rows that are read alone. No autocast, no gradient; on
CUDA a shape is captured in a graph and replayed (:mod:`.graphs`). :func:`cohobate.teacher.fp8.quantise` makes it fp8.

:meth:`cohobate.teacher.anatomy.Anatomy.forward` is the reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.kernels.backends import attend
from cohobate.kernels.transformer import add_norm, add_norm_fp8
from cohobate.kernels.transformer.block import Products, packed_blocks, packed_in_one_call
from cohobate.models import Precision, VisionTransformer
from cohobate.models.positions import bias_of_patches, bias_of_queries
from cohobate.models.vit import embed_tokens
from cohobate.teacher.anatomy import Affine, Anatomy, BlockWeights
from cohobate.teacher.graphs import Replays, replayable
from cohobate.teacher.product import GELU, Product, moved
from cohobate.teacher.sources import own
from cohobate.teacher.targets import check_finite, target_layers

INITS = ("copy", "independent")


class Layer:
    """The products of one block, folded and cast.

    ``qkv_scale``, ``fc1_scale``: static scales of the float8 that those two read from the norms; None for no float8.
    """

    qkv_scale: float | None = None
    fc1_scale: float | None = None

    def __init__(self, block: BlockWeights, activation: str, dtype: torch.dtype) -> None:
        self.qkv = Product(*_after_norm(block.norm1, block.qkv, block.qkv_bias), dtype)
        self.proj = Product(*_before_scale(block.scale1, block.proj, block.proj_bias), dtype)
        self.fc1 = Product(*_after_norm(block.norm2, block.fc1, block.fc1_bias), dtype, activation)
        self.fc2 = Product(*_before_scale(block.scale2, block.fc2, block.fc2_bias), dtype)
        self._split: tuple[Product, Product] | None = None

    def split(self) -> tuple[Product, Product]:
        """q alone, and k and v alone: for a block of which only some rows are read."""
        if self._split is None:
            width = self.qkv.weight.shape[1]
            self._split = self.qkv.part(0, width), self.qkv.part(width, 3 * width)
        return self._split

    def packed(self, x: Tensor, branch: Tensor | None, heads: int) -> Products | None:
        """Its products for :func:`packed_blocks`; None where that is not for such a call."""
        products = (self.qkv, self.proj, self.fc1, self.fc2)
        if any(type(product) is not Product for product in products) or self.fc1.activation not in GELU:
            return None
        packed = [product.packed(x) for product in products]
        return cast(Products, packed) if packed_in_one_call(x, branch, packed, heads) else None

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Every weight to where ``fn`` puts it."""
        self._split = None
        for product in (self.qkv, self.proj, self.fc1, self.fc2):
            product.move(fn)


class FrozenTeacher(nn.Module):
    """Features of a frozen ViT. It has no parameters, no buffers and no entry in any ``state_dict``.

    It runs under ``no_grad`` (not ``inference_mode``, whose tensors a loss may not save).

    Args:
        source: an :class:`Anatomy`, or one of our encoders; its weights are copied.
        layers: which blocks' outputs are targets, 1-based and ascending; 0 is the embedding. Default: the last block.
        precision: dtypes; default the encoder's, or bf16 with an fp32 residual stream.
        cuda_graph: replay CUDA graphs, one a shape: True to raise if that fails, None (auto) to fall back and say so,
            False not to. Off CUDA there are none.

    Attributes:
        name, grid, heads, prefix, mean, std: of the model. width: of its features, D_T where it has a head.
        layers, precision, cuda_graph: as given.

    Raises:
        UserError: layers that are not ascending inside [0, depth].
    """

    def __init__(
        self,
        source: Anatomy | VisionTransformer,
        layers: Sequence[int] | None = None,
        *,
        precision: Precision | None = None,
        cuda_graph: bool | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, VisionTransformer):
            precision = precision or source.precision
            source = own.read(source, "encoder")
        self.precision = precision or Precision()
        self.layers = target_layers(layers, source.depth)
        self.name, self.grid, self.width, self.heads = source.name, source.grid, source.out, source.heads
        self.prefix, self.mean, self.std, self.eps = source.prefix.shape[0], source.mean, source.std, source.eps
        self.depth, self.activation = self.layers[-1], source.activation
        self._fingerprint = _digest(source, self.layers)
        compute, residual = self.precision.compute, self.precision.residual
        self._tensors: dict[str, Any] = {
            "patch": source.patch.to(compute, copy=True),
            "patch_bias": _copy(source.patch_bias),
            "prefix": source.prefix.to(residual, copy=True),
            "positions": _copy(source.positions),
            "relative": None if source.relative is None else source.relative.detach().to(compute, copy=True),
        }
        for name, affine in (("embed_norm", source.embed_norm), ("norm", source.norm)):
            for part in ("weight", "bias"):
                self._tensors[f"{name}.{part}"] = None if affine is None else _copy(getattr(affine, part))
        self._blocks = [Layer(block, source.activation, compute) for block in source.blocks[: self.depth]]
        self._head = None if source.head is None else _head(source.head, source.norm, compute)
        self._checked = False
        self.cuda_graph, self._replays = cuda_graph, Replays(required=bool(cuda_graph))
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Always eval."""
        return super().train(False)

    @property
    def precision_name(self) -> str:
        """Such as "bfloat16" or "fp8 in 10 of 12 blocks, bfloat16"; "emulated fp8" where no card computes it."""
        compute = str(self.precision.compute).removeprefix("torch.")
        quantised = [block for block in self._blocks if block.qkv_scale is not None]
        if not quantised:
            return compute
        kind = "fp8" if quantised[0].qkv.weight.is_cuda else "emulated fp8"
        return f"{kind} in {len(quantised)} of {self.depth} blocks, {compute}"

    def replace_blocks(self, blocks: Mapping[int, Layer]) -> None:
        """Exchange the products of some blocks, counted from 1."""
        self._blocks = [blocks.get(number, block) for number, block in enumerate(self._blocks, start=1)]
        self._replays.clear()

    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from the weights and the layers; the same on every device and precision."""
        return self._fingerprint

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, rows: Tensor | None = None, *, queries: Tensor | None = None, norm: bool = False
    ) -> list[Tensor]:
        """Targets, one a layer.

        Args:
            pixels: [B, T, H, W, C], uint8, or floating and normalised by this teacher's ``mean`` and ``std`` already
                (:func:`cohobate.models.pixels.renormalise` takes them over from another model's).
            rows: [B, n] int32, the patches the teacher sees (``plan.teacher_rows``); None for all.
            queries: [B, q] int32 in [0, P + n), the rows that the loss reads; None for all.
            norm: apply the final norm (off in dBOT: the target is the residual stream itself). A teacher with a head
                always applies norm and head.

        Returns:
            [B, q or P + n, D_T] each, in the residual dtype, without a graph.

        Raises:
            UserError: pixels of another shape, or, in the first call, a layer whose features are not finite.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            if self.cuda_graph is not False and replayable(pixels):
                return self._replays(self._compute, (pixels, rows, queries), norm)
            return self._compute(pixels, rows, queries, norm)

    def _compute(self, pixels: Tensor, rows: Tensor | None, queries: Tensor | None, norm: bool) -> list[Tensor]:
        found = self._features(pixels, rows, queries, self.layers)
        if not self._checked and type(pixels) is Tensor and not torch.compiler.is_compiling():
            check_finite(found, self.layers, self.name)
            self._checked = True
        if self._head is not None:
            return [self._projected(self._head, x) for x in found]
        return [self._normed("norm", x) for x in found] if norm else found

    def _features(
        self, pixels: Tensor, rows: Tensor | None, queries: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """Streams behind ``layers``, the last of which is the teacher's."""
        x = embed_tokens(
            pixels,
            rows,
            self._tensors["patch"],
            self._tensors["patch_bias"],
            self._tensors["positions"],
            self._tensors["prefix"],
            grid=self.grid,
            mean=self.mean,
            std=self.std,
            precision=self.precision,
        )
        x = self._normed("embed_norm", x)
        bias = self._tensors["relative"]
        if bias is not None and rows is not None:
            bias = bias_of_patches(bias, rows, self.prefix)
        found = [x] if layers[0] == 0 else []
        branch: Tensor | None = None
        number = 1
        while number <= self.depth:
            seen = number - 1 in layers and number > 1  # the stream in front of this block is asked for
            run = [] if bias is not None else self._in_one_call(number, x, branch, layers, queries is not None)
            if run:
                first, x, branch = packed_blocks(x, branch, run, self.heads, self.eps, wants_first=seen)
                found += [first] if first is not None else []
                number += len(run)
                continue
            block, last = self._blocks[number - 1], number == self.depth
            x, normed = self._add_norm(x, branch, block.qkv_scale)
            if seen:
                found.append(x)
            if last and queries is not None:
                q, kv = block.split()
                bias = None if bias is None else bias_of_queries(bias, queries)
                heads = attend(kv(normed), self.heads, q(tokens.take(normed, queries)), bias=bias)
                x = tokens.take(x, queries)
            else:
                heads = attend(block.qkv(normed), self.heads, bias=bias)
            x, normed = self._add_norm(x, block.proj(heads), block.fc1_scale)
            branch = block.fc2(block.fc1(normed))
            number += 1
        if branch is not None:
            found.append((x + branch).to(x.dtype))
        if queries is None:
            return found
        whole = len(found) if self.depth == 0 else len(found) - 1
        return [tokens.take(x, queries) for x in found[:whole]] + found[whole:]

    def _in_one_call(
        self, start: int, x: Tensor, branch: Tensor | None, layers: Sequence[int], pruned: bool
    ) -> list[Products]:
        """Blocks from number ``start`` on that one call computes: nothing is read between them."""
        run: list[Products] = []
        for number in range(start, self.depth + (not pruned)):  # a pruned last block stands apart
            if run and number - 1 in layers:
                break
            packed = self._blocks[number - 1].packed(x, branch, self.heads)
            if packed is None:
                break
            run.append(packed)
        return run

    def _add_norm(self, x: Tensor, branch: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
        if scale is not None:
            return add_norm_fp8(x, branch, scale, eps=self.eps)
        return add_norm(x, branch, eps=self.eps, dtype=self.precision.compute)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return x if weight is None else add_norm(x, weight=weight, bias=bias, eps=self.eps)[1]

    def _projected(self, head: Product, x: Tensor) -> Tensor:
        """Final norm, whose affine part is in the head's weights already, and head."""
        has_norm = self._tensors["norm.weight"] is not None
        normed = add_norm(x, eps=self.eps, dtype=self.precision.compute)[1] if has_norm else x
        return head(normed.to(self.precision.compute)).to(self.precision.residual)

    def flops(self, queries: int | None = None, patches: int | None = None) -> int:
        """Multiply-adds x 2 of one sample: ``patches`` visible (None: all), the last block for ``queries`` rows."""
        patches = self.grid.size if patches is None else patches
        width = self._tensors["patch"].shape[0]
        n, total = patches + self.prefix, 2 * patches * self.grid.row_length * width
        if self._head is not None:
            total += 2 * len(self.layers) * (n if queries is None else queries) * self._head.weight.numel()
        for number, block in enumerate(self._blocks, start=1):
            rows = n if queries is None or number < self.depth else queries
            mlp = block.fc1.weight.numel() + block.fc2.weight.numel()
            total += 4 * width**2 * (n + rows) + 4 * rows * n * width + 2 * rows * mlp
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        """Move to a device; a change of dtype is not taken over, the precision is the teacher's own."""
        self._tensors = {name: None if x is None else moved(x, fn) for name, x in self._tensors.items()}
        for block in self._blocks:
            block.move(fn)
        if self._head is not None:
            self._head.move(fn)
        self._replays.clear()
        super()._apply(fn, recurse)
        return self


def from_student(
    student: VisionTransformer,
    *,
    init: str = "copy",
    depth: int | None = None,
    precision: Precision | None = None,
    generator: torch.Generator | None = None,
) -> FrozenTeacher:
    """The teacher of a stage, out of a student: its weights as they are, or a network of its shape drawn independently.

    A freshly drawn student's copy is dBOT's random teacher; at a stage boundary the copy is the previous student.

    Args:
        student: the model to start from; not changed.
        init: "copy" or "independent".
        depth: blocks of the teacher; 0 leaves a linear patch projection. Default the student's.
        precision: dtypes; default the student's.
        generator: where "independent" draws from.

    Raises:
        UserError: an unknown ``init``, or a copy deeper than the student.
    """
    if init not in INITS:
        raise UserError(f"init: expected one of {', '.join(INITS)}; got {init!r}")
    depth = student.depth if depth is None else depth
    if init == "copy":
        if not 0 <= depth <= student.depth:
            raise UserError(f"depth: expected a copy of 0 to {student.depth} blocks, got {depth}")
        return FrozenTeacher(student, (depth,), precision=precision)
    model = student.like(depth=depth)
    model.reset(generator)
    return FrozenTeacher(model.to(student.device), precision=precision)


def _after_norm(norm: Affine, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y g + b) W^T + c = y (W diag(g))^T + (W b + c)."""
    shift = weight @ norm.bias
    return weight * norm.weight, shift if bias is None else shift + bias


def _head(head: Tensor, norm: Affine | None, dtype: torch.dtype) -> Product:
    return Product(head, None, dtype) if norm is None else Product(*_after_norm(norm, head, None), dtype)


def _before_scale(scale: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """s (y W^T + c) = y (diag(s) W)^T + s c."""
    if scale is None:
        return weight, bias
    return weight * scale[:, None], None if bias is None else bias * scale


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _digest(source: Anatomy, layers: Sequence[int]) -> str:
    """Of every weight that the features of these layers depend on, in their own bits."""
    digest = hashlib.sha256(
        repr((layers, source.activation, source.heads, source.eps, source.mean, source.std)).encode()
    )

    def add(part: Any) -> None:
        if isinstance(part, Tensor) and part.is_meta:  # a shape without values
            digest.update(repr(part.shape).encode())
        elif isinstance(part, Tensor):
            digest.update(part.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        elif isinstance(part, (tuple, list)):
            for member in part:
                add(member)
        elif isinstance(part, BlockWeights):
            add(list(vars(part).values()))

    add([source.patch, source.patch_bias, source.prefix, source.positions, source.embed_norm, source.norm])
    add(source.blocks[: layers[-1]])
    add([source.relative, source.head])
    return digest.hexdigest()[:16]
