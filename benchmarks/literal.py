"""The ops as published training codes spell them, in plain eager PyTorch: the baseline of every ratio.

Same mathematics, in our own words, with the habits that cost time kept: whole images are normalised and embedded
although most patches are dropped, int64 indices are expanded to the width of what they gather, losses are chains of
full-size temporaries over every token with a mask at the end. Sources: MAE (He et al., CVPR 2022), dBOT (Liu et al.,
ICLR 2024), AMD (Zhao et al., CVPR 2024). Written for any floating dtype: in float64 the same functions give the answer
that every implementation is checked against.

Sizes: B samples, N patches (C*pt*ph*pw values each), n kept, D width. ``index`` is int64, in raster order of the grid.

The transformer pieces at the end are what a published block calls between its matrix products, under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, T, H, W, C] -> [B, C, T, H, W] in mean's dtype, every pixel: (u / 255 - mean) / std."""
    image = pixels.permute(0, 4, 1, 2, 3).to(mean.dtype).div(255)
    return (image - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def patchify(image: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, N, pt*ph*pw*C], every patch, values ordered (frame, row, column, channel)."""
    batch, channels, frames, height, width = image.shape
    pt, ph, pw = patch
    grid = image.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    return grid.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, -1, pt * ph * pw * channels)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], int64 [B, n] -> [B, n, D], the index expanded to the width first."""
    return torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def gather_patches(pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Patch rows of the kept patches, taken from the normalised whole image."""
    return rows_of(patchify(normalise(pixels, mean, std), patch), index)


def embed_patches(
    pixels: Tensor, index: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    """Convolve every patch, add positions [N, D], keep n of N rows. Weight [D, C, ph, pw], or [D, C, pt, ph, pw]."""
    image = normalise(pixels, mean, std).to(weight.dtype)
    if weight.dim() == 4:
        embedded = F.conv2d(image.squeeze(2), weight, bias, stride=weight.shape[2:])
    else:
        embedded = F.conv3d(image, weight, bias, stride=weight.shape[2:])
    return rows_of(embedded.flatten(2).transpose(1, 2) + positions, index)


def assemble(x: Tensor, mask_token: Tensor, positions: Tensor, restore: Tensor) -> Tensor:
    """Decoder input [B, 1+N, D] of visible rows [B, 1+n, D] (class token first): repeat, cat, unshuffle, cat, add."""
    missing = restore.shape[1] + 1 - x.shape[1]
    tokens = torch.cat([x[:, 1:, :], mask_token.repeat(x.shape[0], missing, 1)], dim=1)
    tokens = rows_of(tokens, restore)
    return torch.cat([x[:, :1, :], tokens], dim=1) + positions


def assemble_visible_first(x: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Decoder input of VideoMAE and AMD: visible rows [B, n, D] plus their positions, then mask tokens plus theirs."""
    table = positions.expand(x.shape[0], -1, -1)
    return torch.cat([x + rows_of(table, visible), mask_token + rows_of(table, masked)], dim=1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample."""
    return rows_of(x, index)


def put(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows scattered into a zero sequence."""
    zeros = torch.zeros(x.shape[0], length, x.shape[-1], dtype=x.dtype, device=x.device)
    return zeros.scatter(1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]), x)


def align_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """dBOT's loss on [B, 1+N, D]: standardise the target's rows, smooth-L1 (beta 2), mean over the masked rows.

    Half-precision inputs are computed in fp32, as autocast does for losses.
    """
    prediction, target = _single(prediction), _single(target)
    mean = target.mean(dim=-1, keepdim=True)
    variance = target.var(dim=-1, keepdim=True)
    target = (target - mean) / (variance + 1.0e-6) ** 0.5
    loss = F.smooth_l1_loss(prediction, target, beta=2.0, reduction="none").mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def align_layers(prediction_0: Tensor, prediction_1: Tensor, target_0: Tensor, target_1: Tensor, kind: str) -> Tensor:
    """AMD's direct alignment of two layers: the teacher's first rows are the student's; plain mean over the layers."""
    chain: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "smooth_l1": partial(F.smooth_l1_loss, beta=2.0),
        "cosine": _cosine,
    }
    losses = [
        chain[kind](_single(prediction), _single(target)[:, : prediction.shape[1]])
        for prediction, target in ((prediction_0, target_0), (prediction_1, target_1))
    ]
    return (losses[0] + losses[1]) / 2


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()


def _single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pixel_loss(
    prediction: Tensor, pixels: Tensor, mask: Tensor, mean: Tensor, std: Tensor, patch: tuple[int, int, int]
) -> Tensor:
    """MAE's loss: all patches of the normalised image as targets, each standardised; squared error, masked mean."""
    target = patchify(normalise(pixels, mean, std), patch)
    average = target.mean(dim=-1, keepdim=True)
    variance = target.var(dim=-1, keepdim=True)
    target = (target - average) / (variance + 1.0e-6) ** 0.5
    loss = ((prediction.to(target.dtype) - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def pixel_loss_video(
    prediction: Tensor, pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, patch: tuple[int, int, int]
) -> Tensor:
    """VideoMAE's loss: pixels back to [0, 1], each colour of each tubelet standardised, rows of ``index`` kept."""
    shape = (1, -1, 1, 1, 1)
    video = normalise(pixels, mean, std) * std.view(shape) + mean.view(shape)
    cubes = patchify(video, patch).unflatten(-1, (-1, pixels.shape[-1]))
    cubes = (cubes - cubes.mean(dim=-2, keepdim=True)) / (cubes.var(dim=-2, keepdim=True).sqrt() + 1.0e-6)
    target = rows_of(cubes.flatten(2), index)
    return F.mse_loss(prediction.to(target.dtype), target)


def random_order(sample_ids: Tensor, length: int) -> Tensor:
    """A random permutation a sample, int64 [B, length]: uniform noise, then argsort (new numbers at every call)."""
    return torch.argsort(torch.rand(sample_ids.shape[0], length, device=sample_ids.device), dim=1)


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The next branch's input [B, N, D] in branch's dtype: add, LayerNorm in the residual's dtype, cast."""
    total = residual + branch
    return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-6).to(branch.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x [..., D] plus bias [D], the sum rounded in between."""
    return F.gelu(x + bias)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """[B, N, 3*D] -> [B, N, D]: heads in front, explicit [B, heads, N, N] scores, softmax, heads back."""
    q, k, v = _heads_first(qkv, heads)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(*qkv.shape[:2], -1)


def attention_sdpa(qkv: Tensor, heads: int) -> Tensor:
    """The same by torch's scaled_dot_product_attention, as today's libraries call it."""
    q, k, v = _heads_first(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _heads_first(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product in x's dtype with parameters of another, each cast at every call."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def pre_norm_block(heads: int, residual: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
    """The MLP's branch [B, N, D] of a transformer block on the stream ``residual``, branches computed in ``dtype``.

    ``parameters``: weight and bias of norm1, qkv, proj, norm2, fc1 and fc2, each cast at every call.
    """
    norm1, shift1, qkv, qkv_bias, proj, proj_bias, norm2, shift2, fc1, fc1_bias, fc2, fc2_bias = parameters
    normed = F.layer_norm(residual, residual.shape[-1:], norm1, shift1, 1e-6).to(dtype)
    total = residual + linear(attention(linear(normed, qkv, qkv_bias), heads), proj, proj_bias)
    normed = F.layer_norm(total, total.shape[-1:], norm2, shift2, 1e-6).to(dtype)
    return linear(F.gelu(linear(normed, fc1, fc1_bias)), fc2, fc2_bias)


def quantise_fp8(x: Tensor, scale: float) -> Tensor:
    """Bytes of e4m3(x / scale), saturating: divide, clamp, cast."""
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


RATE, DECAY, BETAS, EPS, CLIP = 1e-3, 0.05, (0.9, 0.95), 1e-8, 1.0  # of the update below


def adamw(
    sizes: list[int], parameters: Tensor, gradients: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor
) -> Tensor:
    """clip_grad_norm_ and AdamW tensor by tensor, as torch's unfused code does both; flat in, cut into ``sizes``."""
    cut = [tensor.split(sizes) for tensor in (parameters, gradients, exp_avg, exp_avg_sq)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in cut[1]]))
    coefficient = (CLIP / (norm + 1e-6)).clamp(max=1.0)
    for gradient in cut[1]:
        gradient.mul_(coefficient)
    steps += 1
    corrections = [1 - beta**steps for beta in BETAS]
    for i, (parameter, gradient, average, average_sq) in enumerate(zip(*cut)):
        parameter.mul_(1 - RATE * DECAY)
        average.lerp_(gradient, 1 - BETAS[0])
        average_sq.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        denominator = (average_sq.sqrt() / corrections[1][i].sqrt()).add_(EPS)
        parameter.sub_(average / denominator * (RATE / corrections[0][i]))
    return parameters


def adamw_fused(
    sizes: list[int], parameters: Tensor, gradients: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor
) -> Tensor:
    """The same by torch's foreach norm and its fused AdamW, which clips as it reads the gradient."""
    values, slopes, averages, squares = (t.split(sizes) for t in (parameters, gradients, exp_avg, exp_avg_sq))
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(slopes)))
    counts = steps.unbind()
    torch._foreach_add_(counts, 1)
    torch._fused_adamw_(
        values, slopes, averages, squares, (), counts, lr=RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY,
        eps=EPS, amsgrad=False, maximize=False, grad_scale=(norm / CLIP).clamp_min(1.0), found_inf=None,
    )  # fmt: skip
    return parameters
