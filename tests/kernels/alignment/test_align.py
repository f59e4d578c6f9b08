"""align_loss: value and gradient of the published formulas in every implementation, and how it behaves at the edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import OPS, native
from cohobate.kernels.alignment import AlignLoss, Standardise, align, align_loss
from cohobate.kernels.alignment.align import LOSSES, WIDEST, align_cost

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
FAST = [NATIVE, TRITON]
DTYPES = {  # the interpreter truncates where a GPU rounds to bf16
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16),
}
# Gradients, as a share of their norm. fp32: a dozen roundings of 6e-8. bf16 and fp16, 8 and 11 bits, are rounded twice:
# when the gradient is stored and when it is scaled.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
STANDARDS = [None, Standardise(), Standardise(0, 1e-3, False), Standardise(1, 1e-6, False), Standardise(0, 1e-6, True)]

Rows = Tensor | None


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_features(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "packed") -> Tensor:
    """Channels that alternate around an offset of their row: their deviation is never small beside their values."""
    batch, rows, width = shape
    sign = 2.0 - 4.0 * (torch.arange(width) % 2)
    x = torch.randn(shape, generator=seeded(seed)) / 2 + sign + torch.randn(batch, rows, 1, generator=seeded(seed + 1))
    x = x.to(dtype)
    if layout == "sliced":  # rows and channels of something larger
        larger = torch.full((batch, 2 * rows + 1, width + 5), math.nan, dtype=dtype)
        larger[:, 1::2, 2 : 2 + width] = x
        return larger[:, 1::2, 2 : 2 + width]
    if layout == "row_major":  # [R, B, D] in memory
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_apart":  # last stride is not 1
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


LAYOUTS = ("packed", "sliced", "row_major", "channels_apart")


def make_rows(batch: int, length: int, count: int, seed: int, ascending: bool = True) -> Tensor:
    rows = torch.rand(batch, length, generator=seeded(seed)).argsort(1)[:, :count].int()
    return rows.sort(1).values if ascending else rows


def take(x: Tensor, rows: Rows) -> Tensor:
    return x if rows is None else torch.stack([x[b, rows[b].long()] for b in range(x.shape[0])])


def literal_layer(
    prediction: Tensor, target: Tensor, loss: str, beta: float, standardise: Standardise | None
) -> Tensor:
    """One layer of the formula in float64, in the shape of the chosen rows."""
    p, g = prediction.double(), target.double()
    if standardise is not None:
        deviation = g - g.mean(-1, keepdim=True)
        variance = deviation.square().sum(-1, keepdim=True) / (g.shape[-1] - standardise.ddof)
        eps = standardise.eps
        g = deviation / ((variance + eps).sqrt() if standardise.eps_inside else variance.sqrt() + eps)
    e = p - g
    if loss == "smooth_l1":
        return torch.where(e.abs() < beta, e.square() / (2 * beta), e.abs() - beta / 2).mean()
    if loss == "mse":
        return e.square().mean()
    if loss == "l1":
        return e.abs().mean()
    norms = p.square().sum(-1).sqrt().clamp_min(1e-8) * g.square().sum(-1).sqrt().clamp_min(1e-8)
    return (1 - (p * g).sum(-1) / norms).mean()


def literal(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[Rows],
    target_rows: Sequence[Rows],
    weights: Sequence[float],
    loss: str = "smooth_l1",
    beta: float = 2.0,
    standardise: Standardise | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Total, layer values and gradients in float64."""
    leaves = [prediction.detach().double().requires_grad_() for prediction in predictions]
    values = [
        literal_layer(take(p, r), take(t, there), loss, beta, standardise)
        for p, t, r, there in zip(leaves, targets, rows, target_rows, strict=True)
    ]
    total = torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum()
    return total.detach(), [v.detach() for v in values], list(torch.autograd.grad(total, leaves))


def run(predictions: Sequence[Tensor], *arguments: Any, factor: float = 1.0, **options: Any) -> tuple[Any, ...]:
    """Total, layer values, gradients of ``factor`` times the total."""
    leaves = [prediction.detach().requires_grad_() for prediction in predictions]
    total, per_layer = align_loss(leaves, *arguments, **options)
    assert total.dtype == per_layer.dtype == torch.float32
    assert total.dim() == 0 and per_layer.shape == (len(leaves),) and not per_layer.requires_grad
    return total.detach(), per_layer, torch.autograd.grad(total * factor, leaves)


def assert_close(
    got: tuple[Any, ...], expected: tuple[Any, ...], factor: float = 1.0, scales: Sequence[float] = ()
) -> None:
    """``scales``: of the parts that a gradient is the difference of, a layer; rounding is in proportion to them."""
    total, per_layer, grads = got
    # Values are sums of up to a few thousand fp32 terms; a cosine distance, the one with scales, is 1 minus such a sum,
    # and its total counts layers with weights of up to 3.
    noise = 5e-7 if scales else 1e-7
    torch.testing.assert_close(total.double(), expected[0], rtol=2e-6, atol=noise * max(1, 3 * len(scales)))
    torch.testing.assert_close(per_layer.double(), torch.stack(expected[1]), rtol=2e-6, atol=noise)
    for grad, exact, scale in zip(grads, expected[2], scales or [0.0] * len(grads), strict=True):
        error = (grad.double() - exact * factor).norm() / (exact * factor).norm().clamp_min(max(1e-30, factor * scale))
        assert error <= TOLERANCE[grad.dtype], f"{error} of {grad.dtype}"


# ------------------------------------------------------------------------------------------------ published formulas


def dbot(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """dBOT's loss as published: a mask over all tokens, the class token counted as masked."""
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = F.smooth_l1_loss(prediction, target, beta=2.0, reduction="none").mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def amd(direct: list[Tensor], generated: list[Tensor], targets: list[Tensor], seen: int) -> tuple[Tensor, Tensor]:
    """AMD's two alignments as published: the teacher's rows are [seen by both, seen by the teacher alone]."""
    first = sum(F.mse_loss(p, t[:, :seen]) for p, t in zip(direct, targets, strict=True)) / len(targets)
    second = sum(F.mse_loss(p, t[:, seen:]) for p, t in zip(generated, targets, strict=True)) / len(targets)
    return torch.as_tensor(first), torch.as_tensor(second)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_dbot(backend: str) -> None:
    prediction, target = (make_features((4, 17, 48), torch.float32, seed) for seed in (0, 10))
    rows = make_rows(4, 16, 12, 1) + 1
    rows = torch.cat([torch.zeros(4, 1, dtype=torch.int32), rows], 1)
    mask = torch.zeros(4, 17, dtype=torch.float64).scatter_(1, rows.long(), 1.0)
    leaf = prediction.double().requires_grad_()
    expected = dbot(leaf, target.double(), mask)
    (grad,) = torch.autograd.grad(expected, leaf)
    got = run([prediction], target, prediction_rows=rows, target_rows=rows, standardise=Standardise(), backend=backend)
    assert_close(got, (expected.detach(), [expected.detach()], [grad]))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_amd(backend: str) -> None:
    seen, unseen, wide, narrow = 5, 7, 40, 24
    targets = [make_features((3, seen + unseen, width), torch.float32, i) for i, width in enumerate((wide, narrow))]
    shapes = [(3, seen, wide), (3, seen, narrow), (3, unseen, wide), (3, unseen, narrow)]
    predictions = [make_features(shape, torch.float32, 20 + i) for i, shape in enumerate(shapes)]
    leaves = [p.double().requires_grad_() for p in predictions]
    direct, generated = amd(leaves[:2], leaves[2:], [t.double() for t in targets], seen)
    values = [
        F.mse_loss(p, t)
        for p, t in zip(
            leaves, [t.double()[:, :seen] for t in targets] + [t.double()[:, seen:] for t in targets], strict=True
        )
    ]
    expected = (
        (direct + generated).detach(),
        [v.detach() for v in values],
        list(torch.autograd.grad(direct + generated, leaves)),
    )
    order = torch.arange(seen + unseen, dtype=torch.int32).expand(3, -1)
    rows = [order[:, :seen], order[:, :seen], order[:, seen:], order[:, seen:]]
    got = run(predictions, targets * 2, target_rows=rows, loss="mse", weights=[0.5] * 4, backend=backend)
    assert_close(got, expected)


def test_reference_in_float64_is_the_formula() -> None:
    for loss, standardise in itertools.product(LOSSES, STANDARDS):
        p, t = (make_features((2, 5, 9), torch.float64, seed) for seed in (0, 5))
        rows = make_rows(2, 5, 3, 0)
        got = align_loss(p, t, prediction_rows=rows, target_rows=rows, loss=loss, beta=0.7, standardise=standardise)
        expected = literal([p], [t], [rows], [rows], [1.0], loss, 0.7, standardise)[0]
        assert got.total.dtype == torch.float64
        torch.testing.assert_close(got.total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("standardise", [None, Standardise()])
def test_gradcheck_of_the_reference(loss: str, standardise: Standardise | None) -> None:
    p = [make_features((2, 4, 5), torch.float64, seed).requires_grad_() for seed in (0, 3)]
    t = [make_features((2, 4, 5), torch.float64, seed) for seed in (6, 9)]
    rows = make_rows(2, 4, 3, 2, ascending=False)

    def total(*predictions: Tensor) -> Tensor:
        return align_loss(
            predictions,
            t,
            prediction_rows=rows,
            target_rows=rows,
            loss=loss,
            standardise=standardise,
            weights=[0.3, 1.7],
        ).total

    assert torch.autograd.gradcheck(total, p)


# ------------------------------------------------------------------------------------------------- every combination


@st.composite
def calls(draw: st.DrawFn, backend: str) -> dict[str, Any]:
    """Everything that a call of some layers needs; sizes, dtypes, layouts and row lists of each layer are its own."""
    dtypes = st.sampled_from(DTYPES[backend])
    batch, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    standardise, loss = draw(st.sampled_from(STANDARDS)), draw(st.sampled_from(LOSSES))
    # One channel has no deviation, and as a direction no gradient: what is left is the rounding of equal terms.
    narrowest = 1 if standardise is None and loss != "cosine" else 2
    made: dict[str, Any] = {name: [] for name in ("predictions", "targets", "prediction_rows", "target_rows")}
    for layer in range(layers):
        count, width = draw(st.integers(1, 6)), draw(st.sampled_from((1, 2, 3, 8, 24, 63, 65, 130)))
        width, seed = max(width, narrowest), 100 * layer + draw(st.integers(0, 50))
        for i, name in enumerate(("prediction", "target")):
            length = count + draw(st.integers(0, 4))
            listed = draw(st.booleans()) or length > count
            rows = make_rows(batch, length, count, seed, draw(st.booleans())) if listed else None
            x = make_features((batch, length, width), draw(dtypes), seed + 50 * i, draw(st.sampled_from(LAYOUTS)))
            made[f"{name}s"].append(x)
            made[f"{name}_rows"].append(rows)
    weights = draw(st.none() | st.lists(st.floats(0.1, 3), min_size=layers, max_size=layers))
    return made | {
        "weights": weights,
        "loss": loss,
        "beta": draw(st.sampled_from((0.0, 0.5, 2.0))),
        "standardise": standardise,
        "factor": draw(st.sampled_from((1.0, 300.0))),
    }


def check_call(backend: str, call: dict[str, Any]) -> None:
    loss = "l1" if call["loss"] == "smooth_l1" and call["beta"] == 0 else call["loss"]
    layers = len(call["predictions"])
    weights = call["weights"] or [1 / layers] * layers
    expected = literal(
        call["predictions"], call["targets"], call["prediction_rows"], call["target_rows"], weights, loss,
        call["beta"], call["standardise"],
    )  # fmt: skip
    scales = []
    if loss == "cosine":  # g / (|p| |g|) - cos p / |p|^2: nothing is left of 1 / |p| where the two are parallel
        for p, rows, weight in zip(call["predictions"], call["prediction_rows"], weights, strict=True):
            inverse = 1 / take(p.detach().double(), rows).norm(dim=-1).clamp_min(1e-8)
            scales.append(abs(weight) * float(inverse.norm()) / inverse.numel())
    assert_close(run(**call, backend=backend), expected, call["factor"], scales)


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@given(calls("native"))
@settings(max_examples=150, deadline=None)
def test_native_on_any_call(call: dict[str, Any]) -> None:
    check_call("native", call)


@pytest.mark.interpreter
@given(calls("triton"))
@settings(max_examples=60, deadline=None)
def test_triton_on_any_call(call: dict[str, Any]) -> None:
    check_call("triton", call)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("width", [384, 768, 1000])
def test_model_widths(backend: str, width: int) -> None:
    p, t = (make_features((2, 9, width), torch.float32, seed) for seed in (0, 10))
    rows = make_rows(2, 9, 6, 0)
    for loss in LOSSES:
        got = run([p], t, prediction_rows=rows, target_rows=rows, loss=loss, standardise=Standardise(), backend=backend)
        assert_close(got, literal([p], [t], [rows], [rows], [1.0], loss, 2.0, Standardise()))


@pytest.mark.parametrize("backend", FAST)
def test_more_layers_than_one_launch_takes(backend: str) -> None:
    p = [make_features((2, 4, 8), torch.float32, i) for i in range(11)]
    t = [make_features((2, 6, 8), torch.float32, 50 + i) for i in range(11)]
    rows, weights = make_rows(2, 6, 4, 1), [0.1 * (i + 1) for i in range(11)]
    got = run(p, t, target_rows=rows, loss="mse", weights=weights, backend=backend)
    assert_close(got, literal(p, t, [None] * 11, [rows] * 11, weights, "mse"))


# ------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("width", [7, 64, 100, 768])
@pytest.mark.parametrize("standardise", STANDARDS[1:])
def test_a_constant_target_row_standardises_to_zero(backend: str, width: int, standardise: Standardise) -> None:
    values = torch.tensor([0.1, 1 / 3, -12345.678, 3e-30, 0.0, 7e7])
    target = values.view(1, -1, 1).expand(1, -1, width).contiguous()
    prediction = torch.zeros_like(target)
    total, _, (grad,) = run([prediction], target, loss="mse", standardise=standardise, backend=backend)
    assert total == 0 and not grad.any()


@pytest.mark.parametrize("backend", FAST)
def test_an_outlier_channel_keeps_the_statistics_exact(backend: str) -> None:
    """Trained transformers have channels hundreds of deviations out; where they stand must not matter."""
    for channel in (0, 63, 64, 767):
        p, t = make_features((1, 2, 768), torch.float32, 0), make_features((1, 2, 768), torch.float32, 9)
        t[..., channel] = 3000.0
        got = run([p], t, standardise=Standardise(), backend=backend)
        assert_close(got, literal([p], [t], [None], [None], [1.0], standardise=Standardise()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_stays_nan(backend: str, loss: str) -> None:
    p, t = (make_features((2, 3, 8), torch.float32, seed) for seed in (0, 9))
    p[1, 2, 4] = math.nan
    total, _, (grad,) = run([p], t, loss=loss, backend=backend)
    assert total.isnan() and grad[1, 2, 4].isnan()
    assert grad[0].isfinite().all() and grad[1, :2].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_a_zero_prediction_under_cosine(backend: str) -> None:
    p, t = torch.zeros(1, 2, 8), make_features((1, 2, 8), torch.float32, 0)
    got, expected = (run([p], t, loss="cosine", backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rows_that_are_not_read_get_zero_gradient(backend: str) -> None:
    p, t = (make_features((2, 6, 8), torch.float32, seed) for seed in (0, 9))
    rows = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    _, _, (grad,) = run([p], t, prediction_rows=rows, target_rows=rows, backend=backend)
    read = torch.zeros(2, 6, dtype=torch.bool).scatter_(1, rows.long(), True)
    assert torch.equal(grad.ne(0).any(-1), read)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_nothing_to_read(backend: str) -> None:
    """The mean of nothing is nan, as in torch; gradients keep their shape and are zero where there is anything."""
    none, p = torch.empty(2, 0, dtype=torch.int32), torch.randn(2, 3, 8)
    total, _, (grad,) = run([p], p, prediction_rows=none, target_rows=none, backend=backend)
    assert total.isnan() and grad.shape == p.shape and not grad.any()
    empty = torch.empty(0, 3, 8)
    total, _, (grad,) = run([empty], empty, backend=backend)
    assert total.isnan() and grad.shape == empty.shape
    total, per_layer, grads = run([p, p[:, :0]], [p + 1, p[:, :0]], loss="l1", backend=backend)
    assert total.isnan() and per_layer[0] == pytest.approx(1, rel=1e-6) and per_layer[1].isnan()
    assert grads[0].isfinite().all() and grads[1].shape == (2, 0, 8)


@pytest.mark.parametrize("backend", FAST)
def test_strides_of_zero(backend: str) -> None:
    p, t = make_features((3, 4, 8), torch.float32, 0), make_features((1, 1, 8), torch.float32, 9).expand(3, 4, 8)
    rows = make_rows(1, 4, 3, 0).expand(3, -1)
    got = run([p], t, prediction_rows=rows, target_rows=rows, backend=backend)
    assert_close(got, literal([p], [t], [rows], [rows], [1.0]))


@pytest.mark.parametrize("backend", FAST)
def test_half_precision_gradients_do_not_underflow(backend: str) -> None:
    """The factor 1e-9 / (B n D) is far below fp16's smallest number; with a loss scale the gradient is not."""
    dtype = DTYPES[backend][1]
    p, t = (make_features((2, 5, 16), dtype, seed) for seed in (0, 9))
    got = run([p], t, weights=[1e-9], factor=1e9, backend=backend)
    assert_close((got[0] * 1e9, got[1], got[2]), literal([p], [t], [None], [None], [1.0]))


# ---------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_backward_twice(backend: str) -> None:
    """The stored gradient serves every backward pass, and nobody who adds to a result changes it."""
    p, t = make_features((2, 4, 8), torch.float32, 0).requires_grad_(), make_features((2, 4, 8), torch.float32, 9)
    total = align_loss(p, t, backend=backend).total
    total.backward(retain_graph=True)
    assert p.grad is not None
    first = p.grad.clone()
    total.backward(retain_graph=True)
    assert torch.equal(p.grad, 2 * first)
    p.grad.zero_()
    (total * 3).backward()
    torch.testing.assert_close(p.grad, 3 * first)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_one_prediction_in_two_layers_and_two_losses(backend: str) -> None:
    p, (t, u) = (
        make_features((2, 4, 8), torch.float32, 0),
        (make_features((2, 4, 8), torch.float32, s) for s in (9, 19)),
    )
    leaf = p.clone().requires_grad_()
    both = align_loss([leaf, leaf], [t, u], backend=backend).total
    (grad,) = torch.autograd.grad(both, leaf)
    alone = [run([p], target, backend=backend)[2][0] for target in (t, u)]
    torch.testing.assert_close(grad, (alone[0] + alone[1]) / 2)
    total = align_loss(leaf, t, backend=backend).total
    (grad,) = torch.autograd.grad(total + total, leaf)
    torch.testing.assert_close(grad, 2 * alone[0])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_only_predictions_that_need_gradients_get_them(backend: str) -> None:
    p = [make_features((2, 4, 8), torch.float32, seed) for seed in (0, 3, 6)]
    t = make_features((2, 4, 8), torch.float32, 9).requires_grad_()
    p[1].requires_grad_()
    align_loss(p, [t, t, t], backend=backend).total.backward()
    assert p[0].grad is None and p[1].grad is not None and p[2].grad is None and t.grad is None
    alone = run([p[1]], t.detach(), backend=backend)[2][0]
    torch.testing.assert_close(p[1].grad, alone / 3)
    with torch.no_grad():
        assert not align_loss(p, [t, t, t], backend=backend).total.requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_no_gradient_is_computed_that_nobody_wants(backend: str) -> None:
    x = torch.randn(2, 3, 8)
    *_, grads = torch.ops.cohobate.align_loss(*op_arguments([x, x], wanted=[False, True], backend=backend))
    assert len(grads) == 1


@pytest.mark.parametrize("backend", FAST)
def test_a_call_that_wants_no_gradient_makes_no_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, in any memory, and autograd is not asked: on the host that costs as much as a small loss."""
    p, t = (make_features((2, 6, 8), torch.float32, seed, "channels_apart") for seed in (0, 9))
    rows = make_rows(2, 6, 4, 0).T.contiguous().T
    options: dict[str, Any] = {"prediction_rows": rows, "target_rows": [None, rows], "standardise": Standardise()}
    leaf, four = p.clone().requires_grad_(), t[:, :4].clone().requires_grad_()
    expected = align_loss([leaf, leaf], [four, t], **options, backend=backend)
    monkeypatch.setattr(align._Align, "apply", lambda *_: pytest.fail("an autograd function was called"))
    with torch.no_grad():
        found = align_loss([leaf, leaf], [four, t], **options, backend=backend)
    frozen = align_loss([p, p], [four, t], **options, backend=backend)
    for values in (found, frozen):
        assert torch.equal(values.total, expected.total) and torch.equal(values.per_layer, expected.per_layer)
        assert not values.total.requires_grad and not values.per_layer.requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_refused(backend: str) -> None:
    p = torch.randn(2, 3, 8, requires_grad=True)
    total = align_loss(p, torch.randn(2, 3, 8), backend=backend).total
    (grad,) = torch.autograd.grad(total.square(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_changes_nothing(backend: str) -> None:
    p, t = (make_features((2, 4, 8), torch.float32, seed) for seed in (0, 9))
    plain = run([p], t, standardise=Standardise(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run([p], t, standardise=Standardise(), backend=backend), plain, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_it_repeats_bit_for_bit(backend: str) -> None:
    p, t = (make_features((3, 40, 72), torch.float32, seed) for seed in (0, 9))
    rows = make_rows(3, 40, 29, 0)

    def once() -> tuple[Tensor, ...]:
        total, per_layer, grads = run(
            [p], t, prediction_rows=rows, target_rows=rows, standardise=Standardise(), backend=backend
        )
        return total, per_layer, *grads

    first, threads = once(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, once(), first))
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------- torch's compiler


def op_arguments(
    x: list[Tensor],
    rows: Rows = None,
    loss: str = "smooth_l1",
    wanted: list[bool] | None = None,
    backend: str = "native",
) -> tuple[Any, ...]:
    """Arguments of the torch op itself: every tensor of ``x`` against itself plus one."""
    layers = len(x)
    lists = x, [t + 1 for t in x], [rows] * layers, [None if rows is None else rows.flip(1)] * layers
    settings = loss, 2.0, True, 1, 1e-6, True, [1.0] * layers, [True] * layers if wanted is None else wanted
    return *lists, *settings, backend == "native", backend


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("wanted", [[True, True], [False, True], [False, False]])
def test_opcheck(backend: str, wanted: list[bool]) -> None:
    x = [torch.randn(2, 6, 8), torch.randn(2, 6, 24)]
    rows = make_rows(2, 6, 4, 0)
    arguments = op_arguments(x, rows, wanted=wanted, backend=backend)
    torch.library.opcheck(torch.ops.cohobate.align_loss.default, arguments)
    *_, grads = torch.ops.cohobate.align_loss(*arguments)
    count = len(grads)
    backward = grads, torch.tensor(3.0), [rows] * count, [6] * count, "smooth_l1", [1.0] * count, backend
    torch.library.opcheck(torch.ops.cohobate.align_loss_backward.default, backward)


def step(p: Tensor, q: Tensor, t: Tensor, rows: Tensor) -> AlignLoss:
    return align_loss(
        [p * 2, q],
        [t, t],
        prediction_rows=rows,
        target_rows=rows,
        standardise=Standardise(),
        weights=[0.2, 0.8],
        backend="native",
    )


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_it_is_the_same(compiler: str, dynamic: bool) -> None:
    tensors = [make_features((2, 9, 24), torch.float32, seed) for seed in (0, 5, 10)]
    rows = make_rows(2, 9, 4, 0)
    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)):
        p, q = (x.clone().requires_grad_() for x in tensors[:2])
        total, per_layer = function(p, q, tensors[2], rows)
        results.append((total.detach(), per_layer, *torch.autograd.grad(total * 7, (p, q))))
    torch.testing.assert_close(
        results[1], results[0], rtol=1e-6, atol=1e-7
    )  # the compiler may reorder p * 2 and the scale


# ------------------------------------------------------------------------------------------------------------- errors

X = torch.zeros(2, 5, 8)
R = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"predictions": []}, ValueError, "predictions: expected at least one layer, got none"),
        ({"predictions": [X, X]}, ValueError, "targets: expected 2, one a prediction, got 1"),
        ({"predictions": [3.0]}, TypeError, "predictions[0]: expected a tensor, got float"),
        ({"predictions": X.int()}, TypeError, "predictions[0]: expected dtype float32"),
        ({"predictions": X[0]}, ValueError, "predictions[0]: expected shape [any, any, any], got [5, 8]"),
        ({"targets": X.long()}, TypeError, "targets[0]: expected dtype float32"),
        ({"targets": X[..., :7]}, ValueError, "targets[0]: expected shape [2, any, 8], got [2, 5, 7]"),
        ({"targets": X[:1]}, ValueError, "targets[0]: expected shape [2, any, 8], got [1, 5, 8]"),
        ({"targets": X.to("meta")}, ValueError, "targets[0]: expected device cpu, got meta"),
        ({"targets": X[:, :4]}, ValueError, "targets[0]: expected 5 rows a sample, as predictions[0] gives, got 4"),
        ({"prediction_rows": R}, ValueError, "targets[0]: expected 3 rows a sample, as predictions[0] gives, got 5"),
        ({"target_rows": R}, ValueError, "target_rows[0]: expected 5 rows a sample, as predictions[0] gives, got 3"),
        ({"prediction_rows": R.long()}, TypeError, "prediction_rows[0]: expected dtype int32, got int64"),
        ({"target_rows": R[:1]}, ValueError, "target_rows[0]: expected shape [2, any], got [1, 3]"),
        ({"target_rows": [None, None]}, ValueError, "target_rows: expected 1, one a prediction, got 2"),
        ({"loss": "huber"}, ValueError, "loss: expected one of smooth_l1, mse, l1, cosine; got 'huber'"),
        ({"beta": -1.0}, ValueError, "beta: expected a number of at least 0, got -1.0"),
        ({"weights": [1.0, 2.0]}, ValueError, "weights: expected 1, one a layer, got 2"),
        ({"standardise": Standardise(ddof=2)}, ValueError, "standardise.ddof: expected 0 or 1, got 2"),
        (
            {"standardise": Standardise(eps=-1.0)},
            ValueError,
            "standardise.eps: expected a number of at least 0, got -1.0",
        ),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        align_loss(**{"predictions": X, "targets": X} | changes)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_one_channel_has_no_unbiased_variance() -> None:
    with pytest.raises(ValueError, match=r"standardise\.ddof: expected less than the channels, 1; got 1"):
        align_loss(X[..., :1], X[..., :1], standardise=Standardise())


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("prediction_rows", [[0, 1], [2, 5]], r"prediction_rows: expected rows in \[0, 5\), got 5 in sample 1"),
        ("prediction_rows", [[0, -1], [2, 4]], r"prediction_rows: expected rows in \[0, 5\), got -1 in sample 0"),
        ("target_rows", [[0, 1], [2, 7]], r"target_rows: expected rows in \[0, 5\), got 7 in sample 1"),
        (
            "prediction_rows",
            [[0, 1], [4, 4]],
            "prediction_rows: expected distinct rows in a sample, got row 4 twice in sample 1",
        ),
    ],
)
def test_native_checks_the_rows_it_reads(name: str, rows: list[list[int]], message: str) -> None:
    good = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    both = {"prediction_rows": good, "target_rows": good} | {name: torch.tensor(rows, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=message):
        align_loss(X.clone().requires_grad_(), X, **both, backend="native")


def test_what_an_implementation_cannot_do_is_said() -> None:
    half = X.half()
    with pytest.raises(
        ValueError, match=r"'native' cannot run align_loss: .*native computes in float32, bfloat16, not float16"
    ):
        align_loss(X, half, backend="native")
    assert align_loss(half, X).total == 0  # by itself it takes the reference
    reasons = OPS["align_loss"].limits["triton"](dtypes=("torch.float64",), wide=True)
    assert "triton computes in float32, bfloat16, float16, not float64" in reasons
    assert f"triton keeps rows of up to {WIDEST} channels in registers, a layer is wider" in reasons


def test_cost_is_what_must_be_moved() -> None:
    cost = align_cost(2, 3, 8, 2, 4, length=5)
    assert cost.bytes == 2 * (3 * 8 * (2 + 4) + 2 * 3 * 4 + 5 * 8 * 2)
    assert align_cost(2, 3, 8, 4, 4, gradient=False).bytes == 2 * 3 * 8 * 8
    assert cost.flops > align_cost(2, 3, 8, 2, 4, standardise=False).flops > 0
