"""What pictures are made of, against answers known beforehand or computed another way."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.kernels.alignment.pixel import pixel_target_reference
from cohobate.masking import MaskPlan, random_plan
from cohobate.methods import AMD, DBOT, MAE, Alignment, AMDOptions, SymmetricDBOT
from cohobate.models import Decoder, Features, MaskTokenHead, PixelDecoder, Precision, VisionTransformer
from cohobate.models.pixels import patch_rows
from cohobate.teacher import FrozenTeacher
from cohobate.teacher.sources import load_source, own
from cohobate.tokens import TokenGrid
from cohobate.training import samples, views

FP32 = Precision(torch.float32, torch.float32)
STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
IMAGE, CLIP = TokenGrid.image((16, 24), 4), TokenGrid(4, 16, 16, (2, 4, 4))


def pixels_of(grid: TokenGrid, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *grid.pixel_shape), dtype=torch.uint8, generator=generator)


def tiny(grid: TokenGrid, depth: int = 2, seed: int = 0, **options: Any) -> VisionTransformer:
    """A small encoder with weights far from their neutral values, so that attention is not even."""
    model = VisionTransformer(grid, 24, depth, 3, precision=FP32, **STATISTICS, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def literal_attention(model: VisionTransformer, pixels: Tensor) -> Tensor:
    """[n, heads, P + N, P + N] of the last block in float64, head by head, from the state dict."""
    with torch.no_grad():
        (x,) = model.intermediates(pixels, [model.depth - 1])
    weights = {name: value.double() for name, value in model.state_dict().items()}
    last = f"blocks.{model.depth - 1}"
    x = x.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    x = x * weights[f"{last}.norm1.weight"] + weights[f"{last}.norm1.bias"]
    qkv = x @ weights[f"{last}.attn.qkv.weight"].T + weights[f"{last}.attn.qkv.bias"]
    size, tables = model.width // model.heads, []
    for head in range(model.heads):
        q = qkv[..., head * size : (head + 1) * size]
        k = qkv[..., model.width + head * size : model.width + (head + 1) * size]
        scores = (torch.einsum("nqd,nkd->nqk", q, k) / size**0.5).exp()
        tables.append(scores / scores.sum(-1, keepdim=True))
    return torch.stack(tables, dim=1)


def test_attention_of_the_class_token() -> None:
    model, pixels = tiny(IMAGE), pixels_of(IMAGE)
    found = views.attention(own.read(model, "model"), pixels)
    wanted = literal_attention(model, pixels)[:, :, 0]
    assert found.shape == (2, 3, 1 + IMAGE.size)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-6)  # fp32 against float64
    assert wanted.max() > 4 / (1 + IMAGE.size)  # uneven enough to tell one token from another


def test_attention_without_a_class_token_is_the_mean_over_patches() -> None:
    model, pixels = tiny(CLIP, cls_token=False), pixels_of(CLIP)
    found = views.attention(own.read(model, "model"), pixels)
    torch.testing.assert_close(found.double(), literal_attention(model, pixels).mean(2), rtol=1e-3, atol=1e-6)


def test_attention_is_what_transformers_gives() -> None:
    """Weights of a hub model, rebuilt; the oracle is its own eager attention."""
    pytest.importorskip("transformers")
    config, model_type = (
        getattr(importlib.import_module("transformers"), f"ViT{name}") for name in ("Config", "Model")
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    model = model_type(config(image_size=16, patch_size=4, initializer_range=0.5, attn_implementation="eager", **shape))
    source, pixels = load_source(model.eval()), pixels_of(TokenGrid.image(16, 4))
    assert source.anatomy is not None and source.original is not None
    with torch.no_grad():
        wanted = model(source.original.images(pixels), output_attentions=True).attentions[-1][:, :, 0]
    torch.testing.assert_close(views.attention(source.anatomy, pixels), wanted, rtol=1e-3, atol=1e-6)


def test_relative_positions_count_in_the_attention() -> None:
    model, pixels = tiny(IMAGE), pixels_of(IMAGE)
    anatomy = own.read(model, "model")
    length = 1 + IMAGE.size
    bias = torch.zeros(3, length, length)
    bias[:, 0, 5] = 100.0
    # One block alone, so that the bias reaches nothing but the table that is read.
    one = replace(anatomy, blocks=anatomy.blocks[:1], relative=bias)
    torch.testing.assert_close(views.attention(one, pixels)[:, :, 5], torch.ones(2, 3))


def test_attention_needs_a_block() -> None:
    with pytest.raises(UserError, match="at least one block"):
        views.attention(own.read(tiny(IMAGE, depth=0), "model"), pixels_of(IMAGE))


def test_maps_are_the_heads_and_their_mean_on_the_grid() -> None:
    model, pixels = tiny(CLIP), pixels_of(CLIP)
    rows = views.attention(own.read(model, "model"), pixels)[:, :, 1:]
    found = views.looked_at(own.read(model, "model"), pixels)
    assert found["attention"].shape == (2, 4, *CLIP.shape) and found["attention_heads"].tolist() == [0, 1, 2]
    torch.testing.assert_close(found["attention"][:, 0].flatten(1), rows.mean(1))
    torch.testing.assert_close(found["attention"][:, 3].flatten(1), rows[:, 2])


@pytest.mark.parametrize("grid", [IMAGE, CLIP], ids=["image", "clip"])
@pytest.mark.parametrize("convention", ["mae", "videomae"])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_perfect_prediction_gives_the_image_back(grid: TokenGrid, convention: str, normalised: bool) -> None:
    model, pixels = tiny(grid, depth=0), pixels_of(grid)
    pixels[0, :, :8, :8] = 77  # flat patches, which standardising makes 0
    plan = random_plan(grid, torch.arange(2), seed=1, stage=0, epoch=0, ratio=0.75)
    perfect = pixel_target_reference(
        pixels, plan.masked, patch=grid.patch, convention=convention, normalise=normalised, **STATISTICS
    )
    whole = views.reconstruct(perfect, pixels, plan, model, convention=convention, normalised=normalised)
    assert whole.dtype == torch.uint8 and torch.equal(whole, pixels)


def test_a_prediction_of_nothing_gives_each_patch_its_own_mean() -> None:
    """By hand: the mean over the patch in normalised units (MAE), or of each colour (VideoMAE)."""
    grid, pixels = IMAGE, pixels_of(IMAGE, batch=1)
    model = tiny(grid, depth=0)
    plan = MaskPlan.from_boolean(torch.arange(grid.size)[None] == 3)  # row 0, column 3
    nothing = torch.zeros(1, 1, grid.row_length)
    patch = pixels[0, 0, :4, 12:16].double() / 255
    videomae = views.reconstruct(nothing, pixels, plan, model, convention="videomae")[0, 0, :4, 12:16]
    assert torch.equal(videomae[0, 0], (255 * patch.mean(dim=(0, 1))).round().to(torch.uint8))
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (STATISTICS["mean"], STATISTICS["std"]))
    mae = views.reconstruct(nothing, pixels, plan, model, convention="mae")[0, 0, :4, 12:16]
    level = ((patch - mean) / std).mean()
    assert torch.equal(mae[2, 1], (255 * (level * std + mean)).round().clamp(0, 255).to(torch.uint8))
    left = pixels.clone()
    left[0, 0, :4, 12:16] = mae
    assert torch.equal(left, views.reconstruct(nothing, pixels, plan, model, convention="mae"))


def test_patches_and_back() -> None:
    pixels = pixels_of(CLIP)
    rows = patch_rows(pixels, None, CLIP)
    assert torch.equal(views.from_patches(rows, CLIP), pixels)
    assert torch.equal(rows[1, 1 + 4 + 16, :3], pixels[1, 2, 4, 4])  # frame slot 1, row 1, column 1


def test_colours_are_the_first_components() -> None:
    """Planted: independent columns of falling spread, so the axes are known; a far token does not grey the rest."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 9.0, 0.1, 3.0, 0.2])
    features = torch.randn(4, 100, 5, generator=generator) * spread + 7
    features[0, 0, 1] = 500.0
    colours = views.Colours(features)
    assert colours.axes.abs().argmax(0).tolist() == [1, 3, 0] and (colours.axes.amax(0) > 0.9).all()
    found = colours(features)
    assert found.shape == (4, 100, 3) and float(found.min()) >= 0 and float(found.max()) <= 1
    middle = features[..., 1].flatten()[1:]
    rank = torch.corrcoef(torch.stack([middle, found[..., 0].flatten()[1:]]))[0, 1]
    assert rank > 0.95 and found[..., 0].std() > 0.15
    assert torch.equal(found[0, 0, 0], torch.tensor(1.0))


@dataclass
class Fixed:
    """A source of given images, with the part of a manifest that is read."""

    pixels: Tensor
    names: list[str]
    labels: Any = None

    @property
    def manifest(self) -> Any:
        return self

    @property
    def paths(self) -> list[str]:
        return self.names

    label_names = ("kind",)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, device: torch.device) -> Any:
        places = torch.arange(len(self.pixels))
        yield from zip(self.pixels.split(3), places.split(3))


class FirstPixel:
    """Features: the first pixel's colour, and a constant."""

    def __call__(self, pixels: Tensor) -> Features:
        return Features(None, pixels[:, 0, 0, 0].float())


def test_neighbours_are_the_nearest_others() -> None:
    colours = torch.tensor([[100, 0, 0], [0, 100, 0], [90, 30, 0], [99, 5, 0], [0, 0, 100]], dtype=torch.uint8)
    pixels = colours[:, None, None, None].expand(5, 1, 2, 2, 3).contiguous()
    memory = Fixed(pixels, ["a", "b", "c", "d", "e"], np.array([[0], [1], [0], [1], [0]]))
    asked = Fixed(pixels[[0, 1]], ["a", "new"], np.array([[0], [1]]))
    found = views.neighbours(FirstPixel(), memory, asked, device=torch.device("cpu"), k=3)  # type: ignore[arg-type]
    # "a" is left out of its own; "new" is as b, which is another file.
    names = [["d", "c"], ["b", "c"]]
    for row, (first, second) in enumerate(names):
        for place, name in enumerate((first, second)):
            assert np.array_equal(found["neighbours"][row, place], pixels[ord(name) - 97, 0].numpy())
    cosine = 90 / (90**2 + 30**2) ** 0.5
    np.testing.assert_allclose(found["similarity"][0, 1], cosine, rtol=1e-5)
    np.testing.assert_allclose(found["similarity"][1, 0], 1, rtol=1e-5)
    assert found["same"][:, :2].tolist() == [[False, True], [True, False]] and found["label"] == "kind"
    lonely = Fixed(pixels[:1], ["a"])
    with pytest.raises(UserError, match="at least two images"):
        views.neighbours(FirstPixel(), lonely, lonely, device=torch.device("cpu"))  # type: ignore[arg-type]


def test_samples_of_mae() -> None:
    student = tiny(IMAGE)
    method = MAE(student, Decoder.for_encoder(student, width=24, depth=1, heads=3)).eval()
    pixels, plan = pixels_of(IMAGE), random_plan(IMAGE, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.75)
    found = samples.draw(method, pixels, plan)
    assert "teacher_visible" not in found and found["visible"].shape == (2, 4, 6)
    hidden = views.on_grid(plan.to_boolean()[0], IMAGE)
    assert torch.equal(found["visible"], ~hidden)
    spread = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)
    assert torch.equal(found["reconstruction"][~spread], pixels[:, 0][~spread])
    assert not torch.equal(found["reconstruction"][spread], pixels[:, 0][spread])


@pytest.mark.parametrize("symmetric", [False, True])
def test_samples_of_dbot_show_its_predictions(symmetric: bool) -> None:
    student, teacher = tiny(IMAGE), FrozenTeacher(tiny(IMAGE, seed=1))
    if symmetric:
        method: DBOT = SymmetricDBOT(student, MaskTokenHead(student, 24), teacher).eval()
    else:
        method = DBOT(student, Decoder.for_encoder(student, 24, width=24, depth=1, heads=3), teacher).eval()
    pixels, plan = pixels_of(IMAGE), random_plan(IMAGE, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.75)
    found = samples.draw(method, pixels, plan)
    assert "reconstruction" not in found and found["target_pca"].shape == (2, 4, 6, 3)
    targets = method.targets(samples._Images(pixels))
    with torch.no_grad():
        whole = method.predict(pixels, plan, (torch.arange(IMAGE.size + 1).expand(2, -1)).int().contiguous(), None)
    wanted = views.on_grid(views.Colours(targets)(whole[:, 1:]), IMAGE)
    hidden = ~found["visible"]
    # The last block is computed for other rows here and there: the same sums in another order.
    torch.testing.assert_close(found["prediction_pca"][hidden], wanted[hidden], rtol=1e-4, atol=1e-4)


def test_samples_of_amd_show_what_the_teacher_sees() -> None:
    student, teacher = tiny(CLIP, cls_token=False), FrozenTeacher(tiny(CLIP, cls_token=False, seed=1), (1, 2))
    options = AMDOptions(direct=((1, 1), (2, 2)), generation=((1, 1), (2, 2)))
    decoder = PixelDecoder.for_encoder(student, width=24, depth=1, heads=3)
    method = AMD(student, decoder, teacher, Alignment(student, 24, 3, options), options).eval()
    pixels = pixels_of(CLIP)
    plan = random_plan(CLIP, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.75, teacher_ratio=0.5, tube=True)
    found = samples.draw(method, pixels, plan)
    assert found["images"].shape == (2, *CLIP.pixel_shape) and found["reconstruction"].shape == found["images"].shape
    student_sees, teacher_sees = found["visible"], found["teacher_visible"]
    assert student_sees.shape == (2, *CLIP.shape) and not (student_sees & ~teacher_sees).any()
    assert int(teacher_sees.sum()) == 2 * plan.teacher and torch.equal(found["predicted"], teacher_sees)
    assert (found["target_pca"][~teacher_sees] == 0).all() and (found["prediction_pca"][~teacher_sees] == 0).all()
    # The target is the teacher's own stream, each row at its token.
    stream = teacher(pixels, plan.teacher_rows)[-1]
    colours = views.Colours(stream)
    token = int(plan.diff[1, 2])
    row = plan.teacher_rows[1].tolist().index(token)
    torch.testing.assert_close(found["target_pca"][1].flatten(0, 2)[token], colours(stream)[1, row])
    generated = method.alignment({2: student.intermediates(pixels, [1, 2], plan.visible)[1],
                                  1: student.intermediates(pixels, [1], plan.visible)[0]}, plan)[1][-1]  # fmt: skip
    torch.testing.assert_close(found["prediction_pca"][1].flatten(0, 2)[token], colours(generated)[1, 2])
