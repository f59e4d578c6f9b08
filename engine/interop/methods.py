"""Methods with the weights of published checkpoints, and gradients under the published names.

method = interop.load_dbot("checkpoint-1600.pth", "checkpoint-teacher-1600.pth")
step = method.loss(batch, MaskPlan.from_boolean(mask))
step.total.backward()
gradients = interop.gradients(method)            # {"blocks.0.attn.qkv.weight": ..., "decoder_predp.bias": ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cohobate.errors import UserError
from cohobate.interop import amd, dbot, mae, native, videomae
from cohobate.interop.formats import Format, choose
from cohobate.interop.parts import FP32, Hints, Parts, Predicts, measured
from cohobate.interop.reading import read, unwrapped
from cohobate.methods import AMD, DBOT, MAE, Alignment, AMDOptions, DBOTOptions, MAEOptions, SymmetricDBOT
from cohobate.models import Decoder, PixelDecoder, Precision
from cohobate.models.exports import fill
from cohobate.teacher import FrozenTeacher

Weights = str | Path | Mapping[str, Tensor]


def load_dbot(
    student: Weights,
    teacher: Weights,
    *,
    options: DBOTOptions | None = None,
    hints: Hints | None = None,
    teacher_hints: Hints | None = None,
    precision: Precision = FP32,
) -> DBOT:
    """dBOT's student and teacher, ready for ``method.loss(batch, plan)``.

    Args:
        student: a file with a head for features (``decoder_predp``), our export of one, or its tensors by name.
        teacher: an encoder of any depth and format; its last block is the target.
        options: default the published recipe, with the target standardised.
        hints: of the student: ``heads``, ``decoder_heads``, ``image_size`` where the published sizes will not do.
        teacher_hints: of the teacher; default those of the student.
        precision: dtypes of the computation.

    Raises:
        UserError: files that do not fit, or a teacher whose width is not the head's; the message names them.
    """
    hints = hints or Hints()
    parts = _load(student, dbot.FORMAT, hints, precision)
    source = _load(teacher, None, teacher_hints or replace(hints, decoder_heads=None), precision)
    frozen = FrozenTeacher(source.student, (source.student.depth,), precision=precision)
    return DBOT(parts.student, _decoder(parts, student), frozen, options)


def load_mae(path: Weights, *, norm_pix: bool = True, hints: Hints | None = None, precision: Precision = FP32) -> MAE:
    """MAE with its decoder, ready for ``method.loss(batch, plan)``.

    Args:
        path: a file with encoder and decoder, a folder of transformers' ViTMAE, our export, or tensors by name.
        norm_pix: standardise the pixels of each patch, as the released models were trained.
        hints: ``heads``, ``decoder_heads``, ``image_size`` where the published sizes will not do.
        precision: dtypes of the computation.

    Raises:
        UserError: a file that does not fit, or without a decoder.
    """
    parts = _load(path, mae.FORMAT, hints, precision)
    return MAE(parts.student, _decoder(parts, path), MAEOptions(norm_pix=norm_pix, convention="mae"))


def load_videomae(
    path: Weights, *, norm_pix: bool = True, hints: Hints | None = None, precision: Precision = FP32
) -> MAE:
    """VideoMAE with its decoder, ready for ``method.loss(batch, plan)``.

    Args:
        path: a pretrained file, a folder of transformers' VideoMAE, our export, or tensors by name.
        norm_pix: standardise the pixels of each tubelet and colour, as published.
        hints: ``frames`` and ``image_size`` unless they are 16 and 224, ``heads``, ``decoder_heads``.
        precision: dtypes of the computation.

    Raises:
        UserError: a file that does not fit, or without a decoder.
    """
    parts = _load(path, videomae.FORMAT, hints, precision)
    return MAE(parts.student, _decoder(parts, path), MAEOptions(norm_pix=norm_pix, convention="videomae"))


def load_amd(
    student: Weights,
    teacher: Weights,
    *,
    options: AMDOptions | None = None,
    mask_tokens: Sequence[Tensor] | None = None,
    hints: Hints | None = None,
    teacher_hints: Hints | None = None,
    precision: Precision = FP32,
) -> AMD:
    """AMD's student, alignment and teacher, ready for ``method.loss(batch, plan)``.

    Args:
        student: a pretrained file of AMD's, our export of one, or tensors by name.
        teacher: an encoder on the same tokens: VideoMAE's, pretrained or fine-tuned, for clips.
        options: which blocks are aligned, and how; default the published (6, 12) with (12, 24).
        mask_tokens: of the generators, D_T numbers each. Published files have none; without this they are drawn.
        hints: ``frames`` and ``image_size`` unless they are 16 and 224, ``heads``, ``decoder_heads``,
            ``teacher_heads`` (of the generators).
        teacher_hints: of the teacher; default the student's sizes with ``teacher_heads`` as its heads.
        precision: dtypes of the computation.

    Raises:
        UserError: files that do not fit each other or the options; the message names them.
    """
    hints, options = hints or Hints(), options or AMDOptions()
    parts = _load(student, amd.FORMAT, hints, precision)
    aligned = parts.sizes.alignment
    if aligned is None or parts.alignment is None:
        raise UserError("student: expected projections and generators beside the encoder, found none")
    for name, has in (("student_layers", aligned.count), ("generation", aligned.generators)):
        wanted = len(getattr(options, name))
        if wanted != has:
            raise UserError(f"options: expected {has} in {name}, as many as the file has, got {wanted}")
    alignment = Alignment(parts.student, aligned.width, aligned.heads, options, depth=aligned.depth)
    fill(alignment, parts.alignment.state_dict(), "student")
    if mask_tokens is not None:
        _set_tokens(alignment, mask_tokens)
    teacher_hints = teacher_hints or replace(hints, heads=hints.teacher_heads, decoder_heads=None)
    source = _load(teacher, None, teacher_hints, precision)
    frozen = FrozenTeacher(source.student, options.teacher_layers, precision=precision)
    return AMD(parts.student, _decoder(parts, student), frozen, alignment, options)


def gradients(method: DBOT | MAE) -> dict[str, Tensor]:
    """Gradients under the names and in the layout of the published code, of parameters that have one.

    Args:
        method: any DBOT, MAE (VideoMAE with its decoder) or AMD, loaded from a file or not.

    Returns:
        Of dBOT and MAE "blocks.0.attn.qkv.bias" [3D] and so on; of VideoMAE and AMD "encoder.blocks.0.attn.q_bias" [D]
        and "v_bias", for they have no key bias. The generators' mask tokens, which no published code names, are
        "generators.k.mask_token".

    Raises:
        UserError: another module, a symmetric dBOT (whose weights have no published names but their own) among them.
    """
    if not isinstance(method, DBOT | MAE) or isinstance(method, SymmetricDBOT):
        raise UserError(f"method: expected DBOT, MAE or AMD, got {type(method).__name__}")
    form, predicts = _published(method)
    alignment = method.alignment if isinstance(method, AMD) else None
    parts = Parts(
        method.student, method.decoder, alignment, measured(method.student, method.decoder, alignment, predicts)
    )
    table = {entry.ours: entry for entry in form.table(form.fit(parts))}
    found: dict[str, Tensor] = {}
    for name, parameter in method.named_parameters():
        if parameter.grad is None:
            continue
        entry = table.get(name)
        if entry is not None and entry.theirs:
            found |= dict(zip(entry.theirs, entry.split(parameter.grad), strict=True))
        else:
            found[name.removeprefix("alignment.")] = parameter.grad
    return found


def _published(method: DBOT | MAE) -> tuple[Format, Predicts]:
    if isinstance(method, DBOT):
        return dbot.FORMAT, "features"
    if isinstance(method, AMD):
        return amd.FORMAT, "pixels"
    return videomae.FORMAT if isinstance(method.decoder, PixelDecoder) else mae.FORMAT, "pixels"


def _load(weights: Weights, usual: Format | None, hints: Hints | None, precision: Precision) -> Parts:
    """Files of any format; bare tensors are taken for the usual one if their keys do not say."""
    file = unwrapped(dict(weights), "the weights") if isinstance(weights, Mapping) else read(weights)
    form = choose(file)
    if usual is not None and form.name not in (usual.name, "hf", native.FORMAT.name):
        raise UserError(f"source: expected a checkpoint of {usual.name} in {file.where!r}, got one of {form.name}")
    return form.load(file, hints, precision=precision)[0]


def _decoder(parts: Parts, weights: Weights) -> Decoder:
    if parts.decoder is None:
        where = "the weights" if isinstance(weights, Mapping) else repr(str(weights))
        raise UserError(f"source: expected encoder and decoder in {where}, found the encoder alone")
    return parts.decoder


@torch.no_grad()
def _set_tokens(alignment: Alignment, tokens: Sequence[Tensor]) -> None:
    if len(tokens) != len(alignment.generators):
        raise UserError(f"mask_tokens: expected {len(alignment.generators)}, one a generator, got {len(tokens)}")
    for token, generator in zip(tokens, alignment.generators, strict=True):
        own: Tensor = generator.mask_token  # type: ignore[assignment]
        if token.numel() != own.numel():
            raise UserError(f"mask_tokens: expected {own.numel()} numbers each, got {list(token.shape)}")
        own.copy_(token.reshape(own.shape))
