"""dBOT against the literal implementation, and every choice it offers against the formula."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cohobate import masking, models
from cohobate.errors import UserError
from cohobate.kernels import tokens
from cohobate.kernels.alignment import Standardise
from cohobate.methods import DBOT, DBOTOptions
from cohobate.models import Decoder, Precision
from cohobate.teacher import FrozenTeacher, from_student, load_source

# fp32 against fp32: the same sums in another order. The loss is one number, a gradient a sum over many rows.
LOSS, GRADIENT = 1e-6, 1e-5


@pytest.mark.parametrize("target_norm", [False, True])
@pytest.mark.parametrize("standardise", [True, False])
def test_loss_and_gradients_are_the_literal_ones(parts: Any, target_norm: bool, standardise: bool) -> None:
    options = DBOTOptions(target_norm=target_norm, standardise=Standardise() if standardise else None)
    method = parts.dbot_method(options)
    literal = parts.literal_dbot(method, target_norm=target_norm, standardise=standardise)
    plan = parts.plan(method.student.grid)
    step = method.loss(parts.batch(), plan)
    expected = literal(parts.images(method.student), plan.where.float())
    assert float(step.total.detach()) == pytest.approx(float(expected.detach()), rel=LOSS)
    step.total.backward()
    expected.backward()
    got, want = parts.gradients(method), parts.gradients(literal)
    assert set(got) == set(want) and len(got) == len([p for p in method.parameters() if p.requires_grad])
    for name, gradient in want.items():
        assert parts.relative(got[name], gradient) < GRADIENT, name


def test_bf16_is_as_near_to_fp32_as_the_literal_autocast(parts: Any) -> None:
    """Same weights in three precisions: our bf16 gradient may be at most 1.2 times as far from fp32 as autocast's."""
    exact, low = parts.dbot_method(), parts.dbot_method(precision=Precision())
    literal = parts.literal_dbot(exact)
    plan, images = parts.plan(exact.student.grid), parts.images(exact.student)
    truth = exact.loss(parts.batch(), plan).total
    with torch.autocast("cpu", torch.bfloat16):
        autocast = literal(images, plan.where.float())
    ours = low.loss(parts.batch(), plan).total
    for loss in (truth, autocast, ours):
        loss.backward()
    flat = [torch.cat([g.flatten() for _, g in sorted(parts.gradients(m).items())]) for m in (exact, literal, low)]
    literal_error, our_error = parts.relative(flat[1], flat[0]), parts.relative(flat[2], flat[0])
    assert our_error < 1.2 * literal_error
    assert abs(float((ours / truth).detach()) - 1) < 5e-3


@pytest.mark.parametrize("masks", [2, 9])  # 9 layers do not fit one launch of the loss
def test_several_masks_are_the_mean_of_single_ones(parts: Any, masks: int) -> None:
    """One pass of the teacher serves all masks of a crop: targets, loss and gradients are those of single steps."""
    method = parts.dbot_method()
    plan, batch = parts.plan(method.student.grid, masks=masks), parts.batch()
    seen = spy_on(method)
    step = method.loss(batch, plan)
    step.total.backward()
    assert [len(pixels) for pixels in seen] == [parts.BATCH]
    got = {name: gradient.clone() for name, gradient in parts.gradients(method).items()}
    method.zero_grad()
    singles = [
        method.loss(batch, masking.MaskPlan(order, plan.student, plan.teacher)) for order in plan.order.chunk(masks)
    ]
    mean = torch.stack([single.total for single in singles]).mean()
    assert len({float(single.total.detach()) for single in singles}) == masks
    assert float(step.total.detach()) == pytest.approx(float(mean.detach()), rel=LOSS)
    assert float(step.terms["loss/align"]) == pytest.approx(float(mean.detach()), rel=LOSS)
    mean.backward()
    for name, gradient in parts.gradients(method).items():
        assert parts.relative(got[name], gradient) < GRADIENT, name


def spy_on(method: DBOT) -> list[Any]:
    """The pixels of every call of the teacher from now on."""
    seen: list[Any] = []
    method.teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def test_several_masks_share_one_launch_and_one_target(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []
    objective = importlib.import_module("cohobate.methods.objective")  # as a name it is the function
    whole = objective.align_loss

    def watched(predictions: Any, targets: Any, **settings: Any) -> Any:
        calls.append((targets, settings["target_rows"]))
        return whole(predictions, targets, **settings)

    monkeypatch.setattr(objective, "align_loss", watched)
    method = parts.dbot_method()
    method.loss(parts.batch(), parts.plan(method.student.grid, masks=3))
    ((targets, rows),) = calls
    assert len({id(target) for target in targets}) == 1 and len(targets) == len(rows) == 3


def test_flops_of_several_masks(parts: Any) -> None:
    """The teacher counts once, for all rows; everything else counts once a mask."""
    method = parts.dbot_method()
    plan = parts.plan(method.student.grid)
    trained = method.flops(plan) - method.teacher.flops(plan.tokens - plan.student + 1)
    assert method.flops(plan, 4) == method.teacher.flops() + 4 * trained
    with pytest.raises(UserError, match="plan: expected 3 samples or a multiple, got 2"):
        method.loss(parts.batch(), masking.MaskPlan(plan.order[:2], plan.student, plan.teacher))


def test_a_teacher_with_registers(parts: Any) -> None:
    """Cls and two registers in front: row 0 is the cls, patches start at row 3, the registers never count."""
    student = parts.student()
    anatomy = load_source(parts.student(width=96, heads=6)).anatomy
    assert anatomy is not None
    registers = torch.randn(2, 96, generator=torch.Generator().manual_seed(2))
    teacher = FrozenTeacher(
        dataclasses.replace(anatomy, prefix=torch.cat([anatomy.prefix, registers])), precision=parts.FP32
    )
    method = DBOT(student, parts.decoder(student, 96), teacher, DBOTOptions(standardise=None, loss="mse"))
    plan, pixels = parts.plan(student.grid), parts.batch().pixels
    rows = method.counted(plan, teacher.prefix)
    assert teacher.prefix == 3 and not rows[:, 0].any() and torch.equal(rows[:, 1:], plan.masked + 3)
    whole = teacher(pixels)[0]
    target = torch.cat([whole[:, :1], tokens.take(whole[:, 3:].contiguous(), plan.masked)], dim=1)
    prediction = method.decoder(student(pixels, plan.visible), plan, method.counted(plan, 1))
    expected = F.mse_loss(prediction, target)
    assert float(method.loss(parts.batch(), plan).total.detach()) == pytest.approx(float(expected.detach()), rel=LOSS)
    assert method.targets(parts.batch()).shape == (3, 24, 96)


def test_the_counted_rows_are_the_hidden_patches_and_the_cls_token(parts: Any) -> None:
    """The loss as a mean over exactly those rows of the unpruned networks."""
    for cls in (True, False):
        method = parts.dbot_method(DBOTOptions(cls=cls))
        plan, pixels = parts.plan(method.student.grid), parts.batch().pixels
        target = method.teacher(pixels)[0]
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        prediction = method.decoder(method.student(pixels, plan.visible), plan)
        distance = F.smooth_l1_loss(prediction, target, beta=2.0, reduction="none").mean(-1)
        hidden = plan.to_boolean()[0]
        counted = torch.cat([torch.full((len(hidden), 1), cls), hidden], dim=1)
        assert float(method.loss(parts.batch(), plan).total.detach()) == pytest.approx(
            float(distance[counted].mean()), rel=LOSS
        )


def test_published_shapes_count_148_tokens() -> None:
    """ViT-B at 224: 147 hidden patches and the cls token."""
    with torch.device("meta"):
        student = models.build("base", depth=0)
        method = DBOT(student, Decoder.for_encoder(student, 768, depth=0), from_student(student))
    plan = masking.random_plan(student.grid, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.75)
    rows = method.counted(plan, 1)
    assert rows.shape == (2, 148) and rows.dtype == torch.int32 and not rows[:, 0].any()
    assert torch.equal(rows[:, 1:], plan.masked + 1)


def test_flops_of_the_published_step() -> None:
    """93.6 GFLOP an image at ViT-B/16, less 1.9 saved exactly: only counted and visible rows are computed."""
    with torch.device("meta"):
        student = models.build("base")
        method = DBOT(student, Decoder.for_encoder(student, 768), FrozenTeacher(student))
    plan = masking.random_plan(student.grid, torch.arange(1), seed=0, stage=0, epoch=0, ratio=0.75)
    assert method.flops(plan) / 1e9 == pytest.approx(93.6 - 1.9, abs=0.1)


@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "l1", "cosine"])
def test_loss_kinds(parts: Any, loss: str) -> None:
    method = parts.dbot_method(DBOTOptions(loss=loss, beta=0.5))
    plan, pixels = parts.plan(method.student.grid), parts.batch().pixels
    rows = method.counted(plan, 1)
    target = tokens.take(method.teacher(pixels)[0], rows)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    prediction = method.decoder(method.student(pixels, plan.visible), plan, rows)
    expected = {
        "smooth_l1": F.smooth_l1_loss(prediction, target, beta=0.5),
        "mse": F.mse_loss(prediction, target),
        "l1": F.l1_loss(prediction, target),
        "cosine": (1 - F.cosine_similarity(prediction, target, dim=-1)).mean(),
    }[loss]
    assert float(method.loss(parts.batch(), plan).total.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_a_wider_teacher_and_no_cls_token(parts: Any) -> None:
    """Widths of teacher and student are free; without cls tokens only patches count."""
    student = parts.student(cls_token=False)
    teacher = FrozenTeacher(parts.student(width=96, heads=6, depth=2, cls_token=True))
    method = DBOT(student, parts.decoder(student, 96), teacher, DBOTOptions(cls=False))
    step = method.loss(parts.batch(), parts.plan(student.grid))
    assert bool(step.total.isfinite())
    assert method.targets(parts.batch()).shape == (3, 24, 96)


def test_the_parameters_are_the_students_and_the_decoders(parts: Any) -> None:
    method = parts.dbot_method()
    names = {name.split(".")[0] for name, _ in method.named_parameters()}
    assert names == {"student", "decoder"}
    assert not any(name.startswith("teacher.") for name in method.state_dict())


def test_swapping_the_teacher_changes_the_target_alone(parts: Any) -> None:
    method = parts.dbot_method()
    before = method.targets(parts.batch())
    method.set_teacher(from_student(method.student))
    after = method.targets(parts.batch())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after.mean(-1), torch.zeros(3, 24), rtol=0, atol=1e-5)  # standardised per token
    torch.testing.assert_close(after.var(-1), torch.ones(3, 24), rtol=0, atol=1e-3)


def test_logged_values(parts: Any) -> None:
    method = parts.dbot_method()
    step = method(parts.batch(), parts.plan(method.student.grid), signals=True)
    assert set(step.terms) == {"loss/align"} and set(step.signals) == {"target/std"}
    assert float(step.terms["loss/align"]) == pytest.approx(float(step.total), rel=1e-6)
    assert not step.terms["loss/align"].requires_grad
    target = method.teacher(parts.batch().pixels, queries=method.counted(parts.plan(method.student.grid), 1))[0]
    expected = target.double().flatten(0, 1).std(0).mean()
    assert float(step.signals["target/std"]) == pytest.approx(float(expected), rel=1e-5)
    assert not method.loss(parts.batch(), parts.plan(method.student.grid)).signals


def test_nothing_hidden_leaves_the_cls_token(parts: Any) -> None:
    method = parts.dbot_method()
    plan = parts.plan(method.student.grid, ratio=0.0)
    assert method.counted(plan, 1).shape == (3, 1)
    assert bool(method.loss(parts.batch(), plan).total.isfinite())
    with pytest.raises(UserError, match="plan: expected at least one hidden token"):
        parts.dbot_method(DBOTOptions(cls=False)).loss(parts.batch(), plan)


def test_drop_path_draws_from_the_generator(parts: Any) -> None:
    method, plan = parts.dbot_method(drop_path=0.5), parts.plan(parts.student().grid)
    losses = [
        float(method.loss(parts.batch(), plan, generator=torch.Generator().manual_seed(seed)).total)
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_step_learns(parts: Any) -> None:
    """Twenty steps of AdamW on one batch in bf16 at least halve the distance to a fixed target."""
    method, plan = parts.dbot_method(precision=Precision()), parts.plan(parts.student().grid)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        loss = method.loss(parts.batch(), plan).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_step_reads_no_value_and_has_static_shapes(parts: Any) -> None:
    """Forward, loss and backward run on inputs without values: any .item(), nonzero or boolean index would raise."""
    method = parts.dbot_method(precision=Precision(), drop_path=0.1)
    trained = [p for p in method.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        plan = masking.MaskPlan(torch.empty(3, 24, dtype=torch.int32), 6, 24)
        step = method.loss(parts.Batch(torch.empty(3, 1, 32, 48, 3, dtype=torch.uint8)), plan, signals=True)
        gradients = torch.autograd.grad(step.total, trained)
    assert step.total.shape == () and [g.shape for g in gradients] == [p.shape for p in trained]


def test_parts_that_do_not_fit(parts: Any) -> None:
    student = parts.student()
    teacher = from_student(student)
    with pytest.raises(UserError, match="teacher: expected the width of the decoder's head 20, got 48"):
        DBOT(student, parts.decoder(student, 20), teacher)
    with pytest.raises(UserError, match="teacher: expected the student's grid"):
        DBOT(student, parts.decoder(student, 48), from_student(parts.student(patch=4)))
    with pytest.raises(UserError, match=r"teacher: expected one target layer, got \[1, 3\]"):
        DBOT(student, parts.decoder(student, 48), FrozenTeacher(student, (1, 3)))
    with pytest.raises(UserError, match="cls: expected a student with a cls token"):
        bare = parts.student(cls_token=False)
        DBOT(bare, parts.decoder(bare, 48), teacher)
    with pytest.raises(UserError, match="cls: expected a teacher with a cls token"):
        DBOT(student, parts.decoder(student, 48), from_student(parts.student(cls_token=False)))
    method = parts.dbot_method()
    with pytest.raises(UserError, match="plan: expected a teacher that sees all 24 tokens, got 12"):
        method.loss(parts.batch(), parts.plan(student.grid, teacher_ratio=0.5))
