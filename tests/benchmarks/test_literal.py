"""The literal forms against the formulas, written as loops over samples and rows: they are everybody's answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cohobate.benchmarks import literal

B, H, W, P, C, D = 2, 6, 4, 2, 3, 5
N, KEEP = (H // P) * (W // P), 2
MEAN = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
STD = torch.tensor([0.2, 0.3, 0.25], dtype=torch.float64)
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 throughout: only the order of additions differs


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def floats(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def pixels_of(random: torch.Generator, frames: int = 1) -> Tensor:
    return torch.randint(0, 256, (B, frames, H, W, C), generator=random, dtype=torch.uint8)


def order_of(random: torch.Generator, length: int) -> Tensor:
    return torch.rand(B, length, generator=random).argsort(dim=1)


def patch_row(pixels: Tensor, sample: int, token: int, tubelet: int = 1, normal: bool = True) -> Tensor:
    """One patch, value by value, in (frame, row, column, channel) order."""
    per_frame = (H // P) * (W // P)
    t, rest = divmod(token, per_frame)
    y, x = divmod(rest, W // P)
    values = []
    for frame in range(tubelet):
        for row in range(P):
            for column in range(P):
                for channel in range(C):
                    u = float(pixels[sample, t * tubelet + frame, y * P + row, x * P + column, channel]) / 255
                    values.append(
                        (u - MEAN[channel]) / STD[channel] if normal else torch.tensor(u, dtype=torch.float64)
                    )
    return torch.stack(values)


def test_gather_patches(random: torch.Generator) -> None:
    pixels, index = pixels_of(random, frames=4), order_of(random, 2 * N)[:, :KEEP]
    got = literal.gather_patches(pixels, index, MEAN, STD, (2, P, P))
    for b in range(B):
        for j in range(KEEP):
            torch.testing.assert_close(got[b, j], patch_row(pixels, b, int(index[b, j]), tubelet=2), **EXACT)


@pytest.mark.parametrize("video", [False, True])
def test_embed_patches(random: torch.Generator, video: bool) -> None:
    tubelet = 2 if video else 1
    pixels, index = pixels_of(random, frames=tubelet), order_of(random, N)[:, :KEEP]
    weight = floats(random, D, C, *((2,) if video else ()), P, P)
    bias, positions = floats(random, D), floats(random, N, D)
    got = literal.embed_patches(pixels, index, weight, bias, positions, MEAN, STD)
    rows = weight.movedim(1, -1).flatten(1)  # our order of a patch's values
    for b in range(B):
        for j in range(KEEP):
            token = int(index[b, j])
            expected = rows @ patch_row(pixels, b, token, tubelet=tubelet) + bias + positions[token]
            torch.testing.assert_close(got[b, j], expected, **EXACT)


def test_assemble(random: torch.Generator) -> None:
    order = order_of(random, N)
    x, token, positions = floats(random, B, 1 + KEEP, D), floats(random, D), floats(random, 1 + N, D)
    got = literal.assemble(x, token, positions, order.argsort(dim=1))
    for b in range(B):
        torch.testing.assert_close(got[b, 0], x[b, 0] + positions[0], **EXACT)
        for rank, place in enumerate(order[b].tolist()):
            source = x[b, 1 + rank] if rank < KEEP else token
            torch.testing.assert_close(got[b, 1 + place], source + positions[1 + place], **EXACT)


def test_assemble_visible_first(random: torch.Generator) -> None:
    order = order_of(random, N)
    x, token, positions = floats(random, B, KEEP, D), floats(random, D), floats(random, N, D)
    got = literal.assemble_visible_first(x, token, positions, order[:, :KEEP], order[:, KEEP:])
    for b in range(B):
        for rank, place in enumerate(order[b].tolist()):
            source = x[b, rank] if rank < KEEP else token
            torch.testing.assert_close(got[b, rank], source + positions[place], **EXACT)


def test_take_and_put(random: torch.Generator) -> None:
    x, index = floats(random, B, N, D), order_of(random, N)[:, :KEEP]
    taken = literal.take(x, index)
    placed = literal.put(taken, index, N)
    for b in range(B):
        for j, place in enumerate(index[b].tolist()):
            assert torch.equal(taken[b, j], x[b, place]) and torch.equal(placed[b, place], x[b, place])
        assert placed[b].ne(0).any(dim=1).sum() == KEEP


def smooth_l1(difference: float) -> float:
    return difference**2 / 4 if abs(difference) < 2 else abs(difference) - 1  # beta 2


def test_align_loss(random: torch.Generator) -> None:
    prediction, target = floats(random, B, 1 + N, D) * 3, floats(random, B, 1 + N, D) * 2
    mask = torch.ones(B, 1 + N, dtype=torch.float64)
    mask[:, 2:4] = 0
    total, count = 0.0, 0
    for b in range(B):
        for i in range(1 + N):
            if mask[b, i]:
                row = target[b, i].tolist()
                mean = sum(row) / D
                variance = sum((value - mean) ** 2 for value in row) / (D - 1)
                normal = [(value - mean) / math.sqrt(variance + 1e-6) for value in row]
                total += sum(smooth_l1(p - t) for p, t in zip(prediction[b, i].tolist(), normal)) / D
                count += 1
    assert float(literal.align_loss(prediction, target, mask)) == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1", "cosine"])
def test_align_layers(random: torch.Generator, kind: str) -> None:
    p0, p1, t0, t1 = (floats(random, B, rows, D) * 2 for rows in (KEEP, KEEP, N, N))
    value = {"mse": lambda d: d * d, "l1": abs, "smooth_l1": smooth_l1}
    total = 0.0
    for p, t in ((p0, t0), (p1, t1)):
        for b in range(B):
            for i in range(KEEP):
                a, c = p[b, i].tolist(), t[b, i].tolist()
                if kind == "cosine":
                    dot = sum(u * v for u, v in zip(a, c))
                    total += 1 - dot / (math.hypot(*a) * math.hypot(*c))
                else:
                    total += sum(value[kind](u - v) for u, v in zip(a, c)) / D
    expected = total / (2 * B * KEEP)
    assert float(literal.align_layers(p0, p1, t0, t1, kind)) == pytest.approx(expected, rel=1e-12)


def test_pixel_loss(random: torch.Generator) -> None:
    pixels, prediction = pixels_of(random), floats(random, B, N, P * P * C)
    mask = torch.ones(B, N, dtype=torch.float64)
    mask[:, :KEEP] = 0
    total = 0.0
    for b in range(B):
        for i in range(KEEP, N):
            row = patch_row(pixels, b, i)
            normal = (row - row.mean()) / (row.var(correction=1) + 1e-6).sqrt()
            total += float(((prediction[b, i] - normal) ** 2).mean())
    got = literal.pixel_loss(prediction, pixels, mask, MEAN, STD, (1, P, P))
    assert float(got) == pytest.approx(total / (B * (N - KEEP)), rel=1e-12)


def test_pixel_loss_video(random: torch.Generator) -> None:
    pixels, index = pixels_of(random, frames=2), order_of(random, N)[:, KEEP:]
    prediction = floats(random, B, N - KEEP, 2 * P * P * C)
    total = 0.0
    for b in range(B):
        for j, token in enumerate(index[b].tolist()):
            colours = patch_row(pixels, b, token, tubelet=2, normal=False).view(-1, C)
            normal = (colours - colours.mean(0)) / (colours.var(0, correction=1).sqrt() + 1e-6)
            total += float(((prediction[b, j] - normal.flatten()) ** 2).mean())
    got = literal.pixel_loss_video(prediction, pixels, index, MEAN, STD, (2, P, P))
    assert float(got) == pytest.approx(total / (B * (N - KEEP)), rel=1e-10)  # pixels go through mean and std and back


def test_random_order_is_a_permutation() -> None:
    order = literal.random_order(torch.arange(7), 11)
    assert torch.equal(order.sort(dim=1).values, torch.arange(11).expand(7, 11))


def test_add_norm(random: torch.Generator) -> None:
    x, branch, weight, bias = floats(random, B, N, D), floats(random, B, N, D), floats(random, D), floats(random, D)
    got = literal.add_norm(x, branch, weight, bias)
    for b in range(B):
        for i in range(N):
            row = (x[b, i] + branch[b, i]).tolist()
            mean = sum(row) / D
            variance = sum((value - mean) ** 2 for value in row) / D
            right = [(v - mean) / math.sqrt(variance + 1e-6) * w + c for v, w, c in zip(row, weight.tolist(), bias)]
            torch.testing.assert_close(got[b, i], torch.tensor(right, dtype=torch.float64), **EXACT)


def test_bias_gelu(random: torch.Generator) -> None:
    x, bias = floats(random, N, D) * 2, floats(random, D)
    for i in range(N):
        for j in range(D):
            value = float(x[i, j] + bias[j])
            right = value * (1 + math.erf(value / math.sqrt(2))) / 2
            assert float(literal.bias_gelu(x, bias)[i, j]) == pytest.approx(right, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("form", [literal.attention, literal.attention_sdpa])
def test_attention(random: torch.Generator, form: Callable[[Tensor, int], Tensor]) -> None:
    heads, dim = 2, 3
    qkv = floats(random, B, N, 3 * heads * dim)
    q, k, v = (qkv[..., part * heads * dim : (part + 1) * heads * dim] for part in range(3))
    got = form(qkv, heads)
    for b in range(B):
        for h in range(heads):
            columns = slice(h * dim, (h + 1) * dim)
            for i in range(N):
                scores = [float(q[b, i, columns] @ k[b, j, columns]) / math.sqrt(dim) for j in range(N)]
                total = sum(map(math.exp, scores))
                right = sum(math.exp(score) / total * v[b, j, columns] for j, score in enumerate(scores))
                torch.testing.assert_close(got[b, i, columns], right, **EXACT)


def test_linear_computes_in_the_dtype_of_its_input(random: torch.Generator) -> None:
    x, weight, bias = floats(random, N, D), floats(random, 3, D), floats(random, 3)
    right = torch.stack([(x[i] * weight).sum(1) + bias for i in range(N)])
    torch.testing.assert_close(literal.linear(x, weight, bias), right, **EXACT)
    assert literal.linear(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_quantise_fp8() -> None:
    """e4m3 bytes by hand: 448 is the largest, 1 is 0x38, its neighbour 1.125; 2**-9 is the smallest."""
    x = torch.tensor([448.0, 1e6, -1e6, 1.0, 1.0625, 2.0**-9, 2.0**-11, 0.0]) / 2
    assert literal.quantise_fp8(x, 0.5).tolist() == [0x7E, 0x7E, 0xFE, 0x38, 0x38, 0x01, 0x00, 0x00]
