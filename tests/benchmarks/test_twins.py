"""Every method of the step benchmark against its literal twin: two programs, written apart, that compute one step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cohobate.benchmarks import step
from cohobate.benchmarks.harness import errors
from cohobate.benchmarks.reference import update
from cohobate.benchmarks.twins import MAKERS, Shape, Twins, make, variants
from cohobate.errors import UserError
from cohobate.training.optimizer import Updater


def results(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **{f"grad {name}": value for name, value in zip(named, gradients)}}


@pytest.fixture(scope="module", params=MAKERS)
def twins(request: pytest.FixtureRequest) -> Twins:
    return make(Shape(request.param, "tiny", image=64, batch=2, frames=4), "cpu", seed=0)


def test_the_engines_step_is_the_literal_one(twins: Twins) -> None:
    literal, method = variants(twins, "cpu")[0], twins.exact()
    expected = results(literal.module, literal.loss())
    got = results(method, method.loss(twins.batch, twins.plan).total)
    assert got.keys() == expected.keys()
    assert max(value or 0 for value in errors(got, expected)) < step.SAME_MATHS


def test_eager_variants_agree(twins: Twins) -> None:
    """In bf16 today's step is at most twice as far from the literal fp32 one as the literal one under autocast is."""
    literal, half, today = (results(variant.module, variant.loss()) for variant in variants(twins, "cpu")[:3])
    error, theirs = (max(value or 0 for value in errors(got, literal)) for got in (today, half))
    assert 0 < error <= step.ERROR_RATIO * theirs


def test_variants_and_their_roles() -> None:
    """One baseline counts as eager, the compiled ones are made of today's step; nothing is compiled yet."""
    twins = make(Shape("mae", "tiny", image=64, batch=1), "cpu", seed=0)
    found = variants(twins, "cpu")
    assert [(v.name, v.role, v.dtype) for v in found] == [
        ("literal fp32", "eager", "fp32"),
        ("literal bf16 autocast", "other", "bf16"),
        ("eager bf16", "other", "bf16"),
        ("compiled bf16", "compile", "bf16"),
        ("compiled bf16 max-autotune", "compile", "bf16"),
    ]
    assert found[1].module is found[0].module and all(v.module is found[2].module for v in found[2:])
    assert "reduce-overhead" in found[3].note
    for name, parameter in found[0].module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, found[2].module.get_parameter(name))


def test_the_literal_loop_reads_its_loss() -> None:
    """So one that is not finite stops it, as published."""
    twins = make(Shape("mae", "tiny", image=64, batch=1), "cpu", seed=0)
    with torch.no_grad():
        twins.literal.get_parameter("student.cls_token").fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="expected a finite value, got nan"):
        variants(twins, "cpu")[0].loss()


def engine_update(module: nn.Module) -> Callable[[], Tensor]:
    updater = Updater(module, weight_decay=update.WEIGHT_DECAY, betas=update.BETAS, clip=update.CLIP)

    def run() -> Tensor:
        norm = updater.gradient_norm()
        updater.step(update.LEARNING_RATE, torch.zeros(()))
        return norm

    return run


def test_updates_agree() -> None:
    """AdamW tensor by tensor, fused, and the engine's; also a gradient that is clipped, and one that is not."""
    for scale in (1.0, 1e-3):
        modules = [nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)) for _ in range(3)]
        for module in modules:
            module.load_state_dict(modules[0].state_dict())
        for module, make_update in zip(modules, (update.published, update.current, engine_update)):
            run, random = make_update(module), torch.Generator().manual_seed(0)
            for _ in range(3):
                for parameter in module.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=random) * scale
                norm = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()
                torch.testing.assert_close(run(), norm)
        for parameter, *others in zip(*(module.parameters() for module in modules)):
            for other in others:
                torch.testing.assert_close(other, parameter, rtol=1e-5, atol=1e-7)  # fp32, another order of operations


def test_published_adamw_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch chooses by itself on a device."""
    asked: list[tuple[object, object]] = []
    plain = torch.optim.AdamW.__init__

    def record(self: torch.optim.AdamW, *args: object, **options: object) -> None:
        asked.append((options.get("foreach"), options.get("fused")))
        plain(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "__init__", record)
    update.published(nn.Linear(2, 2))
    update.current(nn.Linear(2, 2))
    assert asked == [(False, False), (None, True)]


def test_a_twin_with_other_weights_is_noticed() -> None:
    twins = make(Shape("amd", "tiny", image=64, batch=1, frames=4), "cpu", seed=0)
    expected = twins.literal(*twins.inputs)
    with torch.no_grad():
        twins.literal.alignment.generators[0].mask_token += 0.1  # type: ignore[union-attr, index]
    assert not torch.isclose(twins.literal(*twins.inputs), expected, rtol=step.SAME_MATHS)


def test_there_is_no_teacher_larger_than_the_largest() -> None:
    with pytest.raises(UserError, match=r"--size: expected one of .*large for amd, got 'huge'"):
        make(Shape("amd", "huge"), "cpu", seed=0)
