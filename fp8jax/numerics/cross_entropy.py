"""Compute the cross-entropy of a linear head, a chunk of the vocabulary at a time, without the
logits of all tokens at once.

    nll_bt, lse_bt = linear_cross_entropy(x_btd, w_vd, targets_bt, recipe, chunk=8192)

The forward pass keeps a running maximum, a running sum of exponentials and the target's logit of
each token. The backward pass computes each chunk's logits again (one more head GEMM in three), from
them its gradient, and from that this chunk's rows of dW and its part of dx. Besides inputs and
results, memory holds one chunk of logits, tokens x chunk, for any vocabulary.

All three GEMMs are FP8 if the recipe is: x is cast once, w comes quantised, the logits' gradient g
is cast chunk by chunk with one scale. Its amax is known before any of it is computed: with a and c
the cotangents of nll and lse, g is (a + c) p off the target and (a + c) p - a on it, so each
token's largest |g| follows from its two largest candidates, the target's logit and the largest
other one. So `current` scaling takes no second pass, and the token, which must get the maximum over
chunks, gets it.

With `shards` > 1 the vocabulary is taken as that many equal parts on different devices, and all
parts are processed at the same time: running values and dx stay separate to the end and are
combined once.

Value and log-partition are separate results so that a z-loss is plain JAX around this: lse ** 2. Of
other libraries, optax's losses take logits, tokamax's has no mask, no z-loss, no FP8, no sharded
vocabulary, and holds all logits except on TPUs (0.0.12).

Blockwise scaling is not supported.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import formats, statistics
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.gemm import (
    accumulator,
    as_bytes,
    from_bytes,
    gemm,
    quantise_weight,
)
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.scaling import operand_scale
from fp8jax.numerics.tokens import FULL, Token, as_token, report_cast


def linear_cross_entropy(
    x_btd: jax.Array,
    w_vd: jax.Array,
    targets_bt: jax.Array,
    recipe: GemmRecipe,
    *,
    chunk: int,
    shards: int = 1,
    quantised_w: Quantised | None = None,
    scales: jax.Array | None = None,
    token: Token | jax.Array | None = None,
    role: str = "lm_head",
    counted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return negative log-likelihoods of targets under softmax(x wᵀ), and the log-partitions.

    Args:
        x_btd: input of the head; float32, bfloat16 or float64.
        w_vd: weight; its gradient has its shape and dtype. Not read if `quantised_w` is given.
        targets_bt: int, rows of w.
        recipe: scaling, formats, backend of the GEMMs.
        chunk: rows of w, of each shard, whose logits are in memory at a time.
        shards: equal parts of w's rows that are processed side by side; must divide their number.
        quantised_w: the weight as `quantise_weight` made it.
        scales: float32 [2], of x and g; needed by delayed scaling.
        token: as for `dot_general`, but not for amaxes by device; the kurtosis of the gradient
            stays unknown.
        role: name of the GEMMs in profiles and programs.
        counted: bool [b, t]: the tokens in statistics; the others' cotangents are zero. None counts
            all.

    Returns:
        nll and lse, [b, t], in float32, or float64 for such x.

    Raises:
        ValueError: scaling is blockwise, or delayed without scales, or the shards do not divide the
            vocabulary.
    """
    if recipe.scaling == "blockwise":
        raise ValueError(
            f"{role}: blockwise scaling has no chunked loss; use current or delayed scaling, or "
            f"all logits at once"
        )
    if recipe.scaling == "delayed" and scales is None:
        raise ValueError(
            f"{role}: delayed scaling needs `scales`, a float32 array [2] for x and the output gradient"
        )
    if w_vd.shape[0] % shards:
        raise ValueError(f"{role}: {shards} shards do not divide a vocabulary of {w_vd.shape[0]}")
    if quantised_w is None:
        quantised_w = quantise_weight(lax.stop_gradient(w_vd), recipe, x_btd.dtype)
    call = _Call(recipe, role, chunk, shards, x_btd.dtype, w_vd.dtype)
    return _cross_entropy(
        call, x_btd, w_vd, quantised_w, targets_bt, scales, as_token(token), counted
    )


class _Call(NamedTuple):
    """The static arguments of one call."""

    recipe: GemmRecipe
    role: str
    chunk: int
    shards: int
    x_dtype: Any
    w_dtype: Any

    @property
    def wide(self) -> Any:
        """Return the dtype of logits and sums."""
        return accumulator(self.x_dtype)

    def gemm(
        self, lhs: Quantised, rhs: Quantised, dims: Any, out_dtype: Any, gemm_pass: str
    ) -> jax.Array:
        """Compute one of the head's GEMMs."""
        return gemm(lhs, rhs, dims, self.recipe, self.role, gemm_pass, out_dtype=out_dtype)


class _Running(NamedTuple):
    """Running values per token and shard, [b, t, shards]: largest logit, sum of exp(logit -
    largest), target's, largest other.
    """

    largest: jax.Array
    total: jax.Array
    target: jax.Array
    other: jax.Array


class _Residuals(NamedTuple):
    """The residuals of the backward pass; lse, target and other are [b, t], of_x is the token's
    cotangent for x.
    """

    qx: Quantised
    qw: Quantised
    targets: jax.Array
    lse: jax.Array
    target: jax.Array
    other: jax.Array
    scales: jax.Array | None
    token: Token | None
    counted: jax.Array | None
    of_x: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    call: _Call,
    x: jax.Array,
    w: jax.Array,
    qw: Quantised,
    targets: jax.Array,
    scales: jax.Array | None,
    token: Token | None,
    counted: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return _forward(call, x, w, qw, targets, scales, token, counted)[0]


def _forward(
    call: _Call,
    x: jax.Array,
    w: jax.Array,
    qw: Quantised,
    targets: jax.Array,
    scales: jax.Array | None,
    token: Token | None,
    counted: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    scales = scales if call.recipe.scaling == "delayed" else None
    qx, amax_x = call.recipe.quantise(x, operand_scale(scales, "x"), "x")

    def chunk(running: _Running, part: Quantised, start: jax.Array) -> tuple[_Running, None]:
        logits = _logits(call, qx, part)
        hit = _hits(call, qw, targets, start, logits.shape[3])
        largest = jnp.maximum(running.largest, jnp.max(logits, axis=3))
        total = running.total * jnp.exp(running.largest - largest) + jnp.sum(
            jnp.exp(logits - largest[..., None]), axis=3
        )
        other = (
            jnp.maximum(running.other, jnp.max(jnp.where(hit, -jnp.inf, logits), axis=3))
            if call.recipe.fp8
            else running.other
        )
        return _Running(
            largest, total, running.target + jnp.sum(jnp.where(hit, logits, 0.0), axis=3), other
        ), None

    zeros = jnp.zeros((*targets.shape, call.shards), call.wide)
    lowest = jnp.full_like(zeros, jnp.finfo(call.wide).min)
    found, _ = _over_chunks(call, qw, chunk, _Running(lowest, zeros, zeros, lowest))
    largest, target = jnp.max(found.largest, axis=2), jnp.sum(found.target, axis=2)
    lse = largest + jnp.log(
        jnp.sum(found.total * jnp.exp(found.largest - largest[..., None]), axis=2)
    )
    of_x = report_cast(token, x, qx, amax_x, counted=counted)
    return (lse - target, lse), _Residuals(
        as_bytes(qx),
        qw,
        targets,
        lse,
        target,
        jnp.max(found.other, axis=2),
        scales,
        token,
        counted,
        of_x,
    )


def _backward(
    call: _Call, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    qx, qw, targets, lse, target, other, scales, token, counted, of_x = residuals
    qx, recipe = from_bytes(qx), call.recipe
    of_nll, both = (
        cotangents[0].astype(call.wide),
        (cotangents[0] + cotangents[1]).astype(call.wide),
    )
    amax = _amax(lse, target, other, of_nll, both) if recipe.fp8 else None
    scale = _gradient_scale(recipe, amax, scales)
    elements, in_full = lse.size * qw.data.shape[0], token is not None and token.brings == FULL

    def chunk(carry, part, start):
        dx, health, total = carry
        logits = _logits(call, qx, part)
        hit = _hits(call, qw, targets, start, logits.shape[3])
        g = _wide(both) * jnp.exp(logits - _wide(lse)) - jnp.where(hit, _wide(of_nll), 0.0)
        qg = (
            Quantised(g.astype(call.x_dtype), None)
            if scale is None
            else formats.quantise(g, scale, recipe.format("g"), emulated=recipe.emulated)
        )
        if in_full and scale is not None:
            health += statistics.health(g, qg, elements=elements)
            total += jnp.sum(g)
        dx += call.gemm(qg, part, (((3,), (1,)), ((2,), (0,))), call.wide, "dgrad")
        return (dx, health, total), call.gemm(
            qg, qx, (((0, 1), (0, 1)), ((), ())), call.w_dtype, "wgrad"
        )

    zeros = (
        jnp.zeros((call.shards, *qx.data.shape), call.wide),
        jnp.zeros(len(statistics.HEALTH)),
        jnp.zeros((), call.wide),
    )
    (dx, health, total), dw = _over_chunks(call, qw, chunk, zeros)
    of_g = amax
    if in_full and scale is not None and amax is not None:
        whole = jnp.concatenate([jnp.stack([amax, scale]), health[2:]])
        of_g = statistics.of_gradient(whole, lse.shape, counted, mean=total / float(elements))
    d_token = None
    if token is not None and of_x is not None and of_g is not None:
        d_token = token.like(jnp.stack([of_x, of_g]))
    return jnp.sum(dx, axis=0).astype(call.x_dtype), dw, None, None, None, d_token, None


_cross_entropy.defvjp(_forward, _backward)


def _over_chunks(
    call: _Call, qw: Quantised, body: Callable, carry: Any
) -> tuple[Any, jax.Array | None]:
    """Fold body(carry, rows of every shard, first row) → (carry, rows of dW or None) over the
    chunks; join dW, [v, d].
    """
    vocabulary, width = qw.data.shape
    by_shard = qw.data.reshape(call.shards, vocabulary // call.shards, width)
    rows = by_shard.shape[1]
    size = min(call.chunk, rows)
    whole, rest = divmod(rows, size)

    def step(carry, start, size=size):
        return body(
            carry,
            Quantised(lax.dynamic_slice_in_dim(by_shard, start, size, axis=1), qw.scale),
            start,
        )

    carry, found = lax.scan(step, carry, jnp.arange(whole, dtype=jnp.int32) * size)
    parts = (
        []
        if found is None
        else [jnp.moveaxis(found, 0, 1).reshape(call.shards, whole * size, width)]
    )
    if rest:
        carry, last = step(carry, jnp.int32(whole * size), rest)
        parts += [] if last is None else [last]
    return carry, jnp.concatenate(parts, axis=1).reshape(vocabulary, width) if parts else None


def _logits(call: _Call, qx: Quantised, part: Quantised) -> jax.Array:
    """Return a chunk's logits, [b, t, shards, rows]."""
    return call.gemm(qx, part, (((2,), (2,)), ((), ())), call.wide, "fprop")


def _hits(call: _Call, qw: Quantised, targets: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    """Return where a chunk's logits are the targets', bool [b, t, shards, rows]."""
    shape = call.shards, rows
    ids = (
        start
        + lax.broadcasted_iota(jnp.int32, shape, 1)
        + qw.data.shape[0] // call.shards * lax.broadcasted_iota(jnp.int32, shape, 0)
    )
    return _wide(targets) == ids


def _amax(
    lse: jax.Array, target: jax.Array, other: jax.Array, of_nll: jax.Array, both: jax.Array
) -> jax.Array:
    """Return the largest |g| of all tokens and rows; all arguments are [b, t]."""
    return formats.amax(
        jnp.stack([both * jnp.exp(other - lse), both * jnp.exp(target - lse) - of_nll])
    )


def _gradient_scale(
    recipe: GemmRecipe, amax: jax.Array | None, scales: jax.Array | None
) -> jax.Array | None:
    if not recipe.fp8 or amax is None:
        return None
    if recipe.scaling == "static":
        return recipe.static_scale("g")
    return recipe.scale(amax, recipe.format("g")) if scales is None else operand_scale(scales, "g")


def _wide(x: jax.Array) -> jax.Array:
    return x[..., None, None]
