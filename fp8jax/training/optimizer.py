"""AdamW with a warm-up, stable, decay schedule (FOG paper, Table 6), from optax's parts.

    transform = adamw(config.optimizer)                       # clip, Adam moments, decoupled weight decay
    update, opt_state = transform.update(grads, opt_state, params)
    params = params - learning_rate(config, step) * update

The learning rate is a function of the step alone, kept out of the optimizer's state, so that a skipped update does not
shift the schedule.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fp8jax.config import Config, OptimizerConfig

MATRIX = "w"  # every matrix is stored under this name, and nothing else is


def learning_rate(config: Config, step: jax.Array) -> jax.Array:
    """Learning rate of the update number `step` (from 0): linear warm-up, constant, then down as 1 - sqrt(progress)."""
    optimizer, steps = config.optimizer, config.training.steps
    decay_steps = round(steps * optimizer.decay_fraction)
    count = step.astype(jnp.float32) + 1.0
    warm = jnp.minimum(1.0, count / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    progress = jnp.clip((count - (steps - decay_steps)) / max(decay_steps, 1), 0.0, 1.0)
    peak, final = optimizer.learning_rate, optimizer.final_learning_rate
    return warm * (final + (peak - final) * (1.0 - jnp.sqrt(progress)))


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """The update before it is multiplied by the learning rate. Gradients in, float32 update out."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(params: Any) -> Any:
    """True for matrices, False for gains and scalars."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == MATRIX, params)
