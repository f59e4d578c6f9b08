"""Symmetric dBOT: against the literal network in float64, what it skips, what it refuses, and that it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cohobate import masking, models
from cohobate.errors import UserError
from cohobate.methods import DBOT, DBOTOptions, SymmetricDBOT
from cohobate.methods.symmetric import CLIP
from cohobate.models import MaskTokenHead, Precision
from cohobate.teacher import FrozenTeacher, load_source

# fp32 against float64: 3 blocks of a dozen roundings of 6e-8 each, which add up like their root; the loss is one mean
# of them, a gradient a sum over rows. Measured: 8e-8 and 7e-7; another machine adds in another order.
LOSS, GRADIENT = 1e-6, 2e-6
BEIT: dict[str, Any] = {"positions": "none", "layer_scale": 0.1, "relative_positions": True}
BOTH: dict[str, Any] = {"positions": "sincos", "layer_scale": 0.5, "relative_positions": True}
PLAIN: dict[str, Any] = {}
D_T = 20


def scrambled(module: torch.nn.Module, seed: int = 4) -> Any:
    """Without neutral parts: norms off 1, biases, scales and tables off 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (parameter.dim() == 1 or "table" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def teacher_of(parts: Any, **changes: Any) -> FrozenTeacher:
    """Another width, another mean and std, and a projection, as CLIP has them."""
    encoder = scrambled(parts.student(width=96, heads=6, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25)), 5)
    anatomy = load_source(encoder).anatomy
    assert anatomy is not None
    head = torch.randn(D_T, 96, generator=torch.Generator().manual_seed(6)) / 10
    return FrozenTeacher(dataclasses.replace(anatomy, **({"head": head} | changes)), precision=parts.FP32)


def method_of(parts: Any, options: DBOTOptions | None = None, precision: Any = None, **student: Any) -> SymmetricDBOT:
    encoder = scrambled(parts.student(precision or parts.FP32, **student))
    torch.manual_seed(1)
    teacher = teacher_of(parts)
    return SymmetricDBOT(encoder, MaskTokenHead(encoder, teacher.width), teacher, options)


def literal_loss(method: Any, images: Tensor, hidden: Tensor, target: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The network as it is written down: every patch embedded, every row computed, one number at the end.

    ``images`` [B, C, H, W] normalised, ``hidden`` bool [B, N], ``target`` [B, P + N, D_T]; all in the weights' dtype.
    """
    rows, columns = method.student.grid.shape[1:]
    heads, prefix, cls = method.student.heads, method.student.prefix, method.options.cls
    w = {name.removeprefix("student."): value for name, value in weights.items()}
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=method.student.grid.patch[1])
    x = torch.where(hidden[..., None], w["decoder.mask_token"], x.flatten(2).transpose(1, 2))
    if prefix:
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    if "pos_embed" in w:
        x = x + w["pos_embed"]
    bias = None
    if "rel_pos_bias.relative_position_bias_table" in w:
        table, last = w["rel_pos_bias.relative_position_bias_table"], (2 * rows - 1) * (2 * columns - 1)
        index = torch.empty(prefix + rows * columns, prefix + rows * columns, dtype=torch.int64)
        for q in range(-prefix, rows * columns):
            for k in range(-prefix, rows * columns):
                if q < 0 or k < 0:
                    entry = last + (2 if q == k else 0 if q < 0 else 1)
                else:
                    dy, dx = q // columns - k // columns, q % columns - k % columns
                    entry = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
                index[q + prefix, k + prefix] = entry
        bias = table[index].permute(2, 0, 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(method.student.depth):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if bias is None else scores + bias
        branch = linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + w.get(f"blocks.{i}.ls1.gamma", 1.0) * branch
        branch = linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
        x = x + w.get(f"blocks.{i}.ls2.gamma", 1.0) * branch
    prediction = F.linear(norm(x, "norm"), w["decoder.head.weight"], w["decoder.head.bias"])
    counted = torch.cat([torch.full((len(hidden), prefix), cls), hidden], dim=1)
    p, t = prediction[counted], target[counted]
    if method.options.loss == "cosine":
        return 1 - ((p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))).mean()
    return F.smooth_l1_loss(p, t, beta=method.options.beta)


def literal_target(parts: Any, method: SymmetricDBOT) -> Tensor:
    """Every token of the teacher behind norm and projection, in float64."""
    encoder = scrambled(parts.student(width=96, heads=6, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25)), 5)
    precise = encoder.like(precision=Precision(torch.float64, torch.float64)).double()
    precise.load_state_dict(encoder.state_dict())
    head = torch.randn(D_T, 96, generator=torch.Generator().manual_seed(6)).double() / 10
    pixels = parts.batch().pixels.double() / 255
    pixels = (pixels - torch.tensor(encoder.mean).double()) / torch.tensor(encoder.std).double()
    with torch.no_grad():
        return precise(pixels) @ head.T


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (BEIT, CLIP),
        (BOTH, CLIP),
        (PLAIN, CLIP),
        (BEIT, dataclasses.replace(CLIP, cls=True, loss="smooth_l1", beta=0.5)),
        (BEIT | {"cls_token": False}, CLIP),
    ],
    ids=["beit", "both", "plain", "cls, smooth-L1", "no class token"],
)
def test_loss_and_gradients_are_the_literal_ones(parts: Any, shape: dict[str, Any], options: DBOTOptions) -> None:
    method = method_of(parts, options, **shape)
    plan = parts.plan(method.student.grid, ratio=0.4)
    step = method.loss(parts.batch(), plan)
    step.total.backward()

    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in method.named_parameters()}
    images = parts.batch().pixels[:, 0].permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (method.student.mean, method.student.std))
    target = literal_target(parts, method)
    target = target if method.student.prefix else target[:, 1:]
    expected = literal_loss(method, (images - mean) / std, plan.to_boolean()[0], target, weights)
    expected.backward()

    assert float(step.total.detach()) == pytest.approx(float(expected.detach()), rel=LOSS)
    assert float(step.terms["loss/align"]) == pytest.approx(float(expected.detach()), rel=LOSS)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert ("student.pos_embed" in weights) == (shape.get("positions") != "none")
    for name, parameter in trained.items():
        got, want = parameter.grad, weights[name].grad
        assert got is not None and want is not None and bool(want.any()), name
        if name.endswith("qkv.bias"):  # the keys' part vanishes: nothing but rounding is left of it
            width = method.student.width
            got, want = (torch.cat([g[:width], g[2 * width :]]) for g in (got, want))
        assert parts.relative(got, want) < GRADIENT, name


def test_the_default_is_the_recipe_for_clip(parts: Any) -> None:
    """And the loss is the released code's, the negative mean cosine, plus 1."""
    method = method_of(parts, **BEIT)
    assert method.options == DBOTOptions(loss="cosine", standardise=None, target_norm=True, cls=False)
    plan = parts.plan(method.student.grid, ratio=0.4)
    rows = method.counted(plan, 1)
    assert torch.equal(rows, plan.masked + 1)
    prediction = method.predict(parts.batch().pixels, plan, rows, None)
    target = method.teacher(parts.batch().pixels, queries=rows)[0]
    released = -F.cosine_similarity(prediction, target, dim=-1).mean()
    assert float(method.loss(parts.batch(), plan).total) == pytest.approx(1 + float(released), rel=1e-6)
    assert method.targets(parts.batch()).shape == (3, 24, D_T)


def test_the_parts_and_their_names(parts: Any) -> None:
    method = method_of(parts, **BEIT)
    assert isinstance(method, DBOT) and method.head is method.decoder
    names = {name for name, _ in method.named_parameters() if not name.startswith("student.")}
    assert names == {"decoder.mask_token", "decoder.head.weight", "decoder.head.bias"}


def test_several_masks_are_the_mean_of_single_ones(parts: Any) -> None:
    method = method_of(parts, **BEIT)
    plan = parts.plan(method.student.grid, ratio=0.4, masks=2)
    singles = [
        method.loss(parts.batch(), masking.MaskPlan(order, plan.student, plan.teacher)).total
        for order in plan.order.chunk(2)
    ]
    total = method.loss(parts.batch(), plan).total
    assert float(total.detach()) == pytest.approx(float(torch.stack(singles).mean().detach()), rel=LOSS)


def test_bf16_stays_near_fp32(parts: Any) -> None:
    """2^-8 a rounding, a few dozen of them in a row."""
    exact, low = method_of(parts, **BEIT), method_of(parts, precision=Precision(), **BEIT)
    plan = parts.plan(exact.student.grid, ratio=0.4)
    losses = [method.loss(parts.batch(), plan).total for method in (exact, low)]
    for loss in losses:
        loss.backward()
    assert abs(float((losses[1] / losses[0]).detach()) - 1) < 5e-3
    flat = [torch.cat([g.flatten() for _, g in sorted(parts.gradients(m).items())]) for m in (exact, low)]
    assert parts.relative(flat[1], flat[0]) < 3e-2
    table = "student.rel_pos_bias.relative_position_bias_table"
    assert parts.relative(parts.gradients(low)[table], parts.gradients(exact)[table]) < 5e-2


def test_a_step_learns(parts: Any) -> None:
    """Thirty steps of AdamW on one batch in bf16 bring the cosine to the target from 0 to above 0.5."""
    method = method_of(parts, precision=Precision(), **BEIT)
    plan = parts.plan(method.student.grid, ratio=0.4)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = method.loss(parts.batch(), plan).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.8 and losses[-1] < 0.5


def test_drop_path_draws_from_the_generator(parts: Any) -> None:
    method = method_of(parts, drop_path=0.5, **BEIT)
    plan = parts.plan(method.student.grid, ratio=0.4)
    losses = [
        float(method.loss(parts.batch(), plan, generator=torch.Generator().manual_seed(seed)).total.detach())
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_step_reads_no_value_and_has_static_shapes(parts: Any) -> None:
    """Forward, loss and backward run on inputs without values: any .item(), nonzero or boolean index would raise."""
    method = method_of(parts, precision=Precision(), drop_path=0.1, **BEIT)
    trained = [p for p in method.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        plan = masking.MaskPlan(torch.empty(3, 24, dtype=torch.int32), 14, 24)
        step = method.loss(parts.Batch(torch.empty(3, 1, 32, 48, 3, dtype=torch.uint8)), plan, signals=True)
        gradients = torch.autograd.grad(step.total, trained)
    assert step.total.shape == () and [g.shape for g in gradients] == [p.shape for p in trained]


def test_flops() -> None:
    """ViT-B/16 and 78 hidden patches by hand: all tokens through 11 blocks, the last block for 78 rows but all keys."""
    with torch.device("meta"):
        student = models.build("base", **BEIT)
        teacher = FrozenTeacher(models.build("base"))
        method = SymmetricDBOT(student, MaskTokenHead(student, 768), teacher)
    plan = masking.MaskPlan(torch.zeros(1, 196, dtype=torch.int32), 118, 196)
    n, q, width = 197, 78, 768
    embed = 2 * 118 * width * width
    whole = 24 * width**2 * n + 4 * n**2 * width
    pruned = 4 * width**2 * n + 20 * width**2 * q + 4 * q * n * width
    trained = embed + 11 * whole + pruned + 2 * q * width * 768
    assert method.flops(plan) == teacher.flops(q) + 3 * trained - embed


def test_parts_that_do_not_fit(parts: Any) -> None:
    student, teacher = parts.student(**BEIT), teacher_of(parts)
    with pytest.raises(UserError, match="teacher: expected the width of the decoder's head 7, got 20"):
        SymmetricDBOT(student, MaskTokenHead(student, 7), teacher)
    with pytest.raises(UserError, match="head: expected the student's width 48, got 96"):
        SymmetricDBOT(student, MaskTokenHead(parts.student(width=96, heads=6), D_T), teacher)
    method = SymmetricDBOT(student, MaskTokenHead(student, D_T), teacher)
    with pytest.raises(UserError, match="plan: expected at least one hidden token, got none"):
        method.loss(parts.batch(), parts.plan(student.grid, ratio=0.0))
