"""gradient_norm and adamw against torch.optim.AdamW in float64: every implementation, over lists of any sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native, why_not
from cohobate.kernels.optimizer import adamw, gradient_norm
from cohobate.kernels.optimizer.adamw import adamw_cost, gradient_norm_cost
from cohobate.kernels.triton_support import INTERPRET

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
EVERY, FAST = ["reference", NATIVE, TRITON], [NATIVE, TRITON]
BETAS, EPS = (0.9, 0.95), 1e-8
# A dozen roundings of 6e-8 an update, of which the moments remember the last ten or twenty.
ROUNDED = 1e-6
SIZES = st.lists(st.sampled_from([0, 1, 7, 16, 63, 64, 65, 1000, 4096, 4097, 16384, 16401]), min_size=1, max_size=6)


class Model:
    """Parameters with their moments, and gradients that are a function of the step."""

    def __init__(self, sizes: Sequence[int], *, shadowed: int = 0, gradient: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(sum(sizes) + len(sizes))
        self.parameters = [torch.randn(size, generator=generator) for size in sizes]
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros(size) for size in sizes] for _ in range(2))
        self.steps = torch.zeros(len(sizes))
        self.shadows = [torch.full((size,), math.nan, dtype=torch.bfloat16) for size in sizes[:shadowed]]
        self.decays = [0.05 * (i % 2) for i in range(len(sizes))]
        self.gradient = gradient

    def gradients(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [(torch.randn(p.shape, generator=generator) * 0.1).to(self.gradient) for p in self.parameters]

    def update(self, step: int, backend: str, gradients: list[Tensor] | None = None, **options: Any) -> None:
        adamw(
            self.parameters, self.gradients(step) if gradients is None else gradients, self.exp_avgs, self.exp_avg_sqs,
            self.steps, rate=torch.tensor(rate(step)), decays=self.decays, betas=BETAS, eps=EPS, shadows=self.shadows,
            backend=backend, **options,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        return [*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, self.steps, *self.shadows]


def rate(step: int) -> float:
    return 1e-2 / (1 + step)


def oracle(model: Model, steps: int, scale: float = 1.0) -> list[list[Tensor]]:
    """Parameters and moments that torch's unfused AdamW arrives at in float64."""
    leaves = [torch.nn.Parameter(p.double()) for p in model.parameters]
    groups = [{"params": [leaf], "weight_decay": decay} for leaf, decay in zip(leaves, model.decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=BETAS, eps=EPS, foreach=False)
    for step in range(steps):
        for leaf, gradient in zip(leaves, model.gradients(step), strict=True):
            leaf.grad = gradient.double() / scale
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    moments = [[optimizer.state[leaf][key] for leaf in leaves] for key in ("exp_avg", "exp_avg_sq")]
    return [[leaf.detach() for leaf in leaves], *moments]


def error(got: Tensor, right: Tensor) -> float:
    assert got.shape == right.shape and bool(got.isfinite().all())
    return float((got.double() - right).norm() / right.norm().clamp_min(1e-300))


def is_shadow(shadow: Tensor, parameter: Tensor) -> bool:
    if INTERPRET:  # Triton's interpreter cuts the lower bits off instead of rounding; the compiled kernel rounds
        return torch.allclose(shadow.float(), parameter, rtol=2**-7, atol=0)
    return torch.equal(shadow, parameter.bfloat16())


# ------------------------------------------------------------------------------------------------------------ adamw


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(sizes=SIZES, scale=st.sampled_from([1.0, 3.7]), shadowed=st.integers(0, 6))
def test_several_updates_are_torchs(
    backend: str, gradient: torch.dtype, sizes: list[int], scale: float, shadowed: int
) -> None:
    model = Model(sizes, shadowed=min(shadowed, len(sizes)), gradient=gradient)
    right = oracle(model, 3, scale)
    for step in range(3):
        model.update(step, backend, scale=torch.tensor(scale))
    for found, answers in zip((model.parameters, model.exp_avgs, model.exp_avg_sqs), right, strict=True):
        assert all(error(value, answer) <= ROUNDED for value, answer in zip(found, answers, strict=True))
    assert model.steps.tolist() == [3.0] * len(sizes)
    assert all(is_shadow(*pair) for pair in zip(model.shadows, model.parameters))


@pytest.mark.parametrize("backend", EVERY)
def test_long_runs_and_late_steps(backend: str) -> None:
    """Bias corrections of late steps, where 1 - beta^step is 1, and of betas as far apart as they are used."""
    model = Model([50])
    model.steps.fill_(1e6)
    before = [value.clone() for value in (*model.parameters, *model.gradients(0))]
    model.update(0, backend)
    p, g = (value.double() for value in before)
    right = p - rate(0) * 0.1 * g / ((0.05 * g * g).sqrt() + EPS)
    assert error(model.parameters[0], right) <= ROUNDED and model.steps.item() == 1e6 + 1
    for betas in ((0.0, 0.999), (0.9, 0.99999), (0.5, 0.0)):
        model, leaf = Model([64]), torch.nn.Parameter(Model([64]).parameters[0].double())
        optimizer = torch.optim.AdamW([leaf], lr=1e-2, betas=betas, eps=1e-6, weight_decay=0.0, foreach=False)
        for step in range(3):
            leaf.grad = model.gradients(step)[0].double()
            optimizer.step()
            adamw(
                model.parameters, model.gradients(step), model.exp_avgs, model.exp_avg_sqs, model.steps,
                rate=torch.tensor(1e-2), decays=[0.0], betas=betas, eps=1e-6, backend=backend,
            )  # fmt: skip
        assert error(model.parameters[0], leaf.detach()) <= ROUNDED


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_a_skipped_update_changes_nothing(backend: str, poison: float) -> None:
    """Not the step count either; shadows are written, so that one that was stale is not any more."""
    model = Model([70, 4100, 3], shadowed=2)
    model.update(0, backend)
    before = [value.clone() for value in model.state()]
    for parameter, shadow in zip(model.parameters, model.shadows):
        shadow.fill_(-parameter[0])
    bad = [gradient + poison for gradient in model.gradients(1)]
    model.update(1, backend, bad, scale=torch.tensor(math.nan), skip=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.state(), strict=True))
    model.update(1, backend, skip=torch.tensor(0.0))
    assert model.steps.tolist() == [2.0] * 3 and not torch.equal(before[0], model.parameters[0])
    fresh = Model([70, 4100, 3])
    fresh.update(0, backend, skip=torch.tensor(2.0))  # before anything has been counted
    assert all(torch.equal(a, b) for a, b in zip(fresh.state(), Model([70, 4100, 3]).state(), strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_where_tensors_begin_does_not_matter(backend: str) -> None:
    """Views at odd offsets of one buffer, and gradients whose values are not adjacent."""
    model, same = Model([300, 5000]), Model([300, 5000])
    for held in (model.parameters, model.exp_avgs, model.exp_avg_sqs):
        for i, tensor in enumerate(held):
            held[i] = torch.cat([torch.zeros(3), tensor, torch.zeros(5)])[3:-5]
            assert held[i].data_ptr() % 16
    strided = [torch.stack([gradient, gradient], dim=1)[:, 0] for gradient in model.gradients(0)]
    model.update(0, backend, strided)
    same.update(0, backend)
    assert all(torch.equal(a, b) for a, b in zip(model.state(), same.state(), strict=True))
    assert all(not tensor._base[:3].any() and not tensor._base[-5:].any() for tensor in model.exp_avgs)  # type: ignore[index]


@pytest.mark.parametrize("backend", FAST)
def test_it_repeats_bit_for_bit_whatever_the_threads(backend: str) -> None:
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            model = Model([40_000, 33], shadowed=1)
            model.update(0, backend)
            runs.append([*model.state(), gradient_norm(model.gradients(1), backend=backend)])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_more_tensors_than_one_launch_takes(backend: str) -> None:
    model, sizes = Model([1 + i % 5 for i in range(120)], shadowed=70), 120
    right = oracle(model, 1)
    model.update(0, backend)
    assert max(error(value, answer) for value, answer in zip(model.parameters, right[0], strict=True)) <= ROUNDED
    assert all(is_shadow(*pair) for pair in zip(model.shadows, model.parameters)) and len(model.parameters) == sizes


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_autograd_sees_the_change(backend: str) -> None:
    model = Model([8], shadowed=1)
    versions = [value._version for value in (*model.parameters, *model.shadows)]
    model.update(0, backend)
    assert all(value._version > old for value, old in zip((*model.parameters, *model.shadows), versions, strict=True))
    leaf = model.parameters[0].requires_grad_()
    (leaf * leaf).sum().backward()
    model.update(1, backend)  # a leaf that needs a gradient may be updated
    product = (leaf * leaf).sum()
    model.update(2, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", EVERY)
def test_what_float64_and_half_gradients_take(backend: str) -> None:
    """float64 parameters exist as the reference alone, and there they are exact."""
    reasons = why_not("adamw", "native", "cpu", dtypes=(torch.float32,), contiguous=False, plain=False)
    assert {"parameters and moments are float32", "parameters, moments and shadows are contiguous"} <= set(reasons)
    model = Model([33])
    right = oracle(model, 2)
    for held in (model.parameters, model.exp_avgs, model.exp_avg_sqs):
        held[0] = held[0].double()
    if backend != "reference":
        with pytest.raises(ValueError, match=f"'{backend}' cannot run adamw: .*parameters and moments are float32"):
            model.update(0, backend)
        return
    for step in range(2):
        # The rate is fp32.
        model.update(step, backend)
    assert error(model.parameters[0], right[0][0]) <= 1e-9


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck() -> None:
    model, scalar = Model([5, 40], shadowed=1), torch.tensor(0.5)
    torch.library.opcheck(torch.ops.cohobate.gradient_norm.default, (model.gradients(0), "native"))
    arguments = (
        model.parameters, model.gradients(0), model.exp_avgs, model.exp_avg_sqs, model.steps, model.shadows, scalar,
        scalar, torch.tensor(0.0), model.decays, *BETAS, EPS, "native",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.cohobate.adamw.default, arguments)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_compiled() -> None:
    torch._dynamo.reset()
    eager, compiled = Model([5, 40], shadowed=1), Model([5, 40], shadowed=1)

    def update(model: Model, gradients: list[Tensor], rate: Tensor) -> Tensor:
        norm = gradient_norm(gradients)
        adamw(
            model.parameters, gradients, model.exp_avgs, model.exp_avg_sqs, model.steps, rate=rate, scale=norm,
            decays=model.decays, betas=BETAS, eps=EPS, shadows=model.shadows,
        )  # fmt: skip
        return norm

    run = torch.compile(functools.partial(update, compiled), fullgraph=True, backend="aot_eager")
    for step in range(2):
        norms = [f(eager.gradients(step), torch.tensor(rate(step))) for f in (functools.partial(update, eager), run)]
        assert torch.equal(*norms)
    assert all(torch.equal(a, b) for a, b in zip(eager.state(), compiled.state(), strict=True))


# ------------------------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(sizes=SIZES, scale=st.sampled_from([1e-15, 1.0, 1e15]))
def test_norm(backend: str, dtype: torch.dtype, sizes: list[int], scale: float) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    values = [(torch.randn(size, generator=generator) * scale).to(dtype) for size in sizes]
    right = torch.cat(values).double().norm()
    got = gradient_norm(values, backend=backend)
    assert got.shape == () and got.dtype == torch.float32
    # fp32 sums of squares, 256 in a row at most: errors of a random walk, halved by the root. Torch's own add more.
    assert abs(float(got) - float(right)) <= (1e-5 if backend == "reference" else 1e-6) * float(right)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_makes_the_norm_bad(backend: str, bad: float) -> None:
    values = [torch.zeros(20_000), torch.zeros(3)]
    values[0][16_399] = bad
    assert not gradient_norm(values, backend=backend).isfinite()


@pytest.mark.parametrize("backend", EVERY)
def test_norm_of_views_and_of_nothing(backend: str) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert gradient_norm([matrix.T, matrix[:, 1:3]], backend=backend).item() == pytest.approx(
        math.sqrt(506 + 1 + 4 + 25 + 36 + 81 + 100)
    )
    assert gradient_norm([torch.zeros(0)], backend=backend).item() == 0.0


def test_costs() -> None:
    assert adamw_cost(100).bytes == 2800 and adamw_cost(100, 2, shadowed=60).bytes == 2720
    assert gradient_norm_cost(100).bytes == 400 and gradient_norm_cost(100, 2).flops == 200


META = torch.zeros(2, device="meta")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"parameters": []}, ValueError, "parameters: expected at least one tensor, got none"),
        ({"gradients": [torch.zeros(4)]}, ValueError, r"gradients: expected 2, as many as parameters, got 1"),
        ({"exp_avgs": [torch.zeros(4), torch.zeros(3)]}, ValueError, r"exp_avgs\[1\]: expected shape \[2\], got \[3\]"),
        ({"gradients": [torch.zeros(4), torch.ones(2).int()]}, TypeError, r"gradients\[1\]: expected dtype .*int32"),
        ({"gradients": [torch.zeros(4), META]}, ValueError, r"gradients\[1\]: expected device cpu, got meta"),
        ({"shadows": [torch.zeros(4)]}, TypeError, r"shadows\[0\]: expected dtype bfloat16, got float32"),
        ({"shadows": [torch.zeros(4)] * 3}, ValueError, "shadows: expected at most 2"),
        ({"steps": torch.zeros(3)}, ValueError, r"steps: expected shape \[2\], got \[3\]"),
        ({"rate": torch.zeros(1)}, ValueError, r"rate: expected shape \[\], got \[1\]"),
        ({"skip": torch.zeros((), dtype=torch.bool)}, TypeError, "skip: expected dtype float32, got bool"),
        ({"decays": [0.1]}, ValueError, "decays: expected 2"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: expected two numbers in \[0, 1\)"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    def two() -> list[Tensor]:
        return [torch.zeros(4), torch.zeros(2)]

    arguments: dict[str, Any] = {
        "parameters": two(), "gradients": two(), "exp_avgs": two(), "exp_avg_sqs": two(), "steps": torch.zeros(2),
        "rate": torch.tensor(0.1), "decays": [0.0, 0.0], "betas": BETAS, "eps": EPS,
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        adamw(**(arguments | change))
    with pytest.raises(ValueError, match="gradients: expected at least one tensor, got none"):
        gradient_norm([])
