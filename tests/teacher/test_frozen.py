"""The frozen teacher: computes the model's numbers, keeps out of the graph, the parameters and training mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cohobate import kernels, models
from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.teacher import FrozenTeacher, from_student

FP32 = Precision(torch.float32, torch.float32)


def model_of(precision: Precision = FP32, drop_path: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch": 8, "width": 48, "depth": 3, "heads": 4}
    return models.build("tiny", precision=precision, drop_path=drop_path, **shape)  # type: ignore[arg-type]


def pixels_of(batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_targets_are_the_models_own() -> None:
    model, pixels = model_of(), pixels_of()
    expected = model.intermediates(pixels, (1, 3))
    got = FrozenTeacher(model, (1, 3))(pixels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    normed = FrozenTeacher(model)(pixels, norm=True)[0]
    torch.testing.assert_close(normed, model(pixels))


def test_rows_and_queries() -> None:
    """Seeing some patches only, and reading some rows only, as the model itself does it."""
    model, pixels = model_of(), pixels_of()
    rows = torch.tensor([[2, 5, 7, 11], [0, 1, 2, 3]], dtype=torch.int32)
    queries = torch.tensor([[0, 4], [1, 2]], dtype=torch.int32)
    whole = model.intermediates(pixels, (2,), rows)[0]
    got = FrozenTeacher(model, (2,))(pixels, rows, queries=queries)[0]
    torch.testing.assert_close(got, kernels.tokens.take(whole, queries), rtol=1e-5, atol=1e-5)  # sums in another order


def test_depth_zero_is_the_embedding() -> None:
    model, pixels = model_of(), pixels_of()
    teacher = from_student(model, depth=0)
    assert len(teacher.model.blocks) == 0
    assert torch.equal(teacher(pixels)[0], model.embed(pixels))
    queries = torch.tensor([[0, 9], [3, 4]], dtype=torch.int32)
    assert torch.equal(teacher(pixels, queries=queries)[0], kernels.tokens.take(model.embed(pixels), queries))


def test_blocks_behind_the_last_layer_are_gone() -> None:
    teacher = FrozenTeacher(model_of(), (2,))
    assert not any(name.startswith("model.blocks.2") for name in teacher.state_dict())


def test_nothing_to_train_and_no_graph() -> None:
    teacher = FrozenTeacher(model_of(drop_path=0.5))
    assert not list(teacher.parameters())
    out = teacher.train()(pixels_of())[0]
    assert not teacher.training and not teacher.model.training and not out.requires_grad
    assert torch.equal(out, teacher(pixels_of())[0])  # no drop path
    weight = torch.ones(48, requires_grad=True)
    (out * weight).sum().backward()  # a loss may save the target: no inference tensor
    assert weight.grad is not None


def test_a_copy_that_shares_nothing() -> None:
    model = model_of()
    teacher = FrozenTeacher(model)
    before = teacher(pixels_of())[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(pixels_of())[0], before)
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "pos_embed") and model.depth == 3


def test_matrices_are_cast_once_the_rest_stays_fp32() -> None:
    teacher = FrozenTeacher(model_of(Precision()))
    dtypes = {name.removeprefix("model."): value.dtype for name, value in teacher.state_dict().items()}
    halves = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert "blocks.0.attn.qkv.weight" in halves and "patch_embed.proj.weight" in halves
    assert dtypes["norm.weight"] == dtypes["blocks.1.mlp.fc1.bias"] == dtypes["pos_embed"] == torch.float32
    same = model_of(Precision()).intermediates(pixels_of(), (3,))[0]
    assert torch.equal(teacher(pixels_of())[0], same)  # casting once or in every call rounds alike


def test_the_precision_can_differ_from_the_students() -> None:
    """bf16 against fp32 of the same weights: a dozen roundings of 2^-8."""
    model = model_of()
    low = FrozenTeacher(model, precision=Precision(torch.bfloat16, torch.bfloat16))(pixels_of())[0]
    high = FrozenTeacher(model)(pixels_of())[0]
    assert low.dtype == torch.bfloat16
    assert 1e-4 < float((low.float() - high).norm() / high.norm()) < 3e-2


def test_random_teachers() -> None:
    model, pixels = model_of(), pixels_of()
    copied = from_student(model)(pixels)[0]
    torch.testing.assert_close(copied, model.intermediates(pixels, (3,))[0])
    drawn = [from_student(model, init="independent", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    first, same, other = (teacher(pixels)[0] for teacher in drawn)
    assert torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, copied)
    assert from_student(model, init="independent", depth=5)(pixels)[0].shape == copied.shape


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
