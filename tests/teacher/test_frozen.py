"""The frozen teacher: the anatomy's features, only what is asked for, outside of every graph and state."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from cohobate import TokenGrid, kernels, models
from cohobate.errors import UserError
from cohobate.kernels.transformer.linear import is_fast
from cohobate.models import Precision, VisionTransformer
from cohobate.models.pixels import normalise
from cohobate.teacher import FrozenTeacher, from_student, frozen
from cohobate.teacher.anatomy import Affine, Anatomy, BlockWeights

FP32 = Precision(torch.float32, torch.float32)
GRID = TokenGrid.image((32, 24), 8)
WIDTH, HEADS, DEPTH, HIDDEN = 48, 4, 3, 80
# fp32: folding and another order of additions cost a few roundings of 6e-8 in each of three blocks; 1e-5 is asked for.
EXACT = 2e-6


def anatomy_of(activation: str = "gelu", **changes: object) -> Anatomy:
    """Random weights in every place, so that a part that is left out shows."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def affine() -> Affine:
        return Affine(1 + random(WIDTH), random(WIDTH))

    gates = 2 if activation == "swiglu" else 1
    blocks = [
        BlockWeights(
            norm1=affine(),
            qkv=random(3 * WIDTH, WIDTH),
            qkv_bias=random(3 * WIDTH),
            proj=random(WIDTH, WIDTH),
            proj_bias=random(WIDTH),
            norm2=affine(),
            fc1=random(gates * HIDDEN, WIDTH),
            fc1_bias=random(gates * HIDDEN),
            fc2=random(WIDTH, HIDDEN),
            fc2_bias=random(WIDTH),
            scale1=random(WIDTH, scale=1.0),
            scale2=random(WIDTH, scale=1.0),
        )
        for _ in range(DEPTH)
    ]
    whole = Anatomy(
        name="random",
        grid=GRID,
        heads=HEADS,
        patch=random(WIDTH, GRID.row_length),
        patch_bias=random(WIDTH),
        prefix=random(2, WIDTH),
        positions=random(GRID.size, WIDTH),
        blocks=tuple(blocks),
        norm=affine(),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        activation=activation,
        embed_norm=affine(),
    )
    return dataclasses.replace(whole, **changes)


def bare(anatomy: Anatomy) -> Anatomy:
    """Without everything that is optional."""
    absent = {"qkv_bias": None, "proj_bias": None, "fc1_bias": None, "fc2_bias": None, "scale1": None, "scale2": None}
    blocks = tuple(dataclasses.replace(block, **absent) for block in anatomy.blocks)
    nothing = {"patch_bias": None, "positions": None, "norm": None, "embed_norm": None}
    return dataclasses.replace(anatomy, blocks=blocks, prefix=anatomy.prefix[:0], **nothing)


def model_of(precision: Precision = FP32, drop_path: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": (32, 24), "patch": 8, "width": WIDTH, "depth": DEPTH, "heads": HEADS}
    return models.build("tiny", precision=precision, drop_path=drop_path, **shape)  # type: ignore[arg-type]


def pixels_of(batch: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (batch, *GRID.pixel_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("norm", [False, True])
def test_features_are_the_anatomys(activation: str, norm: bool) -> None:
    anatomy, pixels = anatomy_of(activation), pixels_of()
    layers = (0, 1, 3)
    expected = anatomy.forward(pixels, layers, norm=norm)
    got = FrozenTeacher(anatomy, layers, precision=FP32)(pixels, norm=norm)
    assert len(got) == 3
    assert all(relative(a, b) < EXACT for a, b in zip(got, expected, strict=True))


def test_every_optional_part_may_be_absent() -> None:
    anatomy, pixels = bare(anatomy_of()), pixels_of()
    expected = anatomy.forward(pixels, (2, 3), norm=True)
    got = FrozenTeacher(anatomy, (2, 3), precision=FP32)(pixels, norm=True)
    assert all(relative(a, b) < EXACT for a, b in zip(got, expected, strict=True))


def test_an_encoder_is_a_source_too() -> None:
    model, pixels = model_of(), pixels_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    for layers in ((1, 3), (0,), (2,)):
        expected = model.intermediates(pixels, layers)
        got = FrozenTeacher(model, layers)(pixels)
        assert all(relative(a, b) < EXACT for a, b in zip(got, expected, strict=True))
    assert relative(FrozenTeacher(model)(pixels, norm=True)[0], model(pixels)) < EXACT


def with_clip_parts(head: bool = True, relative: bool = True) -> Anatomy:
    """A projection behind the final norm, and a relative position bias in every block."""
    generator, anatomy = torch.Generator().manual_seed(3), anatomy_of()
    length = len(anatomy.prefix) + GRID.size
    return dataclasses.replace(
        anatomy,
        head=torch.randn(20, WIDTH, generator=generator) / 7 if head else None,
        relative=torch.randn(HEADS, length, length, generator=generator) if relative else None,
    )


@pytest.mark.parametrize("norm", [False, True])
def test_a_head_projects_the_normed_tokens(norm: bool) -> None:
    """By hand from the features without a head; norm and head are always applied, whatever ``norm`` says."""
    anatomy, pixels = with_clip_parts(relative=False), pixels_of()
    assert anatomy.head is not None and (anatomy.width, anatomy.out) == (WIDTH, 20)
    plain = anatomy_of().forward(pixels, (1, 3), norm=True)
    expected = [x @ anatomy.head.T for x in plain]
    queries = torch.tensor([[0, 3], [2, 13]], dtype=torch.int32)
    for given in (pixels, normalise(pixels, anatomy)):
        teacher = FrozenTeacher(anatomy, (1, 3), precision=FP32)
        assert teacher.width == 20
        for got, reference, want in zip(
            teacher(given, norm=norm), anatomy.forward(given, (1, 3), norm=norm), expected, strict=True
        ):
            assert relative(got, want) < EXACT and relative(reference, want) < EXACT
        some = teacher(given, queries=queries, norm=norm)
        assert all(relative(a, kernels.tokens.take(b, queries)) < EXACT for a, b in zip(some, expected, strict=True))
    bare_head = dataclasses.replace(bare(anatomy_of()), head=anatomy.head)
    expected = [bare(anatomy_of()).forward(pixels, (3,))[0] @ anatomy.head.T]
    assert relative(FrozenTeacher(bare_head, precision=FP32)(pixels)[0], expected[0]) < EXACT  # no norm to apply


def test_what_a_head_changes_besides() -> None:
    anatomy = with_clip_parts(relative=False)
    teacher, plain = FrozenTeacher(anatomy), FrozenTeacher(anatomy_of())
    assert teacher.flops(queries=5) - plain.flops(queries=5) == 2 * 5 * 20 * WIDTH
    assert teacher.fingerprint() != plain.fingerprint()
    assert teacher(pixels_of())[0].dtype == torch.float32 and teacher.to("meta")._head is not None
    assert teacher._head is not None and teacher._head.weight.is_meta
    with pytest.raises(UserError, match=r"head: expected shape \[20, 48\], got \[20, 7\]"):
        dataclasses.replace(anatomy, head=torch.zeros(20, 7))


@pytest.mark.parametrize("layers", [(3,), (1, 3), (0, 2)])
@pytest.mark.parametrize("seen", [False, True])
def test_a_relative_position_bias(layers: tuple[int, ...], seen: bool) -> None:
    anatomy, pixels = with_clip_parts(head=False), pixels_of()
    rows = torch.tensor([[2, 5, 7, 11], [0, 1, 2, 3]], dtype=torch.int32) if seen else None
    queries = torch.tensor([[0, 4], [1, 5]], dtype=torch.int32)
    teacher = FrozenTeacher(anatomy, layers, precision=FP32)
    whole = teacher(pixels, rows)
    assert all(relative(a, b) < EXACT for a, b in zip(whole, anatomy.forward(pixels, layers, rows), strict=True))
    for got, full in zip(teacher(pixels, rows, queries=queries), whole, strict=True):
        assert relative(got, kernels.tokens.take(full, queries)) < 1e-6
    assert teacher.fingerprint() != FrozenTeacher(anatomy_of(), layers).fingerprint()
    with pytest.raises(UserError, match="relative: expected shape"):
        dataclasses.replace(anatomy, prefix=anatomy.prefix[:1])
    with pytest.raises(UserError, match=r"grid: expected \(1, 4, 3\) tokens for relative positions, got \(1, 4, 4\)"):
        anatomy.resized(TokenGrid.image(32, 8))


@pytest.mark.parametrize("positions", ["sincos", "none"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_an_encoder_with_layer_scale_and_relative_positions(positions: str, cls_token: bool) -> None:
    """A symmetric student as the next stage's teacher."""
    torch.manual_seed(0)
    model = models.build(
        "tiny", image_size=(32, 24), patch=8, width=WIDTH, depth=DEPTH, heads=HEADS, precision=FP32,
        positions=positions, layer_scale=0.5, relative_positions=True, cls_token=cls_token,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    pixels, rows = pixels_of(), torch.tensor([[2, 5, 7, 11], [0, 1, 2, 3]], dtype=torch.int32)
    for given in (pixels, normalise(pixels, model)):
        for chosen in (None, rows):
            expected = model.intermediates(given, (1, 3), chosen)
            got = FrozenTeacher(model, (1, 3))(given, chosen)
            assert all(relative(a, b) < EXACT for a, b in zip(got, expected, strict=True))
    copied = from_student(model)(pixels)[0]
    assert relative(copied, model.intermediates(pixels, (3,))[0]) < EXACT
    drawn = from_student(model, init="independent", generator=torch.Generator().manual_seed(1))
    assert drawn(pixels)[0].shape == copied.shape


@pytest.mark.parametrize("precision", [FP32, Precision()])
def test_float_pixels_are_normalised_already(precision: Precision) -> None:
    """bf16: floats are rounded to it before the first product and bytes are not, or behind other factors."""
    anatomy, pixels = anatomy_of(), pixels_of()
    teacher, limit = FrozenTeacher(anatomy, (0, 3), precision=precision), 1e-5 if precision == FP32 else 1e-2
    rows = torch.tensor([[2, 5, 7, 11], [0, 1, 2, 3]], dtype=torch.int32)
    for chosen in (None, rows):
        for got, want in zip(teacher(normalise(pixels, teacher), chosen), teacher(pixels, chosen), strict=True):
            assert relative(got, want) < limit and got.dtype == want.dtype
        for got, want in zip(
            anatomy.forward(normalise(pixels, anatomy), (0, 3), chosen),
            anatomy.forward(pixels, (0, 3), chosen),
            strict=True,
        ):
            assert relative(got, want) < 1e-5


@pytest.mark.parametrize("layers", [(3,), (1, 3), (0, 2), (0,)])
def test_rows_and_queries(layers: tuple[int, ...]) -> None:
    """Seeing some patches only and reading some rows only gives the rows of the whole computation.

    A product over fewer rows may be cut into other blocks and so be summed in another order: 1e-6, not the same bits.
    """
    anatomy, pixels = anatomy_of(), pixels_of()
    rows = torch.tensor([[2, 5, 7, 11], [0, 1, 2, 3]], dtype=torch.int32)
    queries = torch.tensor([[0, 4], [1, 5]], dtype=torch.int32)
    teacher = FrozenTeacher(anatomy, layers, precision=FP32)
    whole = teacher(pixels, rows)
    assert all(relative(a, b) < EXACT for a, b in zip(whole, anatomy.forward(pixels, layers, rows), strict=True))
    for got, full in zip(teacher(pixels, rows, queries=queries), whole, strict=True):
        assert relative(got, kernels.tokens.take(full, queries)) < 1e-6


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_bf16_is_at_most_twice_as_wrong_as_the_eager_module(residual: torch.dtype) -> None:
    """The eager module in bf16: weights, stream and every operation of :meth:`Anatomy.forward` in bf16."""
    anatomy, pixels = anatomy_of(), pixels_of(4)
    exact = anatomy.to(dtype=torch.float64).forward(pixels, (1, 3))
    eager = anatomy.to(dtype=torch.bfloat16).forward(pixels, (1, 3))
    got = FrozenTeacher(anatomy, (1, 3), precision=Precision(torch.bfloat16, residual))(pixels)
    for ours, theirs, right in zip(got, eager, exact, strict=True):
        assert ours.dtype == residual
        assert 1e-4 < relative(ours, right) <= 2 * relative(theirs, right)


@pytest.mark.skipif(not is_fast(), reason="no packed products here")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [(3,), (1, 2, 3), (0, 2)])
def test_blocks_in_one_call_are_their_parts(activation: str, residual: torch.dtype, layers: tuple[int, ...]) -> None:
    """To the last bit, in every layer, whether or not the last block computes some rows alone."""
    teacher = FrozenTeacher(anatomy_of(activation), layers, precision=Precision(torch.bfloat16, residual))
    pruned = torch.tensor([[0, 4], [1, 5]], dtype=torch.int32)
    with mock.patch.object(frozen, "packed_blocks", wraps=frozen.packed_blocks) as spy:
        for queries, blocks in ((None, layers[-1]), (pruned, layers[-1] - 1)):
            spy.reset_mock()
            whole = teacher(pixels_of(), queries=queries)
            runs = [len(call.args[2]) for call in spy.call_args_list]
            assert sum(runs) == blocks and len(runs) == len([n for n in layers if 0 < n < blocks]) + (blocks > 0)
            with kernels.use_backend("reference", "pre_norm_block"):
                parts = teacher(pixels_of(), queries=queries)
            assert spy.call_count == len(runs)
            assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True)) and len(whole) == len(layers)


def test_a_copy_that_shares_nothing_and_leaves_no_trace() -> None:
    model = model_of(drop_path=0.5)
    teacher = FrozenTeacher(model)
    before = teacher(pixels_of())[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(pixels_of())[0], before)  # and no drop path
    owner = nn.ModuleDict({"teacher": teacher, "student": model})
    assert not list(teacher.parameters()) and not list(teacher.buffers())
    assert not [key for key in owner.state_dict() if key.startswith("teacher")]
    assert not teacher.train().training and not before.requires_grad
    weight = torch.ones(WIDTH, requires_grad=True)
    (before * weight).sum().backward()  # a loss may save the target: no inference tensor
    assert weight.grad is not None


def test_moves_with_its_owner_but_keeps_its_dtypes() -> None:
    owner = nn.ModuleDict({"teacher": FrozenTeacher(anatomy_of(), precision=FP32)})
    before = owner["teacher"](pixels_of())[0]
    for change in (owner.half, owner.double):
        change()
        assert torch.equal(owner["teacher"](pixels_of())[0], before)
    meta = FrozenTeacher(anatomy_of()).to("meta")
    assert {x.device.type for x in meta._tensors.values() if x is not None} == {"meta"}
    assert meta._blocks[0].fc1.weight.device.type == "meta"


def test_fingerprint_follows_from_the_weights_that_count() -> None:
    anatomy = anatomy_of()
    first = FrozenTeacher(anatomy).fingerprint()
    assert len(first) == 16 and first == FrozenTeacher(anatomy_of(), precision=FP32).fingerprint()
    assert first != FrozenTeacher(anatomy, (2,)).fingerprint()
    other = dataclasses.replace(anatomy.blocks[2], fc2=anatomy.blocks[2].fc2 + 1e-6)
    changed = dataclasses.replace(anatomy, blocks=(*anatomy.blocks[:2], other))
    assert first != FrozenTeacher(changed).fingerprint()
    assert FrozenTeacher(anatomy, (2,)).fingerprint() == FrozenTeacher(changed, (2,)).fingerprint()


def test_flops_are_those_of_the_encoder() -> None:
    model = model_of()
    assert FrozenTeacher(model).flops() == model.flops()
    assert FrozenTeacher(model).flops(queries=5, patches=7) == model.flops(visible=7, queries=5)


def test_random_teachers() -> None:
    model, pixels = model_of(), pixels_of()
    copied = from_student(model)(pixels)[0]
    assert relative(copied, model.intermediates(pixels, (3,))[0]) < EXACT
    drawn = [from_student(model, init="independent", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    first, same, other = (teacher(pixels)[0] for teacher in drawn)
    assert torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, copied)
    assert from_student(model, init="independent", depth=5)(pixels)[0].shape == copied.shape
    assert torch.equal(from_student(model, depth=0)(pixels)[0], model.embed(pixels))


def test_refuses() -> None:
    model = model_of()
    with pytest.raises(UserError, match="init: expected one of copy, independent; got 'ema'"):
        from_student(model, init="ema")
    with pytest.raises(UserError, match="depth: expected a copy of 0 to 3 blocks, got 4"):
        from_student(model, depth=4)
    with pytest.raises(UserError, match=r"layers: expected numbers in \[0, 3\], got \[4\]"):
        FrozenTeacher(model, (4,))
    with pytest.raises(UserError, match="layers: expected ascending numbers"):
        FrozenTeacher(model, (2, 1))
    with pytest.raises(UserError, match=r"pixels: expected uint8 or floating \[B, 1, 32, 24, 3\]"):
        FrozenTeacher(model)(pixels_of()[:, :, :16])


def test_features_that_are_not_finite_name_their_layer() -> None:
    anatomy = anatomy_of()
    broken = dataclasses.replace(anatomy.blocks[1], fc2=anatomy.blocks[1].fc2 * float("inf"))
    teacher = FrozenTeacher(dataclasses.replace(anatomy, blocks=(anatomy.blocks[0], broken, anatomy.blocks[2])), (1, 2))
    with pytest.raises(UserError, match="teacher: expected finite features, got inf or nan behind layer 2 of random"):
        teacher(pixels_of())
