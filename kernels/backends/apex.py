"""NVIDIA's apex: FusedLayerNorm and FusedAdam.

apex has no releases (``APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex``)
and the ``apex`` on PyPI is an unrelated package, so what is looked for is the extension modules that only NVIDIA's has:
``fused_layer_norm_cuda`` and ``amp_C``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cohobate.kernels.backends import probe
from cohobate.kernels.backends.probe import capability, load, once, present, short

NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def package(extension: str, module: str, *names: str) -> list[str]:
    """Reasons why a part of apex cannot be used: its extension module first, then its Python module."""
    if not present(extension):
        if present("apex"):
            return [f"this apex has no {extension}: NVIDIA's is built from its repository, PyPI's is another package"]
        return ["apex is not installed"]
    return load(extension)[1] or load(module, *names)[1]


def _on_cuda(device: str) -> list[str]:
    if device != "cuda":
        return ["it runs on CUDA"]
    return [] if capability() is not None else ["no CUDA device"]


# ------------------------------------------------------------------------------------------------------------ norm


def why_not_norm(device: str, dtype: torch.dtype) -> list[str]:
    """Reasons against a LayerNorm by apex."""
    reasons = _on_cuda(device)
    if dtype not in NORM_DTYPES:
        reasons.append(f"computes in {', '.join(map(short, NORM_DTYPES))}, not {short(dtype)}")
    reasons += package("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
    return reasons or once(("apex norm", device, dtype), lambda: _small_norm(probe.place(device), dtype))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """apex's fused_layer_norm_affine over the last dimension."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    out: Tensor = fused_layer_norm_affine(x, weight, bias, (x.shape[-1],), eps)
    return out


def _small_norm(device: torch.device, dtype: torch.dtype) -> bool:
    x = torch.tensor([[-1.0, 1.0] * 4], device=device, dtype=dtype)
    out = layer_norm(x, torch.full((8,), 2.0).to(x), torch.ones(8).to(x), 0.0)
    return torch.allclose(out, 2 * x + 1, atol=1e-2)  # a few roundings in bf16


# ------------------------------------------------------------------------------------------------------- optimizer


def why_not_adamw(device: str) -> list[str]:
    """Reasons against an AdamW by apex."""
    reasons = _on_cuda(device) + package("amp_C", "apex.optimizers", "FusedAdam")
    return reasons or once(("apex adamw", device), lambda: _small_step(probe.place(device)))


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """FusedAdam as AdamW that reads ``found_inf`` and ``grad_scale`` as torch's fused AdamW does, without a sync."""
    return _adapter()(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True, capturable=True)


class _Scaler:
    """What FusedAdam asks a gradient scaler for."""

    def __init__(self, found_inf: Tensor, scale: Tensor) -> None:
        self.found_inf, self.scale = found_inf, scale

    def _check_inf_per_device(self, _: Any) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return self.scale


def _adapter() -> Callable[..., torch.optim.Optimizer]:
    from apex.optimizers import FusedAdam

    class Adapter(FusedAdam):
        """FusedAdam whose rate may be a float, and which takes flag and factor from its attributes."""

        def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
            super().__init__(groups, **options)
            device = self.param_groups[0]["params"][0].device
            self.found_inf = torch.zeros((), device=device)
            self.grad_scale = torch.ones((), device=device)
            self._rates = [torch.zeros((), device=device) for _ in self.param_groups]
            for group in self.param_groups:  # FusedAdam would count a first update that is skipped
                group["step"] = torch.zeros(1, dtype=torch.int32, device=device)

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def step(self, closure: Any = None) -> Any:
            for group, rate in zip(self.param_groups, self._rates, strict=True):
                group["lr"] = rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
            return super().step(closure, grad_scaler=_Scaler(self.found_inf, self.grad_scale))

    return Adapter


def _small_step(device: torch.device) -> bool:
    """One update of one value: AdamW's first step is the rate times the sign of the gradient."""
    value = torch.nn.Parameter(torch.ones(8, device=device))
    optimizer = adamw([{"params": [value], "weight_decay": 0.0}], (0.9, 0.95), 1e-8)
    optimizer.param_groups[0]["lr"] = 0.5
    value.grad = torch.full_like(value, 3.0)
    optimizer.step()
    return torch.allclose(value.detach(), torch.full_like(value, 0.5))
