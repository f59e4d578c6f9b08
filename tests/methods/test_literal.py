"""Every method's loss and gradients against the published formulas, written out here in plain eager float64.

Nothing of the engine is used in the formulas but the weights and the boolean masks of a plan: positions come from their
definition, every patch is embedded, every block computes every row, attention is an explicit softmax, rows are chosen
with booleans. The engine runs in fp32, as a user's run would.

How far apart two results are: the L2 norm of the difference over the L2 norm of the formula's, for the gradient over
the gradients of all parameters together, and of each parameter alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate import TokenGrid, models, random_plan
from cohobate.masking import MaskPlan
from cohobate.methods import AMD, DBOT, MAE, Alignment, AMDOptions, DBOTOptions, MAEOptions
from cohobate.models import Decoder, PixelDecoder, Precision, VisionTransformer
from cohobate.teacher import FrozenTeacher
from cohobate.training.optimizer import Updater
from cohobate.training.schedule import Schedule

FP32 = Precision(torch.float32, torch.float32)
# fp32 rounds to 6e-8; sums of a few hundred terms, a few dozen operations deep, stay within 1e-6 of float64.
TOGETHER, ALONE = 1e-6, 3e-6
Weights = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------ the formulas


def part(w: Weights, name: str) -> Weights:
    """The weights below ``name``."""
    return {key[len(name) + 1 :]: value for key, value in w.items() if key.startswith(f"{name}.")}


def linear(w: Weights, x: Tensor) -> Tensor:
    y = x @ w["weight"].T
    return y + w["bias"] if "bias" in w else y


def norm(w: Weights, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["weight"] + w["bias"]


def block(w: Weights, x: Tensor, heads: int) -> Tensor:
    batch, length, width = x.shape
    qkv = linear(part(w, "attn.qkv"), norm(part(w, "norm1"), x))
    q, k, v = qkv.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
    x = x + linear(part(w, "attn.proj"), (weights @ v).transpose(1, 2).reshape(batch, length, width))
    hidden = linear(part(w, "mlp.fc1"), norm(part(w, "norm2"), x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(part(w, "mlp.fc2"), hidden)


def blocks(w: Weights, x: Tensor, heads: int) -> list[Tensor]:
    """The stream in front of the first block and behind each."""
    depth = len({name.split(".")[0] for name in part(w, "blocks")})
    states = [x]
    for i in range(depth):
        states.append(block(part(w, f"blocks.{i}"), states[-1], heads))
    return states


def positions(grid: TokenGrid, width: int, dtype: torch.dtype) -> Tensor:
    """2-D over an image, 1-D over a clip; computed in float64 and stored in fp32, as published."""
    frames, rows, columns = grid.shape
    table = np.zeros((grid.size, width))
    if frames > 1:
        for n, j in itertools.product(range(grid.size), range(width)):
            angle = n / 10000 ** (2 * (j // 2) / width)
            table[n, j] = math.cos(angle) if j % 2 else math.sin(angle)
    else:
        quarter = width // 4
        for y, x, i in itertools.product(range(rows), range(columns), range(quarter)):
            w = 10000 ** (-i / quarter)
            table[y * columns + x, i::quarter] = math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)
    return torch.from_numpy(table).float().to(dtype)


def normalised(pixels: Tensor, model: VisionTransformer, dtype: torch.dtype) -> Tensor:
    """[B, C, T, H, W]."""
    clip = pixels.permute(0, 4, 1, 2, 3).to(dtype) / 255
    mean, std = (torch.tensor(x, dtype=dtype).view(1, -1, 1, 1, 1) for x in (model.mean, model.std))
    return (clip - mean) / std


def rows(x: Tensor, chosen: Tensor) -> Tensor:
    """The rows that a boolean [B, N] chooses, in raster order; as many in each sample."""
    return x[chosen].view(len(x), -1, x.shape[-1])


def embedded(w: Weights, clip: Tensor, grid: TokenGrid) -> Tensor:
    """Every patch, with its position."""
    weight = w["patch_embed.proj.weight"]
    convolved = (
        F.conv3d(clip, weight, w["patch_embed.proj.bias"], stride=grid.patch)
        if weight.dim() == 5
        else F.conv2d(clip[:, :, 0], weight, w["patch_embed.proj.bias"], stride=grid.patch[1:])
    )
    return convolved.flatten(2).transpose(1, 2) + positions(grid, len(weight), clip.dtype)


def with_cls(w: Weights, x: Tensor) -> Tensor:
    """The position of the cls token is zero."""
    return torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) if "cls_token" in w else x


def patches(clip: Tensor, grid: TokenGrid) -> Tensor:
    """[B, N, pixels of a patch, C] in the order (frame, row, column)."""
    pt, ph, pw = grid.patch
    x = clip.unfold(2, pt, pt).unfold(3, ph, ph).unfold(4, pw, pw)  # [B, C, t, h, w, pt, ph, pw]
    return x.permute(0, 2, 3, 4, 5, 6, 7, 1).reshape(len(clip), grid.size, pt * ph * pw, -1)


def pixel_targets(clip: Tensor, model: VisionTransformer, convention: str, norm_pix: bool) -> Tensor:
    """[B, N, row length]: of the normalised image (MAE), or of [0, 1] pixels, each colour by itself (VideoMAE)."""
    if convention == "mae":
        x = patches(clip, model.grid).flatten(2)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt() if norm_pix else x
    mean, std = (torch.tensor(x, dtype=clip.dtype).view(1, -1, 1, 1, 1) for x in (model.mean, model.std))
    x = patches(clip * std + mean, model.grid)
    if norm_pix:
        x = (x - x.mean(-2, keepdim=True)) / (x.var(-2, keepdim=True).sqrt() + 1e-6)
    return x.flatten(2)


def raster_decoder(w: Weights, x: Tensor, hidden: Tensor, grid: TokenGrid, heads: int) -> Tensor:
    """MAE and dBOT: mask tokens at their places, all tokens through every block, norm and head. [B, P + N, out]."""
    x = linear(part(w, "embed"), x)
    prefix = x.shape[1] - int((~hidden[0]).sum())
    body = w["mask_token"].expand(*hidden.shape, -1).clone()
    body[~hidden] = x[:, prefix:].flatten(0, 1)
    x = torch.cat([x[:, :prefix], body + positions(grid, x.shape[-1], x.dtype)], dim=1)
    return linear(part(w, "head"), norm(part(w, "norm"), blocks(w, x, heads)[-1]))


def visible_first(token: Tensor, x: Tensor, seen: Tensor, filled: Tensor, grid: TokenGrid) -> Tensor:
    """VideoMAE and AMD: prefix, visible rows and mask tokens, each with its position."""
    table = positions(grid, x.shape[-1], x.dtype).expand(len(x), -1, -1)
    prefix = x.shape[1] - int(seen[0].sum())
    return torch.cat([x[:, :prefix], x[:, prefix:] + rows(table, seen), token + rows(table, filled)], dim=1)


def dbot(method: DBOT, w: Weights, teacher: VisionTransformer, pixels: Tensor, hidden: Tensor) -> Tensor:
    student, options, dtype = method.student, method.options, w["student.cls_token"].dtype
    clip, grid = normalised(pixels, student, dtype), student.grid
    frozen = {name: value.detach().to(dtype) for name, value in teacher.state_dict().items()}
    target = blocks(frozen, with_cls(frozen, embedded(frozen, clip, grid)), teacher.heads)[-1]
    if options.target_norm:
        target = norm(part(frozen, "norm"), target)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    encoder = part(w, "student")
    x = with_cls(encoder, rows(embedded(encoder, clip, grid), ~hidden))
    x = norm(part(encoder, "norm"), blocks(encoder, x, student.heads)[-1])
    error = raster_decoder(part(w, "decoder"), x, hidden, grid, heads_of(method.decoder)) - target
    distance = torch.where(error.abs() < 2, error.square() / 4, error.abs() - 1).mean(-1)
    counted = torch.cat([torch.ones_like(hidden[:, :1]), hidden], dim=1).to(dtype)
    return (distance * counted).sum() / counted.sum()


def mae(method: MAE, w: Weights, pixels: Tensor, hidden: Tensor) -> Tensor:
    student, dtype = method.student, w["decoder.mask_token"].dtype
    clip, encoder = normalised(pixels, student, dtype), part(w, "student")
    x = with_cls(encoder, rows(embedded(encoder, clip, student.grid), ~hidden))
    x = norm(part(encoder, "norm"), blocks(encoder, x, student.heads)[-1])
    return reconstruction(method, part(w, "decoder"), x, clip, hidden)


def reconstruction(method: MAE, w: Weights, x: Tensor, clip: Tensor, hidden: Tensor) -> Tensor:
    """The mean squared error of hidden patches, out of the normed tokens of the visible ones."""
    grid, options, heads = method.student.grid, method.options, heads_of(method.decoder)
    target = rows(pixel_targets(clip, method.student, options.convention, options.norm_pix), hidden)
    if isinstance(method.decoder, PixelDecoder):
        x = visible_first(w["mask_token"], x @ w["embed.weight"].T, ~hidden, hidden, grid)
        x = blocks(w, x, heads)[-1][:, -target.shape[1] :]
        return F.mse_loss(linear(part(w, "head"), norm(part(w, "norm"), x)), target)
    prediction = raster_decoder(w, x, hidden, grid, heads)[:, method.student.prefix :]
    return F.mse_loss(rows(prediction, hidden), target)


def amd(
    method: AMD, w: Weights, teacher: VisionTransformer, pixels: Tensor, hidden: Tensor, unseen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms. ``hidden`` from the student, ``unseen`` by the teacher."""
    student, options, grid, dtype = method.student, method.options, method.student.grid, w["decoder.mask_token"].dtype
    clip, seen, between = normalised(pixels, student, dtype), ~hidden, hidden & ~unseen
    frozen = {name: value.detach().to(dtype) for name, value in teacher.state_dict().items()}
    x = embedded(frozen, clip, grid)
    x = with_cls(frozen, torch.cat([rows(x, seen), rows(x, between)], dim=1))
    targets = blocks(frozen, x, teacher.heads)
    encoder = part(w, "student")
    features = blocks(encoder, with_cls(encoder, rows(embedded(encoder, clip, grid), seen)), student.heads)
    pixel = reconstruction(method, part(w, "decoder"), norm(part(encoder, "norm"), features[-1]), clip, hidden)
    distance = {
        "l2": lambda e: e.square().mean(),
        "l1": lambda e: e.abs().mean(),
        "smooth_l1": lambda e: torch.where(e.abs() < 1, e.square() / 2, e.abs() - 0.5).mean(),
    }[options.loss]
    # One projection a student layer, in ascending order of the layers of both lists.
    layers = sorted({s for s, _ in (*options.direct, *options.generation)})
    projected = {s: features[s] @ w[f"alignment.projections.{i}.weight"].T for i, s in enumerate(layers)}
    visible, skip = int(seen[0].sum()), 0 if options.align_cls else student.prefix
    direct, generated = [], []
    for s, t in options.direct:
        start = skip if options.align_cls else teacher.prefix
        direct.append(distance(projected[s][:, skip:] - targets[t][:, start : teacher.prefix + visible]))
    for i, (s, t) in enumerate(options.generation):
        g = part(w, f"alignment.generators.{i}")
        x = visible_first(g["mask_token"], projected[s], seen, between, grid)
        count = int(between[0].sum())
        x = blocks(g, x, heads_of(method.alignment.generators[i]))[-1][:, -count:]
        generated.append(distance(x - targets[t][:, -count:]))
    sums = torch.stack(direct).sum(), torch.stack(generated).sum()
    if options.reduction == "mean":
        sums = sums[0] / len(direct), sums[1] / len(generated)
    return pixel, *sums


# ------------------------------------------------------------------------------------------------ the comparison


def heads_of(module: nn.Module) -> int:
    return next(int(m.heads) for m in module.modules() if isinstance(getattr(m, "heads", None), int))


def shaken(module: nn.Module) -> Any:
    """Norms and biases start at 1 and 0, where a forgotten one does not show."""
    g = torch.Generator().manual_seed(len(list(module.parameters())))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=g))
    return module


def leaves(method: nn.Module, dtype: torch.dtype = torch.float64) -> Weights:
    """The trained weights (and the buffers), as leaves of their own."""
    found = {name: p.detach().to(dtype).clone().requires_grad_() for name, p in method.named_parameters()}
    found = {name: value for name, value in found.items() if not name.endswith("pos_embed")}
    return found | {name: value.to(dtype) for name, value in method.named_buffers() if name.endswith("mask_token")}


@dataclass
class Batch:
    pixels: Tensor


def bytes_for(grid: TokenGrid, batch: int, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randint(0, 256, (batch, *grid.pixel_shape), dtype=torch.uint8, generator=g))


def compare(method: nn.Module, got: Tensor, w: Weights, expected: Tensor) -> None:
    got.backward()
    expected.backward()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=TOGETHER)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert {name for name, value in w.items() if value.requires_grad} == set(trained)
    mine = {name: p.grad.double() for name, p in trained.items() if p.grad is not None}
    assert set(mine) == set(trained)
    theirs = {name: w[name].grad for name in mine}
    error = {name: float((mine[name] - value).norm()) for name, value in theirs.items() if value is not None}
    size = {name: float(value.norm()) for name, value in theirs.items() if value is not None}
    assert math.hypot(*error.values()) < TOGETHER * math.hypot(*size.values())
    for name, e in error.items():
        assert e < ALONE * size[name], f"{name}: {e / size[name]:.1e}"


# ------------------------------------------------------------------------------------------------ the tests


SIZES = {"small": (384, 6, 16, 2), "base": (768, 12, 16, 2), "large": (1024, 16, 16, 1), "huge": (1280, 16, 14, 1)}


@pytest.mark.parametrize("target_norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_dbot(size: str, target_norm: bool) -> None:
    """Width, heads, patch and image of every size and the published decoder's width; few blocks, and one image."""
    width, heads, patch, depth = SIZES[size]
    torch.manual_seed(0)
    student, teacher = (shaken(models.build(size, depth=depth, precision=FP32)) for _ in range(2))
    assert (student.width, student.heads, student.grid.patch[1]) == (width, heads, patch)
    decoder = shaken(Decoder.for_encoder(student, width, depth=depth))
    method = DBOT(student, decoder, FrozenTeacher(teacher), DBOTOptions(target_norm=target_norm))
    batch = bytes_for(student.grid, 1)
    plan = random_plan(student.grid, torch.arange(1), seed=0, stage=0, epoch=0, ratio=0.75)
    w = leaves(method)
    expected = dbot(method, w, teacher, batch.pixels, plan.to_boolean()[0])
    compare(method, method.loss(batch, plan).total, w, expected)


def small(seed: int, clip: bool, width: int, depth: int, heads: int, **changes: Any) -> VisionTransformer:
    """An encoder of 4 x 6 patches of 8 x 8 pixels, an image's or, in pairs of frames, a clip's of 6."""
    torch.manual_seed(seed)
    frames = {"frames": 6, "tubelet": 2, "cls_token": False} if clip else {}
    sizes: dict[str, Any] = {"image_size": (32, 48), "patch": 8, "width": width, "depth": depth, "heads": heads}
    return shaken(models.build("tiny", precision=FP32, **(sizes | frames | changes)))  # type: ignore[no-any-return]


def masks(grid: TokenGrid, batch: int, ratio: float, teacher_ratio: float | None = None, epoch: int = 0) -> MaskPlan:
    return random_plan(
        grid,
        torch.arange(batch),
        seed=3,
        stage=0,
        epoch=epoch,
        ratio=ratio,
        teacher_ratio=teacher_ratio,
        rounding="mask",
        tube=grid.frames > 1,
    )


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("published", ["mae", "videomae"])
def test_mae_and_videomae(published: str, norm_pix: bool) -> None:
    clip = published == "videomae"
    student = small(0, clip, 48, 3, 4)
    decoder = (PixelDecoder if clip else Decoder).for_encoder(student, width=32, depth=2, heads=2)
    method = MAE(student, shaken(decoder), MAEOptions(norm_pix, published))
    batch, plan = bytes_for(student.grid, 3), masks(student.grid, 3, 0.75)
    w = leaves(method)
    expected = mae(method, w, batch.pixels, plan.to_boolean()[0])
    compare(method, method.loss(batch, plan).total, w, expected)


AMD_CASES = {
    "clip-l2": (True, {}),
    "clip-l1-sum": (True, {"loss": "l1", "reduction": "sum", "direct_weight": 0.5, "generation_weight": 2.0}),
    "clip-smooth-l1": (True, {"loss": "smooth_l1", "norm_pix": False, "pixel_weight": 0.25}),
    "image-smooth-l1-cls": (False, {"loss": "smooth_l1"}),
    "image-l2-no-cls": (False, {"align_cls": False}),
    "image-l1-teacher-without-cls": (False, {"loss": "l1", "align_cls": False}),
}


@pytest.mark.parametrize("case", AMD_CASES)
def test_amd(case: str) -> None:
    """Unequal lists of layers: two direct pairs, three generators, a student layer that two teacher layers follow."""
    clip, changes = AMD_CASES[case]
    options = AMDOptions(
        convention="videomae" if clip else "mae",
        direct=((1, 2), (3, 4)),
        generation=((2, 1), (2, 4), (3, 3)),
        **changes,  # type: ignore[arg-type]
    )
    student = small(0, clip, 48, 3, 4)
    teacher = small(1, clip, 64, 5, 2, cls_token=not clip and not case.endswith("without-cls"))
    decoder: Decoder = (PixelDecoder if clip else Decoder).for_encoder(student, width=32, depth=2, heads=2)
    alignment = shaken(Alignment(student, 64, 4, options))
    method = AMD(student, shaken(decoder), FrozenTeacher(teacher, (1, 2, 3, 4)), alignment, options)
    batch, plan = bytes_for(student.grid, 3), masks(student.grid, 3, 0.75, 0.4)
    w = leaves(method)
    hidden, unseen = plan.to_boolean()
    terms = dict(
        zip(
            ("loss/pixels", "loss/direct", "loss/generation"),
            amd(method, w, teacher, batch.pixels, hidden, unseen),
            strict=True,
        )
    )
    step = method.loss(batch, plan)
    assert {name: float(value) for name, value in step.terms.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in terms.items()}, rel=TOGETHER
    )
    weights = options.pixel_weight, options.direct_weight, options.generation_weight
    expected = sum(weight * term for weight, term in zip(weights, terms.values(), strict=True))
    assert isinstance(expected, Tensor)
    compare(method, step.total, w, expected)


def test_200_steps_of_dbot_follow_the_literal_run() -> None:
    """Same first weights, images, masks and rates: AdamW, clipping, warm-up and cosine; every loss within 1e-4.

    The literal run is eager fp32: the formulas above, torch's AdamW, and its rates and groups written out.
    """
    steps, warmup, peak, clip = 200, 20, 2e-3, 1.0
    student, teacher = small(0, False, 48, 2, 4), small(1, False, 48, 3, 4)
    method = DBOT(student, shaken(Decoder.for_encoder(student, 48, width=32, depth=2, heads=2)), FrozenTeacher(teacher))
    w = leaves(method, torch.float32)
    groups = [
        {"params": [p for p in w.values() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in w.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    literal = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    schedule, updater = Schedule(steps, warmup, peak), Updater(method, weight_decay=0.05, clip=clip)
    images = bytes_for(student.grid, 32).pixels
    ours, theirs = [], []
    for step in range(steps):
        batch, plan = Batch(images[step * 4 % 32 :][:4]), masks(student.grid, 4, 0.75, epoch=step)
        result = method.loss(batch, plan).total
        result.backward()
        updater.gradient_norm()
        updater.step(schedule.rate(step), torch.zeros(()))
        updater.zero()
        expected = dbot(method, w, teacher, batch.pixels, plan.to_boolean()[0])
        literal.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(list(w.values()), clip)
        for group in literal.param_groups:
            done = (step - warmup) / (steps - warmup)
            group["lr"] = peak * step / warmup if step < warmup else peak * 0.5 * (1 + math.cos(math.pi * done))
        literal.step()
        ours.append(float(result.detach()))
        theirs.append(float(expected.detach()))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert np.mean(ours[-20:]) < 0.8 * ours[0]  # the runs went somewhere
