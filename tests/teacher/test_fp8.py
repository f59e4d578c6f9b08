"""The teacher in fp8: the emulated numerics, what is quantised, what the gate keeps in bf16 and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate import models
from cohobate.errors import UserError
from cohobate.models import Precision, VisionTransformer
from cohobate.teacher import FrozenTeacher, fp8
from cohobate.teacher.fp8 import Fp8Product, fidelity, quantise
from cohobate.teacher.product import Product
from cohobate.teacher.sources import own

FP8 = torch.float8_e4m3fn
WIDTH, DEPTH = 64, 4
BF16_STEP = 2.0**-8  # largest relative error of rounding to bf16


def model_of(depth: int = DEPTH, width: int = WIDTH) -> VisionTransformer:
    """Xavier weights, and biases that are not 0."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": (32, 32), "patch": 8, "width": width, "depth": depth, "heads": 4}
    model = models.build("tiny", **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks") and name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def with_outlier(model: VisionTransformer, *blocks: int) -> VisionTransformer:
    """A hidden unit of 30,000 that nobody reads: bf16 does not notice, a scale for it leaves the others no digits."""
    with torch.no_grad():
        for number in blocks:
            mlp = model.blocks[number - 1].mlp  # type: ignore[union-attr]
            mlp.fc1.bias[0], mlp.fc2.weight[:, 0] = 3e4, 0.0  # type: ignore[union-attr, index]
    return model


def pixels_of(seed: int = 1, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 1, 32, 32, 3), dtype=torch.uint8, generator=generator)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def product_of(activation: str | None = None, out_scale: float | None = None) -> tuple[Product, Fp8Product]:
    torch.manual_seed(1)
    weight = torch.randn(48, 32) * torch.logspace(-3, 0, 48)[:, None]  # rows of unequal size: the smallest go subnormal
    plain = Product(weight, torch.randn(48), torch.bfloat16, activation)
    return plain, Fp8Product(plain, 0.01, out_scale)


def literal(plain: Product, product: Fp8Product, x: Tensor) -> Tensor:
    """The formula in fp64, of operands quantised by torch's own cast."""
    x8 = (x.float() / product.scale).clamp(-448, 448).to(FP8).double() * product.scale
    w8 = (plain.weight.float() / product.weight_scale).to(FP8).double() * product.weight_scale
    return x8 @ w8.T + plain.bias.double()  # type: ignore[union-attr]


def test_the_emulated_product_is_the_formula_of_quantised_operands() -> None:
    plain, product = product_of()
    x = torch.randn(2, 5, 32).bfloat16()
    x[0, 0, 0] = 100.0  # beyond 448 * 0.01: saturates
    expected = literal(plain, product, x)
    # One rounding to bf16, and fp32 additions of 32 numbers of about 1.
    torch.testing.assert_close(product(x).double(), expected, rtol=BF16_STEP, atol=1e-5)
    assert product(x).dtype == torch.bfloat16
    assert product.weight_scale == pytest.approx(float(plain.weight.abs().max()) / 448)
    error = relative(product(x), plain(x.clamp(-4.48, 4.48)))
    assert 0.01 < error < 0.05  # e4m3 keeps 4 binary digits: it is quantised, and not broken


def test_what_cublas_is_called_with_is_the_same_product() -> None:
    """torch computes its scaled_mm on a CPU too, so that the call's arguments can be checked here."""
    plain, product = product_of()
    x8 = (torch.randn(7, 32) / 0.01).clamp(-448, 448).to(FP8)
    arguments = (x8, product.weight, *product._scales, plain.bias, torch.bfloat16)
    got, expected = fp8.scaled_product(*arguments), fp8.scaled_product_reference(*arguments)
    torch.testing.assert_close(got, expected, rtol=2 * BF16_STEP, atol=1e-5)  # two roundings to bf16


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_writes_what_the_next_product_reads(activation: str) -> None:
    plain, product = product_of(activation, out_scale=0.05)
    x = torch.randn(2, 5, 32).bfloat16()
    got = product(x)
    assert got.dtype == FP8
    value = literal(plain, product, x) - plain.bias.double()  # type: ignore[union-attr]
    value = value.bfloat16().double() + plain.bias.double()  # type: ignore[union-attr]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    expected = torch.nn.functional.gelu(value, approximate=approximate)
    # Half a step of e4m3 (2^-4, or half of 2^-9 units), and a step of bf16 in front of it.
    torch.testing.assert_close(got.double() * 0.05, expected, rtol=2**-4 + BF16_STEP, atol=0.05 * 2**-10 + 1e-4)


def test_an_activation_that_is_not_fused_leaves_quantising_to_the_next_product() -> None:
    plain, product = product_of("quick_gelu", out_scale=0.05)
    x = torch.randn(2, 5, 32).bfloat16()
    value = literal(plain, product, x)
    assert product(x).dtype == torch.bfloat16
    # Three roundings to bf16 at the size of the values, in the product and in the activation.
    torch.testing.assert_close(product(x).double(), value * torch.sigmoid(1.702 * value), rtol=4 * BF16_STEP, atol=1e-2)


def test_a_part_of_a_product() -> None:
    _, product = product_of()
    x = torch.randn(2, 5, 32).bfloat16()
    torch.testing.assert_close(product.part(8, 24)(x), product(x)[..., 8:24], rtol=2 * BF16_STEP, atol=1e-5)


def test_fidelity_is_measured_on_features_and_on_their_standardised_form() -> None:
    expected = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    got = torch.tensor([[[1.0, 1.0], [0.0, 2.0]]])
    found = fidelity(got, expected)
    assert found.cosine == pytest.approx((2**-0.5 + 1) / 2)
    assert found.error == pytest.approx((1 / 5) ** 0.5)
    # Standardised with ddof 1, two numbers become +-1/sqrt(2), and two equal ones 0.
    assert found.target_error == pytest.approx(0.5**0.5, rel=1e-5)
    assert not fidelity(got * float("nan"), expected).passes(0.0, 9.0)


def test_a_random_teacher_passes() -> None:
    teacher, pixels = FrozenTeacher(model_of(), (2, 4)), pixels_of()
    before, fingerprint = teacher(pixels), teacher.fingerprint()
    report = quantise(teacher, pixels)
    assert [block.precision for block in report.blocks] == ["bf16", "fp8", "fp8", "bf16"]
    assert report.passed and report.emulated and report.quantised == 2
    after = teacher(pixels)
    for layer, old, new in zip(teacher.layers, before, after, strict=True):
        assert report.features[layer] == fidelity(new, old)  # what is reported is what the teacher now does
        assert 0.002 < report.features[layer].error < 0.03 and new.dtype == old.dtype
    assert teacher.precision_name == "emulated fp8 in 2 of 4 blocks, bfloat16"
    assert teacher.fingerprint() == fingerprint


def test_the_report_reads_well_and_is_json() -> None:
    teacher = FrozenTeacher(with_outlier(model_of(5), 3))
    report = quantise(teacher, pixels_of())
    lines = str(report).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert "emulated on the CPU" in lines[0] and lines[1].startswith("2 of 5 blocks; gate: cosine 0.999, errors 3.0%")
    assert lines[2].endswith("first") and "misses the gate alone" in lines[4] and "features of layer   5" in lines[7]
    rows = json.loads(json.dumps(report.rows()))
    assert [row["precision"] for row in rows] == ["bf16", "fp8", "bf16", "fp8", "bf16", "fp8"]
    assert rows[0]["cosine"] is None and rows[2]["error"] > 0.03 and rows[-1]["part"] == "features"
    assert all(row["emulated"] for row in rows)


def test_a_block_with_outliers_stays_bf16() -> None:
    teacher, pixels = FrozenTeacher(with_outlier(model_of(5), 3)), pixels_of()
    before = teacher(pixels)[0]
    kept = teacher._blocks[2]
    report = quantise(teacher, pixels)
    assert [block.precision for block in report.blocks] == ["bf16", "fp8", "bf16", "fp8", "bf16"]
    assert teacher._blocks[2] is kept and kept.qkv.weight.dtype == torch.bfloat16
    assert relative(teacher(pixels)[0], before) < 0.03


def test_blocks_are_put_back_worst_first_until_the_sum_passes() -> None:
    pixels = pixels_of()
    report = quantise(FrozenTeacher(model_of(6)), pixels, error=1.0, gate=0.5)
    errors = {block.number: block.fidelity.target_error for block in report.blocks if block.fidelity is not None}
    together = max(report.features[6].target_error, report.features[6].error)
    limit = (max(errors.values()) + together) / 2  # each passes alone, all together do not
    assert max(errors.values()) < limit < together
    report = quantise(FrozenTeacher(model_of(6)), pixels, error=limit, gate=0.5)
    back = [block.number for block in report.blocks if block.why.startswith("put back")]
    assert back and set(back) == set(sorted(errors, key=lambda n: -errors[n])[: len(back)])
    assert report.passed and report.features[6].target_error <= limit


def test_a_teacher_that_cannot_pass_is_refused_and_stays_as_it_was() -> None:
    teacher, pixels = FrozenTeacher(with_outlier(model_of(), 2, 3)), pixels_of()
    before = teacher(pixels)[0]
    with pytest.raises(UserError, match=r"(?s)expected some block to stay inside the gate.*0 of 4 blocks.*misses"):
        quantise(teacher, pixels)
    assert torch.equal(teacher(pixels)[0], before) and teacher.precision_name == "bfloat16"


def test_scales_are_static() -> None:
    teacher, pixels = FrozenTeacher(model_of()), pixels_of()
    quantise(teacher, pixels)

    def scales() -> list[float]:
        parts = ("qkv", "proj", "fc1", "fc2")
        return [getattr(block, part).scale for block in teacher._blocks[1:-1] for part in parts]

    before, first = scales(), teacher(pixels)[0]
    assert len(before) == 8 and all(isinstance(scale, float) for scale in before)
    teacher(torch.zeros_like(pixels))
    assert scales() == before and torch.equal(teacher(pixels)[0], first)
    # An image's features do not depend on what else is in the batch: a scale of the batch would make them.
    mixed = torch.cat([pixels[:1], pixels_of(2, 2) // 8])
    assert relative(teacher(mixed)[0][:1], first[:1]) < 1e-2


def test_scales_are_those_of_the_batch_with_room() -> None:
    seen: dict[str, float] = {}
    teacher, pixels = FrozenTeacher(model_of(3)), pixels_of()
    block = teacher._blocks[1]
    for name in ("qkv", "proj", "fc1", "fc2"):
        product = getattr(block, name)

        def spy(x: Tensor, name: str = name, product: Product = product) -> Tensor:
            seen[name] = float(x.abs().max())
            return product(x)

        setattr(block, name, spy)
    teacher(pixels)
    fresh = FrozenTeacher(model_of(3))
    quantise(fresh, pixels, margin=1.5)
    for name, largest in seen.items():
        assert getattr(fresh._blocks[1], name).scale == pytest.approx(1.5 * largest / 448)


def test_only_attentions_result_is_quantised_in_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, pixels = FrozenTeacher(model_of()), pixels_of()
    quantise(teacher, pixels)
    calls: list[float] = []
    monkeypatch.setattr(fp8, "quantise_fp8", lambda x, scale: calls.append(scale) or (x.float() / scale).to(FP8))
    teacher(pixels)
    assert calls == [block.proj.scale for block in teacher._blocks[1:-1]]  # type: ignore[attr-defined]


def test_rows_queries_copies_and_moves() -> None:
    teacher, pixels = FrozenTeacher(model_of()), pixels_of()
    rows = torch.arange(8, dtype=torch.int32).repeat(3, 1)
    quantise(teacher, pixels, rows=rows)
    whole = teacher(pixels, rows)[0]
    queries = torch.tensor([[0, 3]] * 3, dtype=torch.int32)
    assert relative(teacher(pixels, rows, queries=queries)[0], whole[:, [0, 3]]) < 1e-2  # bf16, in another order
    assert torch.equal(copy.deepcopy(teacher)(pixels, rows)[0], whole)
    teacher.double()  # the precision is the teacher's own
    assert torch.equal(teacher(pixels, rows)[0], whole)
    product = teacher.to("meta")._blocks[1].qkv
    assert isinstance(product, Fp8Product) and product.weight.is_meta and all(x.is_meta for x in product._scales)


def test_other_activations() -> None:
    pixels = pixels_of()
    for activation in ("gelu_tanh", "quick_gelu"):
        anatomy = dataclasses.replace(own.read(model_of(), "encoder"), activation=activation)
        assert quantise(FrozenTeacher(anatomy), pixels).quantised == 2


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixels_of()
    with pytest.raises(UserError, match="expected a teacher in bf16, got float32"):
        quantise(FrozenTeacher(model_of(), precision=Precision(torch.float32, torch.float32)), pixels)
    with pytest.raises(UserError, match="needs 3, got 2"):
        quantise(FrozenTeacher(model_of(), (2,)), pixels)
    with pytest.raises(UserError, match=r"multiples of 16, got qkv \[216, 72\] in block 2"):
        quantise(FrozenTeacher(model_of(width=72)), pixels)
    with pytest.raises(UserError, match="margin: expected at least 1"):
        quantise(FrozenTeacher(model_of()), pixels, margin=0.5)
    teacher = FrozenTeacher(model_of())
    quantise(teacher, pixels)
    with pytest.raises(UserError, match="not quantised yet, got emulated fp8 in 2 of 4 blocks"):
        quantise(teacher, pixels)
    broken = model_of()
    with torch.no_grad():
        broken.blocks[1].mlp.fc2.bias[0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="expected finite features"):
        quantise(FrozenTeacher(broken), pixels)


def test_a_card_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"precision: fp8 needs .* 8.9 or newer, got NVIDIA A100 with 8.0"):
        fp8.check_card(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_card(torch.device("cuda"))


@pytest.mark.gpu
def test_a_card_computes_what_the_cpu_emulates() -> None:
    if torch.cuda.get_device_capability() < fp8.OLDEST:
        pytest.skip("needs compute capability 8.9")
    teacher, pixels = FrozenTeacher(model_of()), pixels_of()
    before = teacher(pixels)[0]
    quantise(teacher, pixels)
    emulated = teacher(pixels)[0]
    teacher.cuda()
    found = teacher(pixels.cuda())[0].cpu()
    assert teacher.precision_name == "fp8 in 2 of 4 blocks, bfloat16"
    # A bf16 rounding that falls the other way may move a value by a step of e4m3: well under the quantisation's error.
    assert relative(found, emulated) < 0.5 * relative(emulated, before)
    plain, product = product_of()
    x8 = (torch.randn(130, 32) / 0.01).clamp(-448, 448).to(FP8)
    arguments = (x8, product.weight, *product._scales, plain.bias)
    on_card = fp8.scaled_product(*(x if x is None else x.cuda() for x in arguments), torch.bfloat16)  # type: ignore[misc]
    expected = fp8.scaled_product_reference(*arguments, torch.bfloat16)
    # Two roundings to bf16; fast accumulation keeps 13 bits of sums of up to about 20.
    torch.testing.assert_close(on_card.cpu(), expected, rtol=2 * BF16_STEP, atol=20 * 2**-13)


@pytest.mark.gpu
def test_a_card_measures_its_own_report() -> None:
    if torch.cuda.get_device_capability() < fp8.OLDEST:
        pytest.skip("needs compute capability 8.9")
    teacher = FrozenTeacher(model_of()).cuda()
    pixels = pixels_of().cuda()
    teacher(pixels)  # captured in bf16: must not be replayed afterwards
    before = teacher(pixels)[0]
    report = quantise(teacher, pixels)
    assert not report.emulated and "on the GPU" in str(report)
    assert 0.002 < relative(teacher(pixels)[0], before) < 0.03
