"""What a teacher comes from: the module behind one small interface, and its anatomy where that is understood."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.models.pixels import check_pixels, normalise
from cohobate.teacher.anatomy import Anatomy
from cohobate.tokens import TokenGrid

TOLERANCE = 1e-5  # of the self-check, fp32: rounding in another order stays near 1e-6 of the largest value
Forward = Callable[[Tensor, Sequence[int]], list[Tensor]]


@runtime_checkable
class TeacherModule(Protocol):
    """What any ``nn.Module`` must offer to be a teacher as it is.

    ``grid`` says how its pixels are cut into tokens, ``width`` is D, ``depth`` the number of its layers, ``prefix`` the
    number P of tokens in front of the patches; ``mean`` and ``std``, one number a channel, normalise pixels in [0, 1].
    """

    grid: TokenGrid
    width: int
    depth: int
    prefix: int
    mean: Sequence[float]
    std: Sequence[float]

    def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Features after the layers asked for.

        Args:
            images: [B, C, H, W], for a clip [B, C, T, H, W]: normalised, in the dtype of the module's weights.
            layers: ascending numbers in [0, depth]; 0 is the embedding.

        Returns:
            One [B, P + N, D] a layer, the patches in raster order behind the prefix.
        """
        ...


class Original:
    """A module's own forward: pixels in, residual streams out, in eval mode, without gradient or autocast.

    The module is neither copied nor changed: it is put in eval mode for the call alone.

    Args:
        module: what runs.
        run: (this, pixels, layers) -> one [B, P + N, D] a layer.
        grid, width, depth, prefix, mean, std: as in :class:`TeacherModule`.
        any_size: its forward fits its positions to whatever size comes, as :meth:`Anatomy.resized` does.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[Original, Tensor, Sequence[int]], list[Tensor]],
        grid: TokenGrid,
        *,
        width: int,
        depth: int,
        prefix: int,
        mean: Sequence[float],
        std: Sequence[float],
        any_size: bool = False,
    ) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != grid.channels:
                raise UserError(f"{name}: expected {grid.channels} numbers, one a channel, got {list(values)}")
        self.module, self.grid, self.any_size = module, grid, any_size
        self.width, self.depth, self.prefix = width, depth, prefix
        self.mean, self.std = tuple(mean), tuple(std)
        self._run = run

    @torch.no_grad()
    def hidden_states(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Residual streams after the blocks ``layers``.

        Args:
            pixels: [B, T, H, W, C] of the grid's size, uint8, or floating and normalised by ``mean`` and ``std``.
            layers: ascending numbers in [0, depth]; 0 is the embedding.

        Returns:
            One [B, P + N, D] a layer, in the module's dtype.

        Raises:
            UserError: pixels or layers that do not fit.
        """
        check_pixels(pixels, self.grid)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > self.depth:
            raise UserError(f"layers: expected ascending numbers in [0, {self.depth}], got {list(layers)}")
        with evaluating(self.module), torch.autocast(pixels.device.type, enabled=False):
            return self._run(self, pixels, layers)

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels [B, T, H, W, C] -> [B, C, H, W], a clip [B, C, T, H, W]: normalised, in the module's dtype."""
        x = (pixels if pixels.is_floating_point() else normalise(pixels, self)).permute(0, 4, 1, 2, 3)
        clip = self.grid.frames > 1 or self.grid.patch[0] > 1
        return (x if clip else x[:, :, 0]).contiguous().to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's weights."""
        return next((p.dtype for p in self._tensors() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the module's weights are."""
        return next((p.device for p in self._tensors()), torch.device("cpu"))

    def with_module(self, module: nn.Module) -> Original:
        """The same around another module of the same kind."""
        other = copy.copy(self)
        other.module = module
        return other

    def at(self, grid: TokenGrid) -> Original:
        """The same for input of another size; only where ``any_size``."""
        other = copy.copy(self)
        other.grid = grid
        return other

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()


@dataclass(frozen=True)
class Source:
    """Where targets come from.

    Attributes:
        name: for messages.
        anatomy: what it is rebuilt from, fp32; None if it runs as it is.
        reasons: why it could not be rebuilt, one line each; empty if it could.
        original: the module itself; None once the anatomy has left the sizes that the module takes.
        notes: what was assumed on the way, such as the statistics of the pixels, one line each.
    """

    name: str
    anatomy: Anatomy | None
    reasons: tuple[str, ...]
    original: Original | None
    notes: tuple[str, ...] = ()

    @property
    def _any(self) -> Any:
        return self.original if self.anatomy is None else self.anatomy

    @property
    def grid(self) -> TokenGrid:
        """How the teacher's own pixels are cut into tokens."""
        return self._any.grid

    @property
    def width(self) -> int:
        """Of the features: D, or D_T behind a projection."""
        return self._any.width if self.anatomy is None else self.anatomy.out

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return self._any.depth

    @property
    def prefix(self) -> int:
        """P, the tokens in front of the patches."""
        return self._any.prefix if self.anatomy is None else self.anatomy.prefix.shape[0]

    @property
    def mean(self) -> tuple[float, ...]:
        """Normalisation of the teacher's own pixels in [0, 1], one number a channel."""
        return self._any.mean

    @property
    def std(self) -> tuple[float, ...]:
        """See ``mean``."""
        return self._any.std


class NotPlainError(Exception):
    """A part that an :class:`Anatomy` cannot express; the message is the reason."""


def assemble(
    name: str, original: Original, read: Callable[[Original], Anatomy], notes: Sequence[str] = (), *, own_weights: bool
) -> Source:
    """A source out of a module and the reader of its anatomy, checked against each other on two random inputs.

    ``own_weights``: the module belongs to somebody else who may go on training it, so that its weights are copied.
    """
    try:
        exact = in_fp32(original)  # sums of weights, too, are taken in fp32
        anatomy = read(exact).to(device=original.device, dtype=torch.float32, copy=own_weights)
        error = agreement(anatomy.forward, exact, original.grid, range(anatomy.depth + 1))
        if not error <= TOLERANCE:
            raise NotPlainError(f"rebuilt features differ by {error:.1e} of the largest value, more than {TOLERANCE:g}")
    except (NotPlainError, UserError) as reason:
        return Source(name, None, (str(reason),), original, tuple(notes))
    except (AttributeError, RuntimeError) as failed:
        told = f"its parts do not go together as a plain ViT's do: {failed}"
        return Source(name, None, (told,), original, tuple(notes))
    return Source(name, anatomy, (), original, tuple(notes))


def agreement(
    anatomy_forward: Forward, original: Original, grid: TokenGrid, layers: Sequence[int], batches: int = 2
) -> float:
    """Largest relative error of rebuilt features, max |rebuilt - original| / max |original| of a layer.

    Args:
        anatomy_forward: (pixels, layers) -> features, such as :meth:`Anatomy.forward`.
        original: what it must agree with; both should compute in fp32. TF32 is off here.
        grid: size of the random uint8 pixels, drawn from fixed seeds.
        layers: which are compared.
        batches: how many inputs of one sample.

    Returns:
        The error; infinite if shapes differ, not a number if a feature is.
    """
    layers, worst = list(layers), 0.0
    for seed in range(batches):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (1, *grid.pixel_shape), dtype=torch.uint8, generator=generator)
        pixels = pixels.to(original.device)
        with _no_tf32():
            pairs = list(zip(anatomy_forward(pixels, layers), original.hidden_states(pixels, layers), strict=True))
        for found, wanted in pairs:
            if found.shape != wanted.shape:
                return float("inf")
            error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            if error != error:
                return error
            worst = max(worst, error)
    return worst


def in_fp32(original: Original) -> Original:
    """Itself if it computes in fp32, or else around a copy of the module that does."""
    precision = Precision(torch.float32, torch.float32)
    ours = isinstance(original.module, VisionTransformer)
    if original.dtype == torch.float32 and (not ours or original.module.precision == precision):
        return original
    module = copy.deepcopy(original.module).float()
    if ours:
        module.precision = precision  # type: ignore[assignment]
    return original.with_module(module)


def hooked(
    blocks: str, call: Callable[[Any, Tensor], Any]
) -> Callable[[Original, Tensor, Sequence[int]], list[Tensor]]:
    """A ``run`` that watches the modules of the list named ``blocks`` while ``call(module, images)`` runs.

    What a block returns is the residual stream behind it, whatever the model makes of the last one.
    """

    def run(original: Original, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        seen: dict[int, Tensor] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[0] = args[0] if args else kwargs["hidden_states"]

        def after(layer: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, out: Any) -> None:
                if layer in layers:
                    seen[layer] = out[0] if isinstance(out, tuple) else out

            return keep

        modules: Any = original.module.get_submodule(blocks)
        handles = [modules[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [block.register_forward_hook(after(i)) for i, block in enumerate(modules, start=1)]
        try:
            call(original.module, original.images(pixels))
        finally:
            for handle in handles:
                handle.remove()
        return [seen[layer] for layer in layers]

    return run


def measure(original: Original) -> Original:
    """The same with ``width`` and ``prefix`` as they come out of the module.

    Raises:
        UserError: fewer tokens than the grid has, or a module that fails on a blank input.
    """
    blank = torch.zeros(1, *original.grid.pixel_shape, dtype=torch.uint8, device=original.device)
    try:
        (x,) = original.hidden_states(blank, [original.depth])
    except Exception as error:
        raise UserError(f"source: the module fails on {list(blank.shape)} pixels: {error!r}") from error
    prefix = x.shape[1] - original.grid.size if x.dim() == 3 else -1
    if prefix < 0:
        raise UserError(f"source: expected features [B, P + {original.grid.size}, D], got {list(x.shape)}")
    other = copy.copy(original)
    other.width, other.prefix = x.shape[2], prefix
    return other


def from_module(module: TeacherModule, name: str) -> Source:
    """A module that speaks :class:`TeacherModule`, as it is.

    Raises:
        UserError: what it says of itself does not fit what comes out of it.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"source: expected an nn.Module, got {type(module).__name__}")

    def run(original: Original, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        found = original.module.hidden_states(original.images(pixels), layers)  # type: ignore[operator]
        return list(found)

    shape: dict[str, Any] = {"depth": module.depth, "width": module.width, "prefix": module.prefix}
    original = Original(module, run, module.grid, mean=module.mean, std=module.std, **shape)
    measured = measure(original)
    for key, said in shape.items():
        if said != getattr(measured, key):
            raise UserError(f"source: {name} says {key} {said}, and its features have {getattr(measured, key)}")
    return Source(name, None, (f"{name} is a module of its own kind, reached through hidden_states",), original)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode inside the block, and as it was behind it."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
