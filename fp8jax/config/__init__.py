"""The typed, validated configuration: what can be set, to which values, and what each field means.

A run is configured by an `ml_collections.ConfigDict` made by a file of `presets/`, changed on the command line with
`--config.section.field=value`, and turned here, once, into frozen dataclasses that the rest of fp8jax reads:

    config = fp8jax.config.from_dict(config_dict)     # raises ConfigError with one helpful line
    config.model.width, config.fp8.recipe, ...

The dataclasses of model.py, training.py and run.py are the one place where fields, types, defaults and meanings are written.
`defaults()` makes the ConfigDict that `presets/common.py` starts from, so a field is never declared twice.
"""

from fp8jax.config.checks import check
from fp8jax.config.errors import CheckpointError, ConfigError, DataError
from fp8jax.config.model import (
    ACTIVATIONS,
    ARCHITECTURES,
    BRANCH_OUTPUTS,
    QK_REGULARISERS,
    Fp8Config,
    ModelConfig,
    head_dim,
)
from fp8jax.config.names import SECTIONS, check_name, did_you_mean, fields_like
from fp8jax.config.reading import (
    check_field,
    defaults,
    digest,
    from_dict,
    kind_of,
    read_json,
    to_dict,
)
from fp8jax.config.run import (
    WARNING_ACTIONS,
    WARNING_LEVELS,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LogConfig,
    MonitorConfig,
    ProfileConfig,
    WarningConfig,
    settled,
)
from fp8jax.config.sources import parse_held_out, parse_sources
from fp8jax.config.training import (
    AUTO,
    CHUNK_AUTO,
    GRADIENT_DTYPES,
    MASTER_DTYPES,
    MASTER_ROUNDINGS,
    MESH_AXES,
    OPTIMIZERS,
    REMAT_POLICIES,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "AUTO",
    "BRANCH_OUTPUTS",
    "CHUNK_AUTO",
    "SECTIONS",
    "CheckpointConfig",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "EvaluationConfig",
    "Fp8Config",
    "GRADIENT_DTYPES",
    "LogConfig",
    "MASTER_DTYPES",
    "MASTER_ROUNDINGS",
    "MESH_AXES",
    "MeshConfig",
    "ModelConfig",
    "MonitorConfig",
    "OPTIMIZERS",
    "OptimizerConfig",
    "ProfileConfig",
    "QK_REGULARISERS",
    "REMAT_POLICIES",
    "TrainingConfig",
    "WARNING_ACTIONS",
    "WARNING_LEVELS",
    "WarningConfig",
    "check",
    "check_field",
    "check_name",
    "defaults",
    "did_you_mean",
    "digest",
    "fields_like",
    "from_dict",
    "head_dim",
    "kind_of",
    "parse_held_out",
    "parse_sources",
    "read_json",
    "settled",
    "to_dict",
]
