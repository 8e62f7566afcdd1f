"""One YAML file per run, parsed into frozen dataclasses and checked before any process group exists."""

from rcm_mcore.config.mesh import (
    MeshConfig,
    chunks_of_stages,
    layers_of_stages,
    microbatches_of_a_chunk,
    resolve_mesh,
    tokens_per_sample,
    validate_mesh,
)
from rcm_mcore.config.model import MID_TIMES, SIZES, ModelConfig
from rcm_mcore.config.parse import ConfigError, load_config, parse_config, parse_model, to_yaml
from rcm_mcore.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    GuardConfig,
    LogConfig,
    OptimConfig,
    PretrainConfig,
    TimeConfig,
    TrainConfig,
)

__all__ = [
    "MID_TIMES",
    "SIZES",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "GuardConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "TimeConfig",
    "TrainConfig",
    "chunks_of_stages",
    "layers_of_stages",
    "load_config",
    "microbatches_of_a_chunk",
    "parse_config",
    "parse_model",
    "resolve_mesh",
    "to_yaml",
    "tokens_per_sample",
    "validate_mesh",
]
