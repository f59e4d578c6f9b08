"""The sections of a run, as frozen dataclasses with the defaults; the docstrings are what ``train --help`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The encoder that is trained."""

    size: Literal["tiny", "small", "base", "large", "huge"] | None = None
    """Named size; width, depth and heads given beside it win."""
    patch: int = 16
    """Side of a square patch, pixels."""
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    cls_token: bool = True
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks rise to it linearly."""


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder between the encoder and the loss; it is thrown away after pretraining."""

    width: int = 512
    depth: int = 8
    heads: int = 16
    drop_path: float | None = None
    """None: the encoder's (as dBOT does)."""


@dataclass(frozen=True)
class DataConfig:
    """Images, and how a training sample is cut from one."""

    root: str = ""
    """Folder (flat, nested or one folder a class) or a text file that lists images."""
    generate: Literal["small", "large"] | None = None
    """Variant of the generated data set to make when `root` does not exist."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width; one number means a square."""
    channels: int = 3
    batch_size: int = 64
    """Images a rank takes in one forward pass; an update sees batch_size x optimizer.accumulate x ranks."""
    loader: Literal["auto", "torch", "dali-cpu", "dali-gpu"] = "auto"
    workers: int = 2
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = 0.5
    """Chance of a horizontal flip."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """One number a channel, on the scale 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    max_bad: float = 0.01
    """Share of images that may be unreadable before the run gives up; each is replaced, counted and listed."""


@dataclass(frozen=True)
class MaskConfig:
    """Which patches the student does not see."""

    ratio: float = 0.75
    rounding: Literal["keep", "mask"] = "keep"
    """keep: floor(N(1-ratio)) patches are seen (MAE, dBOT); mask: floor(ratio N) are hidden (VideoMAE, AMD)."""
    masks: int = 1
    """Masks of each crop in an update (dbot): the teacher runs once for all of them, the student on each."""


@dataclass(frozen=True)
class DbotConfig:
    """The feature-alignment term (dBOT, Liu et al., ICLR 2024)."""

    loss: Literal["smooth_l1", "mse", "l1", "cosine"] = "smooth_l1"
    beta: float = 2.0
    standardise: bool = True
    """Standardise each target token over its channels (unbiased variance, no affine)."""
    final_norm: bool = False
    """Apply the teacher's last LayerNorm to the target."""
    cls: bool = True
    """Count the class token beside the masked patches."""


@dataclass(frozen=True)
class MaeConfig:
    """The pixel term (MAE, He et al., CVPR 2022)."""

    normalise: bool = True
    """Standardise the pixels of each target patch."""


@dataclass(frozen=True)
class TeacherConfig:
    """Where a stage's frozen teacher comes from."""

    source: Literal["none", "random", "previous", "file", "model"] = "none"
    """random: untrained; previous: the student of the stage before; file: an export (`path`); model: any ViT, as `spec`
    says."""
    init: Literal["copy", "independent"] = "copy"
    """For source=random: the student's own initial weights (dBOT), or another draw."""
    depth: int | None = None
    """Blocks kept; 0 leaves patch embedding and positions (dBOT's first teacher for ViT-L and ViT-H). None: all."""
    layer: int | None = None
    """The block whose output is the target, 1-based; nothing behind it runs. None: the last. The same as `depth`."""
    path: str | None = None
    """For source=file: an export's folder, or a run's."""
    spec: str | None = None
    """For source=model: timm:NAME, hf:FOLDER_OR_ID, random:vit_small?seed=1, or an export's folder."""
    resize: Literal["none", "positions", "pixels"] = "none"
    """How a teacher of another size comes to the student's tokens: it interpolates its positions, or gets pixels of
    its own size."""


@dataclass(frozen=True)
class StudentConfig:
    """Where a stage's student starts."""

    init: Literal["fresh", "previous", "file"] = "fresh"
    """fresh: re-initialised; previous: goes on from the stage before; file: encoder weights from `path`."""
    path: str | None = None


@dataclass(frozen=True)
class StageConfig:
    """One stage: a teacher, a student, a number of epochs, and a learning-rate schedule of its own."""

    name: str = "stage"
    method: Literal["mae", "dbot"] = "dbot"
    epochs: float = 800.0
    steps: int | None = None
    """Optimizer updates; wins over epochs."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of model, decoder, mask, dbot, mae or optimizer that differ in this stage, e.g. {optimizer.blr: 1e-3}."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (fused), linear warm-up and half a cosine, both restarted in every stage."""

    blr: float = 1.5e-4
    """Learning rate for 256 images; the rate used is blr x (images an update sees) / 256."""
    lr: float | None = None
    """Learning rate itself; wins over blr."""
    min_lr: float = 0.0
    warmup_epochs: float = 40.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay: Literal["mae", "videomae"] = "mae"
    """mae: everything but biases and 1-D tensors decays; videomae: nor do tokens and positions."""
    clip: float | None = None
    """Largest global L2 norm of the gradient."""
    accumulate: int = 1
    """Forward passes an update."""
    max_bad_steps: int = 20
    """Updates skipped in a row for a gradient that is not finite, before the run gives up."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Master weights are fp32 always."""

    compute: Literal["bf16", "fp32"] = "bf16"
    """Type of the matrix products."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Type of the residual stream between blocks."""
    teacher: Literal["bf16", "fp32"] = "bf16"


@dataclass(frozen=True)
class EvaluateConfig:
    """kNN, linear probe and effective rank after each stage; the untrained network is stage 0."""

    enabled: bool = True
    knn: bool = True
    linear: bool = True
    k: int = 20
    temperature: float = 0.07
    train_limit: int | None = 50_000
    """Most images whose features are the kNN's memory and the probe's training set; None: all."""
    test_limit: int | None = 10_000
    batch_size: int = 256
    samples: int = 8
    """Images drawn in the report (masks, target, prediction)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Resume points, beside the one at every stage's end."""

    every_minutes: float = 15.0
    every_steps: int | None = None
    """Updates between two checkpoints; wins over every_minutes."""
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 20
    """Updates between two reads of the metrics from the device."""
    tensorboard: bool = True


@dataclass(frozen=True)
class CompatConfig:
    """Defects of the published dBOT code, for those who compare with it; all off by default."""

    unsynchronised_reset: bool = False
    """Each rank draws its own student at a stage boundary, and nobody is told (ranks then train different networks)."""
    keep_optimizer: bool = False
    """Adam's moments and step count survive the student's re-initialisation."""
    keep_patch_bias: bool = False
    """The patch embedding's bias survives the student's re-initialisation."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: str = "runs/last"
    """Folder that everything is written to."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu or cuda."""
    resume: str = "auto"
    """auto: go on if the run folder holds a checkpoint; never: the folder must be new; or the path of a checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    dbot: DbotConfig = field(default_factory=DbotConfig)
    mae: MaeConfig = field(default_factory=MaeConfig)
    stages: tuple[StageConfig, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
