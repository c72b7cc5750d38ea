"""Compute attention by backend `pallas`: our own fused FP8 kernels (kernels.py), for Hopper GPUs.

    o = attention(q, k, v, recipes, softmax_scale=0.125, backend="pallas")

Scores never leave the chip: memory is linear in the sequence length, and the only extra arrays are
transposed FP8 copies (of V in the forward pass, of Q, K and dO in the backward pass), which the
compiler writes from the casting fusion if it can. Two kernels do the backward pass, one for dQ and
one for dK and dV; both recompute S and dP, seven GEMMs instead of five, and in return no result is
summed by atomic additions, whose order would change from run to run.

With a recipe that emulates, Pallas interprets the kernels: exact FP8 products on any device, slow,
for tests. On a sharded mesh the kernels run in `shard_map` over batch and KV heads,
`Call.partition`, because a compiler cannot split a kernel.

Roles in BF16 (both of attention must be FP8) and head dims other than HEAD_DIMS are not supported;
the tiles between documents of a packed sequence are masked, not skipped. `current` scaling measures
dS by `composed`'s chunks first.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import triton

from fp8jax.numerics import statistics, triton_dot
from fp8jax.numerics.attention import composed as attention_composed
from fp8jax.numerics.attention import kernels as attention_kernels
from fp8jax.numerics.attention import rows as attention_rows
from fp8jax.numerics.attention.kernels import (
    ForwardInputs,
    KeyInputs,
    QueryInputs,
    ScoreInputs,
    Shape,
    Tile,
)
from fp8jax.numerics.attention.rows import LOG2_E, P_SCALE, Call, Operands, Residuals, Weights
from fp8jax.numerics.formats import Quantised

HEAD_DIMS = (64, 128, 256)
FORWARD, QUERIES, KEYS = "forward", "query_gradient", "key_gradients"
# Tiles by kernel and head dim. Those of 128 are the fastest on an H200 of those in
# benchmarks/tune_attention.py; others are by analogy.
TILES = {
    (FORWARD, 64): Tile(64, 128, 4, 3),
    (FORWARD, 128): Tile(64, 128, 4, 3),
    (FORWARD, 256): Tile(128, 64, 8, 2),
    (QUERIES, 64): Tile(64, 128, 4, 2),
    (QUERIES, 128): Tile(64, 128, 4, 2),
    (QUERIES, 256): Tile(128, 64, 8, 2),
    (KEYS, 64): Tile(64, 64, 4, 3),
    (KEYS, 128): Tile(64, 64, 4, 2),
    (KEYS, 256): Tile(32, 64, 8, 2),
}
Tiles = dict[tuple[str, int], Tile]
KernelInputs = ForwardInputs | ScoreInputs | QueryInputs | KeyInputs
# Lengths are padded to whole numbers of the largest tile; FP8 rows are then also aligned for
# 16-byte copies.
_PAD = 128
_MOST = 2**31 - 1  # the most elements of an array for a kernel


def forward(call: Call, x: Operands, tiles: Tiles | None = None) -> tuple[jax.Array, Weights]:
    """Return what `rows.output` does, for all rows.

    Raises:
        ValueError: the softmax scale is not positive; the kernel takes a row's maximum before it
            scales.
    """
    if call.softmax_scale <= 0:
        raise ValueError(
            f"pallas needs a positive softmax scale, not {call.softmax_scale}; composed and "
            f"emulated take any"
        )
    factors = _factors(call.softmax_scale * LOG2_E * (_scale(x.q) * _scale(x.k)), _scale(x.v))
    run = _sharded(
        call,
        functools.partial(_forward, call, tiles or TILES),
        ("", "btkgh", "bskh", "bskh", "bs"),
        ("btkgh", "btkg", "btkg"),
    )
    o, *rows = run(factors, x.q.data, x.k.data, x.v.data, x.segment_ids)
    return o, Weights(*rows)


def backward(
    call: Call,
    x: Operands,
    residuals: Residuals,
    scale: jax.Array | None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return gradients of q, k, v in the dtype of activations, and dS's amax by head, or its
    health, as `composed.backward`.
    """
    scale = attention_composed.ds_scale(call, x, residuals, scale)
    of_do, of_ds = _scale(residuals.do), _scale(Quantised(x.q.data, scale))
    shared = (
        call.softmax_scale * LOG2_E * (_scale(x.q) * _scale(x.k)),
        of_do * _scale(x.v) / of_ds * P_SCALE,
    )
    tally = ("bkgt",) * len(attention_kernels.TALLY) * call.health
    of_q = _factors(*shared, of_ds * _scale(x.k) * call.softmax_scale)
    of_k = _factors(*shared, of_ds * _scale(x.q) * call.softmax_scale, of_do * P_SCALE)
    run = _sharded(
        call,
        functools.partial(_backward, call, tiles or TILES),
        ("", "", "btkgh", "bskh", "bskh", "btkgh", "btkg", "btkg", "bs"),
        ("btkgh", "bskh", "bskh", "bkgt", *tally),
    )
    offset, shift = (
        attention_kernels.P_BITS - residuals.offset,
        residuals.delta * (-P_SCALE / of_ds),
    )
    dq, dk, dv, largest, *sums = run(
        of_q, of_k, x.q.data, x.k.data, x.v.data, residuals.do.data, offset, shift, x.segment_ids
    )
    if call.health:
        return (
            dq,
            dk,
            dv,
            _health(
                jnp.max(attention_rows.amax_by_head(largest)) * of_ds,
                of_ds,
                sums,
                x.q.data.shape[1],
            ),
        )
    return (
        dq,
        dk,
        dv,
        attention_rows.amax_by_head(largest) * of_ds if call.scores.measured else None,
    )


def _health(amax: jax.Array, scale: jax.Array, sums: list[jax.Array], length: int) -> jax.Array:
    """Return `statistics.HEALTH` of dS, over the whole square of scores, from its TALLY, [b, k, g,
    t] each.
    """
    of = {
        name: rows[..., :length] for name, rows in zip(attention_kernels.TALLY, sums, strict=True)
    }
    zero = length - of["nonzero"] - of["negative_zero"]
    counts, energies = (
        (of["overflow"], of["underflow"], zero, of["negative_zero"]),
        (of["signal"], of["noise"]),
    )
    return statistics.from_rows(amax, scale, counts, energies, max(zero.size * length, 1))


def scores(
    call: Call, q: Quantised, k: Quantised, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return what `rows.spread_of_scores` does for each query: float32 [b, k, g, t], natural logits
    and nats.
    """
    run = _sharded(
        call, functools.partial(_scores, call), ("", "btkgh", "bskh", "bs"), ("bkgt", "bkgt")
    )
    top, entropy = run(
        _factors(call.softmax_scale * LOG2_E * (_scale(q) * _scale(k))), q.data, k.data, segment_ids
    )
    return top / LOG2_E, entropy / LOG2_E


def _scale(q: Quantised) -> jax.Array:
    return jnp.float32(1) if q.scale is None else q.scale


def _factors(*scalars: jax.Array) -> jax.Array:
    """Return scalars as a float32 vector of eight, which a kernel reads by index."""
    given = jnp.stack([jnp.asarray(scalar, jnp.float32) for scalar in scalars])
    return jnp.pad(given, (0, 8 - len(scalars)))


def _sharded(
    call: Call, function: Callable, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Callable:
    """Run the function on each device's share: `call.partition` splits dimensions b and k; '' is a
    replicated array.
    """
    function = _in_parts(function, inputs)
    mesh = jax.sharding.get_abstract_mesh()
    if call.partition is None or mesh.empty or mesh.size == 1:
        return function
    of_inputs, of_outputs = (
        tuple(call.partition.of(letters).gemm for letters in arrays) for arrays in (inputs, outputs)
    )
    return jax.shard_map(
        function, mesh=mesh, in_specs=of_inputs, out_specs=of_outputs, check_vma=False
    )


def _in_parts(function: Callable, inputs: tuple[str, ...]) -> Callable:
    """Run the function over as many sequences at once as keep arrays below 2**31 elements: Pallas
    counts in 32 signed bits.

    Raises:
        ValueError: a single sequence is larger, when the result is called.
    """

    def run(*arrays):
        batched = [
            bool(letters) and array is not None
            for letters, array in zip(inputs, arrays, strict=True)
        ]
        given = [array for array, split in zip(arrays, batched, strict=True) if split]
        batch, length = given[0].shape[:2]
        of_one = max(math.prod(array.shape[2:]) for array in given) * -(-length // _PAD) * _PAD
        if of_one > _MOST:
            raise ValueError(
                f"pallas: a sequence of {of_one:,} elements on one device is more than its "
                f"{_MOST:,}; "
                "split the heads over more devices, or use composed"
            )
        together = _MOST // of_one
        if batch <= together:
            return function(*arrays)
        parts = []
        for first in range(0, batch, together):
            some = slice(first, first + together)
            parts.append(
                function(
                    *(
                        array[some] if split else array
                        for array, split in zip(arrays, batched, strict=True)
                    )
                )
            )
        return tuple(jnp.concatenate(results) for results in zip(*parts, strict=True))

    return run


def _forward(call: Call, tiles: Tiles, factors, q, k, v, segments) -> tuple[jax.Array, ...]:
    (b, t, kv, g, h), shape = q.shape, _shape(call, tiles, FORWARD, q)
    q, k, v = (_padded(a) for a in (q, k, v))
    segments = _padded_segments(segments)
    of_head, of_keys, of_keys_ht, of_rows, of_batch = _query_specs(shape, g, h)
    o, *rows = _call(
        attention_kernels.forward,
        shape,
        (shape.length // shape.tile.queries, kv * g, b),
        ("attention_scores.fprop", "attention_values.fprop"),
        in_specs=ForwardInputs(_whole(8), of_head, of_keys, of_keys_ht, of_batch),
        out_specs=[of_head, of_rows, of_rows],
        out_shape=[jax.ShapeDtypeStruct(q.shape, call.dtype)]
        + [jax.ShapeDtypeStruct((b, kv, g, shape.length), jnp.float32)] * 2,
    )(ForwardInputs(factors, q, k, _ht(v), segments))
    return o[:, :t], *(jnp.moveaxis(row, 3, 1)[:, :t] for row in rows)


def _backward(
    call: Call, tiles: Tiles, of_q, of_k, q, k, v, do, offset, shift, segments
) -> tuple[jax.Array, ...]:
    t = q.shape[1]
    # Without it the cast of dO is made for its transposed copy, and the terms of rowsum(dO * O) in
    # float32, too.
    do = with_layout_constraint(do, Layout(tuple(range(do.ndim))))
    q, k, v, do, shift = (_padded(a) for a in (q, k, v, do, shift))
    segments = _padded_segments(segments)
    offset = _padded(offset, value=-jnp.inf)  # so that P of a padded query is 0
    offset, shift = (jnp.moveaxis(a, 1, 3) for a in (offset, shift))
    dq, *largest = _query_gradient(
        call, _shape(call, tiles, QUERIES, q), of_q, q, k, v, do, offset, shift, segments
    )
    dk, dv = _key_gradients(
        call, _shape(call, tiles, KEYS, q), of_k, q, k, v, do, offset, shift, segments
    )
    return dq[:, :t], dk[:, :t], dv[:, :t], *largest


def _scores(call: Call, factors, q, k, segments) -> tuple[jax.Array, ...]:
    (b, t, kv, g, h), shape = q.shape, _shape(call, TILES, FORWARD, q)
    q, k, segments = _padded(q), _padded(k), _padded_segments(segments)
    of_head, of_keys, _, of_rows, of_batch = _query_specs(shape, g, h)
    found = _call(
        attention_kernels.scores,
        shape,
        (shape.length // shape.tile.queries, kv * g, b),
        ("attention_scores.fprop",),
        in_specs=ScoreInputs(_whole(8), of_head, of_keys, of_batch),
        out_specs=[of_rows] * 2,
        out_shape=[jax.ShapeDtypeStruct((b, kv, g, shape.length), jnp.float32)] * 2,
    )(ScoreInputs(factors, q, k, segments))
    return tuple(rows[..., :t] for rows in found)


def _query_gradient(call, shape, factors, q, k, v, do, offset, shift, segments) -> list[jax.Array]:
    (b, t, kv, g, h), tally = q.shape, attention_kernels.TALLY_DTYPES if shape.health else ()
    of_head, of_keys, of_keys_ht, of_rows, of_batch = _query_specs(shape, g, h)
    return _call(
        attention_kernels.query_gradient,
        shape,
        (t // shape.tile.queries, kv * g, b),
        ("attention_scores.fprop*", "attention_values.dgrad*", "attention_scores.dgrad"),
        in_specs=QueryInputs(
            factors=_whole(8),
            q=of_head,
            k=of_keys,
            k_ht=of_keys_ht,
            v=of_keys,
            do=of_head,
            offset=of_rows,
            shift=of_rows,
            segments=of_batch,
        ),
        out_specs=[of_head, of_rows, *[of_rows] * len(tally)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, call.dtype)]
        + [jax.ShapeDtypeStruct((b, kv, g, t), dtype) for dtype in (jnp.float32, *tally)],
    )(QueryInputs(factors, q, k, _ht(k), v, do, offset, shift, segments))


def _key_gradients(call, shape, factors, q, k, v, do, offset, shift, segments) -> list[jax.Array]:
    b, t, kv, g, h = q.shape
    of_tile = pl.BlockSpec(
        (None, shape.tile.keys, None, h), lambda i, head, batch: (batch, i, head, 0)
    )
    of_heads = pl.BlockSpec((None, t, None, g, h), lambda i, head, batch: (batch, 0, head, 0, 0))
    of_heads_ht = pl.BlockSpec((None, None, g, h, t), lambda i, head, batch: (batch, head, 0, 0, 0))
    of_rows = pl.BlockSpec((None, None, g, t), lambda i, head, batch: (batch, head, 0, 0))
    of_batch = pl.BlockSpec((None, t), lambda i, head, batch: (batch, 0))
    return _call(
        attention_kernels.key_gradients,
        shape,
        (t // shape.tile.keys, kv, b),
        (
            "attention_scores.fprop*",
            "attention_values.wgrad",
            "attention_values.dgrad",
            "attention_scores.wgrad",
        ),
        repeats=g,
        in_specs=KeyInputs(
            factors=_whole(8),
            k=of_tile,
            v=of_tile,
            q=of_heads,
            q_ht=of_heads_ht,
            do=of_heads,
            do_ht=of_heads_ht,
            offset=of_rows,
            shift=of_rows,
            segments=of_batch,
        ),
        out_specs=[of_tile, of_tile],
        out_shape=[jax.ShapeDtypeStruct(k.shape, call.dtype)] * 2,
    )(KeyInputs(factors, k, v, q, _ht(q), do, _ht(do), offset, shift, segments))


def _shape(call: Call, tiles: Tiles, kernel: str, q: jax.Array) -> Shape:
    head_dim = q.shape[-1]
    length = -(-q.shape[1] // _PAD) * _PAD
    precise = tuple(
        name
        for name in ("fprop", "dgrad", "wgrad")
        if call.scores.precise(name) or call.values.precise(name)
    )
    return Shape(
        tiles[kernel, head_dim],
        length,
        call.scores.format("ds"),
        call.scores.emulated,
        precise,
        call.health,
    )


def _query_specs(shape: Shape, groups: int, h: int) -> tuple[pl.BlockSpec, ...]:
    """Return specs for kernels with a program per tile of queries and query head: tile, keys, their
    transpose, rows, sequence.
    """
    tiles, rows, t = shape.length // shape.tile.queries, shape.tile.queries, shape.length
    return (
        pl.BlockSpec(
            (None, rows, None, None, h),
            lambda i, head, batch: (batch, tiles - 1 - i, head // groups, head % groups, 0),
        ),
        pl.BlockSpec((None, t, None, h), lambda i, head, batch: (batch, 0, head // groups, 0)),
        pl.BlockSpec((None, None, h, t), lambda i, head, batch: (batch, head // groups, 0, 0)),
        pl.BlockSpec(
            (None, None, None, rows),
            lambda i, head, batch: (batch, head // groups, head % groups, tiles - 1 - i),
        ),
        pl.BlockSpec((None, t), lambda i, head, batch: (batch, 0)),
    )


def _whole(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((size,), lambda *_: (0,))


def _call(
    kernel: Callable,
    shape: Shape,
    grid: tuple[int, ...],
    gemms: tuple[str, ...],
    *,
    in_specs: KernelInputs,
    repeats: int = 1,
    **options: Any,
) -> Callable:
    """Return the kernel as a function of what it reads, arrays, segments or None; `gemms` go into
    the scope.
    """

    def run(x: KernelInputs) -> Any:
        specs = in_specs if x.segments is not None else in_specs._replace(segments=None)
        head_dim = x.k.shape[-1]
        names, flops = "+".join(gemms), 2 * _pairs(shape) * head_dim * math.prod(grid[1:]) * repeats
        with jax.named_scope(f"fp8jax.fused[{names}][{flops}]"):
            return pl.pallas_call(
                functools.partial(kernel, shape),
                grid=grid,
                in_specs=[specs],
                interpret=shape.interpret,
                name=f"fp8_attention_{kernel.__name__}",
                compiler_params=triton.CompilerParams(
                    num_warps=shape.tile.warps, num_stages=shape.tile.stages
                ),
                **options,
            )(x)

    if not shape.interpret:
        triton_dot.register()
    return run


def _pairs(shape: Shape) -> int:
    """Return the number of query and key pairs that one head's tiles compute, below the diagonal
    and touching it.
    """
    rows, keys = shape.tile.queries, shape.tile.keys
    return sum(-(-(first + rows) // keys) * rows * keys for first in range(0, shape.length, rows))


def _padded_segments(segments: jax.Array | None) -> jax.Array | None:
    return None if segments is None else _padded(segments)


def _padded(x: jax.Array, value: float = 0.0) -> jax.Array:
    """Pad [b, t, ...] at the end to whole tiles; the causal mask hides keys there, queries
    contribute zeros.
    """
    if x.shape[1] % _PAD == 0:
        return x
    widths = [(0, -x.shape[1] % _PAD) if i == 1 else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _ht(x: jax.Array) -> jax.Array:
    """Transpose [b, t, ..., h] to [b, ..., h, t]."""
    return jnp.moveaxis(x, 1, -1)
