"""Compute attention by backend `composed`: plain FP8 GEMMs over chunks of queries, without an S x S
array.

    o = attention(q, k, v, recipes, softmax_scale=0.125, backend="composed")

It runs wherever FP8 GEMMs run. Each chunk of CHUNK queries sees its whole key prefix at once, so
its row maximum is exact and no result is rescaled. Memory besides inputs and results is one chunk
of scores, CHUNK x keys: linear in the sequence length.

Keys after a chunk's last query are skipped. The number of keys is part of a GEMM's shape, and a
program with GEMMs of its own for every chunk would grow with the sequence; so the queries fall into
at most BANDS bands, and the chunks of a band, a scan, all take the keys up to the band's end. That
computes 75% of the square of scores at 1024 tokens, 56% at 4096 and above; half is the minimum.

The cast of dS needs one scale for the whole tensor. Delayed and static scaling have it beforehand.
`current` takes two passes over the chunks: one for the largest |dS| (two of the five GEMMs again),
one for the gradients.

The work between documents of a packed sequence is masked, not skipped, and scores do not stay on
chip: a chunk of them goes through memory, float32, as in any composition of GEMMs.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import formats, statistics
from fp8jax.numerics.attention import rows as attention_rows
from fp8jax.numerics.attention.rows import Call, Operands, Residuals, Weights
from fp8jax.numerics.formats import Quantised

CHUNK = 256  # queries; a multiple of 128, the tile of a tensor core's GEMM
BANDS = 8


def forward(call: Call, x: Operands) -> tuple[jax.Array, Weights]:
    """Return what `rows.output` does, for all rows."""
    shape = x.q.data.shape

    def chunk(carry, start, rows, keys):
        mask = attention_rows.visible(start, rows, keys, x.segment_ids)
        found = attention_rows.output(
            call, rows_of(x.q, start, rows), rows_of(x.k, 0, keys), rows_of(x.v, 0, keys), mask
        )
        return jax.tree.map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, axis=1),
            carry,
            found,
        )

    row = jnp.zeros(shape[:4], jnp.float32)
    return over_chunks(shape[1], chunk, x.q.data, (jnp.zeros(shape, call.dtype), Weights(row, row)))


def backward(
    call: Call, x: Operands, residuals: Residuals, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return gradients of q, k, v in the dtype of activations, and dS's amax by head, [b, k] (or
    None), or its health if asked.

    Args:
        call: recipes and softmax scale.
        x: operands of the forward pass.
        residuals: residuals of every query.
        scale: scale of dS, with delayed and static scaling.
    """
    scale = ds_scale(call, x, residuals, scale)

    elements = x.q.data.shape[1] * math.prod(x.q.data.shape[:4])

    def chunk(carry, start, rows, keys):
        dq, dk, dv, largest, health = carry
        p, ds, do = _chunk_ds(call, x, residuals, start, rows, keys)
        qds = Quantised(ds.astype(call.dtype), None)
        if call.scores.fp8 and scale is not None:
            qds = formats.quantise(
                ds, scale, call.scores.format("ds"), emulated=call.scores.emulated
            )
        if call.scores.measured or call.health:
            largest = jnp.maximum(
                largest, attention_rows.amax_by_head(ds, emulated=call.scores.emulated)
            )
        if call.health:
            health += statistics.health(ds, qds, elements=elements)
        q, k = rows_of(x.q, start, rows), rows_of(x.k, 0, keys)
        dq_rows, dk_part, dv_part = attention_rows.input_gradients(call, p, qds, q, k, do)
        dq = lax.dynamic_update_slice_in_dim(dq, dq_rows.astype(call.dtype), start, axis=1)
        return dq, _add_prefix(dk, dk_part), _add_prefix(dv, dv_part), largest, health

    b, t, k, g, h = x.q.data.shape
    zeros = jnp.zeros((b, k, t, h), jnp.float32)
    init = (
        jnp.zeros((b, t, k, g, h), call.dtype),
        zeros,
        zeros,
        jnp.zeros((b, k), jnp.float32),
        jnp.zeros(len(statistics.HEALTH)),
    )
    dq, dk, dv, largest, health = over_chunks(t, chunk, x.q.data, init)
    dk, dv = (attention_rows.swap_heads(d).astype(call.dtype) for d in (dk, dv))
    if call.health:
        return dq, dk, dv, _whole(health, jnp.max(largest), scale, t)
    return dq, dk, dv, largest if call.scores.measured else None


def _whole(health: jax.Array, amax: jax.Array, scale: jax.Array | None, length: int) -> jax.Array:
    """Return the health of dS from the sum over chunks; skipped elements are zero, amax and scale
    do not add up.
    """
    computed = (
        sum(chunks * rows * (first + chunks * rows) for first, chunks, rows in _bands(length))
        / max(length, 1) ** 2
    )
    found = dict(zip(statistics.HEALTH, health, strict=True))
    found |= {
        "amax": amax,
        "scale": jnp.float32(0) if scale is None else scale,
        "zero": found["zero"] + (1 - computed),
    }
    return jnp.stack([found[name] for name in statistics.HEALTH])


def _chunk_ds(
    call: Call, x: Operands, residuals: Residuals, start: Any, rows: int, keys: int
) -> tuple[jax.Array, jax.Array, Quantised]:
    """Return P times its rows' factors, dS and dO of one chunk."""
    do = rows_of(residuals.do, start, rows)
    offset, delta = (
        lax.dynamic_slice_in_dim(a, start, rows, axis=1)
        for a in (residuals.offset, residuals.delta)
    )
    mask = attention_rows.visible(start, rows, keys, x.segment_ids)
    q, k, v = rows_of(x.q, start, rows), rows_of(x.k, 0, keys), rows_of(x.v, 0, keys)
    return *attention_rows.score_gradient(call, q, k, v, Residuals(do, offset, delta), mask), do


def largest_ds(call: Call, x: Operands, residuals: Residuals) -> jax.Array:
    """Return the largest |dS| over all chunks."""

    def chunk(largest, start, rows, keys):
        ds = _chunk_ds(call, x, residuals, start, rows, keys)[1]
        return jnp.maximum(largest, attention_rows.amax_by_head(ds, emulated=call.scores.emulated))

    b, length, k = x.q.data.shape[:3]
    return jnp.max(over_chunks(length, chunk, x.q.data, jnp.zeros((b, k), jnp.float32)))


def ds_scale(
    call: Call, x: Operands, residuals: Residuals, scale: jax.Array | None
) -> jax.Array | None:
    """Return the scale of dS: the one given, or, where that is missing or unknown, that of a pass
    for the largest |dS|.
    """

    def measured() -> jax.Array:
        return call.scores.scale(largest_ds(call, x, residuals), call.scores.format("ds"))

    if call.scores.scaling == "current":
        return measured()
    if call.scores.fill_unknown and call.scores.scaling == "delayed" and scale is not None:
        return lax.cond(scale == 0, measured, lambda: scale)
    return scale


def over_chunks(length: int, body: Callable, like: jax.Array, carry: Any) -> Any:
    """Fold `body(carry, start, rows, keys)` over all chunks; rows and keys are static, start may be
    traced; `like` is an input.
    """
    for first, chunks, rows in _bands(length):
        step = functools.partial(body, rows=rows, keys=first + chunks * rows)
        if chunks == 1:
            carry = step(carry, first)
        else:
            # The start is tied to an input: constant masks would be moved out of the loop over
            # layers, and all of them kept.
            starts, _ = lax.optimization_barrier(
                (first + rows * jnp.arange(chunks), like[(0,) * like.ndim])
            )
            carry, _ = lax.scan(lambda c, start, step=step: (step(c, start), None), carry, starts)
    return carry


def _bands(length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, number of chunks, queries per chunk) of each band; an odd rest at the end
    is a band of its own.
    """
    whole, rest = divmod(length, CHUNK)
    # A band has at least two chunks: compilers unroll a scan of one step, then work on several
    # bands at once. Measured at 4096 tokens, on a CPU and in a program for 8 H100s: three times the
    # memory of one chunk.
    step = max(2, -(-whole // BANDS))
    for i in range(0, whole, step):
        yield i * CHUNK, min(step, whole - i), CHUNK
    if rest:
        yield whole * CHUNK, 1, rest


def rows_of(x: Quantised, start: Any, size: int) -> Quantised:
    """Return `size` positions of [b, t, ...] from `start` on."""
    return Quantised(lax.dynamic_slice_in_dim(x.data, start, size, axis=1), x.scale)


def _add_prefix(total: jax.Array, part: jax.Array) -> jax.Array:
    """Add a part to the first keys of [b, k, s, h]."""
    return lax.dynamic_update_slice_in_dim(total, total[:, :, : part.shape[2]] + part, 0, axis=2)
