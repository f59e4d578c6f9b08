"""What a run is made of: frozen dataclasses, filled from a YAML recipe and from dotted keys on the command line.

Every key has one spelling, the same in YAML (nested), in ``key=value`` and in ``--key value``: ``optimizer.blr``,
``stages.1.epochs``. Unknown keys are errors that name the nearest known one. :func:`load` is the only way in that
reads files; the dataclasses themselves can be built from Python without it.
"""

from cohobate.config.checking import check, for_stage
from cohobate.config.conversion import assign, flatten, suggestion, to_dict
from cohobate.config.reading import bound, dump, fingerprint, from_dict, load, recipes
from cohobate.config.schema import (
    AmdConfig,
    CheckpointConfig,
    CompatConfig,
    Config,
    DataConfig,
    DbotConfig,
    DecoderConfig,
    EvaluateConfig,
    ExecutionConfig,
    LogConfig,
    MaeConfig,
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)

__all__ = [
    "AmdConfig",
    "CheckpointConfig",
    "CompatConfig",
    "Config",
    "DataConfig",
    "DbotConfig",
    "DecoderConfig",
    "EvaluateConfig",
    "ExecutionConfig",
    "LogConfig",
    "MaeConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "StageConfig",
    "StudentConfig",
    "TeacherConfig",
    "assign",
    "bound",
    "check",
    "dump",
    "fingerprint",
    "flatten",
    "for_stage",
    "from_dict",
    "load",
    "recipes",
    "suggestion",
    "to_dict",
]
