"""Norm and optimizer by torch or apex: detection of NVIDIA's apex, and the adapters against torch's own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cohobate.kernels.backends import adamw, apex, layer_norm, norm, optimizer

Install = Any
Card = Any

NORM = """
import torch.nn.functional as F

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input, normalized_shape, weight, bias, eps)
"""
# The interface of FusedAdam(capturable=True): a rate that is a tensor, one count of updates a group which looks at the
# flag of the update before, and a gradient scaler that is asked for the flag and the factor.
ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert adam_w_mode and capturable
        super().__init__(params, dict(lr=torch.tensor(lr), betas=betas, eps=eps, weight_decay=weight_decay))
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def zero_grad(self):
        raise AssertionError("takes no set_to_none")

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.ones(1, dtype=torch.int)
            device = group["params"][0].device
            found = grad_scaler._check_inf_per_device(self)[device]
            self._dummy_overflow_buf.copy_(found)
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            if self._dummy_overflow_buf.item():
                continue
            (b1, b2), rate, step = group["betas"], group["lr"], group["step"]
            assert isinstance(rate, torch.Tensor)
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                g = p.grad * inverse
                m.lerp_(g, 1 - b1)
                v.lerp_(g * g, 1 - b2)
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(rate * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"]))
"""
GOOD = {
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": NORM,
    "apex/optimizers/__init__.py": ADAM,
}
PYPI = "this apex has no {}: NVIDIA's is built from its repository, PyPI's is another package"


def norm_asked() -> list[str]:
    return norm.why_not("apex", "cuda", torch.bfloat16)


def adamw_asked() -> list[str]:
    return optimizer.why_not("apex", "cuda")


def test_absent(install: Install, card: Card) -> None:
    card(9, 0)
    assert norm_asked() == ["apex is not installed"] and adamw_asked() == ["apex is not installed"]


def test_the_apex_of_pypi(install: Install, card: Card) -> None:
    """It imports, and calls itself by the same name and a version."""
    card(9, 0)
    install("apex", {"apex/__init__.py": "__version__ = '0.9.10.dev0'", "apex/optimizers/__init__.py": ADAM})
    assert norm_asked() == [PYPI.format("fused_layer_norm_cuda")]
    assert adamw_asked() == [PYPI.format("amp_C")]
    assert "apex" not in sys.modules  # the question is not worth an import of somebody else's package


def test_good(install: Install, card: Card) -> None:
    card(9, 0)
    install(None, GOOD)
    assert norm_asked() == [] and adamw_asked() == []


@pytest.mark.parametrize("error", ["ImportError", "OSError", "AttributeError", "RuntimeError"])
def test_broken_imports(error: str, install: Install, card: Card) -> None:
    card(9, 0)
    broken = f"raise {error}('undefined symbol')"
    install(None, GOOD | {"amp_C.py": broken, "apex/normalization/fused_layer_norm.py": broken})
    (reason,) = adamw_asked()
    assert reason == f"amp_C does not import ({error}: undefined symbol)"
    (reason,) = norm_asked()
    assert reason == f"apex.normalization.fused_layer_norm does not import ({error}: undefined symbol)"


def test_parts_that_were_not_built_or_compute_nothing(install: Install, card: Card) -> None:
    card(9, 0)
    wrong = NORM.replace("return F", "return 0 * F")
    optimizers = {
        "apex/optimizers/__init__.py": "class FusedLAMB: pass",
        "apex/normalization/fused_layer_norm.py": wrong,
    }
    install(None, GOOD | optimizers)
    assert adamw_asked() == ["apex.optimizers has no FusedAdam"]
    assert norm_asked() == ["a small run gave wrong values"]


def test_device_and_dtype(install: Install, card: Card) -> None:
    install(None, GOOD)
    assert norm.why_not("apex", "cpu", torch.float32) == ["it runs on CUDA"]
    assert optimizer.why_not("apex", "cpu") == ["it runs on CUDA"]
    card(9, 0)
    assert norm.why_not("apex", "cuda", torch.float64) == ["computes in float32, bfloat16, float16, not float64"]


def test_apex_only_by_name(install: Install, card: Card) -> None:
    card(9, 0)
    install(None, GOOD)
    parameter = torch.nn.Parameter(torch.ones(3))
    assert isinstance(adamw([{"params": [parameter]}], betas=(0.9, 0.95), eps=1e-8), torch.optim.AdamW)
    assert norm._resolve("cuda", torch.float32, None) == "torch"
    assert norm._resolve("cuda", torch.float32, "apex") == "apex"


def test_a_backend_asked_for_by_name_says_why_not() -> None:
    x = torch.ones(2, 8)
    parameter = torch.nn.Parameter(x)
    with pytest.raises(ValueError, match="backend: 'apex' cannot run LayerNorm: it runs on CUDA"):
        layer_norm(x, x[0], x[0], 1e-6, backend="apex")
    with pytest.raises(ValueError, match="backend: 'apex' cannot run AdamW: it runs on CUDA"):
        adamw([{"params": [parameter]}], betas=(0.9, 0.95), eps=1e-8, backend="apex")
    with pytest.raises(ValueError, match="backend: expected one of torch, apex; got 'triton'"):
        layer_norm(x, x[0], x[0], 1e-6, backend="triton")
    with pytest.raises(ValueError, match="backend: expected one of auto, cohobate, torch, apex; got 'lamb'"):
        adamw([{"params": [parameter]}], betas=(0.9, 0.95), eps=1e-8, backend="lamb")


def test_environment_variables() -> None:
    code = (
        "import torch; from cohobate.kernels.backends import adamw, layer_norm\n"
        "x = torch.ones(2, 8)\n"
        "for call in (lambda: layer_norm(x, x[0], x[0], 1e-6),\n"
        "             lambda: adamw([{'params': [torch.nn.Parameter(x)]}], betas=(0.9, 0.95), eps=1e-8)):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)"
    )
    environment = os.environ | {"COHOBATE_NORM": "apex", "COHOBATE_OPTIMIZER": "lion"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("COHOBATE_NORM: 'apex' cannot run LayerNorm: it runs on CUDA")
    assert second == "COHOBATE_OPTIMIZER: expected one of auto, cohobate, torch, apex; got 'lion'"


def test_layer_norms_agree(install: Install) -> None:
    install(None, GOOD)
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 8, generator=g), torch.randn(8, generator=g), torch.randn(8, generator=g)
    ours = layer_norm(x, weight, bias, 1e-3)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    torch.testing.assert_close(ours, (x - mean) / (var + 1e-3).sqrt() * weight + bias)  # fp32: its own default
    assert torch.equal(apex.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (8,), weight, bias, 1e-3))


def test_a_compiled_norm() -> None:
    x = torch.randn(3, 8)
    compiled = torch.compile(lambda x: layer_norm(x, x[0], x[1], 1e-6), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer_norm(x, x[0], x[1], 1e-6))


def test_all_optimizers_scale_and_skip_alike(install: Install) -> None:
    """Rates, scales and skipped updates, the first one among them, as the training loop sets them."""
    install(None, GOOD)
    starts = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    runs = []
    ours = [] if optimizer.why_not("cohobate", "cpu") else ["cohobate"]
    makers = [functools.partial(_by_name, name) for name in ("torch", *ours)]
    for make in (apex.adamw, *makers):
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
        updates: Any = make(groups, (0.9, 0.95), 1e-8)
        history = []
        for index, (bad, scale) in enumerate(((1, 1.0), (0, 4.0), (0, 1.0), (1, 2.0), (1, 1.0), (0, 1.0))):
            updates.zero_grad(set_to_none=True)
            for parameter in parameters:
                parameter.grad = (parameter.detach() + index) * scale
            for group in updates.param_groups:
                group["lr"] = 0.1 / (index + 1)
            updates.found_inf = torch.tensor(float(bad))
            updates.grad_scale = torch.tensor(scale)
            updates.step()
            history.append(torch.stack([parameter.detach().clone() for parameter in parameters]))
        runs.append(torch.stack(history))
    assert torch.equal(runs[0][0], torch.stack(starts)) and torch.equal(runs[0][3], runs[0][2])  # skipped
    for run in runs[1:]:
        torch.testing.assert_close(runs[0], run)  # fp32: its own default


def _by_name(name: str, groups: Any, betas: Any, eps: float) -> torch.optim.Optimizer:
    return adamw(groups, betas=betas, eps=eps, backend=name)
