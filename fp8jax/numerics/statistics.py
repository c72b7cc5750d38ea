"""Take outlier statistics of one tensor: mean, rms, uncentred kurtosis, and the losses of its FP8
cast (FOG paper, section 5).

    distribution(x_btd)["kurtosis"], health(x_btd, quantised)[HEALTH.index("underflow")]

All are float32 scalars, computed in float32 from any floating input, and not differentiable:
callers stop gradients.

Padding does not count: `counted`, bool [batch, tokens], marks the tokens that enter. The amount
that entered comes with the numbers (WEIGHTS), so that microbatches are averaged by it; a number is
unknown (`known`) if no token entered, or none was cast.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import blockwise, formats
from fp8jax.numerics.formats import Quantised

HEALTH = ("amax", "scale", "overflow", "underflow", "zero", "negative_zero", "signal", "noise")
DISTRIBUTION = ("mean", "rms", "kurtosis", "pooled_kurtosis")
# Amounts that entered: tokens; the tokens and heads that the kurtosis is a mean over; sequences,
# for the pooled one.
WEIGHTS = ("tokens", "rows", "sequences")
REPORT = HEALTH + DISTRIBUTION + WEIGHTS


def distribution(x: jax.Array, counted: jax.Array | None = None) -> dict[str, jax.Array]:
    """Return how the values of a tensor are distributed: the numbers in DISTRIBUTION, and WEIGHTS.

    `mean` and `rms` are over everything. `kurtosis` is the mean over tokens of mean(x^4) /
    mean(x^2)^2 over the features: 3 for a Gaussian, D at most. `pooled_kurtosis` takes each
    sequence (tokens x features) as one sample, as the paper's released code does.

    Tokens, and sequences, are divided by their largest magnitude first, because float32 fourth
    powers overflow at 1e10; all-zero ones are left out of the kurtosis. It is 0 if none is left.

    Args:
        x: [batch, tokens, ..., features], floating.
        counted: bool [batch, tokens]: the tokens that count; None counts all.
    """
    x = _as_stored(x).astype(jnp.float32)
    # Without a barrier XLA takes the maximum and sum over all values in a pass of its own, from x,
    # and not from these.
    largest, total = lax.optimization_barrier(_by_row(jnp.abs(x), x, maxima=1))
    square = (x * (1.0 / _not_zero(largest))[..., None]) ** 2
    second, fourth = (power / x.shape[-1] for power in _by_row(square, square**2))
    largest, total, second, fourth = (
        _kept(part, counted) for part in (largest, total, second, fourth)
    )
    within = tuple(range(1, largest.ndim))
    weight = (largest / _not_zero(jnp.max(largest, axis=within, keepdims=True))) ** 2
    in_each, in_all = _rows(largest.shape, counted)
    pooled = (
        jnp.sum(weight * second, axis=within) / in_each,
        jnp.sum(weight**2 * fourth, axis=within) / in_each,
    )
    top = jnp.max(largest)
    rms = top * jnp.sqrt(jnp.sum((largest / _not_zero(top)) ** 2 * second) / in_all)
    mean = jnp.sum(total) / in_all / x.shape[-1]
    (kurtosis, rows), (pooled_kurtosis, sequences) = (
        _mean_ratio(second, fourth),
        _mean_ratio(*pooled),
    )
    return {
        "mean": mean,
        "rms": rms,
        "kurtosis": kurtosis,
        "pooled_kurtosis": pooled_kurtosis,
        "tokens": tokens(x.shape, counted),
        "rows": rows,
        "sequences": sequences,
    }


def tokens(shape: tuple[int, ...], counted: jax.Array | None) -> jax.Array:
    """Return how many tokens of an array [batch, tokens, ...] count, float32."""
    return (
        jnp.float32(math.prod(shape[:2]))
        if counted is None
        else jnp.sum(counted.astype(jnp.int32)).astype(jnp.float32)
    )


def _kept(rows: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Return [batch, tokens, ...], zero where a token does not count."""
    return (
        rows
        if counted is None
        else jnp.where(
            counted.reshape(*counted.shape, *(1,) * (rows.ndim - 2)),
            rows,
            jnp.zeros((), rows.dtype),
        )
    )


def _rows(
    shape: tuple[int, ...], counted: jax.Array | None
) -> tuple[jax.Array | float, jax.Array | float]:
    """Return how many rows [batch, tokens, ...] count, of each sequence and in all; at least 1, to
    divide by.
    """
    if counted is None:
        return float(math.prod(shape[1:])), float(math.prod(shape))
    in_each = jnp.sum(counted.astype(jnp.int32), axis=1).astype(jnp.float32) * float(
        math.prod(shape[2:])
    )
    return jnp.maximum(in_each, 1.0), jnp.maximum(jnp.sum(in_each), 1.0)


def _as_stored(x: jax.Array) -> jax.Array:
    """Return the tensor rounded to its dtype: XLA may continue with values before rounding (1e-4 of
    a kurtosis, measured).
    """
    return x if x.dtype == jnp.float32 else lax.optimization_barrier(x)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < 2.0**-126, 1.0, x)  # some devices treat subnormal numbers as zero


def _mean_ratio(second: jax.Array, fourth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean of fourth / second^2 where second is not 0, and how many those are."""
    ratio = fourth / _not_zero(second) ** 2
    entered = second != 0
    number = jnp.sum(entered.astype(jnp.int32)).astype(
        jnp.float32
    )  # float32 loses ones beyond 2**24
    return jnp.sum(jnp.where(entered, ratio, 0.0)) / jnp.maximum(number, 1.0), number


def choose(found: dict[str, jax.Array], *, pooled: bool) -> dict[str, jax.Array]:
    """Keep one kurtosis and its count, as `kurtosis` and `rows`: over one token's features, or
    pooled over a sequence.
    """
    if "pooled_kurtosis" not in found:
        return found
    kept = {
        name: value for name, value in found.items() if name not in ("pooled_kurtosis", "sequences")
    }
    return (
        kept | {"kurtosis": found["pooled_kurtosis"], "rows": found["sequences"]}
        if pooled
        else kept
    )


def report(
    x: jax.Array, q: Quantised, *, spread: bool, counted: jax.Array | None = None
) -> jax.Array:
    """Return a token's cotangent for one operand of a GEMM: a float32 vector, one entry for each
    name in REPORT.

    Args:
        x: the operand, [batch, tokens, ..., features].
        q: its cast; without a scale it is not cast, and of HEALTH only the amax is known.
        spread: whether the distribution is taken, too; otherwise it is 0, and taken of no rows.
        counted: bool [batch, tokens]: the tokens that count; None counts all.
    """
    found = health(x, q, counted=counted)
    return _with_rest(
        found, distribution(x, counted) if spread else {"tokens": tokens(x.shape, counted)}
    )


def _with_rest(found: jax.Array, rest: dict[str, jax.Array]) -> jax.Array:
    """Return REPORT from HEALTH and the other known numbers."""
    return jnp.concatenate(
        [found, jnp.stack([jnp.float32(rest.get(name, 0.0)) for name in (*DISTRIBUTION, *WEIGHTS)])]
    )


def health(
    x: jax.Array, q: Quantised, *, elements: int | None = None, counted: jax.Array | None = None
) -> jax.Array:
    """Return the effects of a cast on a tensor: a float32 vector, one entry for each name in
    HEALTH.

    `amax`: largest magnitude; `scale`: the scale, the largest of them if there are several;
    fractions of the elements: `overflow`, finite or not, beyond the format's maximum; `underflow`,
    not zero, but zero or -0 after the cast; `zero` and `negative_zero`, so before the cast,
    float32's subnormal numbers among them; `signal` and `noise`: mean squares of the tensor and of
    the cast's error, in units of `scale`, from which comes the signal-to-noise ratio.

    Counts are summed as integers, so that all but signal and noise are bit-equal on any number of
    devices.

    Args:
        x: the tensor, floating.
        q: its cast; without a scale it is not cast, and all but the amax is 0, the scale too, which
            no cast has.
        elements: number of elements that fractions and means refer to, if x is a part of a larger
            array; parts then add up.
        counted: bool [batch, tokens]: the tokens that count; None counts all. The amax and the
            scale are those of all, as is the cast.
    """
    if q.scale is None:
        return jnp.zeros(len(HEALTH)).at[0].set(formats.amax(_as_stored(x)))
    x = _as_stored(x).astype(jnp.float32)
    scale, elements = jnp.max(q.scale), elements or max(x.size, 1)
    by_element = blockwise.spread(q.scale, x.shape)
    # Magnitudes come from bits, as some devices treat subnormal numbers as zero. Counts are
    # integers, not comparisons: XLA for GPUs writes booleans that several counts share to memory,
    # two bytes per element (seen in programs for H100s).
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    nonzero = jnp.minimum(magnitude >> 23, 1)
    vanished = (lax.bitcast_convert_type(q.data, jnp.uint8) & 0x7F) == 0
    clipped = jnp.abs(x * (1.0 / by_element)) > formats.max_value(q.data.dtype)
    negative_zero = (1 - nonzero) & (bits >> 31)
    largest = jnp.minimum(magnitude, 0x7F800000)  # NaN counts as infinity
    top, *counts = _by_row(
        largest,
        clipped.astype(jnp.int32),
        nonzero & vanished.astype(jnp.int32),
        1 - nonzero - negative_zero,
        negative_zero,
        maxima=1,
    )
    amax = lax.bitcast_convert_type(jnp.max(top, initial=0), jnp.float32)
    scaled = x * (1.0 / scale)
    error = scaled - q.data.astype(jnp.float32) * (by_element / scale)
    energies = [jnp.sum(part**2, axis=-1) for part in (scaled, error)]
    counts, energies = ([_kept(rows, counted) for rows in parts] for parts in (counts, energies))
    found = from_rows(amax, scale, counts, energies, elements)
    return found if counted is None else found.at[2:].multiply(_factor(counted))


def of_gradient(
    found: jax.Array, shape: tuple[int, ...], counted: jax.Array | None, *, mean: Any = 0.0
) -> jax.Array:
    """Return REPORT, without kurtosis, of a gradient that exists only in parts; padding, with zero
    gradients, does not count.

    Args:
        found: HEALTH of the whole gradient.
        shape: [batch, tokens, ...].
        counted: bool [batch, tokens]: the tokens that count; None counts all.
        mean: mean of the whole gradient.
    """
    factor = 1.0 if counted is None else _factor(counted)
    of = dict(zip(HEALTH, found, strict=True))
    for name in HEALTH[2:]:
        of[name] = of[name] * factor
    if counted is not None:
        of["zero"] = jnp.where(factor > 0, jnp.maximum(of["zero"] + 1 - factor, 0.0), 0.0)
    rest = {
        "mean": mean * factor,
        "rms": of["scale"] * jnp.sqrt(of["signal"]),
        "tokens": tokens(shape, counted),
    }
    return _with_rest(jnp.stack(list(of.values())), rest)


def _factor(counted: jax.Array) -> jax.Array:
    """Return the factor from a mean over all tokens to one over those that count: their inverse
    share, 0 without any.
    """
    number = tokens(counted.shape, counted)
    return jnp.where(number > 0, float(counted.size) / jnp.maximum(number, 1.0), 0.0)


def from_rows(
    amax: jax.Array,
    scale: jax.Array,
    counts: Sequence[jax.Array],
    energies: Sequence[jax.Array],
    elements: int,
) -> jax.Array:
    """Return HEALTH from sums over the rows of a tensor.

    Args:
        amax: amax of the tensor.
        scale: its largest scale.
        counts: int32, any shape: overflow, underflow, zero, negative zero; below 2**31 per row.
        energies: float32: squares of the tensor and of the cast's error, in units of `scale`.
        elements: number of elements they refer to: those of all rows, or more if these rows are a
            part.
    """
    rows, whole = jnp.stack(energies), tuple(range(1, energies[0].ndim + 1))
    most = elements // max(energies[0].size, 1)  # elements of a row
    # Far beyond the scale a value is all error, and its square must stay finite, over 2**31 rows.
    sums = jnp.concatenate(
        [_count(jnp.stack(counts), most), jnp.sum(jnp.minimum(rows, 2.0**90), axis=whole)]
    )
    return jnp.concatenate([jnp.stack([amax, scale]), sums / float(elements)])


def _by_row(*parts: jax.Array, maxima: int = 0) -> list[jax.Array]:
    """Return maxima over the last dimension of the first `maxima` arrays, not negative, and sums of
    the others, all of one shape.

    One reduction does it: XLA's CPU compiler makes vector instructions of that; for several
    reductions it writes what they share to memory and takes four to six times as long (measured).
    """

    def combine(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(
            jnp.maximum(a, b) if i < maxima else a + b
            for i, (a, b) in enumerate(zip(one, other, strict=True))
        )

    rows = [jnp.atleast_1d(part) for part in parts]
    return lax.reduce(rows, [row.dtype.type(0) for row in rows], combine, (rows[0].ndim - 1,))


def _count(rows: jax.Array, most: int) -> jax.Array:
    """Return sums of counts over all but the first dimension, float32.

    They are summed as integers that do not wrap: if their sum might, the last dimensions come
    first, then limbs of few bits.

    Args:
        rows: int32, [sums, ...], of fewer than 2**31 counts each.
        most: an upper bound of each, below 2**31.
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
    """Return how many counts a sum has."""
    return math.prod(rows.shape[1:])


def combine(parts: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """Return the statistics of a whole batch from those of its microbatches, each weighed by the
    amount that entered it.

    Args:
        parts: tensor → statistic → float32 [microbatches, ...]; without `tokens` and `rows`, all
            weigh the same.
    """
    return {name: {key: _combined(stats, key) for key in stats} for name, stats in parts.items()}


def _combined(stats: dict[str, jax.Array], statistic: str) -> jax.Array:
    values = stats[statistic]
    if statistic in WEIGHTS:
        return jnp.sum(values, axis=0)
    if statistic == "amax":
        return jnp.max(values, axis=0)
    weights = stats.get("rows" if statistic == "kurtosis" else "tokens", jnp.ones_like(values))
    if statistic == "max_logit":
        top = jnp.max(jnp.where(weights > 0, values, -jnp.inf), axis=0)
        return jnp.where(jnp.sum(weights, axis=0) > 0, top, 0.0)
    if statistic == "scale":
        return _largest_scale(stats, weights)
    if statistic in ("signal", "noise"):  # in units of its own microbatch's scale
        values = (
            values
            * jnp.minimum(stats["scale"] / _not_zero(_largest_scale(stats, weights)), 1.0) ** 2
        )
    if statistic == "rms":
        top = jnp.max(
            jnp.where(weights > 0, values, 0.0), axis=0
        )  # the squares themselves may overflow
        return top * jnp.sqrt(_mean((values / _not_zero(top)) ** 2, weights))
    return _mean(values, weights)


def _largest_scale(stats: dict[str, jax.Array], weights: jax.Array) -> jax.Array:
    """Return the largest scale of the microbatches that had values to cast; without values the
    scale is 1 and has no meaning.
    """
    entered = (weights > 0) & (stats["amax"] > 0)
    entered = entered | ~jnp.any(entered, axis=0)
    return jnp.max(jnp.where(entered, stats["scale"], 0.0), axis=0)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted mean over the first dimension; a value without weight does not count even
    if it is not finite.
    """
    total = jnp.sum(jnp.where(weights > 0, values * weights, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(weights, axis=0), 1.0)
