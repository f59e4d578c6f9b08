"""AMD: what it computes, reads and refuses. Its numbers are checked against the formula in ``test_literal.py``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cohobate import kernels, masking, models, random_plan
from cohobate.errors import UserError
from cohobate.methods import AMD, MAE, Alignment, AMDOptions, StepLoss
from cohobate.models import PixelDecoder, Precision, VisionTransformer
from cohobate.models.pixels import normalise
from cohobate.teacher import FrozenTeacher, OriginalTeacher

FP32 = Precision(torch.float32, torch.float32)
CHOICES: dict[str, Any] = {"direct": ((1, 2), (3, 4)), "generation": ((2, 2), (3, 4))}
WIDTH, TEACHER = 48, 64
SUMS = 1e-6  # the same numbers added in another order, in fp32


def encoder(width: int, depth: int, seed: int = 0, precision: Precision = FP32, **changes: Any) -> VisionTransformer:
    """Over clips of 3 x 4 x 6 tubelets."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"image_size": (32, 48), "patch": 8, "frames": 6, "tubelet": 2, "cls_token": False}
    return models.build("tiny", **(sizes | changes), width=width, depth=depth, heads=4, precision=precision)


def method(
    precision: Precision = FP32,
    teacher: VisionTransformer | None = None,
    student: VisionTransformer | None = None,
    frozen_token: bool = False,
    **choices: Any,
) -> AMD:
    options = AMDOptions(**(CHOICES | choices))
    student = student or encoder(WIDTH, 3, precision=precision)
    frozen = FrozenTeacher(teacher or encoder(TEACHER, 5, seed=1, precision=precision), options.teacher_layers)
    alignment = Alignment(student, frozen.width, frozen.heads, options, frozen_token=frozen_token)
    return AMD(student, PixelDecoder.for_encoder(student, depth=2, heads=2), frozen, alignment, options)


class Batch:
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels


def batch(frames: int = 6) -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(torch.randint(0, 256, (2, frames, 32, 48, 3), dtype=torch.uint8, generator=g))


def plan(amd: AMD, ratio: float = 0.75, teacher_ratio: float | None = 0.5) -> masking.MaskPlan:
    grid, ids = amd.student.grid, torch.arange(2)
    settings: dict[str, Any] = {"seed": 3, "stage": 0, "epoch": 0, "rounding": "mask", "tube": grid.frames > 1}
    return random_plan(grid, ids, ratio=ratio, teacher_ratio=teacher_ratio, **settings)


def values(step: StepLoss) -> dict[str, float]:
    return {name: float(value) for name, value in step.terms.items()}


# size: GFLOP of a clip as published codes compute it, and what is saved exactly (spared rows and products)
PUBLISHED = {"small": (451.6, 30.4), "base": (594.7, 36.1), "large": (880.0, 40.3)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_flops_of_the_published_step(size: str) -> None:
    """16 frames at 224, a ViT-L teacher, pixel decoders of half the student's width and four blocks."""
    total, saved = PUBLISHED[size]
    pairs = ((12, 12), (24, 24)) if size == "large" else ((6, 12), (12, 24))
    options = AMDOptions(direct=pairs, generation=pairs)
    with torch.device("meta"):
        student, teacher = (models.build(s, frames=16, tubelet=2, cls_token=False) for s in (size, "large"))
        frozen = FrozenTeacher(teacher, options.teacher_layers)
        amd = AMD(
            student,
            PixelDecoder.for_encoder(student),
            frozen,
            Alignment(student, frozen.width, frozen.heads, options),
            options,
        )
    masks = random_plan(
        student.grid,
        torch.arange(1),
        seed=0,
        stage=0,
        epoch=0,
        ratio=0.9,
        teacher_ratio=0.75,
        rounding="mask",
        tube=True,
    )
    assert (masks.student, masks.teacher, masks.tokens) == (160, 392, 1568)
    assert amd.flops(masks) / 1e9 == pytest.approx(total - saved, abs=0.1)  # both are rounded to 0.1
    trained = sum(p.numel() for p in amd.alignment.generators.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(50.4, abs=0.05)


def test_the_default_layers_are_the_published_ones() -> None:
    options = AMDOptions()
    assert options.student_layers == (6, 12) and options.teacher_layers == (12, 24)
    unequal = AMDOptions(direct=((6, 8), (12, 24)), generation=((3, 16), (6, 20)))
    assert unequal.student_layers == (3, 6, 12) and unequal.teacher_layers == (8, 16, 20, 24)


def test_a_projection_belongs_to_a_student_layer_and_runs_once() -> None:
    amd = method(direct=((1, 2), (3, 4)), generation=((1, 4), (3, 2), (3, 4)))
    calls: list[int] = []
    for i, projection in enumerate(amd.alignment.projections):
        projection.register_forward_hook(lambda *_, i=i: calls.append(i))
    amd.loss(batch(), plan(amd))
    assert calls == [0, 1] and len(amd.alignment.generators) == 3


def test_each_term_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = importlib.import_module("cohobate.methods.objective")
    whole, launches = objective.align_loss, []

    def watched(predictions: Any, targets: Any, **settings: Any) -> Any:
        launches.append([tuple(p.shape) for p in predictions])
        return whole(predictions, targets, **settings)

    monkeypatch.setattr(objective, "align_loss", watched)
    amd = method()
    masks = plan(amd, teacher_ratio=0.4)
    amd.loss(batch(), masks)
    direct, generated = (2, masks.student, TEACHER), (2, masks.teacher - masks.student, TEACHER)
    assert sorted(launches) == sorted([[direct] * 2, [generated] * 2])


def test_the_teacher_sees_its_rows_alone_and_the_student_its_own() -> None:
    """Pixels of tokens that nobody sees reach the loss as pixel targets only; the teacher's feel no other ones."""
    amd = method()
    masks, pixels = plan(amd), batch().pixels
    before = amd.loss(Batch(pixels), masks).terms
    hidden = masks.order[:, masks.teacher :]
    noise = Batch(torch.randint_like(pixels, 0, 256))
    changed = pixels.clone()
    t, h, w = amd.student.grid.shape
    for sample, rows in enumerate(hidden.tolist()):
        for n in rows:
            a, y, x = n // (h * w), n // w % h, n % w
            where = sample, slice(2 * a, 2 * a + 2), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8)
            changed[where] = noise.pixels[where]
    assert t * h * w == masks.tokens and not torch.equal(changed, pixels)
    after = amd.loss(Batch(changed), masks).terms
    assert after["loss/direct"] == before["loss/direct"] and after["loss/generation"] == before["loss/generation"]
    assert after["loss/pixels"] != before["loss/pixels"]


def test_weights_and_reduction() -> None:
    amd = method(pixel_weight=0.5, direct_weight=2.0, generation_weight=3.0)
    step = amd(batch(), plan(amd), signals=True)
    terms = values(step)
    assert set(terms) == {"loss/pixels", "loss/direct", "loss/generation"}
    total = 0.5 * terms["loss/pixels"] + 2 * terms["loss/direct"] + 3 * terms["loss/generation"]
    assert float(step.total.detach()) == pytest.approx(total, rel=SUMS)
    assert not any(value.requires_grad for value in (*step.terms.values(), *step.signals.values()))
    assert float(step.signals["target/std"]) > 0
    summed = method(reduction="sum")
    summed.load_state_dict(amd.state_dict())
    for name, value in values(summed.loss(batch(), plan(amd))).items():
        layers = 1 if name == "loss/pixels" else 2
        assert value == pytest.approx(layers * terms[name], rel=SUMS)


@pytest.mark.parametrize("off", ["direct", "generation"])
def test_a_term_of_weight_0_is_not_there(off: str) -> None:
    """Neither its parts nor its layers, whatever its pairs say; every parameter left gets a gradient."""
    amd = method(**{f"{off}_weight": 0.0})
    assert amd.options.teacher_layers == (2, 4) and len(amd.alignment.projections) == 2
    assert len(amd.alignment.generators) == (0 if off == "generation" else 2)
    step = amd.loss(batch(), plan(amd, teacher_ratio=0.75 if off == "generation" else 0.5))
    assert f"loss/{off}" not in step.terms and len(step.terms) == 2
    step.total.backward()
    assert all(p.grad is not None for p in amd.parameters() if p.requires_grad)


def test_the_parameters_are_those_of_student_decoder_and_alignment() -> None:
    amd = method()
    assert {name.split(".")[0] for name, _ in amd.named_parameters()} == {"student", "decoder", "alignment"}
    assert not any(name.startswith("teacher.") for name in amd.state_dict())
    amd.loss(batch(), plan(amd)).total.backward()
    assert all(p.grad is not None for p in amd.parameters() if p.requires_grad)


def test_a_frozen_token_is_saved_but_not_trained() -> None:
    amd = method(frozen_token=True)
    names = {name for name, _ in amd.named_parameters()}
    assert "alignment.generators.0.mask_token" not in names
    assert "alignment.generators.0.mask_token" in amd.state_dict()
    assert "alignment.generators.0.mask_token" in {name for name, _ in method().named_parameters()}


def test_swapping_the_teacher() -> None:
    amd = method()
    before = amd.loss(batch(), plan(amd)).terms
    amd.set_teacher(FrozenTeacher(encoder(TEACHER, 4, seed=2), (2, 4)))
    after = amd.loss(batch(), plan(amd)).terms
    assert before["loss/pixels"] == after["loss/pixels"] and before["loss/direct"] != after["loss/direct"]


def test_targets_are_the_pixels() -> None:
    amd = method(norm_pix=False)
    assert isinstance(amd, MAE) and amd.targets(batch()).shape == (2, 72, 2 * 8 * 8 * 3)
    assert 0 <= float(amd.targets(batch()).min()) < float(amd.targets(batch()).max()) <= 1


@pytest.mark.parametrize("convention", ["videomae", "mae"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_normalised_float_pixels_give_the_same_loss(convention: str, norm_pix: bool) -> None:
    """Also with a teacher that has a mean and a std of its own."""
    teacher = encoder(TEACHER, 5, seed=1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    amd = method(teacher=teacher, convention=convention, norm_pix=norm_pix)
    pixels = batch().pixels
    floats = Batch(normalise(pixels, amd.student))
    expected, got = amd.loss(Batch(pixels), plan(amd)), amd.loss(floats, plan(amd))
    assert values(got) == pytest.approx(values(expected), rel=2e-6)  # fp32 pixels, normalised and back
    expected.total.backward()
    wanted = {name: p.grad.clone() for name, p in amd.named_parameters() if p.grad is not None}
    amd.zero_grad()
    got.total.backward()
    for name, p in amd.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and float((p.grad - wanted[name]).norm() / wanted[name].norm()) < 1e-5, name
    torch.testing.assert_close(amd.targets(floats), amd.targets(Batch(pixels)), rtol=1e-4, atol=1e-5)


def test_images_and_their_cls_tokens() -> None:
    """Direct alignment counts the cls token or not; a teacher without one is aligned on patches alone."""
    image: dict[str, Any] = {"frames": 1, "tubelet": 1, "cls_token": True}
    student, teacher = encoder(WIDTH, 3, **image), encoder(TEACHER, 5, seed=1, **image)
    counted = method(student=student, teacher=teacher, convention="mae", loss="l1")
    bare = method(student=student, teacher=teacher, convention="mae", loss="l1", align_cls=False)
    bare.load_state_dict(counted.state_dict())
    masks, images = plan(counted), batch(1)
    both = [float(m.loss(images, masks).terms["loss/direct"]) for m in (counted, bare)]
    seen = counted.teacher(images.pixels, masks.teacher_rows)
    direct, _ = counted.alignment(
        dict(zip((1, 2, 3), student.intermediates(images.pixels, (1, 2, 3), masks.visible))), masks
    )
    cls = torch.stack([(p[:, 0] - t[:, 0]).abs().mean() for p, t in zip(direct, seen)]).mean()
    a = masks.student
    assert both[0] * (a + 1) == pytest.approx(both[1] * a + float(cls.detach()), rel=1e-5)
    without = encoder(TEACHER, 5, seed=1, **(image | {"cls_token": False}))
    with pytest.raises(
        UserError, match="align_cls: expected a teacher with the student's 1 prefix tokens, or align_cls"
    ):
        method(student=student, teacher=without, convention="mae")
    assert bool(method(student=student, teacher=without, align_cls=False).loss(images, masks).total.isfinite())


def test_bf16_is_near_fp32() -> None:
    exact, low = method(), method(precision=Precision())
    low.load_state_dict(exact.state_dict())
    expected = values(exact.loss(batch(), plan(exact)))
    step = low.loss(batch(), plan(low))
    assert values(step) == pytest.approx(expected, rel=1e-2)  # bf16 keeps 8 bits of each of some thousand numbers
    step.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)


def test_a_step_learns() -> None:
    """Thirty steps of AdamW on one batch of noise bring every term down."""
    amd = method()
    masks, optimizer = plan(amd), torch.optim.AdamW([p for p in amd.parameters() if p.requires_grad], lr=3e-3)
    terms = []
    for _ in range(30):
        step = amd.loss(batch(), masks)
        optimizer.zero_grad()
        step.total.backward()
        optimizer.step()
        terms.append(values(step))
    assert all(terms[-1][name] < 0.9 * terms[0][name] for name in terms[0])


class Audit(TorchDispatchMode):
    """Names of the ops that pass, and those that a CUDA graph cannot capture: they wait for the device."""

    WAITING = (
        "nonzero",
        "_local_scalar_dense",
        "item",
        "masked_select",
        "_unique2",
        "unique_dim",
        "is_nonzero",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in self.WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_audit_finds_what_waits() -> None:
    x = torch.arange(4.0)
    for wait in (lambda: x[x > 1], lambda: x.sum().item(), lambda: x.nonzero(), lambda: x.masked_select(x > 1)):
        with Audit() as audit:
            wait()
        assert audit.found


@pytest.fixture(params=["images", "clips"])
def watched(request: pytest.FixtureRequest) -> Iterator[tuple[AMD, Batch]]:
    image = request.param == "images"
    changes: dict[str, Any] = {"frames": 1, "tubelet": 1, "cls_token": True} if image else {}
    drop = Precision()
    amd = method(
        student=encoder(WIDTH, 3, precision=drop, drop_path=0.1, **changes),
        teacher=encoder(TEACHER, 5, seed=1, precision=drop, **changes),
    )
    amd.loss(batch(1 if image else 6), plan(amd))  # the teacher reads its features once, in its first call
    yield amd, batch(1 if image else 6)


def test_no_op_of_a_step_waits_for_the_device(watched: tuple[AMD, Batch]) -> None:
    """Masks, forward, losses, signals and backward through the plain implementations of all ops."""
    amd, inputs = watched
    with kernels.use_backend("reference"), Audit() as audit:
        step = amd.loss(inputs, plan(amd), signals=True)
        step.total.backward()
    assert not audit.found and {"gather", "mm", "mse_loss_backward"} <= audit.seen


def test_the_step_reads_no_value_and_has_static_shapes(watched: tuple[AMD, Batch]) -> None:
    """The fast ops on inputs without values: .item(), nonzero or a boolean index would raise."""
    amd, inputs = watched
    trained = [p for p in amd.parameters() if p.requires_grad]
    masks = plan(amd)
    with FakeTensorMode(allow_non_fake_inputs=True), Audit() as audit:
        order = torch.empty(masks.order.shape, dtype=torch.int32)
        fake = masking.MaskPlan(order, masks.student, masks.teacher)
        pixels = torch.empty(inputs.pixels.shape, dtype=torch.uint8)
        step = amd.loss(Batch(pixels), fake, signals=True)
        gradients = torch.autograd.grad(step.total, trained)
    assert step.total.shape == () and [g.shape for g in gradients] == [p.shape for p in trained]
    assert not audit.found


def test_choices_that_are_not_offered() -> None:
    for choices, message in (
        ({"loss": "l3"}, "loss: expected one of l2, l1, smooth_l1; got 'l3'"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum; got 'max'"),
        ({"convention": "both"}, "convention: expected one of mae, videomae; got 'both'"),
        ({"pixel_weight": 0.0}, "pixel_weight: expected a number above 0, got 0.0"),
        ({"direct_weight": -1.0}, "direct_weight: expected a number of at least 0, got -1.0"),
        ({"generation": ()}, "generation: expected at least one pair of layers, or generation_weight 0; got none"),
        ({"direct_weight": 0.0, "generation_weight": 0.0}, "direct_weight, generation_weight: expected one above 0"),
    ):
        with pytest.raises(UserError, match=message):
            AMDOptions(**choices)  # type: ignore[arg-type]
    assert AMDOptions(generation=(), generation_weight=0.0).teacher_layers == (12, 24)


def test_plans_that_do_not_fit() -> None:
    amd = method()
    with pytest.raises(UserError, match="plan: expected a teacher that sees more than the student's 18 tokens"):
        amd.loss(batch(), plan(amd, teacher_ratio=0.75))
    with pytest.raises(UserError, match="teacher_ratio: expected"):
        plan(amd, ratio=0.5, teacher_ratio=0.75)
    with pytest.raises(UserError, match="plan: expected at least one hidden token, got none"):
        amd.loss(batch(), plan(amd, ratio=0.0, teacher_ratio=0.0))
    with pytest.raises(UserError, match="plan: expected 1 samples, got 2"):
        amd.loss(Batch(batch().pixels[:1]), plan(amd))
    everything = plan(amd, teacher_ratio=None)
    assert everything.teacher == everything.tokens and bool(amd.loss(batch(), everything).total.isfinite())


def test_parts_that_do_not_fit() -> None:
    student, options = encoder(WIDTH, 3), AMDOptions(**CHOICES)
    decoder = PixelDecoder.for_encoder(student, depth=1, heads=2)
    alignment = Alignment(student, TEACHER, 4, options)
    teacher = encoder(TEACHER, 5)

    def build(frozen: Any, between: Alignment = alignment) -> AMD:
        return AMD(student, decoder, frozen, between, options)

    with pytest.raises(UserError, match=r"direct, generation: expected student blocks in \[1, 3\], got \[0, 1, 2, 3\]"):
        Alignment(student, TEACHER, 4, AMDOptions(direct=((0, 1), (1, 2)), generation=((2, 2), (3, 4))))
    with pytest.raises(UserError, match=r"direct, generation: expected student blocks in \[1, 3\], got \[6, 12\]"):
        Alignment(student, TEACHER, 4, AMDOptions())
    with pytest.raises(UserError, match=r"teacher: expected target layers \[2, 4\], those of the pairs, got \[5\]"):
        build(FrozenTeacher(teacher))
    whole = OriginalTeacher.__new__(OriginalTeacher)  # whatever it is, it computes every patch
    whole.name = "hooked"
    with pytest.raises(UserError, match="teacher: expected one that can see some patches alone; hooked runs as it is"):
        build(whole)
    with pytest.raises(UserError, match="teacher: expected the alignment's width 64, got 48"):
        build(FrozenTeacher(encoder(48, 5), (2, 4)))
    with pytest.raises(UserError, match="teacher: expected the student's grid"):
        build(FrozenTeacher(encoder(TEACHER, 5, patch=16), (2, 4)))
    with pytest.raises(UserError, match="alignment: expected generation pairs"):
        build(
            FrozenTeacher(teacher, (2, 4)),
            Alignment(student, TEACHER, 4, AMDOptions(direct=CHOICES["direct"], generation=((3, 4),))),
        )
    with pytest.raises(UserError, match="alignment: expected 48 channels and 0 prefix tokens, the student's; got"):
        build(FrozenTeacher(teacher, (2, 4)), Alignment(encoder(96, 3), TEACHER, 4, options))
    with pytest.raises(UserError, match="heads: expected a divisor of the width 64, got 5"):
        Alignment(student, TEACHER, 5, options)
