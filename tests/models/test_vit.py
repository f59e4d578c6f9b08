"""The encoder: names, shapes, what it skips, how it is drawn, drop path and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cohobate import TokenGrid, kernels, models, random_plan
from cohobate.errors import UserError
from cohobate.kernels.backends import use_attention
from cohobate.models import Precision, VisionTransformer
from cohobate.models.layers import DropPath
from cohobate.models.positions import relative_index

FP32 = Precision(torch.float32, torch.float32)


def model_of(**changes: object) -> VisionTransformer:
    arguments: dict[str, object] = {"size": "tiny", "image_size": 32, "patch": 8, "width": 48, "depth": 3, "heads": 4}
    torch.manual_seed(0)
    return models.build(**(arguments | {"precision": FP32} | changes))  # type: ignore[arg-type]


def pixels_of(model: VisionTransformer, batch: int = 2) -> Tensor:
    shape = (batch, *model.grid.pixel_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_state_dict_keys_are_timms() -> None:
    block = [
        f"{n}.{p}"
        for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for p in ("weight", "bias")
    ]
    expected = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    }
    expected |= {f"blocks.{i}.{name}" for i in range(3) for name in block}
    state = model_of().state_dict()
    assert set(state) == expected
    assert state["pos_embed"].shape == (1, 17, 48)
    assert state["patch_embed.proj.weight"].shape == (48, 3, 8, 8)
    assert state["blocks.0.attn.qkv.weight"].shape == (144, 48)


@pytest.mark.parametrize(("size", "millions"), [("small", 21.59), ("base", 85.65), ("large", 303.10), ("huge", 630.44)])
def test_named_sizes_have_the_published_parameter_counts(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.build(size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"image_size": (16, 40)}, 11),
        ({"channels": 1}, 17),
        ({"cls_token": False, "channels": 5}, 16),
        ({"frames": 4, "tubelet": 2, "cls_token": False}, 32),
        ({"depth": 0}, 17),
        ({"precision": Precision()}, 17),
        ({"precision": Precision(torch.bfloat16, torch.bfloat16)}, 17),
    ],
)
def test_shapes(changes: dict[str, object], tokens: int) -> None:
    model = model_of(**changes)
    out = model(pixels_of(model))
    assert out.shape == (2, tokens, 48) and out.dtype == model.precision.compute
    assert bool(out.isfinite().all())
    features = model.features(pixels_of(model))
    assert (features.cls is None) == (model.prefix == 0)
    torch.testing.assert_close(features.mean, out.float()[:, model.prefix :].mean(1))


def test_visible_rows_are_what_masking_the_whole_sequence_gives() -> None:
    """Embedding only the visible patches equals dropping the others afterwards; fp32 sums in another order."""
    model = model_of()
    pixels = pixels_of(model)
    plan = random_plan(model.grid, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.6)
    embedded = model.embed(pixels)
    kept = torch.cat([embedded[:, :1], kernels.tokens.take(embedded[:, 1:], plan.visible)], dim=1)
    torch.testing.assert_close(model.embed(pixels, plan.visible), kept, rtol=1e-5, atol=1e-5)


def test_the_patch_kernel_is_a_convolution() -> None:
    model = model_of(image_size=(16, 24), depth=0)
    pixels = pixels_of(model)
    image = pixels[:, 0].permute(0, 3, 1, 2) / 255
    image = (image - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    proj = model.patch_embed.proj
    expected = torch.nn.functional.conv2d(image, proj.weight, proj.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.embed(pixels)[:, 1:], expected + model.pos_embed[:, 1:], rtol=1e-5, atol=1e-5)


def test_intermediates_agree_with_each_other_and_with_the_whole() -> None:
    model = model_of().eval()
    pixels = pixels_of(model)
    every = model.intermediates(pixels, (0, 1, 2, 3))
    torch.testing.assert_close(every[0], model.embed(pixels))
    for layer in (1, 2, 3):
        torch.testing.assert_close(model.intermediates(pixels, (layer,))[0], every[layer])
    torch.testing.assert_close(model.norm(every[3]), model(pixels))
    torch.testing.assert_close(model.intermediates(pixels, (1, 3), norm=True)[0], model.norm(every[1]))


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 3)])
def test_queries_change_no_number(layers: tuple[int, ...]) -> None:
    """The last block for some rows alone equals those rows of the whole; fp32 sums in another order."""
    model = model_of()
    pixels = pixels_of(model)
    queries = torch.tensor([[0, 3, 16], [0, 1, 9]], dtype=torch.int32)
    whole = [kernels.tokens.take(x, queries) for x in model.intermediates(pixels, layers)]
    some = model.intermediates(pixels, layers, queries=queries)
    assert [x.shape[1] for x in some] == [3] * len(layers)
    weights = torch.randn(some[0].shape, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for outputs in (whole, some):
        total = sum((x * weights).sum() for x in outputs)
        assert isinstance(total, Tensor)
        gradients.append(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))
    for a, b in zip([*some, *gradients[1]], [*whole, *gradients[0]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (4,), (-1,)])
def test_layers_out_of_order(layers: tuple[int, ...]) -> None:
    model = model_of()
    with pytest.raises(UserError, match=r"layers: expected ascending numbers in \[0, 3\]"):
        model.intermediates(pixels_of(model), layers)


def test_reset_is_a_function_of_the_generator() -> None:
    first, second = model_of(), model_of(drop_path=0.1)
    with torch.no_grad():
        for parameter in second.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-3, 3)
    torch.manual_seed(99)
    first.reset(torch.Generator().manual_seed(7))
    torch.manual_seed(100)
    second.reset(torch.Generator().manual_seed(7))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    second.reset(torch.Generator().manual_seed(8))
    assert not torch.equal(first.blocks[0].attn.qkv.weight, second.blocks[0].attn.qkv.weight)


def test_reset_draws_everything_and_the_compat_flag_keeps_the_patch_bias() -> None:
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(5.0)
    model.reset(torch.Generator().manual_seed(7), keep_patch_bias=True)
    kept = {name for name, p in model.named_parameters() if bool((p == 5).any())}
    assert kept == {"patch_embed.proj.bias"}
    reference = {name: p.clone() for name, p in model.named_parameters()}
    model.reset(torch.Generator().manual_seed(7))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, reference[name])}
    assert changed == {"patch_embed.proj.bias"}


def test_the_distributions_of_the_weights() -> None:
    """Bounds and standard deviations of the papers; 5 % covers the sampling error of the smallest tensor used."""
    model = models.build("tiny", depth=1)
    qkv, proj = model.blocks[0].attn.qkv, model.patch_embed.proj
    for weight, bound in ((qkv.weight, (6 / (192 + 576)) ** 0.5), (proj.weight, (6 / (192 + 768)) ** 0.5)):
        assert float(weight.detach().abs().max()) <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0.9 * 768**-0.5 < float(proj.bias.detach().abs().max()) <= 768**-0.5
    assert not qkv.bias.any() and bool((model.norm.weight == 1).all())
    assert model.cls_token is not None and float(model.cls_token.detach().std()) == pytest.approx(0.02, rel=0.25)
    assert not model.pos_embed.requires_grad


def test_drop_path_keeps_the_mean_and_rises_linearly() -> None:
    drop = DropPath(0.4, 5)
    factors = drop(4096, torch.Generator().manual_seed(0))
    assert factors is not None and factors.shape == (5, 2, 4096)
    for i, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        assert float((factors[i] == 0).double().mean()) == pytest.approx(rate, abs=0.03)  # 5 deviations of 8192 draws
        alive = factors[i][factors[i] > 0]
        torch.testing.assert_close(alive, torch.full_like(alive, 1 / (1 - rate)))
    again = drop(4096, torch.Generator().manual_seed(0))
    assert again is not None and torch.equal(again, factors)
    assert drop.eval()(8) is None and DropPath(0.0, 5)(8) is None


def test_drop_path_drops_whole_branches_of_a_sample() -> None:
    model = model_of(drop_path=0.9, depth=2)
    pixels = pixels_of(model, 64)
    generator = torch.Generator().manual_seed(3)
    trained = model.intermediates(pixels, (1, 2), generator=generator)
    same = (trained[0] == trained[1]).flatten(1).all(1)
    assert 0.5 < float(same.double().mean()) < 1  # both branches of the last block fall away with chance 0.81
    whole = model.eval().intermediates(pixels, (1, 2))
    torch.testing.assert_close(whole[0], trained[0])  # the first block's rate is 0


def test_bf16_stays_near_fp32() -> None:
    """bf16 products with either residual against fp32: 2^-8 a rounding, a dozen of them in a row."""
    reference = model_of()
    pixels = pixels_of(reference)
    expected = reference(pixels)
    for residual, limit in ((torch.float32, 2e-2), (torch.bfloat16, 3e-2)):
        model = reference.like(precision=Precision(torch.bfloat16, residual))
        model.load_state_dict(reference.state_dict())
        out = model(pixels)
        assert float(((out.float() - expected).norm() / expected.norm()).detach()) < limit
        out.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("visible", [None, 5])
def test_flops_are_what_torch_counts(visible: int | None) -> None:
    model = model_of(mlp_ratio=2.0)
    queries = torch.tensor([[0, 2, 4]], dtype=torch.int32)
    rows = None if visible is None else torch.arange(visible, dtype=torch.int32).view(1, -1)
    counter = FlopCounterMode(display=False)  # it does not count SDPA on the CPU, nor our ops
    with counter, kernels.use_backend("reference"), use_attention("explicit"), torch.no_grad():
        model.intermediates(pixels_of(model, 1), (3,), rows, queries=queries)
    assert counter.get_total_flops() == model.flops(visible, queries=3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": "giant"}, "size: expected one of tiny, small, base, large, huge; got 'giant'"),
        ({"image_size": 33}, "height: expected a positive multiple of the patch size 8, got 33"),
        ({"heads": 5}, "heads: expected a divisor of the width 48, got 5"),
        ({"width": 50, "heads": 5}, "width: expected a multiple of 4"),
        ({"drop_path": 1.0}, "drop_path: expected a rate"),
        ({"depth": -1}, "depth: expected 0 or more"),
        ({"mean": (0.5,)}, "mean: expected 3 numbers, one a channel, got 1"),
        ({"positions": "learned"}, "positions: expected one of sincos, none; got 'learned'"),
        ({"layer_scale": 0.0}, "layer_scale: expected a number above 0 or None, got 0.0"),
        ({"relative_positions": True, "frames": 4, "tubelet": 2}, "relative_positions: expected the grid of an image"),
    ],
)
def test_refuses(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        model_of(**changes)


def test_pixels_of_another_size() -> None:
    model = model_of()
    with pytest.raises(
        UserError, match=r"pixels: expected uint8 or floating \[B, 1, 32, 32, 3\], got torch.uint8 \[2, 1, 40, 32, 3\]"
    ):
        model(torch.zeros(2, 1, 40, 32, 3, dtype=torch.uint8))


def test_precision_of_a_dtype_that_cannot_compute() -> None:
    with pytest.raises(UserError, match="residual: expected float32"):
        Precision(torch.float32, torch.int32)


def test_a_grid_with_one_frame_of_tubelet_two_has_a_clip_kernel() -> None:
    model = VisionTransformer(TokenGrid(2, 8, 8, (2, 4, 4)), 48, 1, 4, cls_token=False, precision=FP32)
    assert model.patch_embed.proj.weight.shape == (48, 3, 2, 4, 4)
    assert model(pixels_of(model)).shape == (2, 4, 48)


def test_the_index_of_relative_positions_by_hand() -> None:
    """2 x 2 patches: 9 offsets; then class -> patch 9, patch -> class 10, class -> class 11."""
    patches = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_index(2, 2, 0).tolist() == patches
    assert relative_index(2, 2, 1).tolist() == [[11, 9, 9, 9, 9], *([10, *row] for row in patches)]
    wide = relative_index(2, 3, 0)
    assert wide.shape == (6, 6) and wide[5, 0] == (1 + 1) * 5 + 2 + 2 and wide.max() == 3 * 5 - 1 and wide.min() == 0


def randomised(model: VisionTransformer) -> VisionTransformer:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ls" in name or "rel_pos" in name:
                parameter.normal_(0, 1, generator=generator)
    return model


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("seen", [False, True])
def test_rows_and_queries_get_their_part_of_the_bias(cls_token: bool, seen: bool) -> None:
    """Patches that are hidden are keys that nobody attends to: an infinite distance, written as a bias of -inf."""
    model = randomised(model_of(cls_token=cls_token, depth=2, relative_positions=True, layer_scale=0.5))
    pixels, prefix = pixels_of(model), int(cls_token)
    rows = torch.tensor([[1, 4, 7, 15], [0, 2, 3, 9]], dtype=torch.int32) if seen else None
    queries = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
    whole = model.intermediates(pixels, (1, 2), rows)
    some = model.intermediates(pixels, (1, 2), rows, queries=queries)
    for a, b in zip(some, whole, strict=True):
        torch.testing.assert_close(a, kernels.tokens.take(b, queries), rtol=1e-5, atol=1e-5)
    if rows is None:
        return
    assert model.rel_pos_bias is not None
    full = model.rel_pos_bias()
    for sample in range(2):  # the whole sequence, hidden keys shut off
        shut = torch.full((model.grid.size + prefix,), float("-inf"))
        kept = torch.cat([torch.arange(prefix), rows[sample].long() + prefix])
        shut[kept] = 0
        x = models.layers.Stream(model.embed(pixels[sample : sample + 1]))
        for block in model.blocks:
            x = block(x, torch.float32, None, None, full + shut)
        torch.testing.assert_close(x.settled()[:, kept], whole[1][sample : sample + 1], rtol=1e-5, atol=1e-5)


def test_a_layer_scale_of_one_changes_nothing_and_learns() -> None:
    plain, scaled = model_of(), model_of(layer_scale=1.0)
    assert {name for name in scaled.state_dict() if name not in plain.state_dict()} == {
        f"blocks.{i}.ls{j}.gamma" for i in range(3) for j in (1, 2)
    }
    scaled.load_state_dict(plain.state_dict(), strict=False)
    pixels = pixels_of(plain)
    assert torch.equal(plain(pixels), scaled(pixels))
    randomised(scaled)
    folded = model_of()
    folded.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for block, twin in zip(folded.blocks, scaled.blocks, strict=True):
            for layer, scale in ((block.attn.proj, twin.ls1.gamma), (block.mlp.fc2, twin.ls2.gamma)):
                layer.weight.mul_(scale[:, None])
                layer.bias.mul_(scale)
    torch.testing.assert_close(scaled(pixels), folded(pixels), rtol=1e-5, atol=1e-5)  # fp32: one rounding elsewhere
    scaled(pixels).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in scaled.named_parameters() if ".ls" in name)


def test_without_positions_patches_are_a_set() -> None:
    """Tokens of the same patches in another order come out in that order."""
    model = model_of(positions="none").eval()
    pixels = pixels_of(model)
    rows = torch.arange(16, dtype=torch.int32).expand(2, -1)
    turned = rows.flip(1)
    out, other = model(pixels, rows), model(pixels, turned)
    torch.testing.assert_close(out[:, 1:].flip(1), other[:, 1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model_of()(pixels, rows)[:, 0], out[:, 0])
