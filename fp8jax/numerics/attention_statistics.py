"""Largest attention score and entropy of the attention probabilities, computed apart from attention itself.

    found = score_statistics(q_btkgh, k_bskh, recipe, softmax_scale=0.125, scales=scales)
    found["max_logit"], found["entropy"]

The scores are computed again, from operands cast as attention casts them, in chunks of queries: one GEMM more, in steps with
statistics only. So they are the same for every backend, a kernel's too, which never shows its scores.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import attention_composed, attention_rows
from fp8jax.numerics.attention_rows import Call
from fp8jax.numerics.recipes import GemmRecipe


def score_statistics(q_btkgh: jax.Array, k_bskh: jax.Array, recipe: GemmRecipe, *, softmax_scale: float,
                     scales: jax.Array | None = None, segment_ids: jax.Array | None = None) -> dict[str, jax.Array]:
    """`max_logit`, the largest scaled score that any query sees, and `entropy`, in nats, a mean over queries and heads.

    Args:
        q_btkgh: queries as `attention` takes them.
        k_bskh: keys, likewise.
        recipe: of role attention_scores.
        softmax_scale: factor on the scores.
        scales: of q, k and dS; needed by delayed scaling.
        segment_ids: int32 [b, t], or None.

    Returns:
        float32 scalars; of scores that are not finite, infinity or NaN.
    """
    q, k = (recipe.quantise(x, None if scales is None else scales[i], name)[0] for i, (x, name) in enumerate(((q_btkgh, "q"), (k_bskh, "k"))))
    call = Call(recipe, recipe, softmax_scale, q_btkgh.dtype)

    def chunk(carry, start, rows, keys):
        mask = attention_rows.visible(start, rows, keys, segment_ids)
        some = attention_composed.rows_of(q, start, rows), attention_composed.rows_of(k, 0, keys)
        top, entropy = attention_rows.spread_of_scores(call, *some, mask)
        return jnp.maximum(carry[0], top), carry[1] + entropy

    b, t, heads, groups, _ = q_btkgh.shape
    init = jnp.full((b, heads), -jnp.inf), jnp.zeros((b, heads))
    top, entropy = attention_composed.over_chunks(t, chunk, lax.stop_gradient(q.data), init)
    return {"max_logit": jnp.max(top), "entropy": jnp.sum(entropy) / (b * t * heads * groups)}
