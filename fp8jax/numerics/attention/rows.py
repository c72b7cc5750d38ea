"""Compute FP8 attention of a block of query rows against a prefix of the keys, which all backends
of `attention` share.

    o, weights = output(call, q, k, v, visible(0, t, s))                         # forward
    p, ds = score_gradient(call, q, k, v, residuals, visible(0, t, s))           # backward, first half
    dq, dk, dv = input_gradients(call, p, quantised_ds, q, k, do)                # second half

The rows may be all queries or some of them; the keys must reach at least to the last row. A row's
result does not depend on the block that it is in, up to the order of float32 sums. Letters as in
`attention`: S, P, dP and dS are [b, k, t, g, s].

Inputs and dS are quantised by the caller, because their scales belong to whole tensors.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.numerics import formats
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.gemm import gemm
from fp8jax.numerics.gemm_sharding import Partition
from fp8jax.numerics.recipes import ATTENTION_ROLES, GemmRecipe

SCORES, VALUES = ATTENTION_ROLES
_gemm = functools.partial(gemm, out_dtype=jnp.float32)

# P is at most 1, so 1/256 uses e4m3 up to 256 of 448: the next power of two would saturate.
P_SCALE = 1.0 / 256
# The part of a row's total that goes into dO. Of 2**17 equal keys 2**-11 is left then, five binades
# above e4m3's subnormal numbers.
ROW_BITS = 6
LOG2_E = math.log2(math.e)

# Dimension numbers: (contracting lhs, rhs), (batch lhs, rhs). S is [b, k, t, g, s].
_QK = (((4,), (3,)), ((0, 2), (0, 2)))  # q_btkgh · k_bskh → S_bktgs, also dP = dO · v
_PV = (((4,), (1,)), ((0, 1), (0, 2)))  # P_bktgs · v_bskh → O_bktgh, also dQ = dS · k
_PTDO = (((2, 3), (1, 3)), ((0, 1), (0, 2)))  # P_bktgs · dO_btkgh → dV_bksh, also dK = dSᵀ · q


class Call(NamedTuple):
    """The static arguments of one attention: recipes of the two roles, the factor on scores, the
    dtype of activations.

    Attributes:
        health: backends report all of `statistics.HEALTH` for the cast of dS, not only its amax.
        partition: how operands lie on the mesh; None without a mesh, or if the compiler chooses.
    """

    scores: GemmRecipe
    values: GemmRecipe
    softmax_scale: float
    dtype: jnp.dtype
    health: bool = False
    partition: Partition | None = None


class Operands(NamedTuple):
    """The inputs of the GEMMs: q_btkgh, k_bskh, v_bskh, and the int32 segment_ids [b, s] or None."""

    q: Quantised
    k: Quantised
    v: Quantised
    segment_ids: jax.Array | None


class Residuals(NamedTuple):
    """The residuals of each query for the backward pass.

    Attributes:
        do: [b, t, k, g, h], the output's gradient divided by the row's factor, as cast.
        offset: float32 [b, t, k, g], with which exp2(S - offset) is P times the row's factor.
        delta: float32 [b, t, k, g], rowsum(do * O), of that cast.
    """

    do: Quantised
    offset: jax.Array
    delta: jax.Array


class Weights(NamedTuple):
    """The softmax's level and weight per query, float32 [b, t, k, g].

    They are the ceil of the largest score in base 2, and the sum of P~ as cast, 0 without a visible
    key.
    """

    level: jax.Array
    total: jax.Array


def visible(
    start: int | jax.Array, queries: int, keys: int, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Return which keys a query may see: those up to its own position, within its segment.

    Args:
        start: position of the first query; may be traced.
        queries: number of queries.
        keys: number of keys, which start at position 0.
        segment_ids: int32 [b, length] of the whole sequence.

    Returns:
        bool [b, queries, keys], or [1, queries, keys] without segments.
    """
    causal = (start + jnp.arange(queries))[:, None] >= jnp.arange(keys)
    if segment_ids is None:
        return causal[None]
    of_queries = jax.lax.dynamic_slice_in_dim(segment_ids, start, queries, axis=1)
    return causal & (of_queries[:, :, None] == segment_ids[:, None, :keys])


def output(
    call: Call, q: Quantised, k: Quantised, v: Quantised, mask: jax.Array
) -> tuple[jax.Array, Weights]:
    """Return O, [b, t, k, g, h] in the dtype of activations, and the softmax's weights for the
    backward pass.
    """
    logits = _logits(call, q, k, mask)
    # A row without a visible key has a maximum of -inf; 0 in its place makes its probabilities 0,
    # not NaN.
    ceiling = jnp.ceil(jnp.max(logits, axis=-1, keepdims=True))
    ceiling = jnp.where(jnp.isneginf(ceiling), 0.0, ceiling)
    qp = _quantise_p(jnp.exp2(logits - ceiling), call.values, v.data.dtype)
    # The weights of an average sum to 1: where a row is flat, all its probabilities round the same
    # way, by up to 6%.
    total = jnp.sum(formats.dequantise(qp), axis=-1, keepdims=True)
    o = _gemm(qp, v, _PV, call.values, VALUES, "fprop")
    o = o / jnp.where(total > 0, total, 1.0)
    return swap_heads(o).astype(call.dtype), Weights(
        swap_heads(ceiling[..., 0]), swap_heads(total[..., 0])
    )


def row_factors(call: Call, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Return the factor and the offset of each row in the backward pass, float32 [b, t, k, g]; see
    `Residuals`.

    P is P~ / total. Its GEMM with dO sums over rows, so all rows share one scale, and a row cast
    alone that spreads over 2**14 keys and more would fall among e4m3's subnormal numbers. So P~ is
    cast again as in the forward pass, and dO is divided by the total. A total beyond 2**ROW_BITS is
    divided between the two, by an exact power of two, as dO's format ends somewhere, too.
    """
    if not call.values.fp8:
        total = jnp.where(weights.total > 0, weights.total, 1.0)
        return jnp.ones_like(total), jnp.where(
            weights.total > 0, weights.level + jnp.log2(total), jnp.inf
        )
    exponent = (
        jax.lax.bitcast_convert_type(weights.total, jnp.int32) >> 23
    ) - 126  # total = f * 2**exponent, 1/2 <= f < 1
    shift = jnp.maximum(exponent - ROW_BITS, 0)
    power = jax.lax.bitcast_convert_type(
        (127 - shift) << 23, jnp.float32
    )  # 2**-shift; exp2 may be off in its last bit
    empty = weights.total == 0
    return jnp.where(empty, 1.0, weights.total * power), jnp.where(
        empty, jnp.inf, weights.level + shift.astype(jnp.float32)
    )


def score_gradient(
    call: Call, q: Quantised, k: Quantised, v: Quantised, residuals: Residuals, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return P times the rows' factors and dS, before their casts, float32 [b, k, t, g, s]; dS
    without the softmax scale.
    """
    p = jnp.exp2(_logits(call, q, k, mask) - swap_heads(residuals.offset)[..., None])
    dp = _gemm(residuals.do, v, _QK, call.values, VALUES, "dgrad")
    return p, p * (dp - swap_heads(residuals.delta)[..., None])


def input_gradients(
    call: Call, p: jax.Array, ds: Quantised, q: Quantised, k: Quantised, do: Quantised
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return these rows' dQ, [b, t, k, g, h], and their part of dK and dV, [b, k, s, h]; all
    float32.
    """
    qp = _quantise_p(p, call.values, do.data.dtype)
    dv = _gemm(qp, do, _PTDO, call.values, VALUES, "wgrad")
    dq = _gemm(ds, k, _PV, call.scores, SCORES, "dgrad") * call.softmax_scale
    dk = _gemm(ds, q, _PTDO, call.scores, SCORES, "wgrad") * call.softmax_scale
    return swap_heads(dq), dk, dv


def spread_of_scores(
    call: Call, q: Quantised, k: Quantised, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return per query, float32 [b, k, g, t], the largest visible score, infinite if one is NaN,
    and the entropy in nats.

    Scores are natural ones, with the softmax scale; the entropy is that of the probabilities before
    their cast.
    """
    logits = _logits(call, q, k, mask)
    top = jnp.max(logits, axis=-1, keepdims=True)
    p = jnp.exp2(logits - top)
    total = jnp.sum(p, axis=-1)
    below = jnp.sum(jnp.where(p > 0, p * (logits - top), 0.0), axis=-1)  # a hidden key has 0 * -inf
    largest = jnp.where(jnp.isnan(top), jnp.inf, top)  # a maximum over devices drops NaN
    entropy = jnp.log2(total) - below / total
    return jnp.swapaxes(largest[..., 0], 2, 3) / LOG2_E, jnp.swapaxes(entropy, 2, 3) / LOG2_E


def amax_by_head(x: jax.Array, *, emulated: bool = False) -> jax.Array:
    """Return the amax of each sequence and KV head of [b, k, ...], so that one reduction over
    devices at the end suffices.
    """
    return jax.vmap(jax.vmap(functools.partial(formats.amax, emulated=emulated)))(x)


def swap_heads(x: jax.Array) -> jax.Array:
    """Transpose [b, t, k, ...] to [b, k, t, ...] and back."""
    return jnp.moveaxis(x, 1, 2)


def _logits(call: Call, q: Quantised, k: Quantised, mask: jax.Array) -> jax.Array:
    """Return scores in base 2, float32, -inf for keys that a query may not see."""
    s = _gemm(q, k, _QK, call.scores, SCORES, "fprop")
    # It is tied to the mask: a constant of this shape would be moved out of the loop over layers
    # and kept.
    low, _ = jax.lax.optimization_barrier((jnp.float32(-jnp.inf), mask[0, 0, 0]))
    return jnp.where(mask[:, None, :, None, :], s * (call.softmax_scale * LOG2_E), low)


def _quantise_p(p: jax.Array, recipe: GemmRecipe, dtype: jnp.dtype) -> Quantised:
    """Quantise P at its fixed scale; cast it if the role is not FP8."""
    if not recipe.fp8:
        return Quantised(p.astype(dtype), None)
    return formats.quantise(p, jnp.float32(P_SCALE), formats.E4M3, emulated=recipe.emulated)
