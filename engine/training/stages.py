"""Stages: what each one starts from, and what it leaves to the next.

Everything a stage starts from is a function of the configuration, the seed and the export of the stage before, so a
resumed run rebuilds it: the student (drawn anew from a seed that does not know the rank), the teacher, the optimizer,
the schedule. A resume point then fills in what is trained (the student, what predicts behind it, and a teacher that
follows) and the optimizer.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cohobate import config as configuration
from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.kernels.alignment import Standardise
from cohobate.masking import MaskPlan, mask_plan
from cohobate.methods import AMD, DBOT, MAE, Alignment, AMDOptions, DBOTOptions, MAEOptions, SymmetricDBOT
from cohobate.models import Decoder, MaskTokenHead, PixelDecoder, Precision, VisionTransformer, build
from cohobate.models.exports import CONFIG, export, find_export, load_encoder
from cohobate.models.layers import compile_blocks, set_checkpointing
from cohobate.teacher import FrozenTeacher, Teacher, fp8, from_student, load_teacher
from cohobate.teacher.momentum import MomentumTeacher
from cohobate.teacher.sources import resize_pixels
from cohobate.training.distributed import Ranks, barrier, derive_seed
from cohobate.training.optimizer import Updater
from cohobate.training.schedule import Schedule, peak_rate

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}  # fp8 begins as bf16


@dataclass
class Stage:
    """A stage that is being trained.

    Attributes:
        index: from 0. config: the run's, with the stage's ``set`` applied. name, steps: of the stage.
        method: student, decoder or head, and teacher, with their loss. module: ``method``, wrapped for many ranks.
        updater: the optimizer. schedule: rate of each update of the stage.
    """

    index: int
    config: Config
    name: str
    steps: int
    method: DBOT | MAE
    module: nn.Module
    updater: Updater
    schedule: Schedule

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The modules whose weights move, by the name they have in a resume point."""
        parts: dict[str, nn.Module] = {"student": self.method.student, "decoder": self.method.decoder}
        if isinstance(self.method, AMD):
            parts["alignment"] = self.method.alignment
        return parts if self.follower is None else parts | {"teacher": self.follower.average}

    @property
    def follower(self) -> MomentumTeacher | None:
        """The teacher, where it follows the student."""
        teacher = self.method.teacher if isinstance(self.method, DBOT) else None
        return teacher if isinstance(teacher, MomentumTeacher) else None

    def plan(self, sample_ids: Tensor, epoch: int, *, masks: int | None = None) -> MaskPlan:
        """The masks of a batch, or of one view of it with ``masks`` = 1; ``sample_ids`` [B] int64."""
        settings = self.config.mask
        return mask_plan(
            self.method.student.grid,
            sample_ids,
            kind=settings.kind,
            seed=self.config.seed,
            stage=self.index,
            epoch=epoch,
            ratio=settings.ratio,
            count=settings.count,
            teacher_ratio=settings.teacher_ratio if isinstance(self.method, AMD) else None,
            rounding=settings.rounding,
            masks=settings.masks if masks is None else masks,
            block_min=settings.block_min,
            block_aspect=settings.block_aspect,
        )

    @property
    def flops(self) -> int:
        """FLOPs of one image that the loader gives, with all its masks."""
        plan = self.plan(torch.zeros(1, dtype=torch.int64), 0, masks=1)
        masks = self.config.mask.masks
        return self.method.flops(plan, masks) if isinstance(self.method, DBOT) else self.method.flops(plan)

    @property
    def teacher(self) -> str | None:
        """Fingerprint of the teacher as the stage began; None where there is none."""
        return self.method.teacher.fingerprint() if isinstance(self.method, (DBOT, AMD)) else None


def stage_steps(config: Config, batches_per_epoch: int) -> list[int]:
    """Updates of every stage, of which each takes as many batches of a rank as it accumulates.

    Raises:
        UserError: a stage too short for a single update.
    """
    counts = []
    for index, stage in enumerate(config.stages):
        updates_per_epoch = _updates_per_epoch(config, index, batches_per_epoch)
        steps = stage.steps if stage.steps is not None else round(stage.epochs * updates_per_epoch)
        if steps < 1:
            expected = f"at least one update of {updates_per_epoch} an epoch"
            raise UserError(f"stages.{index}.epochs: expected {expected}, got {stage.epochs:g}")
        counts.append(steps)
    return counts


def _updates_per_epoch(config: Config, index: int, batches_per_epoch: int) -> int:
    return batches_per_epoch // configuration.for_stage(config, index).optimizer.accumulate


class StageManager:
    """Makes stages and their exports.

    Args:
        config: the run's. ranks: who takes part. folder: the run folder. batches_per_epoch: of a rank, for
            schedules in epochs.
    """

    def __init__(self, config: Config, ranks: Ranks, folder: Path, batches_per_epoch: int) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder
        self.batches_per_epoch = batches_per_epoch
        self.steps = stage_steps(config, batches_per_epoch)
        for index in range(len(self.steps)):
            self.schedule(index)  # what cannot be fails before the first stage is trained
            source = config.stages[index].teacher.source
            if index > 0 and (source in ("file", "model") or config.stages[index].method == "amd"):
                before = build_encoder(configuration.for_stage(config, index - 1)) if source == "previous" else None
                self._method(index, build_encoder(configuration.for_stage(config, index)), before)

    def export_folder(self, index: int) -> Path:
        """Where stage ``index`` is exported to."""
        return self.folder / "exports" / f"{index + 1}-{self.config.stages[index].name}"

    def schedule(self, index: int) -> Schedule:
        """Learning rates of stage ``index``.

        Raises:
            UserError: a warm-up longer than the stage, or rates out of order.
        """
        config = configuration.for_stage(self.config, index)
        optimizer = config.optimizer
        peak = peak_rate(optimizer.lr, optimizer.blr, config.data.batch_size * optimizer.accumulate * self.ranks.world)
        warmup = optimizer.warmup_epochs * _updates_per_epoch(self.config, index, self.batches_per_epoch)
        return Schedule(self.steps[index], warmup, peak, optimizer.min_lr)

    def initial_student(self, index: int) -> VisionTransformer:
        """The student of stage ``index`` before its first update, on the CPU.

        Raises:
            UserError: a file or an earlier stage whose shape does not fit.
        """
        config, stage = configuration.for_stage(self.config, index), self.config.stages[index]
        student = build_encoder(config)
        if stage.student.init == "fresh":
            keep = self.config.compat.keep_patch_bias and index > 0
            if keep:
                _copy_patch_bias(load_encoder(self.export_folder(index - 1)), student)
            student.reset(self._generator("student", index), keep_patch_bias=keep)
        else:
            path = self.export_folder(index - 1) if stage.student.init == "previous" else Path(str(stage.student.path))
            _copy_weights(load_encoder(path), student, f"stages.{index}.student")
        return student

    def enter(self, index: int, before: Stage | None = None) -> Stage:
        """Build stage ``index``; ``before`` is the finished one, needed only for compat.keep_optimizer.

        Raises:
            UserError: parts that do not fit together, or a teacher or student that cannot be read.
        """
        config, stage = configuration.for_stage(self.config, index), self.config.stages[index]
        method = self._method(index, self.initial_student(index)).to(self.ranks.device).train()
        set_checkpointing(method, config.execution.checkpointing)
        if config.execution.compile:
            compile_blocks(method)
        module: nn.Module = method
        if self.ranks.many:
            # Sends the first rank's weights to all. Buffers (the teacher) are not sent again at every step.
            module = DistributedDataParallel(method, init_sync=not self._unsynchronised(index), **_no_buffer_sync())
        updater = Updater(
            method,
            weight_decay=config.optimizer.weight_decay,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            clip=config.optimizer.clip,
            rule=config.optimizer.decay,
            shadow=config.execution.shadow,
        )
        if self.config.compat.keep_optimizer and before is not None:
            _carry_moments(before, method, updater)
        return Stage(index, config, stage.name, self.steps[index], method, module, updater, self.schedule(index))

    def leave(self, stage: Stage, step: int) -> Path:
        """Export the student, and its decoder if it has one; returns the folder, complete on every rank."""
        folder = self.export_folder(stage.index)
        if self.ranks.first:
            about = {"stage": stage.name, "method": self.config.stages[stage.index].method, "step": step}
            decoder = None if isinstance(stage.method, SymmetricDBOT) else stage.method.decoder
            alignment = stage.method.alignment if isinstance(stage.method, AMD) else None
            export(folder, stage.method.student, decoder, about, self.config.data.interpolation, alignment)
        barrier(self.ranks)
        return folder

    def _unsynchronised(self, index: int) -> bool:
        return self.config.compat.unsynchronised_reset and index > 0 and self.ranks.many

    def _generator(self, purpose: str, index: int) -> torch.Generator:
        """Seeded the same on every rank, or not where that defect is asked for."""
        rank = [self.ranks.rank] if self._unsynchronised(index) else []
        return torch.Generator().manual_seed(derive_seed(self.config.seed, purpose, index, *rank))

    def _method(self, index: int, student: VisionTransformer, before: VisionTransformer | None = None) -> DBOT | MAE:
        """The method of a stage; ``before`` stands in for the export of the stage before, while there is none."""
        config, generator = configuration.for_stage(self.config, index), self._generator("decoder", index)
        kind = config.stages[index].method
        if kind in ("mae", "videomae"):
            decoder = _decoder(student, None, config, generator, PixelDecoder if kind == "videomae" else Decoder)
            return MAE(student, decoder, MAEOptions(config.mae.normalise, kind))
        if kind == "amd":
            return self._amd(index, student, before, generator)
        teacher = self._teacher(index, student)
        if config.dbot.student == "symmetric":
            head = MaskTokenHead(student, teacher.width)
            head.reset(generator)
            return SymmetricDBOT(student, head, teacher, _dbot_options(config))
        return DBOT(student, _decoder(student, teacher.width, config, generator), teacher, _dbot_options(config))

    def _amd(
        self, index: int, student: VisionTransformer, before: VisionTransformer | None, generator: torch.Generator
    ) -> AMD:
        config = configuration.for_stage(self.config, index)
        options = _amd_options(config)
        teacher = self._teacher(index, student, options.teacher_layers, before)
        runtime = getattr(teacher, "teacher", teacher)
        if not isinstance(runtime, FrozenTeacher):
            problem = f"one that can see some patches alone; {teacher.name} runs as it is"
            raise UserError(f"stages.{index}.teacher.source: expected {problem}")
        decoder = _decoder(student, None, config, generator, PixelDecoder if _reads_clips(config) else Decoder)
        depth, frozen_token = config.amd.generator_depth, config.compat.frozen_token
        try:
            alignment = Alignment(
                student, teacher.width, runtime.heads, options, depth=depth, frozen_token=frozen_token
            )
            alignment.reset(generator)
            return AMD(student, decoder, teacher, alignment, options)
        except UserError as error:
            raise UserError(f"amd.{error}") from None

    def _teacher(
        self,
        index: int,
        student: VisionTransformer,
        layers: tuple[int, ...] | None = None,
        before: VisionTransformer | None = None,
    ) -> Teacher:
        """A stage's teacher with target ``layers``; None for those of its own settings."""
        config, settings = self.config, self.config.stages[index].teacher
        precision = Precision(_DTYPES[config.precision.teacher], _DTYPES[config.precision.residual])
        layer = settings.depth if settings.layer is None else settings.layer
        spec: str | Path | nn.Module = Path(str(settings.path)) if settings.source == "file" else str(settings.spec)
        if settings.source == "previous":
            spec = self.export_folder(index - 1) if before is None else before
        try:
            generator = self._generator("teacher", index)
            if settings.momentum is not None:
                if layer is not None and layer > student.depth:
                    raise UserError(f"depth: expected at most the student's {student.depth} blocks, got {layer}")
                average = student.like(depth=layer)
                average.reset(generator)
                if settings.source == "previous" or settings.init == "copy":
                    start = student if settings.source == "random" else load_encoder(self.export_folder(index - 1))
                    _copy_first_blocks(start, average)
                return MomentumTeacher(average, settings.momentum, precision=precision)
            if settings.source == "random":
                return from_student(student, init=settings.init, depth=layer, precision=precision, generator=generator)
            return load_teacher(
                spec,
                student.grid,
                layers=layers if layer is None else (layer,),
                resize=None if settings.resize == "none" else settings.resize,
                precision=precision,
            )
        except UserError as error:
            raise UserError(f"stages.{index}.teacher.{error}") from None


def quantise_teacher(stage: Stage, pixels: Tensor, plan: MaskPlan) -> fp8.Report:
    """Turn the teacher of a stage into one that runs in fp8, as far as its gate lets it; returns what was measured.

    Args:
        pixels: [B, T, H, W, C] uint8, of the stage's own data: they decide the scales, so all ranks must have the same.
        plan: their masks.

    Raises:
        UserError: a teacher that runs as it is, or that cannot be quantised inside the gate.
    """
    method = stage.method
    assert isinstance(method, (DBOT, AMD))
    teacher, runtime = method.teacher, getattr(method.teacher, "teacher", method.teacher)
    try:
        if not isinstance(runtime, FrozenTeacher):
            raise UserError(f"teacher: fp8 expected one that can be rebuilt; {teacher.name} runs as it is")
        if runtime is not teacher:
            pixels = resize_pixels(pixels, (runtime.grid.height, runtime.grid.width), teacher)
        return fp8.quantise(runtime, pixels, rows=plan.teacher_rows if isinstance(method, AMD) else None)
    except UserError as error:
        raise UserError(f"stages.{stage.index}.{error}") from None


def _no_buffer_sync() -> dict[str, Any]:
    """How this torch is told not to send buffers around in every forward pass (2.13 renamed it)."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def build_encoder(config: Config) -> VisionTransformer:
    """The encoder that a configuration describes, freshly drawn from torch's default generator."""
    model, data = config.model, config.data
    return build(
        model.size or "base",
        image_size=data.image_size,
        patch=model.patch,
        channels=data.channels,
        frames=data.frames,
        tubelet=model.tubelet,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        cls_token=model.cls_token,
        drop_path=model.drop_path,
        positions=model.positions,
        layer_scale=model.layer_scale,
        relative_positions=model.relative_positions,
        precision=Precision(_DTYPES[config.precision.compute], _DTYPES[config.precision.residual]),
        mean=data.mean,
        std=data.std,
    )


def _decoder(
    student: VisionTransformer,
    out: int | None,
    config: Config,
    generator: torch.Generator,
    kind: type[Decoder] = Decoder,
) -> Decoder:
    settings = config.decoder
    drop_path = config.model.drop_path if settings.drop_path is None else settings.drop_path
    decoder = kind.for_encoder(
        student, out, width=settings.width, depth=settings.depth, heads=settings.heads, drop_path=drop_path
    )
    decoder.reset(generator)
    return decoder


def _dbot_options(config: Config) -> DBOTOptions:
    settings = config.dbot
    return DBOTOptions(
        loss=settings.loss,
        beta=settings.beta,
        standardise=Standardise() if settings.standardise else None,
        target_norm=settings.final_norm,
        cls=settings.cls,
    )


def _reads_clips(config: Config) -> bool:
    return config.data.frames > 1


def _amd_options(config: Config) -> AMDOptions:
    settings = config.amd
    return AMDOptions(
        norm_pix=config.mae.normalise,
        convention="videomae" if _reads_clips(config) else "mae",
        direct=settings.direct,
        generation=settings.generation,
        loss=settings.loss,
        reduction=settings.reduction,
        pixel_weight=settings.pixel_weight,
        direct_weight=settings.direct_weight,
        generation_weight=settings.generation_weight,
        align_cls=settings.align_cls,
    )


@torch.no_grad()
def _copy_patch_bias(source: VisionTransformer, student: VisionTransformer) -> None:
    if source.patch_embed.proj.bias.shape == student.patch_embed.proj.bias.shape:
        student.patch_embed.proj.bias.copy_(source.patch_embed.proj.bias)


@torch.no_grad()
def _copy_weights(source: VisionTransformer, student: VisionTransformer, key: str) -> None:
    """All weights of ``source``; the position table stays the student's own, which its grid decides."""
    found, wanted = source.state_dict(), student.state_dict()
    for name in (found.keys() | wanted.keys()) - {"pos_embed"}:
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            raise UserError(f"{key}: expected weights of this model's shape, got another {name}")
    for name, tensor in wanted.items():
        if name != "pos_embed":
            tensor.copy_(found[name])


@torch.no_grad()
def _copy_first_blocks(source: VisionTransformer, average: VisionTransformer) -> None:
    """The weights of ``source`` that ``average``, a model of its shape and perhaps less depth, has too."""
    found = source.state_dict()
    for name, tensor in average.state_dict().items():
        tensor.copy_(found[name])


def _carry_moments(before: Stage, method: DBOT | MAE, updater: Updater) -> None:
    """Adam's state of the stage before, for every parameter that has the same name and shape."""
    old = {name: before.updater.optimizer.state.get(p) for name, p in before.method.named_parameters()}
    for name, parameter in method.named_parameters():
        state: dict[str, Any] | None = old.get(name)
        if state and state["exp_avg"].shape == parameter.shape:
            updater.optimizer.state[parameter] = dict(state)


def source_hashes(config: Config) -> dict[str, str]:
    """Fingerprints of the weight files that the stages read, so that a resumed run notices when one has changed."""
    hashes = {}
    for stage in config.stages:
        for part in (stage.teacher, stage.student):
            if part.path:
                folder = find_export(part.path)
                digest = hashlib.sha256((folder / CONFIG).read_bytes())
                digest.update((folder / "model.safetensors").read_bytes())
                hashes[part.path] = digest.hexdigest()[:16]
    return hashes
