"""Small parts of both methods, and their literal twins with the same weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cohobate import TokenGrid, models, random_plan
from cohobate.benchmarks.reference import dbot, mae, vit
from cohobate.masking import MaskPlan
from cohobate.methods import DBOT, MAE, DBOTOptions, MAEOptions
from cohobate.models import Decoder, Precision, VisionTransformer
from cohobate.teacher import FrozenTeacher, from_student

FP32 = Precision(torch.float32, torch.float32)
BATCH, ROWS, COLUMNS, PATCH, WIDTH, DEPTH, HEADS = 3, 4, 6, 8, 48, 3, 4
TEACHER = 5  # seed of its weights


@dataclass
class Batch:
    """What a method reads of a batch."""

    pixels: Tensor


def batch() -> Batch:
    shape = (BATCH, 1, ROWS * PATCH, COLUMNS * PATCH, 3)
    return Batch(torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))


def plan(grid: TokenGrid, ratio: float = 0.75, **changes: float) -> MaskPlan:
    return random_plan(grid, torch.arange(BATCH), seed=3, stage=0, epoch=0, ratio=ratio, **changes)


def student(precision: Precision = FP32, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    arguments: dict[str, object] = {"patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS}
    size = (ROWS * PATCH, COLUMNS * PATCH)
    return models.build("tiny", image_size=size, precision=precision, **(arguments | changes))  # type: ignore[arg-type]


def decoder(encoder: VisionTransformer, out: int | None = None) -> Decoder:
    return Decoder.for_encoder(encoder, out, width=32, depth=2, heads=2)


def dbot_method(options: DBOTOptions | None = None, precision: Precision = FP32, **changes: object) -> DBOT:
    encoder = student(precision, **changes)
    teacher = from_student(encoder, init="independent", generator=torch.Generator().manual_seed(TEACHER))
    return DBOT(encoder, decoder(encoder, teacher.width), teacher, options)


def mae_method(options: MAEOptions | None = None, precision: Precision = FP32, **changes: object) -> MAE:
    encoder = student(precision, **changes)
    return MAE(encoder, decoder(encoder), options)


def literal_encoder(weights: dict[str, Tensor]) -> vit.Encoder:
    encoder = vit.Encoder((ROWS, COLUMNS), PATCH, WIDTH, DEPTH, HEADS)
    encoder.load_state_dict(weights)
    return encoder


def literal_decoder(weights: dict[str, Tensor], out: int) -> vit.Decoder:
    twin = vit.Decoder(ROWS * COLUMNS, WIDTH, out, 32, 2, 2)
    twin.load_state_dict(weights)
    return twin


def teacher_model(method: DBOT) -> VisionTransformer:
    """What :func:`dbot_method`'s teacher was made from: it was drawn independently of the student."""
    model = method.student.like(depth=method.teacher.depth)
    model.reset(torch.Generator().manual_seed(TEACHER))
    assert FrozenTeacher(model).fingerprint() == method.teacher.fingerprint()
    return model


def literal_dbot(method: DBOT, **changes: object) -> dbot.DBOT:
    return dbot.DBOT(
        literal_encoder(method.student.state_dict()),
        literal_decoder(method.decoder.state_dict(), method.decoder.out),
        literal_encoder(teacher_model(method).state_dict()),
        **changes,  # type: ignore[arg-type]
    )


def literal_mae(method: MAE, norm_pix: bool = True) -> mae.MAE:
    return mae.MAE(
        literal_encoder(method.student.state_dict()),
        literal_decoder(method.decoder.state_dict(), method.decoder.out),
        PATCH,
        norm_pix=norm_pix,
    )


def images(encoder: VisionTransformer) -> Tensor:
    return vit.normalise(batch().pixels, encoder.mean, encoder.std)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def parts() -> ModuleType:
    """The functions above: test files are not importable from each other."""
    return sys.modules[__name__]
