"""Flash attention in FP8 as Pallas kernels for Triton: forward, dQ, and dK with dV. Host side: attention_pallas.py.

Every GEMM is a product of two FP8 tiles. Hopper's tensor cores read both operands of one with the contracted dimension
contiguous, so a GEMM that contracts tokens takes a transposed copy: V in the forward pass, K for dQ, Q and dO for dK and dV
(names ending in `_ht`). The dK and dV kernel forms S and P transposed, [keys, queries], so that P and dS are left operands,
which need no copy: they go from registers to the tensor cores.

What is computed is `attention_rows`', tile by tile: P~ = exp2(S·c - ceil(m)) at scale 1/256 with m the running row maximum,
so that moving to a later maximum multiplies by an exact power of two; in the backward pass P from the log-sum-exp, dS before
the softmax scale. All arithmetic between the GEMMs is float32. Tiles above the diagonal are skipped.

A kernel sees one head of one sequence (for dK and dV one KV head with its `g` query heads). Letters as in `attention`; lengths are
whole numbers of tiles. `factors` are the scalars that the scales fold into.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fp8jax.numerics import formats
from fp8jax.numerics.triton_dot import dot

# P's scale of 1/256 as a power of two, added to exponents.
P_BITS = 8


class Tile(NamedTuple):
    """How a kernel is cut: queries and keys a tile, warps of a program, stages of the loads' pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What is static in a kernel: the tile, the length in tokens, formats of dS, whether Pallas interprets it."""

    tile: Tile
    length: int
    ds_dtype: Any
    interpret: bool


def forward(shape: Shape, factors, q, k, v_ht, segments, o, lse):
    """O, [queries, h], and the log-sum-exp in base 2, [queries].

    factors: softmax scale * log2(e) * scale of q * scale of k; scale of v.
    """
    rows, keys = shape.tile.queries, shape.tile.keys
    first = _from_the_end(0) * rows
    q_tile, factor = q[...], factors[0]
    own = None if segments is None else segments[pl.ds(first, rows)]

    def step(j, carry, masked):
        total, sums, peak = carry
        s = dot(q_tile, k[pl.ds(j * keys, keys), :].T, interpret=shape.interpret) * factor
        if masked:
            s = jnp.where(_visible(first, j * keys, rows, keys, own, segments), s, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.ceil(jnp.max(s, axis=1)))
        # A row without any visible key so far has a peak of -inf; 0 in its place makes its probabilities 0, not NaN.
        level = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        p = jnp.exp2(s - (level - P_BITS)[:, None])
        moved = jnp.exp2(peak - level)
        part = dot(_cast(p, formats.E4M3, shape), v_ht[:, pl.ds(j * keys, keys)].T, interpret=shape.interpret)
        return total * moved[:, None] + part, sums * moved + jnp.sum(p, axis=1), new_peak

    init = jnp.zeros((rows, q_tile.shape[1]), jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    total, sums, peak = _over_keys(shape, first, segments is not None, step, init)
    empty = sums == 0
    o[...] = (total * (factors[1] / jnp.where(empty, 1.0, sums))[:, None]).astype(o.dtype)
    lse[...] = jnp.where(empty, jnp.inf, peak + jnp.log2(sums) - P_BITS)


def query_gradient(shape: Shape, factors, q, k, k_ht, v, do, lse, delta, segments, dq, largest):
    """dQ, [queries, h], and the largest |dS| of each query, [queries].

    factors: that of the scores; scale of dO * scale of v; 1 / scale of dS; scale of dS * scale of k * softmax scale.
    """
    rows, keys = shape.tile.queries, shape.tile.keys
    first = _from_the_end(0) * rows
    q_tile, do_tile = q[...], do[...]
    row_lse, row_delta = lse[...], delta[...]
    own = None if segments is None else segments[pl.ds(first, rows)]

    def step(j, carry, masked):
        total, peak = carry
        at = pl.ds(j * keys, keys)
        s = dot(q_tile, k[at, :].T, interpret=shape.interpret) * factors[0]
        if masked:
            s = jnp.where(_visible(first, j * keys, rows, keys, own, segments), s, -jnp.inf)
        p = jnp.exp2(s - row_lse[:, None])
        dp = dot(do_tile, v[at, :].T, interpret=shape.interpret) * factors[1]
        ds = p * (dp - row_delta[:, None])
        part = dot(_cast(ds * factors[2], shape.ds_dtype, shape), k_ht[:, at].T, interpret=shape.interpret)
        return total + part, jnp.maximum(peak, jnp.max(jnp.abs(ds), axis=1))

    init = jnp.zeros((rows, q_tile.shape[1]), jnp.float32), jnp.zeros(rows, jnp.float32)
    total, peak = _over_keys(shape, first, segments is not None, step, init)
    dq[...] = (total * factors[3]).astype(dq.dtype)
    # A GPU's maximum drops NaN, but a NaN in dS is one in dQ.
    largest[...] = jnp.where(jnp.max(jnp.where(jnp.isnan(total), 1.0, 0.0), axis=1) > 0, jnp.nan, peak)


def key_gradients(shape: Shape, factors, k, v, q, q_ht, do, do_ht, lse, delta, segments, dk, dv):
    """DK and dV of one KV head, [keys, h], summed over its query heads.

    factors: that of the scores; scale of dO * scale of v; 1 / scale of dS; scale of dS * scale of q * softmax scale;
        scale of dO / 256.
    """
    rows, keys = shape.tile.queries, shape.tile.keys
    first = pl.program_id(0) * keys
    k_tile, v_tile = k[...], v[...]
    own = None if segments is None else segments[pl.ds(first, keys)]

    def step(head, i, carry, masked):
        total_k, total_v = carry
        at = pl.ds(i * rows, rows)
        s_t = dot(k_tile, q[at, head, :].T, interpret=shape.interpret) * factors[0]
        if masked:
            s_t = jnp.where(_visible(i * rows, first, rows, keys, own, segments, transposed=True), s_t, -jnp.inf)
        p_t = jnp.exp2(s_t - (lse[head, at] - P_BITS)[None, :])  # 256 times P
        total_v += dot(_cast(p_t, formats.E4M3, shape), do_ht[head, :, at].T, interpret=shape.interpret)
        dp_t = dot(v_tile, do[at, head, :].T, interpret=shape.interpret) * factors[1]
        ds_t = p_t * (dp_t - delta[head, at][None, :])
        total_k += dot(_cast(ds_t * (factors[2] / 2**P_BITS), shape.ds_dtype, shape), q_ht[head, :, at].T, interpret=shape.interpret)
        return total_k, total_v

    def one_head(head, carry):
        diagonal, below, end = first // rows, pl.cdiv(first + keys, rows), shape.length // rows
        carry = lax.fori_loop(diagonal, below, lambda i, carry: step(head, i, carry, True), carry)
        return lax.fori_loop(below, end, lambda i, carry: step(head, i, carry, segments is not None), carry)

    zeros = jnp.zeros(k_tile.shape, jnp.float32)
    total_k, total_v = lax.fori_loop(0, q.shape[1], one_head, (zeros, zeros))
    dk[...] = (total_k * factors[3]).astype(dk.dtype)
    dv[...] = (total_v * factors[4]).astype(dv.dtype)


def _from_the_end(axis: int) -> jax.Array:
    """This program's index, counted from the end: under a causal mask the last queries have most to do, so they start first."""
    return pl.num_programs(axis) - 1 - pl.program_id(axis)


def _over_keys(shape: Shape, first, segmented: bool, step: Any, carry: Any) -> Any:
    """Runs step(j, carry, masked) over the tiles of keys that the queries from `first` may see."""
    diagonal, end = first // shape.tile.keys, pl.cdiv(first + shape.tile.queries, shape.tile.keys)
    carry = lax.fori_loop(0, diagonal, functools.partial(step, masked=segmented), carry)
    return lax.fori_loop(diagonal, end, functools.partial(step, masked=True), carry)


def _visible(first_row, first_key, rows: int, keys: int, own, segments, *, transposed: bool = False) -> jax.Array:
    """Where queries may look, bool [rows, keys] or [keys, rows]; `own` are the segments of the side that stays in the loop."""
    row, key = first_row + jnp.arange(rows), first_key + jnp.arange(keys)
    a, b = (key[:, None], row[None, :]) if transposed else (row[:, None], key[None, :])
    seen = b >= a if transposed else a >= b
    if segments is None:
        return seen
    other = segments[pl.ds(first_row, rows)] if transposed else segments[pl.ds(first_key, keys)]
    return seen & (own[:, None] == other[None, :])


def _cast(x: jax.Array, dtype: Any, shape: Shape) -> jax.Array:
    """Saturating cast. The GPU's own saturates finite values, and infinity too; that one shows in the largest |dS|."""
    return formats.cast(x, dtype, emulated=True) if shape.interpret else x.astype(dtype)
