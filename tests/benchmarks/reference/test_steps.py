"""The literal steps and the current ones against the formulas, written out sample by sample in float64.

The formulas read the same parameters, so that autograd gives their gradients, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cohobate.benchmarks.reference import amd, dbot, mae, video, videomae, vit
from cohobate.benchmarks.reference.current import current

B, C, T, H, W, P = 2, 3, 4, 16, 24, 8
IMAGE, CLIP = (1, P, P), (2, P, P)
WIDTH, INNER, TEACHER, HEADS = 8, 12, 16, 2
IMAGE_TOKENS, CLIP_TOKENS = 6, 12
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
EXACT = 1e-10  # relative, in float64: only the order of additions differs; a pixel's standard deviation costs the most
LOSS, GRADIENT = 1e-6, 1e-5  # relative, in fp32


@dataclass
class Step:
    """A literal module in float64, its inputs, the same masks as indices, and the formula of its loss."""

    literal: nn.Module
    inputs: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    formula: Callable[[], Tensor]


def results(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values()))))}


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Relative errors of the loss and of the gradients, each gradient by its norm."""
    assert got.keys() == expected.keys()
    errors = {name: float((got[name].double() - value).norm() / value.norm()) for name, value in expected.items()}
    return errors.pop("loss"), max(errors.values())


# -- the formulas ------------------------------------------------------------------------------------------------------


Weights = dict[str, Any]


def weights(module: nn.Module) -> Weights:
    return {**dict(module.named_parameters()), **{n: m for n, m in module.named_modules() if hasattr(m, "positions")}}


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    bias = w.get(f"{name}.bias")
    y = x @ w[f"{name}.weight"].flatten(1).T
    return y if bias is None else y + bias


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def run_blocks(x: Tensor, w: Weights, name: str) -> list[Tensor]:
    """[n, D] -> the stream behind each block, the first entry in front of all."""
    states = [x]
    while f"{name}.blocks.{len(states) - 1}.norm1.weight" in w:
        block = f"{name}.blocks.{len(states) - 1}"
        q, k, v = linear(norm(x, w, f"{block}.norm1"), w, f"{block}.attn.qkv").chunk(3, dim=-1)
        dim, parts = x.shape[1] // HEADS, []
        for begin in range(0, x.shape[1], dim):
            columns = slice(begin, begin + dim)
            scores = (q[:, columns] @ k[:, columns].T / math.sqrt(dim)).exp()
            parts.append(scores / scores.sum(1, keepdim=True) @ v[:, columns])
        x = x + linear(torch.cat(parts, dim=1), w, f"{block}.attn.proj")
        h = linear(norm(x, w, f"{block}.norm2"), w, f"{block}.mlp.fc1")
        x = x + linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, w, f"{block}.mlp.fc2")
        states.append(x)
    return states


def cube(sample: Tensor, token: int, patch: tuple[int, int, int]) -> Tensor:
    """[C, T, H, W] -> the token's [C, pt, ph, pw]."""
    pt, ph, pw = patch
    rows, columns = H // ph, W // pw
    t, y, x = token // (rows * columns) * pt, token // columns % rows * ph, token % columns * pw
    return sample[:, t : t + pt, y : y + ph, x : x + pw]


def embedded(sample: Tensor, tokens: list[int], patch: tuple[int, int, int], w: Weights, name: str) -> Tensor:
    rows = torch.stack([cube(sample, token, patch).flatten() for token in tokens])
    return linear(rows, w, f"{name}.patch_embed.proj")


def image_predictions(image: Tensor, visible: list[int], w: Weights) -> Tensor:
    """[1 + N, out] of one image, in raster order."""
    x = embedded(image, visible, IMAGE, w, "student")
    table = w["student.pos_embed"][0]
    x = torch.cat([w["student.cls_token"][0] + table[:1], x + table[1:][visible]])
    x = linear(norm(run_blocks(x, w, "student")[-1], w, "student.norm"), w, "decoder.embed")
    table, rows = w["decoder.pos_embed"][0], [x[0]]
    for token in range(IMAGE_TOKENS):
        rows.append(x[1 + visible.index(token)] if token in visible else w["decoder.mask_token"][0, 0])
    x = run_blocks(torch.stack(rows) + table, w, "decoder")[-1]
    return linear(norm(x, w, "decoder.norm"), w, "decoder.head")


def standardised(row: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / (centred.square().sum() / (len(row) - 1) + 1e-6).sqrt()


def dbot_formula(literal: nn.Module, images: Tensor, visible: Tensor) -> Tensor:
    w, total, count = weights(literal), torch.zeros((), dtype=torch.float64), 0
    for image, seen in zip(images.unsqueeze(2), visible.tolist()):
        prediction = image_predictions(image, seen, w)
        table = w["teacher.pos_embed"][0]
        x = embedded(image, list(range(IMAGE_TOKENS)), IMAGE, w, "teacher")
        target = run_blocks(torch.cat([w["teacher.cls_token"][0], x]) + table, w, "teacher")[-1].detach()
        for place in [0, *(1 + token for token in range(IMAGE_TOKENS) if token not in seen)]:
            off = (prediction[place] - standardised(target[place])).abs()
            total, count = total + torch.where(off < 2, off**2 / 4, off - 1).mean(), count + 1
    return total / count


def mae_formula(literal: nn.Module, images: Tensor, visible: Tensor) -> Tensor:
    w, total, count = weights(literal), torch.zeros((), dtype=torch.float64), 0
    for image, seen in zip(images.unsqueeze(2), visible.tolist()):
        prediction = image_predictions(image, seen, w)
        for token in range(IMAGE_TOKENS):
            if token not in seen:
                target = standardised(cube(image, token, IMAGE).permute(1, 2, 3, 0).flatten())
                total, count = total + (prediction[1 + token] - target).square().mean(), count + 1
    return total / count


def positions(w: Weights, name: str) -> Tensor:
    return w[name].positions[0].double()  # type: ignore[no-any-return]


def clip_states(clip: Tensor, tokens: list[int], w: Weights, name: str) -> list[Tensor]:
    x = embedded(clip, tokens, CLIP, w, name) + positions(w, name)[tokens]
    return run_blocks(x, w, name)


def pixel_term(clip: Tensor, seen: list[int], last: Tensor, w: Weights) -> Tensor:
    hidden = [token for token in range(CLIP_TOKENS) if token not in seen]
    table = positions(w, "decoder")
    x = linear(norm(last, w, "student.norm"), w, "decoder.embed") + table[seen]
    x = run_blocks(torch.cat([x, w["decoder.mask_token"][0] + table[hidden]]), w, "decoder")[-1]
    prediction, total = linear(norm(x, w, "decoder.norm"), w, "decoder.head"), 0.0
    for row, token in zip(prediction[len(seen) :], hidden):
        colours = []
        for channel in range(C):
            values = cube(clip, token, CLIP)[channel].flatten() * STD[channel] + MEAN[channel]
            colours.append((values - values.mean()) / (values.std() + 1e-6))
        total = total + (row - torch.stack(colours, dim=1).flatten()).square().mean()
    return total / len(hidden)  # type: ignore[return-value]


def videomae_formula(literal: nn.Module, clips: Tensor, visible: Tensor) -> Tensor:
    w, total = weights(literal), torch.zeros((), dtype=torch.float64)
    for clip, seen in zip(clips, visible.tolist()):
        total = total + pixel_term(clip, seen, clip_states(clip, seen, w, "student")[-1], w)
    return total / len(clips)


def amd_formula(literal: amd.AMD, clips: Tensor, visible: Tensor, between: Tensor) -> Tensor:
    w, total = weights(literal), torch.zeros((), dtype=torch.float64)
    for clip, seen, more in zip(clips, visible.tolist(), between.tolist()):
        states = clip_states(clip, seen, w, "student")
        targets = [state.detach() for state in clip_states(clip, seen + more, w, "teacher")]
        total = total + pixel_term(clip, seen, states[-1], w)
        for number, (student, teacher) in enumerate(literal.pairs):
            x = linear(states[student], w, f"alignment.projections.{number}")
            direct = (x - targets[teacher][: len(seen)]).square().mean()
            name = f"alignment.generators.{number}"
            table = positions(w, name)
            x = torch.cat([x + table[seen], w[f"{name}.mask_token"][0] + table[more]])
            made = (run_blocks(x, w, name)[-1][len(seen) :] - targets[teacher][len(seen) :]).square().mean()
            total = total + (direct + made) / len(literal.pairs)
    return total / len(clips)


# -- the steps ---------------------------------------------------------------------------------------------------------


def drawn(module: nn.Module, random: torch.Generator) -> Any:
    """In float64, every parameter drawn anew: nothing is zero by chance of its first value."""
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3 + float("norm" in name))
    return module


def image_step(recipe: str, random: torch.Generator) -> Step:
    grid = (H // P, W // P)
    student = vit.Encoder(grid, P, WIDTH, 2, HEADS)
    literal: nn.Module
    if recipe == "dbot":
        teacher = vit.Encoder(grid, P, TEACHER, 3, HEADS)
        literal = dbot.DBOT(student, vit.Decoder(IMAGE_TOKENS, WIDTH, TEACHER, INNER, 1, HEADS), teacher, ratio=0.5)
    else:
        literal = mae.MAE(student, vit.Decoder(IMAGE_TOKENS, WIDTH, P * P * C, INNER, 1, HEADS), P, ratio=0.5)
    literal = drawn(literal, random)
    images = torch.randn(B, C, H, W, generator=random, dtype=torch.float64)
    noise = torch.rand(B, IMAGE_TOKENS, generator=random)
    order = noise.argsort(dim=1)
    visible, hidden = order[:, :3], order[:, 3:]
    formula = dbot_formula if recipe == "dbot" else mae_formula
    return Step(literal, (images, noise), (visible, hidden), lambda: formula(literal, images, visible))


def clip_step(recipe: str, random: torch.Generator) -> Step:
    def table(width: int) -> Tensor:
        return torch.randn(1, CLIP_TOKENS, width, generator=random)

    student, decoder = (
        video.Encoder(table(WIDTH), CLIP, 2, HEADS),
        video.Decoder(table(INNER), WIDTH, math.prod(CLIP) * C, 1, HEADS),
    )
    clips = torch.randn(B, C, T, H, W, generator=random, dtype=torch.float64)
    order = torch.rand(B, CLIP_TOKENS, generator=random).argsort(dim=1)
    visible, between, rest = (part.sort(dim=1).values for part in order.split([3, 4, 5], dim=1))
    masks = torch.ones(2, B, CLIP_TOKENS, dtype=torch.bool)
    masks[0].scatter_(1, visible, False)
    masks[1].scatter_(1, torch.cat([visible, between], dim=1), False)
    hidden = torch.cat([between, rest], dim=1)
    if recipe == "videomae":
        plain = drawn(videomae.VideoMAE(student, decoder, CLIP, MEAN, STD), random)
        formula = lambda: videomae_formula(plain, clips, visible)  # noqa: E731
        return Step(plain, (clips, masks[0]), (visible, hidden), formula)
    shared = table(TEACHER)  # of the teacher and of the generators
    generators = [amd.Generator(shared, 1, HEADS) for _ in range(2)]
    alignment = amd.Alignment(WIDTH, TEACHER, generators)
    teacher = video.Encoder(shared, CLIP, 4, HEADS)
    full = drawn(amd.AMD(student, decoder, teacher, alignment, ((1, 2), (2, 3)), CLIP, MEAN, STD), random)
    formula = lambda: amd_formula(full, clips, visible, between)  # noqa: E731
    return Step(full, (clips, *masks), (visible, hidden, between), formula)


RECIPES = ("dbot", "mae", "videomae", "amd")


def step_of(recipe: str) -> Step:
    random = torch.Generator().manual_seed(0)
    return image_step(recipe, random) if recipe in ("dbot", "mae") else clip_step(recipe, random)


@pytest.fixture(params=RECIPES)
def step(request: pytest.FixtureRequest) -> Step:
    return step_of(request.param)


def test_the_literal_step_is_the_formula(step: Step) -> None:
    expected = results(step.literal, step.formula())
    assert max(worst(results(step.literal, step.literal(*step.inputs)), expected)) < EXACT


def test_the_current_step_is_the_formula(step: Step) -> None:
    module = current(step.literal, half=False)
    got = results(module, module(step.inputs[0], *step.indices))
    assert max(worst(got, results(step.literal, step.formula()))) < EXACT


def test_both_in_fp32(step: Step) -> None:
    expected = results(step.literal, step.formula())
    literal = step.literal.float()
    clips, *masks = step.inputs
    loss, gradient = worst(results(literal, literal(clips.float(), *masks)), expected)
    assert loss < LOSS and gradient < GRADIENT
    module = current(literal, half=False)
    loss, gradient = worst(results(module, module(clips.float(), *step.indices)), expected)
    assert loss < LOSS and gradient < GRADIENT


def test_another_mask_is_another_loss(step: Step) -> None:
    """What the checks above would say of a step whose masks are one token off."""
    expected = step.formula()
    clips, *masks = step.inputs
    shifted = step.literal(clips, *(mask.roll(1, dims=1) for mask in masks))
    assert abs(shifted / expected - 1) > 100 * LOSS


def test_the_current_step_is_one_graph(step: Step) -> None:
    """Which torch.compile differentiates as a whole. The code it makes of it is checked wherever it is timed."""
    module = current(step.literal, half=False)
    program = torch.compile(module, backend="aot_eager", fullgraph=True)
    got = results(module, program(step.inputs[0], *step.indices))
    assert max(worst(got, results(step.literal, step.formula()))) < EXACT


@pytest.mark.parametrize("recipe", ["dbot", "amd"])
def test_a_teachers_matrices_are_cast_once(recipe: str) -> None:
    """Autocast rounds the same matrices, at every step: so not a bit changes."""
    step = step_of(recipe)
    literal, clips = step.literal.float(), step.inputs[0].float()
    once, always = current(literal, half=True), current(literal, half=False)
    kept = {name for name, p in once.named_parameters() if p.dtype == torch.float32}
    cast = {name for name, p in once.named_parameters() if p.dtype == torch.bfloat16}
    assert all(name.startswith("teacher.") for name in cast)
    assert all(not name.startswith("teacher.") or "norm" in name or "embed" in name or "token" in name for name in kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(once(clips, *step.indices), always(clips, *step.indices))


def test_amd_keeps_the_parts_of_its_loss_for_the_log() -> None:
    step = step_of("amd")
    loss = step.literal(*step.inputs)
    terms = step.literal.terms
    assert len(terms) == 3 and torch.isclose(sum(terms), loss) and not any(term.requires_grad for term in terms)  # type: ignore[call-overload, union-attr]


def test_only_a_literal_step_can_be_rewritten() -> None:
    with pytest.raises(TypeError, match="expected one of DBOT, MAE, VideoMAE, AMD, got Linear"):
        current(nn.Linear(1, 1), half=False)
