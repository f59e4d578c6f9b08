"""From a name to a teacher on the student's tokens: rebuilt, as it is, or fed pixels of its own size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cohobate import TokenGrid, models, random_plan
from cohobate.errors import UserError
from cohobate.methods import DBOT, DBOTOptions, SymmetricDBOT
from cohobate.models import Decoder, MaskTokenHead, Precision
from cohobate.models.pixels import normalise
from cohobate.teacher import FrozenTeacher, OriginalTeacher, ResizedTeacher, load_source, load_teacher
from cohobate.teacher import loading as loading_of_teachers
from cohobate.teacher.sources import resize_pixels

FP32 = Precision(torch.float32, torch.float32)
GRID = TokenGrid.image((16, 24), 8)
TINY = "random:vit_tiny?width=48&depth=3&heads=4&image_size=32"


class Opaque(nn.Module):
    """No transformer: a convolution, a token in front and attention between its own rows, twice."""

    def __init__(self, grid: TokenGrid = GRID) -> None:
        super().__init__()
        self.grid, self.width, self.depth, self.prefix = grid, 12, 2, 1
        self.mean, self.std = (0.5,) * 3, (0.25,) * 3
        self.conv = nn.Conv2d(3, 12, grid.patch[1:], grid.patch[1:])
        self.register_buffer("shift", torch.ones(12))

    def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        x = self.conv(images).flatten(2).transpose(1, 2) + self.shift
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        found = [x]
        for _ in range(2):
            x = x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            found.append(x)
        return [found[layer] for layer in layers]


def opaque() -> Opaque:
    torch.manual_seed(0)
    return Opaque()


def pixels_of(grid: TokenGrid, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, *grid.pixel_shape), dtype=torch.uint8, generator=generator)


def test_a_plain_vit_is_rebuilt() -> None:
    teacher = load_teacher(f"{TINY}&patch=8&seed=3", layers=(1, 2), precision=FP32)
    source = load_source(f"{TINY}&patch=8&seed=3")
    assert isinstance(teacher, FrozenTeacher) and source.anatomy is not None
    pixels = pixels_of(teacher.grid)
    for found, wanted in zip(teacher(pixels), source.anatomy.forward(pixels, [1, 2]), strict=True):
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())  # fp32, other sums
    assert load_teacher(source, layers=(1, 2)).fingerprint() == teacher.fingerprint()
    assert load_teacher(source).layers == (3,) and load_teacher(source).precision == Precision()


def test_pixels_are_resized_where_it_is_asked_for() -> None:
    """Patches of 16 against the student's 8: the teacher sees twice the pixels, and DBOT need not know."""
    student = TokenGrid.image(16, 8)
    with pytest.raises(UserError, match="resize: the teacher takes 32 x 32 px"):
        load_teacher(f"{TINY}&patch=16", student)
    teacher = load_teacher(f"{TINY}&patch=16", student, resize="pixels", precision=FP32)
    plain = load_teacher(f"{TINY}&patch=16", precision=FP32)
    assert isinstance(teacher, ResizedTeacher) and teacher.grid == student and not list(teacher.parameters())
    pixels, queries = pixels_of(student), torch.tensor([[0, 3], [1, 4]], dtype=torch.int32)
    wanted = plain(resize_pixels(pixels, (32, 32)), queries=queries)[0]
    assert torch.equal(teacher(pixels, queries=queries)[0], wanted)
    assert (teacher.flops(2), teacher.fingerprint()) == (plain.flops(2), plain.fingerprint())
    assert not teacher.train().training and not teacher.state_dict()
    with pytest.raises(UserError, match=r"pixels: expected uint8 or floating \[B, 1, 16, 16, 3\]"):
        teacher(pixels_of(plain.grid))
    with pytest.raises(UserError, match="resize: expected None without a student_grid, got 'pixels'"):
        load_teacher(TINY, resize="pixels")
    with pytest.raises(UserError, match=r"teacher: expected .* tokens, the student's"):
        ResizedTeacher(plain, TokenGrid.image(32, 8))


def test_float_pixels_are_resized_as_floats() -> None:
    """To a size of their own without rounding to bytes: at most half of 1/255 from there, in units of the std."""
    student = TokenGrid.image(16, 8)
    teacher = load_teacher(f"{TINY}&patch=16", student, resize="pixels", precision=FP32)
    assert isinstance(teacher, ResizedTeacher)
    pixels = pixels_of(student)
    floats = resize_pixels(normalise(pixels, teacher), (32, 32), teacher)
    rounded = normalise(resize_pixels(pixels, (32, 32)), teacher)
    assert float((floats - rounded).abs().max()) <= 0.5 / 255 / min(teacher.std) + 1e-5
    assert torch.equal(teacher(normalise(pixels, teacher))[0], teacher.teacher(floats)[0])
    same = normalise(pixels, teacher)
    assert resize_pixels(same, (16, 16), teacher) is same
    with pytest.raises(UserError, match=r"pixels: expected uint8 or floating \[B, 1, 16, 16, 3\]"):
        teacher(pixels.int())


def test_an_original_takes_float_pixels() -> None:
    teacher = load_teacher(opaque())
    pixels = pixels_of(GRID)
    torch.testing.assert_close(teacher(normalise(pixels, teacher)), teacher(pixels), rtol=1e-6, atol=1e-6)


def test_positions_are_resized_where_it_is_asked_for() -> None:
    teacher = load_teacher(f"{TINY}&patch=8", GRID, resize="positions")
    assert isinstance(teacher, FrozenTeacher) and teacher.grid == GRID


def test_a_module_that_is_not_understood_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module, pixels = opaque(), pixels_of(GRID)
    loading_of_teachers._said.clear()
    with caplog.at_level(logging.WARNING, logger="cohobate.teacher"):
        teacher = load_teacher(module, GRID, layers=(1, 2))
        load_teacher(module, GRID)
    assert isinstance(teacher, OriginalTeacher)
    assert [m for m in caplog.messages if "runs as it is" in m] == caplog.messages and len(caplog.messages) == 1
    images = (pixels[:, 0].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    wanted = module.hidden_states(images, [1, 2])
    queries = torch.tensor([[0, 3], [5, 6]], dtype=torch.int32)
    for found, some, all_rows in zip(teacher(pixels), teacher(pixels, queries=queries), wanted, strict=True):
        torch.testing.assert_close(found, all_rows)
        assert torch.equal(some, torch.stack([found[0, [0, 3]], found[1, [5, 6]]])) and not found.requires_grad
    before = teacher(pixels)[0]
    with torch.no_grad():
        module.conv.weight.mul_(2)  # its owner goes on training it
    assert torch.equal(teacher(pixels)[0], before)
    assert all(p.requires_grad for p in module.parameters()) and module.training


def test_an_original_is_no_part_of_any_state() -> None:
    teacher = load_teacher(opaque())
    outer = nn.Sequential(teacher).train()
    assert not list(outer.parameters()) and not list(outer.buffers()) and not outer.state_dict()
    assert not teacher.training
    before = teacher(pixels_of(GRID))[0]
    assert torch.equal(outer.double()[0](pixels_of(GRID))[0], before)  # a dtype is not taken over, a device is
    assert teacher.to("meta")._original.device.type == "meta"  # type: ignore[union-attr]


def test_the_originals_fingerprint_follows_weights_buffers_and_layers() -> None:
    module = opaque()
    prints = [load_teacher(module).fingerprint(), load_teacher(module, layers=(1,)).fingerprint()]
    assert load_teacher(opaque()).fingerprint() == prints[0] and len(prints[0]) == 16
    module.shift[3] += 1  # type: ignore[index]
    prints.append(load_teacher(module).fingerprint())
    with torch.no_grad():
        module.conv.weight[0, 0, 0, 0] += 1
    assert len({*prints, load_teacher(module).fingerprint()}) == 4


def test_the_originals_flops_are_counted() -> None:
    """Convolution and two attentions of 7 rows and width 12, by hand; more or fewer rows change nothing."""
    teacher = load_teacher(opaque())
    convolution, attention = 2 * 6 * 12 * GRID.row_length, 2 * 2 * 7 * 7 * 12
    assert teacher.flops() == teacher.flops(3) == convolution + 2 * attention


def test_what_an_original_cannot_do() -> None:
    teacher, pixels = load_teacher(opaque()), pixels_of(GRID)
    with pytest.raises(UserError, match="rows: expected None, all patches, for Opaque runs as it is"):
        teacher(pixels, torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(UserError, match="norm: expected False, for Opaque runs as it is"):
        teacher(pixels, norm=True)
    for layers, told in (((2, 1), "ascending"), ((3,), r"numbers in \[0, 2\]"), ((), "ascending")):
        with pytest.raises(UserError, match=f"layers: expected .*{told}"):
            load_teacher(opaque(), layers=layers)
    broken = opaque()
    broken.shift[0] = float("nan")  # type: ignore[index]
    with pytest.raises(UserError, match="finite features, got inf or nan behind layer 2 of Opaque"):
        load_teacher(broken)(pixels)


@pytest.mark.parametrize("resize", [False, True])
def test_a_student_learns_from_a_module_as_it_is(resize: bool) -> None:
    """The method asks for the same things of every teacher."""
    torch.manual_seed(0)
    side = 4 if resize else 8
    student = models.build(
        "tiny", image_size=(2 * side, 3 * side), patch=side, width=24, depth=1, heads=2, precision=FP32
    )
    teacher = load_teacher(opaque(), student.grid, resize="pixels" if resize else None)
    assert isinstance(teacher, ResizedTeacher if resize else OriginalTeacher)
    method = DBOT(student, Decoder.for_encoder(student, 12, width=16, depth=1, heads=2), teacher, DBOTOptions())
    with pytest.raises(UserError, match="target_norm: expected False, for Opaque runs as it is"):
        DBOT(student, method.decoder, teacher, DBOTOptions(target_norm=True))
    plan = random_plan(student.grid, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.5)

    class Batch:
        pixels = pixels_of(student.grid)

    step = method.loss(Batch(), plan)
    step.total.backward()
    assert bool(step.total.isfinite()) and method.flops(plan) > 3 * student.flops(3)
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"student", "decoder"}


def test_clips_projected_tokens_on_a_student_of_another_patch(tmp_path: Path) -> None:
    """CLIP of patch 14, made for 4 x 4 tokens, on a student of patch 16 with 3 x 3: it sees 42 px, as L/14 sees 196."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(intermediate_size=96, projection_dim=20, **shape)
    )
    model.save_pretrained(tmp_path)
    student = TokenGrid.image(48, 16)
    teacher = load_teacher(f"hf:{tmp_path}?projection=true", student, resize="pixels", precision=FP32)
    assert isinstance(teacher, ResizedTeacher) and isinstance(teacher.teacher, FrozenTeacher)
    assert (teacher.width, teacher.prefix, teacher.layers) == (20, 1, (2,))
    assert teacher.teacher.grid == TokenGrid.image(42, 14)
    source = load_source(f"hf:{tmp_path}?projection=true")
    assert source.anatomy is not None and source.width == 20
    pixels = pixels_of(student)
    (wanted,) = source.anatomy.resized(teacher.teacher.grid).forward(resize_pixels(pixels, (42, 42)), [2])
    torch.testing.assert_close(teacher(pixels)[0], wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape == (2, 10, 20)

    encoder = models.build("tiny", image_size=48, patch=16, width=24, depth=1, heads=2, precision=FP32)
    method = SymmetricDBOT(encoder, MaskTokenHead(encoder, teacher.width), teacher)
    plan = random_plan(student, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.4)

    class Batch:
        pixels = pixels_of(student)

    assert 0 < float(method.loss(Batch(), plan).total.detach()) < 2


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    """DINOv2 as it comes, patch 14, two registers of a kind of its own: rebuilt, on a student of patch 16."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(num_register_tokens=2, **shape)
    ).save_pretrained(tmp_path)
    student = TokenGrid.image(32, 16)
    teacher = load_teacher(f"hf:{tmp_path}", student, resize="pixels", layers=(1, 2), precision=FP32)
    assert isinstance(teacher, ResizedTeacher) and isinstance(teacher.teacher, FrozenTeacher)
    assert (teacher.prefix, teacher.width, teacher.layers) == (3, 48, (1, 2))
    assert [x.shape for x in teacher(pixels_of(student))] == [(2, 7, 48)] * 2
