"""Float pixels: what they mean, and that they give what the same bytes give."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cohobate import TokenGrid, kernels, models
from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.models.pixels import denormalise, normalise, patch_rows, renormalise

FP32 = Precision(torch.float32, torch.float32)


@dataclass
class Of:
    """Statistics."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


OURS, THEIRS = Of((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), Of((0.48, 0.45, 0.4), (0.27, 0.26, 0.28))


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def model_of(**changes: object) -> VisionTransformer:
    arguments: dict[str, object] = {"image_size": (16, 24), "patch": 8, "width": 48, "depth": 2, "heads": 4}
    torch.manual_seed(0)
    return models.build("tiny", **(arguments | {"precision": FP32} | changes))  # type: ignore[arg-type]


def test_normalising_by_hand() -> None:
    pixels = torch.tensor([[[[[0, 51, 255]]]]], dtype=torch.uint8)
    wanted = torch.tensor([(0 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (1 - 0.3) / 0.3]).view(1, 1, 1, 1, 3)
    torch.testing.assert_close(normalise(pixels, OURS), wanted)
    torch.testing.assert_close(denormalise(wanted, OURS), pixels / 255)
    torch.testing.assert_close(renormalise(wanted, OURS, THEIRS), normalise(pixels, THEIRS))


def test_what_needs_no_other_statistics_is_left_alone() -> None:
    pixels = bytes_of(2, 1, 8, 8, 3)
    assert renormalise(pixels, OURS, THEIRS) is pixels
    floats = normalise(pixels, OURS)
    assert renormalise(floats, OURS, Of(OURS.mean, OURS.std)) is floats
    assert renormalise(floats.bfloat16(), OURS, THEIRS).dtype == torch.float32


@pytest.mark.parametrize(
    "grid", [TokenGrid.image((16, 24), 8), TokenGrid(4, 16, 24, (2, 8, 4)), TokenGrid.image(8, 4, 1)]
)
def test_patches_are_those_of_the_kernel(grid: TokenGrid) -> None:
    """The kernel's own gathering of bytes, which normalises on the way: one fp32 formula, so 1e-6."""
    pixels, by = bytes_of(2, *grid.pixel_shape), Of((0.5,) * grid.channels, (0.25,) * grid.channels)
    rows = torch.tensor([[0, 3, 2], [1, 2, 3]], dtype=torch.int32)
    for chosen in (None, rows):
        wanted = kernels.tokens.gather_patches(pixels, chosen, patch=grid.patch, mean=by.mean, std=by.std)
        torch.testing.assert_close(patch_rows(normalise(pixels, by), chosen, grid), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"cls_token": False, "frames": 4, "tubelet": 2}, {"positions": "none"}], ids=str
)
@pytest.mark.parametrize("seen", [False, True])
def test_features_and_gradients_are_those_of_the_bytes(changes: dict[str, object], seen: bool) -> None:
    """fp32, normalised inside or before: 1e-5 for sums over patches and blocks in another order."""
    model = model_of(**changes)
    pixels = bytes_of(2, *model.grid.pixel_shape)
    rows = torch.tensor([[0, 3, 4], [1, 2, 5]], dtype=torch.int32) if seen else None
    found = []
    for given in (pixels, normalise(pixels, model)):
        model.zero_grad()
        out = model(given, rows)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_floats_of_any_layout_have_a_gradient_themselves() -> None:
    """Channels first, as other trainers have them, in bf16 and under autocast."""
    model = model_of(precision=Precision())
    images = torch.randn(2, 3, 16, 24, requires_grad=True, generator=torch.Generator().manual_seed(2))
    pixels = images.permute(0, 2, 3, 1).unsqueeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pixels)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert images.grad is not None and bool(images.grad.any())
    torch.testing.assert_close(model(pixels), out)


def test_pixels_of_another_kind() -> None:
    for pixels in (bytes_of(2, 1, 16, 24, 3).int(), torch.zeros(2, 1, 24, 16, 3), torch.zeros(2, 3, 16, 24)):
        with pytest.raises(UserError, match=r"pixels: expected uint8 or floating \[B, 1, 16, 24, 3\], got"):
            model_of()(pixels)
