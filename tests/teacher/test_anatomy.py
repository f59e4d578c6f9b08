"""The plain description of a ViT: its forward against torch's own encoder layer, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.teacher.anatomy import ACTIVATIONS, Affine, Anatomy, BlockWeights
from cohobate.tokens import TokenGrid

D, HIDDEN, HEADS = 16, 40, 4
GRID = TokenGrid(2, 8, 12, (2, 4, 4))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def affine(seed: int) -> Affine:
    return Affine(1 + drawn(D, seed=seed), drawn(D, seed=seed + 1))


def block(seed: int, gates: int = 1, scales: bool = False) -> BlockWeights:
    shapes = {
        "qkv": (3 * D, D), "qkv_bias": (3 * D,), "proj": (D, D), "proj_bias": (D,),
        "fc1": (gates * HIDDEN, D), "fc1_bias": (gates * HIDDEN,), "fc2": (D, HIDDEN), "fc2_bias": (D,),
    }  # fmt: skip
    weights: dict[str, Any] = {name: drawn(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    if scales:
        weights |= {"scale1": drawn(D, seed=seed + 20), "scale2": drawn(D, seed=seed + 21)}
    return BlockWeights(norm1=affine(seed + 30), norm2=affine(seed + 40), **weights)


def anatomy(**changes: Any) -> Anatomy:
    parts: dict[str, Any] = {
        "name": "test", "grid": GRID, "heads": HEADS, "patch": drawn(D, GRID.row_length, seed=1),
        "patch_bias": drawn(D, seed=2), "prefix": drawn(3, D, seed=3), "positions": drawn(GRID.size, D, seed=4),
        "blocks": (block(100), block(200)), "norm": affine(5), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
    }  # fmt: skip
    return Anatomy(**(parts | changes))


def pixels(grid: TokenGrid = GRID) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (2, *grid.pixel_shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_forward_is_torchs_pre_norm_encoder(activation: str) -> None:
    """The embedding as a Conv3d, the blocks as nn.TransformerEncoderLayer, eps and all."""
    model = anatomy(activation=activation, eps=1e-3)
    conv = nn.Conv3d(3, D, GRID.patch, GRID.patch)
    x = (pixels().float() / 255 - torch.tensor(model.mean)) / torch.tensor(model.std)
    with torch.no_grad():
        conv.weight.copy_(model.patch.view(D, *GRID.patch, 3).permute(0, 4, 1, 2, 3))
        assert conv.bias is not None and model.patch_bias is not None and model.positions is not None
        conv.bias.copy_(model.patch_bias)
        x = conv(x.permute(0, 4, 1, 2, 3)).flatten(2).transpose(1, 2) + model.positions
        x = torch.cat([model.prefix.expand(2, -1, -1), x], dim=1)
        wanted = [x]
        for weights in model.blocks:
            x = as_torch_layer(weights, activation)(x)
            wanted.append(x)
    found = model.forward(pixels(), [0, 1, 2])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert model.norm is not None
    normed = nn.functional.layer_norm(x, (D,), model.norm.weight, model.norm.bias, 1e-3)
    torch.testing.assert_close(model.forward(pixels(), [2], norm=True)[0], normed, rtol=1e-5, atol=1e-5)


def as_torch_layer(weights: BlockWeights, activation: str) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        D, HEADS, HIDDEN, dropout=0.0, activation=ACTIVATIONS[activation], batch_first=True, norm_first=True,
        layer_norm_eps=1e-3,
    )  # fmt: skip
    named = {
        "self_attn.in_proj_weight": weights.qkv, "self_attn.in_proj_bias": weights.qkv_bias,
        "self_attn.out_proj.weight": weights.proj, "self_attn.out_proj.bias": weights.proj_bias,
        "linear1.weight": weights.fc1, "linear1.bias": weights.fc1_bias,
        "linear2.weight": weights.fc2, "linear2.bias": weights.fc2_bias,
        "norm1.weight": weights.norm1.weight, "norm1.bias": weights.norm1.bias,
        "norm2.weight": weights.norm2.weight, "norm2.bias": weights.norm2.bias,
    }  # fmt: skip
    layer.load_state_dict(named)
    return layer.train()  # eval mode would take a fused path of its own; there is no dropout


def test_a_layer_scale_scales_its_branch() -> None:
    """Scaling a branch is scaling the layer it ends in."""
    scaled = block(100, scales=True)
    assert scaled.scale1 is not None and scaled.scale2 is not None
    assert scaled.proj_bias is not None and scaled.fc2_bias is not None
    folded = replace(
        scaled, scale1=None, scale2=None,
        proj=scaled.proj * scaled.scale1[:, None], proj_bias=scaled.proj_bias * scaled.scale1,
        fc2=scaled.fc2 * scaled.scale2[:, None], fc2_bias=scaled.fc2_bias * scaled.scale2,
    )  # fmt: skip
    found, wanted = (anatomy(blocks=(part,)).forward(pixels(), [1]) for part in (scaled, folded))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_swiglu_has_the_gate_first() -> None:
    """With the gate's rows zero and its bias b, the MLP is linear: silu(b) times the value."""
    part = block(100, gates=2)
    gate, value = part.fc1.clone(), part.fc1_bias
    assert value is not None
    gate[:HIDDEN] = 0
    value = torch.cat([torch.full((HIDDEN,), 0.7), value[HIDDEN:]])
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    hidden = ACTIVATIONS["swiglu"](nn.functional.linear(x, gate, value))
    silu = 0.7 / (1 + torch.exp(torch.tensor(-0.7)))
    torch.testing.assert_close(hidden, silu * nn.functional.linear(x, gate[HIDDEN:], value[HIDDEN:]))
    anatomy(activation="swiglu", blocks=(part,)).forward(pixels(), [1])


def test_the_norm_of_the_embedding_covers_the_prefix() -> None:
    plain, normed = anatomy().forward(pixels(), [0])[0], anatomy(embed_norm=affine(7)).forward(pixels(), [0])[0]
    wanted = nn.functional.layer_norm(plain, (D,), *affine(7), 1e-6)
    torch.testing.assert_close(normed, wanted)


def test_only_the_rows_asked_for_are_embedded() -> None:
    rows = torch.tensor([[5, 0, 2], [1, 3, 4]], dtype=torch.int32)
    some, whole = anatomy().forward(pixels(), [0], rows)[0], anatomy().forward(pixels(), [0])[0]
    torch.testing.assert_close(some[0, 3:], whole[0, 3:][rows[0].long()])
    torch.testing.assert_close(some[1, :3], whole[1, :3])


def test_moving_takes_every_tensor() -> None:
    moved = anatomy(blocks=(block(100, scales=True),), embed_norm=affine(7)).to(dtype=torch.float64)
    part = moved.blocks[0]
    tensors = [moved.patch, moved.prefix, moved.positions, *moved.norm, *moved.embed_norm, *part.norm1, part.scale2]  # type: ignore[misc]
    assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.float64}
    assert moved.forward(pixels(), [1])[0].dtype == torch.float64


def test_resizing_keeps_what_a_frame_has_in_common() -> None:
    """Two frames with one constant each: interpolation stays inside the frame and keeps constants."""
    grid = TokenGrid(4, 8, 12, (2, 4, 4))
    positions = torch.cat([torch.full((6, D), 1.0), torch.full((6, D), -2.0)])
    model = anatomy(grid=grid, positions=positions)
    larger = TokenGrid(4, 20, 16, (2, 4, 4))
    table = model.resized(larger).positions
    assert table is not None and table.shape == (40, D) and model.resized(larger).grid == larger
    torch.testing.assert_close(table, torch.cat([torch.full((20, D), 1.0), torch.full((20, D), -2.0)]))
    assert model.resized(grid).positions is positions


def test_resizing_down_is_antialiased() -> None:
    """Stripes, one row in four, in a table a quarter of its size: their mean, 0.25, and not the 0.59 of 4 samples."""
    stripes = (torch.arange(16) % 4 == 1).float()
    positions = stripes[:, None, None].expand(16, 16, D).reshape(256, D)
    model = anatomy(grid=TokenGrid.image(64, 4), patch=drawn(D, 48, seed=1), positions=positions)
    table = model.resized(TokenGrid.image(16, 4)).positions
    assert table is not None
    inner = table.view(4, 4, D)[1:3]  # away from the border, where the kernel is cut
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25), rtol=0, atol=0.05)


@pytest.mark.parametrize("grid", [TokenGrid(2, 8, 12, (2, 2, 4)), TokenGrid(4, 8, 12, (2, 4, 4))], ids=str)
def test_resizing_refuses_another_patch_or_time(grid: TokenGrid) -> None:
    with pytest.raises(UserError, match="in another height and width"):
        anatomy().resized(grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation: expected one of gelu"),
        ({"heads": 5}, "heads: expected a divisor of the width 16"),
        ({"mean": (0.5,)}, "mean: expected 3 numbers, got 1"),
        ({"patch": drawn(D, 7, seed=1)}, r"patch: expected shape \[16, 96\], got \[16, 7\]"),
        ({"positions": drawn(5, D, seed=1)}, r"positions: expected shape \[6, 16\]"),
        ({"activation": "swiglu"}, r"blocks\[0\].fc1: expected shape \[80, 16\], got \[40, 16\]"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        anatomy(**changes)
