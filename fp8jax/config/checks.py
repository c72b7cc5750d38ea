"""Refuse combinations of fields that cannot run together on any device."""

from fp8jax.config import bounds
from fp8jax.config.errors import ConfigError
from fp8jax.config.model import Fp8Config, ModelConfig, head_dim
from fp8jax.config.run import Config
from fp8jax.config.sources import parse_held_out, parse_sources
from fp8jax.config.training import MESH_AXES, MeshConfig
from fp8jax.numerics import roles


def check(config: Config) -> None:
    """Raise ConfigError on the first combination of fields that cannot run together."""
    _check_model(config.model)
    _check_fp8(config.fp8, config.model)
    _check_mesh(config.mesh)
    _check_lengths(config)
    if problem := bounds.problem(config):
        raise ConfigError(problem)
    parse_sources(config.data.source)
    parse_held_out(config.data.held_out)
    if config.data.held_out == "none" and config.checkpoint.keep_best:
        raise ConfigError(
            f"config.checkpoint.keep_best: {config.checkpoint.keep_best} needs a held-out loss, and "
            "config.data.held_out is 'none'; set it to 0"
        )
    layers, fallback = config.model.layers, roles.in_bf16(config.warning.fallback)
    _check_overrides("fp8.overrides", config.fp8.overrides, layers)
    _check_overrides("warning.fallback", fallback, layers)


def _check_model(model: ModelConfig) -> None:
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"config.model.kv_heads: {model.kv_heads} does not divide model.heads={model.heads}"
        )
    if model.head_dim is None and model.width % model.heads:
        raise ConfigError(
            f"config.model.heads: {model.heads} does not divide model.width={model.width}; "
            "or set model.head_dim"
        )
    if head_dim(model) % 2:
        raise ConfigError(f"config.model.head_dim: {head_dim(model)} is odd; RoPE rotates pairs")
    if model.rope_scaling_factor > 1:
        _check_rope_scaling(model)


def _check_rope_scaling(model: ModelConfig) -> None:
    if model.rope_scaling == "yarn" and model.rope_theta == 1.0:
        raise ConfigError(
            "config.model.rope_theta: 1.0 has no frequencies for yarn to tell apart; set it above 1"
        )
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if model.rope_scaling == "llama3" and high <= low:
        raise ConfigError(
            f"config.model.rope_high_freq_factor: {high} is not above "
            f"model.rope_low_freq_factor={low}"
        )


def _check_fp8(fp8: Fp8Config, model: ModelConfig) -> None:
    if fp8.head and model.tied_embeddings:
        raise ConfigError(
            "config.fp8.head: True needs config.model.tied_embeddings=False: an FP8 head cannot "
            "share the embedding"
        )
    if fp8.weight_scaling == "delayed" and "delayed" not in fp8.scaling + fp8.overrides:
        raise ConfigError(
            f"config.fp8.weight_scaling: delayed has no effect with "
            f"config.fp8.scaling={fp8.scaling}; set "
            "config.fp8.scaling=delayed, or config.fp8.weight_scaling=current"
        )


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError("config.mesh: only one axis may be -1 (take what is left)")
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(
                f"config.mesh.{axis}: 0 devices; allowed: 1 or more, or -1 to take what is left"
            )


def _check_lengths(config: Config) -> None:
    training, warmup = config.training, config.optimizer.warmup_steps
    if training.microbatches and training.batch_size % training.microbatches:
        raise ConfigError(
            f"config.training.microbatches: {training.microbatches} does not divide "
            f"training.batch_size={training.batch_size}"
        )
    if warmup > training.steps:
        raise ConfigError(
            f"config.optimizer.warmup_steps: {warmup} exceeds training.steps={training.steps}; "
            "leave it out, and it follows the run's length"
        )


def _check_overrides(field: str, text: str, layers: int) -> None:
    try:
        roles.parse_overrides(text, layers=layers)
    except ValueError as error:
        raise ConfigError(f"config.{field}: {error}") from None
