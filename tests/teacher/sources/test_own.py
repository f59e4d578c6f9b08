"""Our own encoders as teachers: rebuilt they give the encoder's numbers, and an export comes back whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cohobate import models
from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.teacher.sources import load_source

Make = Callable[..., Any]
SHAPE: dict[str, Any] = {"image_size": 32, "patch": 8, "width": 48, "depth": 3, "heads": 4}
QUERY = "image_size=32&patch=8&width=48&depth=3&heads=4"


def encoder(**options: Any) -> VisionTransformer:
    return models.build("tiny", **(SHAPE | {"precision": Precision(torch.float32, torch.float32)} | options))


@pytest.mark.parametrize("options", [{}, {"cls_token": False}, {"frames": 4, "tubelet": 2}, {"depth": 0}], ids=str)
def test_rebuilt_features_are_the_encoders(options: dict[str, Any], scramble: Make, pixels_of: Make) -> None:
    model = scramble(encoder(**options))
    source = load_source(model)
    assert source.reasons == () and source.anatomy is not None
    assert (source.width, source.depth, source.prefix) == (48, model.depth, model.prefix)
    pixels, layers = pixels_of(model.grid), list(range(model.depth + 1))
    with torch.no_grad():
        wanted = model.intermediates(pixels, layers)
    for a, b in zip(source.anatomy.forward(pixels, layers), wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())  # fp32, another order of sums


def test_rows_are_the_encoders(scramble: Make, pixels_of: Make) -> None:
    model = scramble(encoder())
    source, rows = load_source(model), torch.tensor([[1, 4, 9], [0, 2, 15]], dtype=torch.int32)
    assert source.anatomy is not None
    pixels = pixels_of(model.grid)
    found = source.anatomy.forward(pixels, [3], rows, norm=True)
    torch.testing.assert_close(found, model.intermediates(pixels, [3], rows, norm=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [Precision(), Precision(torch.float32, torch.float32)], ids=["bf16", "fp32"])
def test_a_student_may_go_on(precision: Precision, scramble: Make, pixels_of: Make) -> None:
    """A student in training mode, drop path and all: read exactly, left alone, and no longer connected."""
    model = scramble(encoder(precision=precision, drop_path=0.5)).train()
    source = load_source(model)
    assert source.reasons == () and source.anatomy is not None and model.training and model.precision == precision
    pixels = pixels_of(model.grid)
    before = source.anatomy.forward(pixels, [3])[0]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    assert torch.equal(source.anatomy.forward(pixels, [3])[0], before)
    assert not any(t.requires_grad for t in (source.anatomy.patch, source.anatomy.blocks[0].qkv, source.anatomy.prefix))


def test_random_is_a_function_of_its_seed() -> None:
    first, again = load_source(f"random:vit_tiny?seed=3&{QUERY}"), load_source("random:tiny", seed=3, **SHAPE)
    other = load_source(f"random:vit_tiny?{QUERY}")
    assert first.anatomy is not None and again.anatomy is not None and other.anatomy is not None
    assert torch.equal(first.anatomy.blocks[2].fc1, again.anatomy.blocks[2].fc1)
    assert not torch.equal(first.anatomy.blocks[2].fc1, other.anatomy.blocks[2].fc1)
    assert first.grid.shape == (1, 4, 4) and first.width == 48 and first.depth == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("random:vit_gigantic", "NAME one of tiny"),
        ("random:tiny?colour=3", "colour"),
        ("random:tiny?width=64", "heads"),
    ],
)
def test_random_with_a_wrong_option(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_source(spec)


def exported(folder: Path, model: VisionTransformer) -> Path:
    from cohobate.models.exports import export

    return export(folder, model, None, {"stage": 0})


def test_an_export_comes_back(tmp_path: Path, scramble: Make, pixels_of: Make) -> None:
    model = scramble(encoder(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]))
    exported(tmp_path / "exports" / "0-a", scramble(encoder(), seed=5))
    folder = exported(tmp_path / "exports" / "10-b", model)
    pixels = pixels_of(model.grid)
    for spec in (folder, str(folder), tmp_path):  # the folder, or the last of a run's
        source = load_source(spec)
        assert source.anatomy is not None and source.mean == (0.1, 0.2, 0.3)
        torch.testing.assert_close(source.anatomy.forward(pixels, [3]), model.intermediates(pixels, [3]))


def test_missing_surplus_and_wrong_keys_are_listed(tmp_path: Path) -> None:
    folder = exported(tmp_path, encoder())
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.1.norm2.bias"]
    weights["blocks.7.norm2.bias"] = torch.zeros(48)
    weights["norm.weight"] = torch.ones(47)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_source(folder)
    for told in ("missing: blocks.1.norm2.bias", "surplus: blocks.7.norm2.bias", r"norm.weight [47] instead of [48]"):
        assert told in str(error.value)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run folder or an export with model.safetensors"):
        load_source(tmp_path)
    folder = exported(tmp_path, encoder())
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="write hf:"):
        load_source(folder)


def test_a_damaged_export(tmp_path: Path) -> None:
    folder = exported(tmp_path, encoder())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot read the export"):
        load_source(folder)
