"""Outlier statistics of one tensor: mean, rms, uncentred kurtosis, and what its FP8 cast loses (FOG paper, section 5).

All are float32 scalars, computed in float32 from any floating input, and differentiable by nobody: callers stop gradients.
"""

import jax
import jax.numpy as jnp

from fp8jax.numerics import formats


def kurtosis(x: jax.Array, *, pooled: bool = False) -> jax.Array:
    """Mean over tokens of mean(x^4) / mean(x^2)^2 over the features: 3 for a Gaussian, D at most.

    Args:
        x: [batch, tokens, ..., features].
        pooled: take each sequence (tokens x features) as one sample, as the paper's released code does.

    Tokens are divided by their largest magnitude first, because float32 fourth powers overflow at 1e10; all-zero tokens
    are left out. 0 if nothing is left.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(1, x.ndim)) if pooled else (-1,)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    square = (x / jnp.where(largest > 0, largest, 1.0)) ** 2
    second = jnp.mean(square, axis=axes)
    ratio = jnp.mean(square**2, axis=axes) / jnp.where(second > 0, second, 1.0) ** 2
    counted = second > 0
    return jnp.sum(jnp.where(counted, ratio, 0.0)) / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def moments(x: jax.Array) -> dict[str, jax.Array]:
    """Mean and root mean square over everything."""
    x = x.astype(jnp.float32)
    return {"mean": jnp.mean(x), "rms": jnp.sqrt(jnp.mean(x**2))}


def cast_losses(x: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """What quantising x with a scale does to it.

    Returns:
        `overflow`: fraction of elements that are clipped; `underflow`: fraction that are not zero but become zero;
        `amax`: largest magnitude; `scale`: as given.
    """
    scaled = x.astype(jnp.float32) * (1.0 / scale)
    info = jnp.finfo(dtype)
    # Half of the smallest subnormal rounds to even, which is zero.
    smallest = float(info.smallest_subnormal) / 2
    clipped = jnp.abs(scaled) > formats.max_value(dtype)
    vanished = (x != 0) & (jnp.abs(scaled) <= smallest)
    return {"overflow": jnp.mean(clipped, dtype=jnp.float32), "underflow": jnp.mean(vanished, dtype=jnp.float32),
            "amax": formats.amax(x), "scale": jnp.asarray(scale, jnp.float32)}


def combine(parts: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """Statistics of a whole batch from those of its microbatches, equal in size.

    Args:
        parts: tensor → statistic → float32 [microbatches, ...].
    """
    def one(statistic: str, values: jax.Array) -> jax.Array:
        if statistic == "amax":
            return jnp.max(values, axis=0)
        if statistic == "rms":
            return jnp.sqrt(jnp.mean(values**2, axis=0))
        return jnp.mean(values, axis=0)

    return {name: {key: one(key, values) for key, values in stats.items()} for name, stats in parts.items()}
