"""Flash attention in FP8 as Pallas kernels for Triton: forward, dQ, dK with dV, and statistics;
pallas.py calls them.

Every GEMM is a product of two FP8 tiles. Hopper's tensor cores read both operands of one with the
contracted dimension contiguous, so a GEMM that contracts tokens takes a transposed copy: V in the
forward pass, K for dQ, Q and dO for dK and dV (names ending in `_ht`). The dK and dV kernel forms S
and P transposed, [keys, queries], so that P and dS are left operands, which need no copy: they go
from registers to the tensor cores.

The kernels compute what rows.py does, tile by tile: P~ = exp2(S·c - ceil(m)) at scale 1/256 with m
the running row maximum, so that moving to a later maximum multiplies by an exact power of two; O
divided by the sum of P~ as cast; in the backward pass P~ again, of the last maximum, and dS before
the softmax scale. All arithmetic between the GEMMs is float32. Tiles above the diagonal are
skipped.

A kernel sees one head of one sequence (for dK and dV one KV head with its `g` query heads). Letters
as in `attention`; lengths are whole numbers of tiles. `factors` are the scalars that the scales
fold into, by the names below. What a kernel reads comes as one tuple of references, what it writes
as references after it.

In steps with statistics the dQ kernel also counts the effects of the cast of dS, and `scores` takes
the largest logit and the entropy of each query.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fp8jax.numerics import formats
from fp8jax.numerics.attention.rows import P_SCALE
from fp8jax.numerics.triton_dot import dot, exp2, fma

# P's scale is a power of two, so it is added to exponents.
P_BITS = -int(math.log2(P_SCALE))


class Tile(NamedTuple):
    """The tiling of a kernel: queries and keys per tile, warps of a program, stages of the loads'
    pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """The static arguments of a kernel.

    Attributes:
        tile, length: in tokens.
        ds_dtype: format of dS.
        interpret: whether Pallas interprets it.
        precise: names of the passes (`fprop`, `dgrad`, `wgrad`) whose sums over tiles are float32;
            the others stay in the tensor cores' accumulators, whose 14 bits per term suffice for a
            tile, and which cost neither registers nor a wait.
        health: whether the cast of dS is counted.
    """

    tile: Tile
    length: int
    ds_dtype: Any
    interpret: bool
    precise: tuple[str, ...] = ()
    health: bool = False


# The dQ kernel's sums over the keys of each query, and their dtypes, besides the largest |dS|,
# which it always takes.
TALLY = ("overflow", "underflow", "nonzero", "negative_zero", "signal", "noise")
TALLY_DTYPES = (jnp.int32,) * 4 + (jnp.float32,) * 2


# Indices of the scalars in `factors`. SCORE: softmax scale * log2(e) * scale of q * scale of k.
# VALUE: scale of v.
SCORE, VALUE = 0, 1
# In the backward kernels, DS: scale of dO * scale of v / scale of dS / 256. GRADIENT: scale of dS *
# softmax scale * scale of k for dQ, of q for dK. DV: scale of dO / 256.
DS, GRADIENT, DV = 1, 2, 3


class ForwardInputs(NamedTuple):
    """The inputs of `forward`."""

    factors: Any
    q: Any
    k: Any
    v_ht: Any
    segments: Any


class ScoreInputs(NamedTuple):
    """The inputs of `scores`."""

    factors: Any
    q: Any
    k: Any
    segments: Any


class QueryInputs(NamedTuple):
    """The inputs of `query_gradient`.

    do, offset, shift: each row's dO divided by its factor, as cast; 8 - `Residuals.offset`;
        -rowsum(do * O) / scale of dS / 256; so that dS = 2**(s factor + offset) * (dp factor +
        shift), where the row's factor cancels.
    """

    factors: Any
    q: Any
    k: Any
    k_ht: Any
    v: Any
    do: Any
    offset: Any
    shift: Any
    segments: Any


class KeyInputs(NamedTuple):
    """The inputs of `key_gradients`; do, offset, shift are as in QueryInputs."""

    factors: Any
    k: Any
    v: Any
    q: Any
    q_ht: Any
    do: Any
    do_ht: Any
    offset: Any
    shift: Any
    segments: Any


def forward(shape: Shape, x: ForwardInputs, o: Any, level: Any, weight: Any) -> None:
    """Compute O, [queries, h], and for each query the ceil of its largest score in base 2 and the
    sum of its P~ as cast.
    """
    factors, q, k, v_ht, segments = x
    rows, keys = shape.tile.queries, shape.tile.keys
    first = _from_the_end(0) * rows
    q_tile, factor = q[...], factors[SCORE]
    own = None if segments is None else segments[pl.ds(first, rows)]

    def step(j, carry, masked):
        total, weights, peak = carry
        s = dot(
            q_tile, k[pl.ds(j * keys, keys), :].T, interpret=shape.interpret
        )  # not scaled yet: the factor is positive
        if masked:
            s = jnp.where(_visible(first, j * keys, rows, keys, own, segments), s, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.ceil(jnp.max(s, axis=1) * factor))
        # A row without any visible key so far has a peak of -inf; 0 in its place makes its
        # probabilities 0, not NaN.
        finite = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        p = _cast(_exponentials(s, factor, (P_BITS - finite)[:, None], shape), formats.E4M3, shape)
        moved = jnp.exp2(peak - finite)
        total = _add(total * moved[:, None], p, v_ht[:, pl.ds(j * keys, keys)].T, shape, "fprop")
        return total, weights * moved + jnp.sum(p.astype(jnp.float32), axis=1), new_peak

    init = (
        jnp.zeros((rows, q_tile.shape[1]), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
    )
    total, weights, peak = _over_keys(shape, first, segments is not None, step, init)
    o[...] = (total * (factors[VALUE] / jnp.where(weights == 0, 1.0, weights))[:, None]).astype(
        o.dtype
    )
    level[...] = jnp.where(peak == -jnp.inf, 0.0, peak)
    weight[...] = weights * P_SCALE


def query_gradient(shape: Shape, x: QueryInputs, dq: Any, largest: Any, *tally: Any) -> None:
    """Compute dQ, [queries, h], the largest |dS| of each query, [queries], in units of its scale,
    and its TALLY if asked.
    """
    factors, q, k, k_ht, v, do, offset, shift, segments = x
    rows, keys = shape.tile.queries, shape.tile.keys
    first = _from_the_end(0) * rows
    q_tile, do_tile = q[...], do[...]
    row_offset, row_shift = offset[...], shift[...]
    own = None if segments is None else segments[pl.ds(first, rows)]

    def step(j, carry, masked):
        total, peak, *sums = carry
        at = pl.ds(j * keys, keys)
        s = dot(q_tile, k[at, :].T, interpret=shape.interpret)
        seen = _visible(first, j * keys, rows, keys, own, segments) if masked else None
        if seen is not None:
            s = jnp.where(seen, s, -jnp.inf)
        dp = dot(do_tile, v[at, :].T, interpret=shape.interpret)
        p = _exponentials(s, factors[SCORE], row_offset[:, None], shape)
        ds = p * fma(dp, factors[DS], row_shift[:, None], interpret=shape.interpret)
        qds = _cast(ds, shape.ds_dtype, shape)
        total = _add(total, qds, k_ht[:, at].T, shape, "dgrad")
        if shape.health:
            sums = [a + b for a, b in zip(sums, _tally(ds, qds, seen), strict=True)]
        return total, jnp.maximum(peak, jnp.max(jnp.abs(ds), axis=1)), *sums

    init = jnp.zeros((rows, q_tile.shape[1]), jnp.float32), jnp.zeros(rows, jnp.float32)
    init += tuple(jnp.zeros(rows, dtype) for dtype in TALLY_DTYPES if shape.health)
    total, peak, *sums = _over_keys(shape, first, segments is not None, step, init)
    for out, value in zip(tally, sums, strict=True):
        out[...] = value
    dq[...] = (total * factors[GRADIENT]).astype(dq.dtype)
    # A GPU's maximum drops NaN, but a NaN in dS is one in dQ.
    bad = jnp.max(jnp.where(jnp.isnan(total), 1.0, 0.0), axis=1) > 0
    largest[...] = jnp.where(bad, jnp.nan, peak)


def key_gradients(shape: Shape, x: KeyInputs, dk: Any, dv: Any) -> None:
    """Compute the gradients of one KV head, dK and dV, [keys, h], summed over its query heads."""
    factors, k, v, q, q_ht, do, do_ht, offset, shift, segments = x
    rows, keys = shape.tile.queries, shape.tile.keys
    first = pl.program_id(0) * keys
    k_tile, v_tile = k[...], v[...]
    own = None if segments is None else segments[pl.ds(first, keys)]

    def step(head, i, carry, masked):
        total_k, total_v = carry
        at = pl.ds(i * rows, rows)
        s_t = dot(k_tile, q[at, head, :].T, interpret=shape.interpret)
        if masked:
            s_t = jnp.where(
                _visible(i * rows, first, rows, keys, own, segments, transposed=True), s_t, -jnp.inf
            )
        p_t = _exponentials(s_t, factors[SCORE], offset[head, at][None, :], shape)
        total_v = _add(
            total_v, _cast(p_t, formats.E4M3, shape), do_ht[head, :, at].T, shape, "wgrad"
        )
        dp_t = dot(v_tile, do[at, head, :].T, interpret=shape.interpret)
        ds_t = p_t * fma(dp_t, factors[DS], shift[head, at][None, :], interpret=shape.interpret)
        total_k = _add(
            total_k, _cast(ds_t, shape.ds_dtype, shape), q_ht[head, :, at].T, shape, "wgrad"
        )
        return total_k, total_v

    def one_head(head, carry):
        diagonal, below, end = first // rows, pl.cdiv(first + keys, rows), shape.length // rows
        carry = lax.fori_loop(diagonal, below, lambda i, carry: step(head, i, carry, True), carry)
        return lax.fori_loop(
            below, end, lambda i, carry: step(head, i, carry, segments is not None), carry
        )

    zeros = jnp.zeros(k_tile.shape, jnp.float32)
    total_k, total_v = lax.fori_loop(0, q.shape[1], one_head, (zeros, zeros))
    dk[...] = (total_k * factors[GRADIENT]).astype(dk.dtype)
    dv[...] = (total_v * factors[DV]).astype(dv.dtype)


def scores(shape: Shape, x: ScoreInputs, top: Any, entropy: Any) -> None:
    """Compute each query's largest scaled logit, infinite if one is not finite, and its entropy in
    base 2, [queries].
    """
    factors, q, k, segments = x
    rows, keys = shape.tile.queries, shape.tile.keys
    first = _from_the_end(0) * rows
    q_tile, factor = q[...], factors[SCORE]
    own = None if segments is None else segments[pl.ds(first, rows)]

    def step(j, carry, masked):
        peak, sums, below = carry
        s = dot(q_tile, k[pl.ds(j * keys, keys), :].T, interpret=shape.interpret) * factor
        if masked:
            s = jnp.where(_visible(first, j * keys, rows, keys, own, segments), s, -jnp.inf)
        level = jnp.maximum(peak, jnp.max(s, axis=1))
        depth, shift = s - level[:, None], peak - level
        p, moved = exp2(depth, interpret=shape.interpret), jnp.exp2(shift)
        weighted = jnp.sum(
            jnp.where(depth == -jnp.inf, 0.0, p * depth), axis=1
        )  # a hidden key has 0 * -inf
        return level, sums * moved + jnp.sum(p, axis=1), (below + shift * sums) * moved + weighted

    zeros = jnp.zeros(rows, jnp.float32)
    # The level is not -inf, because a query that sees no key yet must move by a finite number to
    # the level of its first.
    peak, sums, below = _over_keys(
        shape,
        first,
        segments is not None,
        step,
        (jnp.full(rows, -(2.0**100), jnp.float32), zeros, zeros),
    )
    top[...] = jnp.where(jnp.isnan(sums), jnp.inf, peak)
    entropy[...] = jnp.log2(sums) - below / sums


def _tally(ds: jax.Array, qds: jax.Array, seen: jax.Array | None) -> list[jax.Array]:
    """Return the TALLY of a tile, [queries]; hidden elements are zero and not -0."""
    magnitude, wide = jnp.abs(ds), qds.astype(jnp.float32)
    nonzero = magnitude >= 2.0**-126
    negative_zero = ~nonzero & (lax.bitcast_convert_type(ds, jnp.int32) < 0)
    masks = (
        magnitude > formats.max_value(qds.dtype),
        nonzero & (wide == 0),
        nonzero,
        negative_zero if seen is None else negative_zero & seen,
    )
    error = ds - wide
    return [jnp.sum(mask.astype(jnp.int32), axis=1) for mask in masks] + [
        jnp.sum(part * part, axis=1) for part in (ds, error)
    ]


def _exponentials(s: jax.Array, factor: jax.Array, offset: jax.Array, shape: Shape) -> jax.Array:
    """Return 256 P = 2**(s factor + offset)."""
    return exp2(fma(s, factor, offset, interpret=shape.interpret), interpret=shape.interpret)


def _add(total: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, gemm_pass: str) -> jax.Array:
    """Return total + a b, summed over tiles with the precision of the pass."""
    if gemm_pass in shape.precise:
        return total + dot(a, b, interpret=shape.interpret)
    return dot(a, b, total, interpret=shape.interpret)


def _from_the_end(axis: int) -> jax.Array:
    """Return this program's index from the end: under a causal mask the last queries have most
    work, so they start first.
    """
    return pl.num_programs(axis) - 1 - pl.program_id(axis)


def _over_keys(shape: Shape, first, segmented: bool, step: Any, carry: Any) -> Any:
    """Run step(j, carry, masked) over the tiles of keys that the queries from `first` may see."""
    diagonal, end = first // shape.tile.keys, pl.cdiv(first + shape.tile.queries, shape.tile.keys)
    carry = lax.fori_loop(0, diagonal, functools.partial(step, masked=segmented), carry)
    return lax.fori_loop(diagonal, end, functools.partial(step, masked=True), carry)


def _visible(
    first_row, first_key, rows: int, keys: int, own, segments, *, transposed: bool = False
) -> jax.Array:
    """Return which keys queries may see, bool [rows, keys] or [keys, rows]; `own` are segments of
    the side that stays in the loop.
    """
    row, key = first_row + jnp.arange(rows), first_key + jnp.arange(keys)
    a, b = (key[:, None], row[None, :]) if transposed else (row[:, None], key[None, :])
    seen = b >= a if transposed else a >= b
    if segments is None:
        return seen
    other = segments[pl.ds(first_row, rows)] if transposed else segments[pl.ds(first_key, keys)]
    return seen & (own[:, None] == other[None, :])


def _cast(x: jax.Array, dtype: Any, shape: Shape) -> jax.Array:
    """Cast with saturation; the GPU's own cast saturates infinity too, which shows in the largest
    |dS|.
    """
    return formats.cast(x, dtype, emulated=True) if shape.interpret else x.astype(dtype)
