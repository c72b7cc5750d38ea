"""Build AdamW, AdEMAMix or Muon with a warm-up, stable, decay schedule (FOG paper, Table 6), from
optax's parts.

    transform = make_transform(config.optimizer)              # clip, moments, decoupled weight decay
    update, moments = transform.update(grads, moments, params)
    params = params - learning_rate(config, step) * update

The learning rate is a function of the step alone, kept out of the optimizer's state, so that a
skipped update does not shift the schedule. All of this computes in float32; state_formats.py sets
the bits in which results are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from fp8jax.config import Config, OptimizerConfig
from fp8jax.models.definition import STACKED

MATRIX = "w"  # every matrix is stored under this name, and nothing else is
# With this root mean square, Muon's updates take AdamW's learning rate (Liu et al. 2025, arXiv
# 2502.16982).
_MUON_RMS = 0.2


def learning_rate(config: Config, step: jax.Array) -> jax.Array:
    """Return the learning rate of update `step` (from 0): linear warm-up, constant, then down as 1
    - sqrt(progress).
    """
    optimizer, steps = config.optimizer, config.training.steps
    decay_steps = round(steps * optimizer.decay_fraction)
    count = step.astype(jnp.float32) + 1.0
    warm = jnp.minimum(1.0, count / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    progress = jnp.clip((count - (steps - decay_steps)) / max(decay_steps, 1), 0.0, 1.0)
    peak, final = optimizer.learning_rate, optimizer.final_learning_rate
    return warm * (final + (peak - final) * (1.0 - jnp.sqrt(progress)))


def make_transform(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the update before the learning rate; it takes float32 gradients and gives a float32
    update.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    make = {"adamw": _adam, "ademamix": _ademamix, "muon": _muon}[config.name]
    return optax.chain(
        clip, make(config), optax.add_decayed_weights(config.weight_decay, mask=decayed)
    )


def decayed(params: Any) -> Any:
    """Return True for matrices, False for gains and scalars."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == MATRIX, params)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _ademamix(config: OptimizerConfig) -> optax.GradientTransformation:
    return contrib.scale_by_ademamix(
        b1=config.b1, b2=config.b2, b3=config.b3, alpha=config.alpha, eps=config.eps
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return Muon for the blocks' matrices, Adam for the rest."""

    def axes(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _muon_axes(path), params)

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if _muon_axes(path) else "adam", params
        )

    # contrib.muon alone would give the other parameters to an Adam with Nesterov's momentum.
    muon = contrib.muon(
        1.0,
        weight_decay=0.0,
        eps=config.eps,
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=axes,
    )
    subtracted = optax.chain(
        muon, optax.scale(-1.0)
    )  # its update is to be added, ours to be subtracted
    return optax.partition({"muon": subtracted, "adam": _adam(config)}, kinds)


def _muon_axes(path: Any) -> contrib.MuonDimensionNumbers | None:
    """Return inputs and outputs of a block's matrix, whose first dimension is the layers; None for
    other parameters.
    """
    names = [key.key for key in path]
    if names[0] != STACKED or names[-1] != MATRIX:
        return None
    inputs, dims = {"qkv": (1, 5), "out": (3, 5)}.get(names[-2], (1, 3))
    return contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, dims)))
