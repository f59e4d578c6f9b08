"""Published checkpoints, loaded: losses, terms and gradients are those of the literal formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cohobate import interop
from cohobate.errors import UserError
from cohobate.interop import Hints
from cohobate.masking import MaskPlan
from cohobate.methods import AMD, Alignment, AMDOptions
from cohobate.models.exports import export

IMAGE = Hints(heads=4, decoder_heads=2)
CLIP = Hints(heads=4, decoder_heads=2, teacher_heads=6, image_size=(24, 24), frames=4)
PAIRS = AMDOptions(direct=((2, 2), (4, 4)), generation=((2, 2), (4, 4)))
TOLERANCE = 1e-5  # relative, both sides in fp32 with sums in another order


def close(found: Tensor, wanted: Tensor, name: str = "") -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    assert error < TOLERANCE, f"{name}: {error:.1e}"


def same_gradients(method: Any, weights: dict[str, Tensor], without: tuple[str, ...] = ()) -> None:
    found = interop.gradients(method)
    wanted = {key: value.grad for key, value in weights.items() if value.grad is not None}
    wanted = {key: value for key, value in wanted.items() if not key.endswith(without or ("?",))}
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert value is not None
        close(found[key], value, key)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("floating", [False, True])
def test_dbot(upstream: Any, tmp_path: Path, depth: int, floating: bool) -> None:
    student, teacher = upstream.dbot(), upstream.encoder(depth)
    assert depth or len(teacher) == 6  # as published: class token, positions, patches, norm
    pixels, mask = upstream.pixels(3, 1, 32, 32, 3), upstream.masked(3, 16, 4)
    images = upstream.normalised(pixels)
    method = interop.load_dbot(
        upstream.save(tmp_path / "checkpoint-1600.pth", student),
        upstream.save(tmp_path / "checkpoint-teacher-1600.pth", teacher),
        hints=IMAGE,
    )
    step = method.loss(upstream.batch(images if floating else pixels), MaskPlan.from_boolean(mask))
    step.total.backward()
    weights = upstream.leaves(student)
    loss = upstream.dbot_loss(weights, teacher, images[:, 0].permute(0, 3, 1, 2), mask, depth)
    loss.backward()
    close(step.total.detach(), loss.detach())
    close(step.terms["loss/align"], loss.detach())
    same_gradients(method, weights, without=("pos_embed",))  # frozen in the published code


def test_mae(upstream: Any, tmp_path: Path) -> None:
    path = upstream.save(tmp_path / "mae.pth", upstream.mae())
    pixels, mask = upstream.pixels(3, 1, 32, 32, 3), upstream.masked(3, 16, 4)
    method = interop.load_mae(path, hints=IMAGE)
    step = method.loss(upstream.batch(pixels), MaskPlan.from_boolean(mask))
    step.total.backward()
    weights = upstream.leaves(interop.read(path).weights)
    loss = upstream.mae_loss(weights, upstream.normalised(pixels)[:, 0].permute(0, 3, 1, 2), mask)
    loss.backward()
    close(step.total.detach(), loss.detach())
    same_gradients(method, weights, without=("pos_embed",))


def test_videomae_from_bare_tensors(upstream: Any) -> None:
    """Biases of q and v have gradients of their own, as published."""
    weights = upstream.leaves(upstream.videomae())
    pixels, mask = upstream.pixels(2, 4, 24, 24, 3), upstream.masked(2, 18, 4)
    method = interop.load_videomae({key: value.detach() for key, value in weights.items()}, hints=CLIP)
    step = method.loss(upstream.batch(pixels), MaskPlan.from_boolean(mask))
    step.total.backward()
    loss, _ = upstream.video_terms(weights, upstream.normalised(pixels).permute(0, 4, 1, 2, 3), mask)
    loss.backward()
    close(step.total.detach(), loss.detach())
    same_gradients(method, weights)


@pytest.mark.parametrize("floating", [False, True])
def test_amd(upstream: Any, tmp_path: Path, floating: bool) -> None:
    student, teacher = upstream.amd(), upstream.finetuned()
    tokens = [0.02 * torch.randn(1, 1, 96, generator=upstream.generator) for _ in range(2)]
    pixels, mask = upstream.pixels(2, 4, 24, 24, 3), upstream.masked(2, 18, 4)
    seen = mask & (torch.cumsum(mask, 1) > 6)  # the teacher sees the first six that the student does not
    method = interop.load_amd(
        upstream.save(tmp_path / "checkpoint-199.pth", student),
        upstream.save(tmp_path / "teacher.pth", teacher),
        options=PAIRS,
        mask_tokens=tokens,
        hints=CLIP,
    )
    normalised = upstream.normalised(pixels)
    plan = MaskPlan.from_boolean(mask, seen)
    step = method.loss(upstream.batch(normalised if floating else pixels), plan)
    step.total.backward()
    weights = upstream.leaves(student)
    terms = upstream.amd_terms(weights, teacher, tokens, normalised.permute(0, 4, 1, 2, 3), mask, seen)
    sum(terms).backward()
    for name, term in zip(("pixels", "direct", "generation"), terms, strict=True):
        close(step.terms[f"loss/{name}"], term.detach(), name)
    close(step.total.detach(), sum(terms).detach())
    gradients = interop.gradients(method)
    assert {key for key in gradients if key.endswith("mask_token")} == {
        "mask_token", "generators.0.mask_token", "generators.1.mask_token",
    }  # fmt: skip
    for key, value in weights.items():
        assert (key in gradients) == (value.grad is not None), key  # the generators' final norms have none
        if value.grad is not None:
            close(gradients[key], value.grad, key)


def test_parts_that_do_not_go_together(upstream: Any, tmp_path: Path) -> None:
    dbot = upstream.save(tmp_path / "dbot.pth", upstream.dbot())
    video = upstream.save(tmp_path / "video.pth", upstream.videomae())
    wide = upstream.save(tmp_path / "wide.pth", upstream.encoder(width=96))
    with pytest.raises(UserError, match="teacher: expected the width of the decoder's head 64, got 96"):
        interop.load_dbot(dbot, wide, hints=IMAGE, teacher_hints=Hints(heads=6))
    with pytest.raises(UserError, match=r"expected a checkpoint of dbot in '.*video.pth', got one of videomae"):
        interop.load_dbot(video, wide, hints=CLIP)
    with pytest.raises(UserError, match=r"expected encoder and decoder in .*wide.pth"):
        interop.load_mae(wide, hints=Hints(heads=6))
    with pytest.raises(UserError, match=r"expected a checkpoint of amd in .* got one of videomae"):
        interop.load_amd(video, video, hints=CLIP)
    amd = upstream.save(tmp_path / "amd.pth", upstream.amd())
    options = AMDOptions(direct=((2, 2),), generation=((2, 2),))
    with pytest.raises(UserError, match="options: expected 2 in student_layers, as many as the file has, got 1"):
        interop.load_amd(amd, video, options=options, hints=CLIP)
    with pytest.raises(UserError, match="heads: expected a divisor of the width 64, got 5"):
        interop.load_dbot(dbot, dbot, hints=Hints(heads=5))


def test_an_export_of_amd_is_a_file_of_amds(upstream: Any, tmp_path: Path) -> None:
    """With its alignment, so that a run of our own can be read by the published code."""
    weights = upstream.amd()
    method = interop.load_amd(weights, upstream.finetuned(), options=PAIRS, hints=CLIP)
    export(tmp_path / "ours", method.student, method.decoder, {"method": "amd"}, alignment=method.alignment)
    interop.convert(tmp_path / "ours", tmp_path / "amd.pth", "amd")
    found = interop.read(tmp_path / "amd.pth").weights
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(found[key], value) or ".norm." in key, key  # the generators' dead norms come back as 1 and 0


@pytest.mark.parametrize(("direct", "generation"), [(2, 1), (1, 2), (2, 0), (0, 2)])
def test_an_export_of_other_numbers_comes_back(upstream: Any, tmp_path: Path, direct: int, generation: int) -> None:
    """More projections than generators, more generators than projections (two for one student block), or none."""
    model = interop.load_amd(upstream.amd(), upstream.finetuned(), options=PAIRS, hints=CLIP)
    options = AMDOptions(
        direct=PAIRS.direct[:direct],
        generation=((2, 2), (2, 4))[:generation],
        direct_weight=float(direct > 0),
        generation_weight=float(generation > 0),
    )
    alignment = Alignment(model.student, 96, 6, options, depth=1)
    export(tmp_path / "ours", model.student, model.decoder, {"method": "amd"}, alignment=alignment)
    again = interop.load_amd(tmp_path / "ours", upstream.finetuned(), options=options, hints=CLIP).alignment
    assert again.state_dict().keys() == alignment.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in alignment.state_dict().items())
    count = len(options.student_layers)
    with pytest.raises(UserError, match=f"expected {count} in student_layers|expected {generation} in generation"):
        interop.load_amd(tmp_path / "ours", upstream.finetuned(), options=PAIRS, hints=CLIP)
    interop.convert(tmp_path / "ours", tmp_path / "copy", "cohobate")
    sizes = [json.loads((tmp_path / name / "config.json").read_text())["alignment"] for name in ("ours", "copy")]
    assert sizes[0] == sizes[1] and (sizes[0]["count"], sizes[0]["generators"]) == (count, generation)
    if count != generation:
        with pytest.raises(UserError, match="to: expected as many generators as projections for amd"):
            interop.convert(tmp_path / "ours", tmp_path / "amd.pth", "amd")


def test_gradients_of_amd_without_generators(upstream: Any) -> None:
    method = interop.load_amd(upstream.amd(), upstream.finetuned(), options=PAIRS, hints=CLIP)
    options = AMDOptions(direct=PAIRS.direct, generation_weight=0.0)
    alignment = Alignment(method.student, 96, 6, options)
    direct = AMD(method.student, method.decoder, method.teacher, alignment, options)
    mask = upstream.masked(2, 18, 4)
    step = direct.loss(upstream.batch(upstream.pixels(2, 4, 24, 24, 3)), MaskPlan.from_boolean(mask))
    step.total.backward()
    found = interop.gradients(direct)
    assert found["encoder.projection_heads.1.weight"].shape == (96, 64)
    assert not any(key.startswith(("generators.", "projections.")) for key in found)


def test_a_mask_of_another_size_and_gradients_of_another_module(upstream: Any) -> None:
    mask = upstream.masked(2, 15, 4)
    pixels = upstream.batch(upstream.pixels(2, 1, 32, 32, 3))
    for method in (
        interop.load_dbot(upstream.dbot(), upstream.encoder(1), hints=IMAGE),
        interop.load_mae(upstream.mae(), hints=IMAGE),
    ):
        with pytest.raises(UserError, match="plan: expected masks of 16 tokens, got 15"):
            method.loss(pixels, MaskPlan.from_boolean(mask))
    module: Any = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="method: expected DBOT, MAE or AMD, got Linear"):
        interop.gradients(module)
