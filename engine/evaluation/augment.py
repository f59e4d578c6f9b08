"""Augmentations of fine-tuning on uint8 batches: RandAugment, random erasing, mixup and cutmix.

Each operation computes what Pillow does, to the rounding, for a batch of samples with a level each, on any device.
Everything random comes from a generator on the CPU, so that a seed gives the same batches on every device.

RandAugment (Cubuk et al., 2020) is timm's ``rand-m9-mstd0.5-inc1``: two of 15 operations a sample, each carried out
with chance 0.5, magnitudes N(9, 0.5) of 10, severity rising with the magnitude; resampling is always bilinear. A clip
[T, H, W, C] counts as one sample: its frames share operations, levels and boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Images uint8 [B, H, W, C]; levels fp32 [B]. One channel or three.
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def _round_blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor (x - degenerate), cut to bytes as Pillow's blend does: towards zero."""
    a, b = degenerate.float(), x.float()
    return (a + factor.view(-1, 1, 1, 1) * (b - a)).clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """Luma as Pillow's, [B, H, W, 1] uint8."""
    if x.shape[-1] != 3:
        return x[..., :1]
    r, g, b = x.int().unbind(-1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(-1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return _round_blend(torch.zeros_like(x), x, factor)


def colour(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _round_blend(_grey(x).expand_as(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image's mean."""
    mean = (_grey(x).double().mean(dim=(1, 2, 3)) + 0.5).floor()
    return _round_blend(mean.view(-1, 1, 1, 1).expand(x.shape), x, factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13, whose border is not smoothed."""
    channels = x.shape[-1]
    kernel = torch.ones(channels, 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    smooth = F.conv2d(x.permute(0, 3, 1, 2).float(), kernel / 13, groups=channels).permute(0, 2, 3, 1)
    blurred = x.clone()
    blurred[:, 1:-1, 1:-1] = (smooth + 0.5).clamp(0, 255).to(torch.uint8)
    return _round_blend(blurred, x, factor)


def _table(x: Tensor, lookup: Tensor) -> Tensor:
    """x[b, h, w, c] -> lookup[b, c, x], bytes [B, C, 256]."""
    batch, _, _, channels = x.shape
    flat = x.permute(0, 3, 1, 2).reshape(batch, channels, -1)
    found = lookup.gather(2, flat.long()).to(torch.uint8)
    return found.view(batch, channels, *x.shape[1:3]).permute(0, 2, 3, 1).contiguous()


def _histogram(x: Tensor) -> Tensor:
    """Counts [B, C, 256] int64."""
    batch, _, _, channels = x.shape
    flat = x.permute(0, 3, 1, 2).reshape(batch, channels, -1).long()
    return torch.zeros(batch, channels, 256, dtype=torch.int64, device=x.device).scatter_add_(
        2, flat, torch.ones_like(flat)
    )


def autocontrast(x: Tensor, level: Tensor) -> Tensor:
    """Stretch each channel from its darkest and brightest value to 0 and 255."""
    low, high = (
        extreme.permute(0, 3, 1, 2).flatten(1).double() for extreme in (x.amin((1, 2), True), x.amax((1, 2), True))
    )
    flat = high <= low
    scale = torch.where(flat, 1.0, 255 / (high - low).clamp_min(1))
    offset = torch.where(flat, 0.0, -low * scale)
    values = torch.arange(256, dtype=torch.float64, device=x.device)
    return _table(x, (values * scale.unsqueeze(2) + offset.unsqueeze(2)).clamp(0, 255).long())


def equalise(x: Tensor, level: Tensor) -> Tensor:
    """Flatten each channel's histogram."""
    counts = _histogram(x)
    values = torch.arange(256, device=x.device)
    last = torch.where(counts > 0, values, 0).amax(dim=2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)).div(255, rounding_mode="floor")
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before).div(step.clamp_min(1), rounding_mode="floor")).clamp(0, 255)
    single = (counts > 0).sum(2, keepdim=True) <= 1
    return _table(x, torch.where((step == 0) | single, values, table))


def invert(x: Tensor, level: Tensor) -> Tensor:
    """255 - x."""
    return 255 - x


def posterise(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` bits."""
    mask = 256 - torch.pow(2, 8 - bits).int()
    return (x.int() & mask.view(-1, 1, 1, 1)).to(torch.uint8)


def solarise(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert values from ``threshold`` on."""
    return torch.where(x < threshold.view(-1, 1, 1, 1), x, 255 - x)


def solarise_add(x: Tensor, amount: Tensor) -> Tensor:
    """Add ``amount`` to values below 128."""
    return torch.where(x < 128, (x.int() + amount.view(-1, 1, 1, 1).int()).clamp(max=255), x.int()).to(torch.uint8)


def affine(x: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Pillow's ``transform(AFFINE, BILINEAR)``: output (u, v) shows input (a u + b v + c, d u + e v + f).

    Args:
        matrix: [B, 6]. fill: [C] uint8, what is shown outside.
    """
    _, height, width, _ = x.shape
    u, v = (torch.arange(n, device=x.device, dtype=torch.float32) + 0.5 for n in (width, height))
    a, b, c, d, e, f = (column.view(-1, 1, 1) for column in matrix.float().unbind(1))
    across, down = a * u + b * v[:, None] + c, d * u + e * v[:, None] + f
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    grid = torch.stack([across * (2 / width) - 1, down * (2 / height) - 1], dim=-1)
    moved = F.grid_sample(x.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    moved = (moved + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return torch.where(outside.unsqueeze(-1), fill, moved)


def _matrix(rows: list[Tensor | float], like: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(r, device=like.device).float().expand_as(like) for r in rows], dim=1)


def shear_x(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Rows move by ``level`` times their height."""
    return affine(x, _matrix([1.0, level, 0.0, 0.0, 1.0, 0.0], level), fill)


def shear_y(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Columns move by ``level`` times their place."""
    return affine(x, _matrix([1.0, 0.0, 0.0, level, 1.0, 0.0], level), fill)


def translate_x(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Move by ``level`` of the width."""
    return affine(x, _matrix([1.0, 0.0, level * x.shape[2], 0.0, 1.0, 0.0], level), fill)


def translate_y(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Move by ``level`` of the height."""
    return affine(x, _matrix([1.0, 0.0, 0.0, 0.0, 1.0, level * x.shape[1]], level), fill)


def rotate(x: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Turn counter-clockwise around the centre."""
    angle = -degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    middle_x, middle_y = x.shape[2] / 2, x.shape[1] / 2
    c = middle_x - cos * middle_x - sin * middle_y
    f = middle_y + sin * middle_x - cos * middle_y
    return affine(x, _matrix([cos, sin, c, -sin, cos, f], degrees), fill)


# From a magnitude in [0, 1] and a sign to an operation's level; then the operation. "enhance" levels are factors.
def _signed(most: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda magnitude, sign: magnitude * most * sign


def _enhance(magnitude: Tensor, sign: Tensor) -> Tensor:
    return (1 + 0.9 * magnitude * sign).clamp_min(0.1)


def _plain(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return lambda x, level, fill: function(x, level)


OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Operation]] = {
    "autocontrast": (lambda m, s: m, _plain(autocontrast)),
    "equalise": (lambda m, s: m, _plain(equalise)),
    "invert": (lambda m, s: m, _plain(invert)),
    "rotate": (_signed(30.0), rotate),
    "posterise": (lambda m, s: 4 - (4 * m).floor(), _plain(posterise)),
    "solarise": (lambda m, s: 256 - (256 * m).floor(), _plain(solarise)),
    "solarise_add": (lambda m, s: (110 * m).floor(), _plain(solarise_add)),
    "colour": (_enhance, _plain(colour)),
    "contrast": (_enhance, _plain(contrast)),
    "brightness": (_enhance, _plain(brightness)),
    "sharpness": (_enhance, _plain(sharpness)),
    "shear_x": (_signed(0.3), shear_x),
    "shear_y": (_signed(0.3), shear_y),
    "translate_x": (_signed(0.45), translate_x),
    "translate_y": (_signed(0.45), translate_y),
}


def rand_augment(
    images: Tensor,
    generator: torch.Generator,
    mean: tuple[float, ...],
    *,
    magnitude: float = 9.0,
    spread: float = 0.5,
    count: int = 2,
    chance: float = 0.5,
) -> Tensor:
    """``count`` random operations on every image, each carried out with ``chance``.

    Args:
        images: [B, (T,) H, W, C] uint8. generator: on the CPU. mean: of pixels / 255, shown where an image moved away.
        magnitude, spread: mean and standard deviation of the magnitude, cut to 0..10.
    """
    batch, names = len(images), list(OPERATIONS)
    fill = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.uint8, device=images.device)
    images = images.clone()
    for _ in range(count):
        choice = torch.randint(len(names), (batch,), generator=generator)
        done = torch.rand(batch, generator=generator) < chance
        level = (magnitude + spread * torch.randn(batch, generator=generator)).clamp(0, 10) / 10
        sign = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
        for number, name in enumerate(names):
            places = (done & (choice == number)).nonzero()[:, 0]
            if len(places):
                scale, operation = OPERATIONS[name]
                at = places.to(images.device)
                frames = images[at].flatten(0, -4)
                levels = scale(level[places], sign[places]).repeat_interleave(len(frames) // len(at))
                images[at] = operation(frames, levels.to(images.device), fill).view(-1, *images.shape[1:])
    return images


def random_erase(
    images: Tensor, generator: torch.Generator, chance: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Replace a random box of some images by noise N(0, 1) of normalised pixels (Zhong et al., AAAI 2020).

    The box covers 2 % to a third of the image, its sides' ratio is 0.3 to 1/0.3; ten tries to fit one in.

    Args:
        images: [B, (T,) H, W, C] uint8; a copy is changed. Frames share the box, not the noise.
    """
    images = images.clone()
    batch, (height, width, channels) = len(images), images.shape[-3:]
    frames = images.shape[1:-3]
    centre, scale = (torch.tensor(values) * 255 for values in (mean, std))
    for place in (torch.rand(batch, generator=generator) < chance).nonzero()[:, 0].tolist():
        for _ in range(10):
            area, ratio, top, left = torch.rand(4, generator=generator).tolist()
            area = (0.02 + area * (1 / 3 - 0.02)) * height * width
            ratio = math.exp((2 * ratio - 1) * math.log(1 / 0.3))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
                noise = torch.randn(*frames, h, w, channels, generator=generator) * scale + centre
                images[place, ..., top : top + h, left : left + w, :] = (
                    noise.round().clamp(0, 255).to(images.device, torch.uint8)
                )
                break
    return images


def mix(
    images: Tensor, targets: Tensor, generator: torch.Generator, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix each image with the one at the opposite end of the batch, by mixup or cutmix, half of the time each.

    mixup (Zhang et al., ICLR 2018): lam x + (1 - lam) x'. cutmix (Yun et al., ICCV 2019): a box of x' in x, lam its
    complement's share. lam ~ Beta(alpha, alpha), one a batch; targets are mixed with it.

    Args:
        images: [B, (T,) H, W, C] uint8. targets: [B, classes] fp32. mixup, cutmix: their alpha; 0 for never.
    """
    if not mixup and not cutmix:
        return images, targets
    by_cut = bool(cutmix) and (not mixup or float(torch.rand((), generator=generator)) < 0.5)
    lam = beta(cutmix if by_cut else mixup, generator)
    other = images.flip(0)
    if by_cut:
        height, width = images.shape[-3:-1]
        side = math.sqrt(1 - lam)
        middle = torch.rand(2, generator=generator)
        y, x = int(middle[0] * height), int(middle[1] * width)
        h, w = int(height * side), int(width * side)
        top, bottom = max(0, y - h // 2), min(height, y + h // 2)
        left, right = max(0, x - w // 2), min(width, x + w // 2)
        images = images.clone()
        images[..., top:bottom, left:right, :] = other[..., top:bottom, left:right, :]
        lam = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = (lam * images.float() + (1 - lam) * other.float()).round().to(torch.uint8)
    return images, lam * targets + (1 - lam) * targets.flip(0)


def beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha): Johnk's method, which needs nothing but uniform numbers, for alpha up to 1."""
    while True:
        u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        x, y = u ** (1 / alpha), v ** (1 / alpha)
        if 0 < x + y <= 1:
            return float(x / (x + y))


def smooth_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B] int64 -> [B, classes] fp32: 1 - smoothing on the label, and smoothing spread evenly over all classes."""
    rest = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return rest.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
