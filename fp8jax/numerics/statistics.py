"""Outlier statistics of one tensor: mean, rms, uncentred kurtosis, and what its FP8 cast loses (FOG paper, section 5).

All are float32 scalars, computed in float32 from any floating input, and differentiable by nobody: callers stop gradients.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import blockwise, formats
from fp8jax.numerics.formats import Quantised

HEALTH = ("amax", "scale", "overflow", "underflow", "zero", "negative_zero", "signal", "noise")


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


def health(x: jax.Array, q: Quantised, *, elements: int | None = None) -> jax.Array:
    """What a cast did to a tensor: a float32 vector, one entry for each name in HEALTH.

    `amax`: largest magnitude; `scale`: the scale, the largest of them if there are several; fractions of the elements:
    `overflow`, finite or not, beyond the format's maximum; `underflow`, not zero, but zero or -0 after the cast; `zero` and
    `negative_zero`, so before the cast, float32's subnormal numbers among them; `signal` and `noise`: mean squares of the
    tensor and of the cast's error, in units of `scale`, from which comes the signal-to-noise ratio.

    Counts are summed as integers, so that all but signal and noise are the same to the bit on any number of devices.

    Args:
        x: the tensor, floating.
        q: its cast.
        elements: what fractions and means refer to, if x is a part of something larger; parts then add up.
    """
    x = x.astype(jnp.float32)
    scale, elements = jnp.max(q.scale), elements or max(x.size, 1)
    # Some devices take subnormal numbers for zero, and the CPU's compiler makes a float comparison of (bits << 1) != 0.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    nonzero, negative = (bits & 0x7FFFFFFF) >= 0x800000, (bits >> 31) == 1
    vanished = (lax.bitcast_convert_type(q.data, jnp.uint8) & 0x7F) == 0
    clipped = jnp.abs(x * (1.0 / blockwise.spread(q.scale, x.shape))) > formats.max_value(q.data.dtype)
    fractions = (_count(mask) / elements for mask in (clipped, nonzero & vanished, ~nonzero & ~negative, ~nonzero & negative))
    # Beyond 2**40 times the scale everything is error, and its square must stay finite.
    scaled = jnp.clip(x * (1.0 / scale), -(2.0**40), 2.0**40)
    error = scaled - q.data.astype(jnp.float32) * (blockwise.spread(q.scale, x.shape) / scale)
    energies = (jnp.sum(part**2) / elements for part in (scaled, error))
    return jnp.stack([formats.amax(x), scale, *fractions, *energies])


def _count(mask: jax.Array) -> jax.Array:
    """How many are true, float32, from sums of integers that do not overflow below 2**39 elements or 2**23 rows."""
    if mask.ndim == 0 or mask.size == 0:
        return jnp.sum(mask, dtype=jnp.float32)
    rows = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    high, low = jnp.sum(rows >> 8), jnp.sum(rows & 0xFF)
    return high.astype(jnp.float32) * 256 + low.astype(jnp.float32)


def combine(parts: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """Statistics of a whole batch from those of its microbatches, equal in size.

    Args:
        parts: tensor → statistic → float32 [microbatches, ...].
    """
    def one(stats: dict[str, jax.Array], statistic: str) -> jax.Array:
        values = stats[statistic]
        if statistic in ("amax", "scale"):
            return jnp.max(values, axis=0)
        if statistic in ("signal", "noise"):  # each in units of its own microbatch's scale
            return jnp.mean(values * (stats["scale"] / jnp.max(stats["scale"], axis=0)) ** 2, axis=0)
        if statistic == "rms":
            return jnp.sqrt(jnp.mean(values**2, axis=0))
        return jnp.mean(values, axis=0)

    return {name: {key: one(stats, key) for key in stats} for name, stats in parts.items()}
