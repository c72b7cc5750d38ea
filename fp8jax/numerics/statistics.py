"""Outlier statistics of one tensor: mean, rms, uncentred kurtosis, and what its FP8 cast loses (FOG paper, section 5).

    distribution(x_btd)["kurtosis"], health(x_btd, quantised)[HEALTH.index("underflow")]

All are float32 scalars, computed in float32 from any floating input, and differentiable by nobody: callers stop gradients.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import blockwise, formats
from fp8jax.numerics.formats import Quantised

HEALTH = ("amax", "scale", "overflow", "underflow", "zero", "negative_zero", "signal", "noise")
DISTRIBUTION = ("mean", "rms", "kurtosis", "pooled_kurtosis")
REPORT = HEALTH + DISTRIBUTION


def distribution(x: jax.Array) -> dict[str, jax.Array]:
    """How the values of a tensor are spread: what DISTRIBUTION names.

    `mean` and `rms` are over everything. `kurtosis` is the mean over tokens of mean(x^4) / mean(x^2)^2 over the features: 3 for a
    Gaussian, D at most. `pooled_kurtosis` takes each sequence (tokens x features) as one sample, as the paper's released code does.

    Tokens, and sequences, are divided by their largest magnitude first, because float32 fourth powers overflow at 1e10;
    all-zero ones are left out of the kurtosis. It is 0 if nothing is left.

    Args:
        x: [batch, tokens, ..., features], floating.
    """
    x = _as_stored(x).astype(jnp.float32)
    # Behind a barrier, or XLA takes maximum and sum of everything in a pass of its own, from x, and not from these.
    largest, total = lax.optimization_barrier(_by_row(jnp.abs(x), x, maxima=1))
    square = (x * (1.0 / _not_zero(largest))[..., None]) ** 2
    second, fourth = (power / x.shape[-1] for power in _by_row(square, square**2))
    within = tuple(range(1, largest.ndim))
    weight = (largest / _not_zero(jnp.max(largest, axis=within, keepdims=True))) ** 2
    pooled = jnp.mean(weight * second, axis=within), jnp.mean(weight**2 * fourth, axis=within)
    top = jnp.max(largest)
    rms = top * jnp.sqrt(jnp.mean((largest / _not_zero(top)) ** 2 * second))
    mean = jnp.sum(total) / float(x.size)  # a Python integer becomes an int32, which ends at 2**31
    return {"mean": mean, "rms": rms, "kurtosis": _mean_ratio(second, fourth), "pooled_kurtosis": _mean_ratio(*pooled)}


def _as_stored(x: jax.Array) -> jax.Array:
    """The tensor rounded to its dtype: XLA is free to go on with what it had before the rounding (1e-4 of a kurtosis, measured)."""
    return x if x.dtype == jnp.float32 else lax.optimization_barrier(x)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < 2.0**-126, 1.0, x)  # some devices take subnormal numbers for zero


def _mean_ratio(second: jax.Array, fourth: jax.Array) -> jax.Array:
    """Mean of fourth / second^2 where second is not 0."""
    ratio = fourth / _not_zero(second) ** 2
    counted = second != 0
    number = jnp.sum(counted.astype(jnp.int32)).astype(jnp.float32)  # float32 loses ones beyond 2**24
    return jnp.sum(jnp.where(counted, ratio, 0.0)) / jnp.maximum(number, 1.0)


def choose(found: dict[str, jax.Array], *, pooled: bool) -> dict[str, jax.Array]:
    """Leaves one kurtosis, under that name: over one token's features, or pooled over a sequence."""
    if "pooled_kurtosis" not in found:
        return found
    kept = {name: value for name, value in found.items() if name != "pooled_kurtosis"}
    return kept | {"kurtosis": found["pooled_kurtosis"]} if pooled else kept


def report(x: jax.Array, q: Quantised, *, spread: bool) -> jax.Array:
    """What a token brings back of one operand of a GEMM: a float32 vector, one entry for each name in REPORT.

    Args:
        x: the operand, [batch, tokens, ..., features].
        q: its cast; without a scale, not cast at all: of HEALTH, only the amax is known then.
        spread: whether the distribution is taken, too. What is not known is NaN.
    """
    of_x = distribution(x) if spread else {}
    unknown = jnp.float32(jnp.nan)
    return jnp.concatenate([health(x, q), jnp.stack([of_x.get(name, unknown) for name in DISTRIBUTION])])


def health(x: jax.Array, q: Quantised, *, elements: int | None = None) -> jax.Array:
    """What a cast did to a tensor: a float32 vector, one entry for each name in HEALTH.

    `amax`: largest magnitude; `scale`: the scale, the largest of them if there are several; fractions of the elements:
    `overflow`, finite or not, beyond the format's maximum; `underflow`, not zero, but zero or -0 after the cast; `zero` and
    `negative_zero`, so before the cast, float32's subnormal numbers among them; `signal` and `noise`: mean squares of the
    tensor and of the cast's error, in units of `scale`, from which comes the signal-to-noise ratio.

    Counts are summed as integers, so that all but signal and noise are the same to the bit on any number of devices.

    Args:
        x: the tensor, floating.
        q: its cast; without a scale, not cast at all: all but the amax is NaN then.
        elements: what fractions and means refer to, if x is a part of something larger; parts then add up.
    """
    if q.scale is None:
        return jnp.full(len(HEALTH), jnp.nan).at[0].set(formats.amax(_as_stored(x)))
    x = _as_stored(x).astype(jnp.float32)
    scale, elements = jnp.max(q.scale), elements or max(x.size, 1)
    by_element = blockwise.spread(q.scale, x.shape)
    # From bits, as some devices take subnormal numbers for zero. Integers, not comparisons: XLA for GPUs writes booleans that several
    # counts share to memory, two bytes an element (seen in programs for H100s).
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    nonzero = jnp.minimum(magnitude >> 23, 1)
    vanished = (lax.bitcast_convert_type(q.data, jnp.uint8) & 0x7F) == 0
    clipped = jnp.abs(x * (1.0 / by_element)) > formats.max_value(q.data.dtype)
    negative_zero = (1 - nonzero) & (bits >> 31)
    largest = jnp.minimum(magnitude, 0x7F800000)  # NaN is as infinity
    top, *counts = _by_row(largest, clipped.astype(jnp.int32), nonzero & vanished.astype(jnp.int32), 1 - nonzero - negative_zero, negative_zero,
                           maxima=1)
    amax = lax.bitcast_convert_type(jnp.max(top, initial=0), jnp.float32)
    scaled = x * (1.0 / scale)
    error = scaled - q.data.astype(jnp.float32) * (by_element / scale)
    return from_rows(amax, scale, counts, [jnp.sum(part**2, axis=-1) for part in (scaled, error)], elements)


def from_rows(amax: jax.Array, scale: jax.Array, counts: Sequence[jax.Array], energies: Sequence[jax.Array], elements: int) -> jax.Array:
    """HEALTH from sums over the rows of a tensor.

    Args:
        amax: of the tensor.
        scale: its largest.
        counts: int32, any shape: overflow, underflow, zero, negative zero; below 2**31 a row.
        energies: float32: squares of the tensor and of the cast's error, in units of `scale`.
        elements: what they refer to: those of all rows, or more if these rows are a part.
    """
    rows, whole = jnp.stack(energies), tuple(range(1, energies[0].ndim + 1))
    most = elements // max(energies[0].size, 1)  # of a row
    # Far beyond the scale everything is error, and its square must stay finite, 2**31 rows of it.
    sums = jnp.concatenate([_count(jnp.stack(counts), most), jnp.sum(jnp.minimum(rows, 2.0**90), axis=whole)])
    return jnp.concatenate([jnp.stack([amax, scale]), sums / float(elements)])


def _by_row(*parts: jax.Array, maxima: int = 0) -> list[jax.Array]:
    """Of the first `maxima` arrays, not negative, the maximum over the last dimension, and the sums of all others; alike in shape and dtype.

    In one reduction: XLA's CPU compiler makes vector instructions of that; of several reductions it writes what they share to memory and
    takes four to six times as long (measured).
    """
    def combine(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jnp.maximum(a, b) if i < maxima else a + b for i, (a, b) in enumerate(zip(one, other, strict=True)))

    rows = [jnp.atleast_1d(part) for part in parts]
    return lax.reduce(rows, [row.dtype.type(0) for row in rows], combine, (rows[0].ndim - 1,))


def _count(rows: jax.Array, most: int) -> jax.Array:
    """Sums of counts over all but the first dimension, float32.

    They are summed as integers that do not wrap: where their sum might, the last dimensions first, then in limbs of few bits.

    Args:
        rows: int32, [sums, ...], of fewer than 2**31 counts each.
        most: none of them is larger; below 2**31.
    """
    most = min(most, 2**31 - 1)
    while rows.ndim > 2 and most * rows.shape[-1] < 2**31 <= most * _number(rows):
        most *= rows.shape[-1]
        rows = jnp.sum(rows, axis=-1)
    axes = tuple(range(1, rows.ndim))
    if most * _number(rows) < 2**31:
        return jnp.sum(rows, axis=axes).astype(jnp.float32)
    bits = max(31 - _number(rows).bit_length(), 1)
    total = jnp.zeros(rows.shape[:1], jnp.float32)
    for shift in range(0, most.bit_length(), bits):
        limbs = (rows >> shift) & (2**bits - 1)
        total += jnp.sum(limbs, axis=axes).astype(jnp.float32) * 2.0**shift
    return total


def _number(rows: jax.Array) -> int:
    """How many counts a sum has."""
    return math.prod(rows.shape[1:])


def combine(parts: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """Statistics of a whole batch from those of its microbatches, equal in size.

    Args:
        parts: tensor → statistic → float32 [microbatches, ...].
    """
    def one(stats: dict[str, jax.Array], statistic: str) -> jax.Array:
        values = stats[statistic]
        if statistic in ("amax", "scale", "max_logit"):
            return jnp.max(values, axis=0)
        if statistic in ("signal", "noise"):  # each in units of its own microbatch's scale
            return jnp.mean(values * (stats["scale"] / jnp.max(stats["scale"], axis=0)) ** 2, axis=0)
        if statistic == "rms":
            return jnp.sqrt(jnp.mean(values**2, axis=0))
        return jnp.mean(values, axis=0)

    return {name: {key: one(stats, key) for key in stats} for name, stats in parts.items()}
