"""Compute the largest attention score and the entropy of attention's probabilities, apart from
attention itself.

    found = score_statistics(q_btkgh, k_bskh, recipe, softmax_scale=0.125, scales=scales)
    found["max_logit"], found["entropy"]

The scores are computed again, from operands cast as attention casts them: one GEMM more, in steps
with statistics only. So attention itself is the same in every step. If attention runs our kernels,
a kernel computes them as well; otherwise chunks of queries do.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import statistics
from fp8jax.numerics.attention import composed as attention_composed
from fp8jax.numerics.attention import pallas as attention_pallas
from fp8jax.numerics.attention import rows as attention_rows
from fp8jax.numerics.attention.rows import Call
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.gemm_sharding import Partition, moved, pin, placements
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.scaling import operand_scale


def score_statistics(
    q_btkgh: jax.Array,
    k_bskh: jax.Array,
    recipe: GemmRecipe,
    *,
    softmax_scale: float,
    scales: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    backend: str = "composed",
    partition: Partition | None = None,
    counted: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return `max_logit`, the largest scaled score that any query sees, and `entropy` in nats, a
    mean over queries and heads.

    Args:
        q_btkgh: queries as `attention` takes them.
        k_bskh: keys, likewise.
        recipe: recipe of role attention_scores.
        softmax_scale: factor on the scores.
        scales: scales of q, k and dS; needed by delayed scaling.
        segment_ids: int32 [b, t], or None.
        backend: backend of `attention`; only `pallas` makes a difference.
        partition: as for `attention`.
        counted: bool [b, t]: the queries that count; None counts all.

    Returns:
        float32 scalars, and the number of `tokens` in them; infinity or NaN for scores that are not
        finite.
    """
    call = Call(recipe, recipe, softmax_scale, q_btkgh.dtype, partition=partition)
    scale_q, scale_k = (operand_scale(scales, name, "attention_scores") for name in ("q", "k"))
    many, few = placements(partition if backend == "pallas" else None, "btkgh", "bskh")
    q, k = (
        moved(recipe.quantise(pin(x, place.cast), scale, name)[0], *place)
        for x, place, scale, name in ((q_btkgh, many, scale_q, "q"), (k_bskh, few, scale_k, "k"))
    )
    meant = jnp.ones(q.data.shape[:2], bool) if counted is None else counted
    if backend == "pallas":
        top, entropy = _reduced(meant, *attention_pallas.scores(call, q, k, segment_ids))
    else:
        top, entropy = _in_chunks(call, q, k, segment_ids, meant)
    tokens, heads = (
        statistics.tokens(meant.shape, counted),
        float(q.data.shape[2] * q.data.shape[3]),
    )
    return {
        "max_logit": jnp.where(tokens > 0, jnp.max(top), 0.0),
        "entropy": jnp.sum(entropy) / (jnp.maximum(tokens, 1.0) * heads),
        "tokens": tokens,
    }


def _in_chunks(
    call: Call, q: Quantised, k: Quantised, segment_ids: jax.Array | None, meant: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def chunk(carry, start, rows, keys):
        mask = attention_rows.visible(start, rows, keys, segment_ids)
        some = attention_composed.rows_of(q, start, rows), attention_composed.rows_of(k, 0, keys)
        top, entropy = _reduced(
            lax.dynamic_slice_in_dim(meant, start, rows, axis=1),
            *attention_rows.spread_of_scores(call, *some, mask),
        )
        return jnp.maximum(carry[0], top), carry[1] + entropy

    b, t, heads, _, _ = q.data.shape
    init = jnp.full((b, heads), -jnp.inf), jnp.zeros((b, heads))
    return attention_composed.over_chunks(t, chunk, lax.stop_gradient(q.data), init)


def _reduced(
    meant_bt: jax.Array, top_bkgt: jax.Array, entropy_bkgt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the largest score and the sum of the entropies of the queries that count, [b, k]."""
    of_query = meant_bt[:, None, None, :]
    return jnp.max(jnp.where(of_query, top_bkgt, -jnp.inf), axis=(2, 3)), jnp.sum(
        jnp.where(of_query, entropy_bkgt, 0.0), axis=(2, 3)
    )
