"""The settings of a run: YAML files of differences over a base, command-line overrides, one frozen dataclass."""

from sana.config.load import dump_config, load_config, parse_overrides
from sana.config.schema import (
    DataConfig,
    ModelConfig,
    ResumeConfig,
    SanaConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TrainConfig,
    VAEConfig,
)
from sana.config.transformer import transformer_overrides
from sana.config.yaml_io import ConfigError

__all__ = [
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "ResumeConfig",
    "SanaConfig",
    "SchedulerConfig",
    "TextEncoderConfig",
    "TrainConfig",
    "VAEConfig",
    "dump_config",
    "load_config",
    "parse_overrides",
    "transformer_overrides",
]
