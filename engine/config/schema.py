"""The sections of a run, as frozen dataclasses with the defaults; the docstrings are what ``train --help`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cohobate.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The encoder that is trained."""

    size: Literal["tiny", "small", "base", "large", "huge"] | None = None
    """Named size; width, depth and heads given beside it win."""
    patch: int = 16
    """Side of a square patch, pixels."""
    tubelet: int = 1
    """Frames of a patch; 2 for clips (VideoMAE, AMD)."""
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    cls_token: bool = True
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier blocks rise to it linearly."""
    positions: Literal["sincos", "none"] = "sincos"
    """Fixed sine-cosine positions added to the patches, or none."""
    layer_scale: float | None = None
    """First value of a learned factor for each channel of a block's branches; null: no factors."""
    relative_positions: bool = False
    """A learned bias of attention by the distance of two patches, shared by all blocks (BEiT)."""


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
    """Images or videos, and how a training sample is cut from one."""

    root: str = ""
    """Folder (flat, nested or one folder a class) or a text file that lists images or videos; or a folder of shards."""
    generate: Literal["small", "large", "video"] | None = None
    """Variant of the generated data set to make when `root` does not exist."""
    frames: int = 1
    """Frames of a clip; 1: images."""
    stride: int = 4
    """From one frame of a clip to the next (Kinetics 4, Something-Something 2)."""
    sampling: Literal["contiguous", "linspace", "segments"] = "contiguous"
    """contiguous: each stride-th frame of a window (Kinetics); linspace: evenly over the window, both ends included
    (Something-Something); segments: over the whole video."""
    repeats: int = 1
    """Crops of a clip in a batch, each with a mask of its own: they share one decode (repeated sampling)."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width; one number means a square."""
    channels: int = 3
    batch_size: int = 64
    """Images or clips a rank takes in one forward pass, every crop counted; an update sees batch_size x
    optimizer.accumulate x ranks."""
    loader: Literal["auto", "torch", "dali-cpu", "dali-gpu"] = "auto"
    workers: int = 2
    crop: Literal["random_resized", "multi_scale"] = "random_resized"
    """random_resized: `scale` and `ratio`; multi_scale: sides of 1, 7/8, 3/4 or 0.66 of the short side, 13 places
    (clips only: VideoMAE, AMD)."""
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

    kind: Literal["random", "block", "inverse_block", "tube"] = "random"
    """random: one by one (MAE); block: rectangles are hidden (BEiT); inverse_block: rectangles stay visible; tube: the
    same patches in every frame of a clip (VideoMAE)."""
    ratio: float = 0.75
    count: int | None = None
    """Patches that are hidden; wins over ratio."""
    teacher_ratio: float | None = None
    """Share hidden from the teacher (amd), less than `ratio`; what the student sees, it sees too."""
    rounding: Literal["keep", "mask"] = "keep"
    """keep: floor(N(1-ratio)) patches are seen (MAE, dBOT); mask: floor(ratio N) are hidden (VideoMAE, AMD)."""
    masks: int = 1
    """Masks of each crop in an update (dbot): the teacher runs once for all of them, the student on each."""
    block_min: int = 16
    """Patches of the smallest block; at most a quarter of what is wanted."""
    block_aspect: float = 0.3
    """Smallest height over width of a block; the largest is 1 / block_aspect."""


@dataclass(frozen=True)
class DbotConfig:
    """The feature-alignment term (dBOT, Liu et al., ICLR 2024)."""

    student: Literal["asymmetric", "symmetric"] = "asymmetric"
    """asymmetric: the encoder sees the visible patches, a decoder predicts; symmetric: the encoder sees mask tokens too
    and a linear head predicts (BEiT; dBOT with CLIP as teacher)."""
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
    """The pixel term (MAE, He et al., CVPR 2022; VideoMAE, Tong et al., NeurIPS 2022)."""

    normalise: bool = True
    """Standardise the pixels of each target patch."""


@dataclass(frozen=True)
class AmdConfig:
    """The two alignment terms beside the pixels (AMD, Zhao et al., CVPR 2024)."""

    direct: tuple[tuple[int, int], ...] = ((6, 12), (12, 24))
    """Pairs of (student block, teacher block), 1-based, compared at the tokens that both see."""
    generation: tuple[tuple[int, int], ...] = ((6, 12), (12, 24))
    """Pairs compared at the tokens that the teacher alone sees; a generator each."""
    loss: Literal["l2", "l1", "smooth_l1"] = "l2"
    reduction: Literal["mean", "sum"] = "mean"
    """Over the pairs of a term: mean as in the published code, sum as in the paper."""
    pixel_weight: float = 1.0
    direct_weight: float = 1.0
    generation_weight: float = 1.0
    generator_depth: int = 2
    """Blocks of a generator, of the teacher's width and heads."""
    align_cls: bool = True
    """Images: direct alignment counts the class token."""


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
    """The block whose output is the target, 1-based; nothing behind it runs. None: the last. The same as `depth`.
    With method amd the pairs of `amd` say it."""
    path: str | None = None
    """For source=file: an export's folder, or a run's."""
    spec: str | None = None
    """For source=model: timm:NAME, hf:FOLDER_OR_ID, random:vit_small?seed=1, or an export's folder."""
    resize: Literal["none", "positions", "pixels"] = "none"
    """How a teacher of another size comes to the student's tokens: it interpolates its positions, or gets pixels of
    its own size."""
    momentum: float | None = None
    """For source=random and previous: the teacher follows the student, teacher = momentum * teacher + (1 - momentum) *
    student. null: it stays as it is (dBOT)."""
    every: int = 1
    """Updates of the student between two of such a teacher."""


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
    method: Literal["mae", "videomae", "dbot", "amd"] = "dbot"
    """mae, videomae: pixels; dbot: a teacher's features; amd: both."""
    epochs: float = 800.0
    steps: int | None = None
    """Optimizer updates; wins over epochs."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of model, decoder, mask, dbot, mae, amd or optimizer that differ here, e.g. {optimizer.blr: 1e-3}."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (fused), linear warm-up and half a cosine, both restarted in every stage."""

    blr: float = 1.5e-4
    """Learning rate for 256 images or clips; the rate used is blr x (what an update sees) / 256."""
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
    teacher: Literal["bf16", "fp32", "fp8"] = "bf16"
    """fp8: e4m3 products in the teacher's inner blocks, as far as its features pass a gate (CUDA only; not exact)."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How a step is carried out. None of it changes a number beyond rounding, so a resume point is not tied to it."""

    checkpointing: Literal["none", "operations", "blocks"] = "none"
    """What the forward pass keeps for the backward: none: everything; operations: not what is cheap to compute again;
    blocks: the inputs of the blocks alone."""
    cuda_graph: Literal["auto", "on", "off"] = "off"
    """The whole step as one CUDA graph; auto: where it can be, else the reason is said once. Unmeasured, so off."""
    ahead: bool = False
    """Compute the teacher's features of the next batch beside the optimizer, on a stream of their own."""
    compile: bool = False
    """torch.compile for each transformer block."""
    shadow: bool = True
    """bf16 copies of the matrices, written by the optimizer in its own pass and read by the products."""


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
    """Defects of the published code of dBOT and AMD, for those who compare with it; all off by default. One word sets
    all of them: compat=upstream, compat=none."""

    unsynchronised_reset: bool = False
    """Each rank draws its own student at a stage boundary, and nobody is told (ranks then train different networks)."""
    keep_optimizer: bool = False
    """Adam's moments and step count survive the student's re-initialisation."""
    keep_patch_bias: bool = False
    """The patch embedding's bias survives the student's re-initialisation."""
    frozen_token: bool = False
    """The mask token of AMD's generators stays as it was drawn."""

    @classmethod
    def from_word(cls, word: str) -> CompatConfig:
        """All defects at once ("upstream"), or not one ("none").

        Raises:
            UserError: another word.
        """
        if word not in ("upstream", "none"):
            raise UserError(f"compat: expected upstream, none or a section of keys, got {word!r}")
        return cls(**{item.name: word == "upstream" for item in fields(cls)})


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
    amd: AmdConfig = field(default_factory=AmdConfig)
    stages: tuple[StageConfig, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
