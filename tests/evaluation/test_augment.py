"""Every operation against Pillow, for whole batches with a level each; mixing and erasing against what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from cohobate.evaluation import augment

LEVELS = torch.tensor([0.9, 0.35, 0.0])
FILL = (124, 116, 104)


def pictures(size: tuple[int, int] = (19, 23)) -> Tensor:
    """Noise, a ramp with few grey values, and one colour."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (*size, 3), generator=draw)
    ramp = (torch.arange(size[0])[:, None, None] * 5 + torch.arange(3) * 20 + 40).expand(*size, 3)
    return torch.stack([noise, ramp, torch.full((*size, 3), 77)]).to(torch.uint8)


def by_pillow(images: Tensor, function: Callable[[Image.Image, float], Image.Image], levels: Tensor) -> Tensor:
    found = [function(Image.fromarray(x.numpy()), float(level)) for x, level in zip(images, levels)]
    return torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in found])


def turned(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def solarise_add(image: Image.Image, amount: float) -> Image.Image:
    return image.point([min(255, i + int(amount)) if i < 128 else i for i in range(256)] * 3)


ENHANCE = LEVELS * 0.9 + 1  # factors 1.81, 1.3, 1
PILLOW: dict[str, tuple[Tensor, Callable[[Image.Image, float], Image.Image], int]] = {
    "brightness": (ENHANCE, lambda i, f: ImageEnhance.Brightness(i).enhance(f), 0),
    "colour": (ENHANCE, lambda i, f: ImageEnhance.Color(i).enhance(f), 0),
    "contrast": (ENHANCE, lambda i, f: ImageEnhance.Contrast(i).enhance(f), 0),
    "sharpness": (ENHANCE, lambda i, f: ImageEnhance.Sharpness(i).enhance(f), 1),
    "autocontrast": (LEVELS, lambda i, _: ImageOps.autocontrast(i), 0),
    "equalise": (LEVELS, lambda i, _: ImageOps.equalize(i), 0),
    "invert": (LEVELS, lambda i, _: ImageOps.invert(i), 0),
    "posterise": (torch.tensor([1.0, 3.0, 4.0]), lambda i, bits: ImageOps.posterize(i, int(bits)), 0),
    "solarise": (torch.tensor([26.0, 130.0, 256.0]), lambda i, t: ImageOps.solarize(i, int(t)), 0),
    "solarise_add": (torch.tensor([99.0, 40.0, 0.0]), solarise_add, 0),
}


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("down", [False, True])
def test_colours_are_pillows(name: str, down: bool) -> None:
    """``down``: factors below 1, where a blend does not leave the range of its two images."""
    levels, function, tolerance = PILLOW[name]
    if down and levels is ENHANCE:
        levels = 2 - levels
    images = pictures()
    found = getattr(augment, name)(images, levels)
    wanted = by_pillow(images, function, levels)
    assert (found.int() - wanted.int()).abs().max() <= tolerance
    assert not torch.equal(found[0], images[0])


def rotated(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL)


GEOMETRY: dict[str, tuple[Tensor, Callable[[Image.Image, float], Image.Image]]] = {
    "shear_x": (torch.tensor([0.27, -0.1, 0.0]), lambda i, v: turned(i, (1, v, 0, 0, 1, 0))),
    "shear_y": (torch.tensor([0.27, -0.1, 0.0]), lambda i, v: turned(i, (1, 0, 0, v, 1, 0))),
    "translate_x": (torch.tensor([0.4, -0.15, 0.0]), lambda i, v: turned(i, (1, 0, v * i.size[0], 0, 1, 0))),
    "translate_y": (torch.tensor([0.4, -0.15, 0.0]), lambda i, v: turned(i, (1, 0, 0, 0, 1, v * i.size[1]))),
    "rotate": (torch.tensor([27.0, -8.0, 0.0]), rotated),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_moves_are_pillows(name: str) -> None:
    """To one grey level, Pillow's own rounding; a pixel on the very edge may fall on either side of it."""
    levels, function = GEOMETRY[name]
    images = pictures()
    found = getattr(augment, name)(images, levels, torch.tensor(FILL, dtype=torch.uint8))
    wanted = by_pillow(images, function, levels)
    off = (found.int() - wanted.int()).abs().amax(dim=-1) > 1
    assert off.float().mean() < 0.005, off.sum()
    assert torch.equal(found[2], images[2])


def test_smoothing_is_pillows_filter_where_it_matters() -> None:
    """Factor 0 is the smoothed image alone."""
    images = pictures()
    found = augment.sharpness(images, torch.zeros(3))
    wanted = by_pillow(images, lambda i, _: i.filter(ImageFilter.SMOOTH), torch.zeros(3))
    assert (found.int() - wanted.int()).abs().max() <= 1


def test_rand_augment_follows_its_seed_and_its_chance() -> None:
    images = pictures().repeat(100, 1, 1, 1)
    mean = (0.485, 0.456, 0.406)
    first, again, other = (
        augment.rand_augment(images, torch.Generator().manual_seed(seed), mean) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Neither of two operations is carried out with chance 1/4; a flat image also survives some that are.
    kept = (first[0::3] == images[0]).flatten(1).all(dim=1).float().mean()
    assert 0.13 < kept < 0.4  # 100 tosses of 0.25 (and a few identities): 3 standard deviations
    none = augment.rand_augment(images, torch.Generator().manual_seed(1), mean, chance=0.0)
    assert torch.equal(none, images)


def test_every_operation_takes_part_and_takes_grey_images() -> None:
    images = pictures()[:, :, :, :1].repeat(200, 1, 1, 1)
    found = augment.rand_augment(images, torch.Generator().manual_seed(0), (0.5,), count=3)
    assert found.shape == images.shape and found.dtype == torch.uint8
    assert len(augment.OPERATIONS) == 15


def test_erasing_boxes() -> None:
    images = torch.full((400, 32, 24, 3), 200, dtype=torch.uint8)
    found = augment.random_erase(images, torch.Generator().manual_seed(0), 0.25, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    changed = (found != images).any(dim=-1)
    hit = changed.flatten(1).any(dim=1)
    assert 0.18 < hit.float().mean() < 0.32  # 0.25 of 400: 3 standard deviations
    noise = found[changed].float()
    assert abs(noise.mean() - 127.5) < 2 and abs(noise.std() - 51) < 2  # mean and std of pixels, in bytes
    shares = changed[hit].float().mean(dim=(1, 2))
    assert shares.min() > 0.01 and shares.max() <= 0.37  # 2 % to a third, sides rounded
    for box in changed[hit][:20]:
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert box.sum() > 0.9 * rows * columns  # a box, less the pixels whose noise is 200 by chance


def test_mixing_mixes_targets_by_the_same_share() -> None:
    images = torch.zeros(6, 20, 30, 3, dtype=torch.uint8)
    images[3:] = 200
    targets = augment.smooth_targets(torch.tensor([0, 0, 0, 1, 1, 1]), 4, 0.1)
    assert targets[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        for seed in range(5):
            mixed, soft = augment.mix(images, targets, torch.Generator().manual_seed(seed), mixup, cutmix)
            share = float((soft[0, 0] - 0.025) / 0.9)  # what is left of class 0
            assert soft.sum(1).tolist() == pytest.approx([1.0] * 6)
            # Half a byte of rounding for mixup; cutmix counts pixels exactly.
            assert float(mixed[0].float().mean()) == pytest.approx(200 * (1 - share), abs=0.51)
            assert set(mixed[0].unique().tolist()) <= ({0, 200} if cutmix else {round(200 * (1 - share))})
    same, kept = augment.mix(images, targets, torch.Generator(), 0.0, 0.0)
    assert same is images and kept is targets


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.3])
def test_beta_has_its_moments(alpha: float) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor([augment.beta(alpha, draw) for _ in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(values.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert float(values.var()) == pytest.approx(variance, rel=0.08)
