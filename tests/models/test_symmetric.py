"""The symmetric student: mask tokens at the input, relative positions, layer scale; against transformers' BEiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate import MaskPlan, models, random_plan
from cohobate.errors import UserError
from cohobate.models import MaskTokenHead, Precision, VisionTransformer
from cohobate.models.pixels import normalise

FP64 = Precision(torch.float64, torch.float64)
OUT = 20
BEIT: dict[str, Any] = {"positions": "none", "layer_scale": 0.1, "relative_positions": True}


def student_of(**changes: object) -> VisionTransformer:
    arguments: dict[str, object] = {"image_size": (32, 48), "patch": 8, "width": 48, "depth": 2, "heads": 4}
    torch.manual_seed(0)
    return models.build("tiny", **(arguments | BEIT | changes))  # type: ignore[arg-type]


def plan_of(model: VisionTransformer) -> MaskPlan:
    return random_plan(model.grid, torch.arange(2), seed=0, stage=0, epoch=0, ratio=0.4)


def as_ours(name: str) -> str:
    """Our name of a parameter of transformers' BeitForMaskedImageModeling."""
    for theirs, ours in (
        ("beit.", ""), ("layers.", "blocks."), ("patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.", ""), ("shared_position_bias", "rel_pos_bias"), ("attention.o_proj", "attn.proj"),
        ("lambda_1", "ls1.gamma"), ("lambda_2", "ls2.gamma"), ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"), ("layernorm", "norm"), ("lm_head", "head"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def test_encoder_and_head_are_beits() -> None:
    """Predictions at the hidden patches and all gradients, in float64, with the last block pruned on our side alone.

    The image is square: for others transformers 5 takes the table's rows for its columns.
    """
    transformers: Any = pytest.importorskip("transformers")
    student = student_of(precision=FP64, image_size=32).double()
    head = MaskTokenHead(student, OUT).double()
    torch.manual_seed(1)
    beit = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=32,
            patch_size=8, use_mask_token=True, use_absolute_position_embeddings=False, layer_norm_eps=1e-6,
            use_relative_position_bias=False, use_shared_relative_position_bias=True, layer_scale_init_value=0.1,
            vocab_size=OUT, use_mean_pooling=True, hidden_dropout_prob=0.0, drop_path_rate=0.0,
        )
    ).double()  # fmt: skip
    for parameter in beit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # no neutral part

    ours = dict(student.named_parameters()) | {"mask_token": head.mask_token}
    ours |= {f"head.{name}": parameter for name, parameter in head.head.named_parameters()}
    theirs: dict[str, Tensor] = {}
    for name, value in beit.named_parameters():
        theirs[as_ours(name)] = value

    def fused(of: dict[str, Tensor], i: int, kind: str) -> Tensor:
        parts = [of.get(f"blocks.{i}.attention.{part}_proj.{kind}") for part in "qkv"]
        return torch.cat([torch.zeros(48, dtype=torch.float64) if part is None else part for part in parts])

    def comparable(of: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {name: value for name, value in of.items() if ".attention." not in name}
        return rest | {
            f"blocks.{i}.attn.qkv.{kind}": fused(of, i, kind) for i in range(2) for kind in ("weight", "bias")
        }

    copied = comparable({name: value.detach() for name, value in theirs.items()})
    assert set(copied) == set(ours)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(copied[name])

    plan = plan_of(student)
    pixels = torch.randint(0, 256, (2, *student.grid.pixel_shape), dtype=torch.uint8)
    floats = normalise(pixels.double() / 255, student)
    hidden = plan.to_boolean()[0]
    x = head.fill(student.embed(floats, plan.visible, positions=False), plan, student)
    found = head(student.encode(x, queries=plan.masked + 1))
    wanted = beit(floats[:, 0].permute(0, 3, 1, 2), bool_masked_pos=hidden).logits[hidden].view(found.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)

    found.square().sum().backward()
    wanted.square().sum().backward()
    gradients = comparable({name: value.grad for name, value in theirs.items() if value.grad is not None})
    for name, parameter in ours.items():
        assert parameter.grad is not None
        got, want = parameter.grad.flatten(), gradients[name].flatten()
        if name.endswith("qkv.bias"):  # keys have none there; here its gradient vanishes, as the softmax ignores it
            assert float(got[48:96].abs().max()) < 1e-9
            got, want = torch.cat([got[:48], got[96:]]), torch.cat([want[:48], want[96:]])
        assert float((got - want).norm()) <= 1e-11 * float(want.norm()), name


def test_keys_and_first_values() -> None:
    student = student_of()
    state = student.state_dict()
    assert "pos_embed" not in state and state["rel_pos_bias.relative_position_bias_table"].shape == (7 * 11 + 3, 4)
    assert not any("index" in name for name in state)
    assert {name for name in state if ".ls" in name} == {f"blocks.{i}.ls{j}.gamma" for i in (0, 1) for j in (1, 2)}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    student.reset(torch.Generator().manual_seed(0))
    assert not any(bool((p == 7).any()) for p in student.parameters())
    assert bool((student.blocks[1].ls2.gamma == 0.1).all()) and student.rel_pos_bias is not None
    assert not student.rel_pos_bias.relative_position_bias_table.any()
    like = student.like(depth=1)
    assert (like.positions, like.layer_scale, like.relative_positions, like.depth) == ("none", 0.1, True, 1)


def test_mask_tokens_stand_where_patches_are_hidden() -> None:
    """And positions are added once, to all tokens."""
    student = student_of(positions="sincos", relative_positions=False, precision=FP64).double()
    head, plan = MaskTokenHead(student, OUT).double(), plan_of(student)
    assert student.pos_embed is not None
    torch.nn.init.normal_(student.pos_embed)  # as in other people's weights the class token may have a position too
    pixels = torch.randint(0, 256, (2, *student.grid.pixel_shape), dtype=torch.uint8)
    filled = head.fill(student.embed(pixels, plan.visible, positions=False), plan, student)
    whole, hidden = student.embed(pixels), plan.to_boolean()[0]
    body = torch.where(hidden[..., None], head.mask_token + student.pos_embed[:, 1:], whole[:, 1:])
    torch.testing.assert_close(filled, torch.cat([whole[:, :1], body], 1), rtol=1e-6, atol=1e-6)  # bytes become fp32


def test_the_head() -> None:
    student = student_of()
    head = MaskTokenHead(student, OUT)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    assert {name: list(value.shape) for name, value in before.items()} == {
        "mask_token": [1, 1, 48], "head.weight": [OUT, 48], "head.bias": [OUT],
    }  # fmt: skip
    head.reset(torch.Generator().manual_seed(1))
    again = MaskTokenHead(student, OUT)
    again.reset(torch.Generator().manual_seed(1))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())
    assert not torch.equal(head.mask_token, before["mask_token"]) and not head.head.bias.any()
    assert head.flops(5) == 2 * 5 * 48 * OUT
    with pytest.raises(UserError, match="out: expected at least 1, got 0"):
        MaskTokenHead(student, 0)
    with pytest.raises(UserError, match="head: expected the student's width 96, got 48"):
        head.check_fits(student_of(width=96))
