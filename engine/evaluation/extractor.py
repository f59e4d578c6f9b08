"""Final tokens of any frozen ViT through the teacher's runtime: what every metric reads."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.models import Features, Precision, VisionTransformer
from cohobate.teacher import FrozenTeacher, OriginalTeacher
from cohobate.teacher.sources.source import NotPlainError, Source

log = logging.getLogger("cohobate.evaluation")
FP32 = Precision(torch.float32, torch.float32)
BF16 = Precision()


class Extractor:
    """Features of uint8 pixels after the final norm, without a graph.

    One of our encoders is copied into the frozen runtime, whatever mode it is in; in fp32 it runs itself, so that its
    features are its own to the last bit. A module that could not be rebuilt runs as it is, without the final norm,
    which is not known.

    Args:
        source: one of our encoders, or what :func:`cohobate.teacher.load_source` gives.
        precision: dtypes; default bf16 with an fp32 residual stream, and an encoder's own.
        name: for messages.

    Attributes:
        grid: of the pixels. width: of the features. prefix: tokens in front of the patches. device: of the weights.

    Raises:
        UserError: weights that are not finite; the message names the first.
    """

    def __init__(
        self,
        source: VisionTransformer | Source,
        precision: Precision | None = None,
        *,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or ("the encoder" if isinstance(source, VisionTransformer) else source.name)
        self.grid, self.width, self.prefix = source.grid, source.width, source.prefix
        self._run: Any
        self._norm = True
        if isinstance(source, VisionTransformer):
            check_weights(source, self.name)
            self.device = source.device
            self._run = _runtime(source, precision or source.precision)
        elif source.anatomy is not None:
            self.device, self.width = source.anatomy.patch.device, source.anatomy.out
            self._run = FrozenTeacher(source.anatomy, precision=precision)
        else:
            self.device = torch.device("cpu")
            self._run, self._norm = OriginalTeacher(source), False
            log.warning("%s runs as it is, whole and without its final norm: %s", self.name, "; ".join(source.reasons))
        if device is not None:
            self.device = torch.device(device)
            self._run.to(self.device)

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """[B, T, H, W, C] uint8 -> [B, P + N, D]."""
        if not isinstance(self._run, VisionTransformer):
            found: Tensor = self._run(pixels, norm=self._norm)[0]
            return found
        training = self._run.training
        self._run.eval()
        try:
            return self._run(pixels)
        finally:
            self._run.train(training)

    def __call__(self, pixels: Tensor) -> Features:
        """The cls token (None without one) and the mean of the patch tokens, [B, D] fp32 each."""
        x = self.tokens(pixels).float()
        # A copy of the cls token: who keeps it shall not keep all tokens.
        return Features(x[:, 0].clone() if self.prefix else None, x[:, self.prefix :].mean(dim=1))


def _runtime(encoder: VisionTransformer, precision: Precision) -> VisionTransformer | FrozenTeacher:
    if precision == FP32 and encoder.precision == FP32:
        return encoder
    try:
        return FrozenTeacher(encoder, precision=precision)
    except NotPlainError as reason:  # a part that the runtime does not know
        log.info("features: %s runs as it is: %s", "the encoder", reason)
        return encoder


@torch.no_grad()
def check_weights(module: torch.nn.Module, name: str) -> None:
    """Raise UserError, naming the first parameter of ``module`` that is not finite. It waits for the device once."""
    named = list(module.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for _, parameter in named])
    if not bool(finite.all()):
        wrong = named[int(finite.int().argmin())][0]
        raise UserError(f"weights: expected finite numbers in {name}, got NaN or inf in {wrong}")
