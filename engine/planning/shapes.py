"""The stages of a recipe as shapes without weights, so that a ViT-H is planned as quickly as a ViT-S.

Models are built on torch's meta device by the code that trains them. Only a teacher that would be read from a file or
the network is not: its shape is read from an export, from the folder's config.json, or from its name.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from cohobate import config as configuration
from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.models import SIZES, Precision, VisionTransformer, build
from cohobate.models.exports import find_export, load_encoder
from cohobate.teacher import FrozenTeacher, Teacher
from cohobate.teacher.loading import ResizedTeacher
from cohobate.teacher.sources import own
from cohobate.teacher.sources.grids import match_grid
from cohobate.tokens import TokenGrid
from cohobate.training.distributed import Ranks
from cohobate.training.feed import training_plan
from cohobate.training.stages import Stage, StageManager, build_encoder

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LETTERS = {name[0]: name for name in SIZES}
_PROJECTED = {"base": 512, "large": 768, "huge": 1024}  # width of CLIP's common space, by the image tower's size


class Shapes(StageManager):
    """The stage manager of a run that will not take place.

    Args:
        config: the run's. samples: images or videos in an epoch. world: ranks.

    Attributes:
        assumed: what had to be assumed, in words.

    Raises:
        UserError: settings that cannot go together, or a teacher whose shape nobody knows.
    """

    def __init__(self, config: Config, samples: int, world: int) -> None:
        self.assumed: list[str] = []
        self.teachers: dict[int, VisionTransformer] = {}
        self._device = "meta"
        self._stages: dict[int, Stage] = {}
        data, accumulate = config.data, config.optimizer.accumulate
        batches = training_plan(data, samples, config.seed).steps_per_epoch(data.batch_size * world)
        if batches < accumulate:
            update = data.batch_size * world * accumulate
            most = f"{samples * data.repeats:,}, an epoch's"
            raise UserError(f"data.batch_size: expected an update of at most {most}, got {update:,}")
        with torch.device("meta"):
            super().__init__(config, Ranks(0, world, torch.device("cpu")), Path(config.run), batches)

    def stage(self, index: int, device: str = "meta") -> Stage:
        """A stage without an updater, not wrapped for many ranks; its weights are random, on "meta" shapes alone."""
        if device == "meta" and index in self._stages:
            return self._stages[index]
        config = configuration.for_stage(self.config, index)
        self._device = device
        with torch.device(device):
            method = self._method(index, build_encoder(config))
        nobody = cast(Any, None)
        name = self.config.stages[index].name
        stage = Stage(index, config, name, self.steps[index], method, nobody, nobody, self.schedule(index))
        if device == "meta":
            self._stages[index] = stage
        return stage

    def _teacher(
        self,
        index: int,
        student: VisionTransformer,
        layers: tuple[int, ...] | None = None,
        before: VisionTransformer | None = None,
    ) -> Teacher:
        config, settings = self.config, self.config.stages[index].teacher
        depth = settings.depth if settings.layer is None else settings.layer
        width: int | None = None
        grid = student.grid
        if settings.source == "previous":
            model = build_encoder(configuration.for_stage(config, index - 1))
        elif settings.source == "random":
            model = student
        else:
            model, width = self._named(index, str(settings.path or settings.spec), student)
            try:
                grid = match_grid(model.grid, grid, None if settings.resize == "none" else settings.resize).grid
            except UserError as error:
                raise UserError(f"stages.{index}.teacher.{error}") from None
        last = model.depth if depth is None else depth
        if settings.source == "random" and settings.init == "independent":
            model = model.like(depth=last)
        if layers is not None:
            last = layers[-1]
        if last > model.depth:
            raise UserError(f"stages.{index}.teacher.depth: expected at most {model.depth} blocks, got {last}")
        model = model.like(depth=last)
        anatomy = own.read(model, "teacher")
        if grid != anatomy.grid:
            anatomy = replace(anatomy, grid=grid, positions=torch.zeros(grid.size, model.width))
        if width is not None:
            anatomy = replace(anatomy, head=torch.zeros(width, model.width))
        compute = _DTYPES.get(config.precision.teacher, torch.bfloat16)  # fp8 is packed out of bf16
        precision = Precision(compute, _DTYPES[config.precision.residual])
        teacher = FrozenTeacher(anatomy, layers or (last,), precision=precision)  # copies the weights
        self.teachers[index] = model.to("meta")
        return teacher if teacher.grid == student.grid else ResizedTeacher(teacher, student.grid)

    def _named(self, index: int, spec: str, student: VisionTransformer) -> tuple[VisionTransformer, int | None]:
        """A teacher from outside, and the width that its head projects to; None without one."""
        try:
            with torch.device("cpu"):
                return load_encoder(find_export(spec)).to(self._device), None
        except UserError:
            pass
        name, _, options = spec.partition("?")
        folder = Path(name.removeprefix("hf:"))
        file = folder / "config.json"
        shape = _from_config(json.loads(file.read_text())) if file.is_file() else _from_name(name)
        if shape is None:
            names = "vit_base, vit-mae-large, vitb16"
            expected = f"a folder with an export or a config.json, or a name that says its size ({names})"
            raise UserError(f"stages.{index}.teacher: expected {expected}, to plan with; got {spec!r}")
        size, patch, image = shape
        grid = student.grid
        _, rows, columns = grid.shape
        model = build(
            image_size=image or (rows * patch, columns * patch), patch=patch, channels=grid.channels,
            frames=grid.frames, tubelet=grid.patch[0], cls_token=grid.frames == 1, **size,
        )  # fmt: skip
        if not file.is_file():
            told = f"{model.depth} blocks of width {model.width}, patches of {patch}"
            self.assumed.append(f"teacher {spec}: {told}, by its name alone")
        projects = "projection=true" in options
        return model, _PROJECTED.get(str(size.get("size")), 768) if projects else None


def _from_name(name: str) -> tuple[dict[str, Any], int, int | None] | None:
    """Size, patch and image side (None: the student's) out of a checkpoint's name."""
    name = Path(name.split(":", 1)[-1].lower()).as_posix()
    size = next((size for size in SIZES if re.search(rf"(?<![a-z]){size}(?![a-z])", name)), None)
    letter = re.search(r"(?<![a-z])vit[-_]?([tsblh])(?![a-z])", name)
    if size is None and letter is not None:
        size = _LETTERS[letter[1]]
    if size is None:
        return None
    found = re.search(r"patch[-_]?(\d+)|vit[-_]?[tsblh][-_/]?(\d+)", name)
    patch = 14 if "dinov2" in name else SIZES[size].patch
    if found is not None:
        patch = int(found[1] or found[2])
    return {"size": size}, patch, None


def _from_config(settings: dict[str, Any]) -> tuple[dict[str, Any], int, int | None] | None:
    """The same out of a Hugging Face config.json."""
    settings = settings.get("vision_config", settings)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    if not all(isinstance(settings.get(key), int) for key in keys):
        return None
    width, depth, heads, patch, image = (settings[key] for key in keys)
    ratio = settings.get("intermediate_size", 4 * width) / width
    return {"width": width, "depth": depth, "heads": heads, "mlp_ratio": ratio}, patch, image


def frames_grid(grid: TokenGrid) -> str:
    """``16 x 224 x 224 px`` or ``224 x 224 px``."""
    size = f"{grid.height} x {grid.width} px"
    return f"{grid.frames} x {size}" if grid.frames > 1 else size
