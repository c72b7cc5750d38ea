"""Keep keys and values of earlier tokens, so that decoding a token costs one token's work.

    cache = kv_cache.empty(model.config, batch=4, capacity=512)
    logits, cache = model.extend(prompt_bt, cache, gemms)       # an empty cache takes the whole prompt
    cache = cache._replace(filled=prompt_lengths_b)                         # rows padded on the right: drop the padding
    logits, cache = model.extend(token_b1, cache, gemms)        # then one token at a time

Slot s of a row holds the token at position s, so the slots that a row's padding took are hidden
until they are overwritten. Only BF16 and float32 are supported: generation has no FP8 path.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.config import ModelConfig
from fp8jax.numerics.attention import rows as attention_rows
from fp8jax.numerics.attention.definition import SCORES, VALUES
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.parallel.sharding import constrain


class KVCache(NamedTuple):
    """The keys (after RoPE) and values, [l, b, s, k, h], of one layer [b, s, k, h]; filled: int32
    [b], slots in use.
    """

    k: jax.Array
    v: jax.Array
    filled: jax.Array


def empty(config: ModelConfig, batch: int, capacity: int) -> KVCache:
    """Return a cache for `batch` rows of at most `capacity` tokens, in the dtype of activations."""
    zeros = jnp.zeros(
        (config.layers, batch, capacity, config.kv_heads, config.head_dim), jnp.dtype(config.dtype)
    )
    return pin(KVCache(zeros, zeros, jnp.zeros((batch,), jnp.int32)))


def pin(cache: KVCache) -> KVCache:
    """Return the cache, split by rows and heads."""
    k, v = (constrain(x, None, "batch", None, "kv_heads", None) for x in cache[:2])
    return KVCache(k, v, constrain(cache.filled, "batch"))


def append(layer: KVCache, k_btkh: jax.Array, v_btkh: jax.Array) -> KVCache:
    """Return one layer's cache with keys and values of t more tokens per row; the caller of all
    layers updates `filled`.
    """
    write = jax.vmap(
        lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0)
    )
    return layer._replace(
        k=write(layer.k, k_btkh, layer.filled), v=write(layer.v, v_btkh, layer.filled)
    )


def attend(
    q_btkgh: jax.Array, layer: KVCache, recipes: Mapping[str, GemmRecipe], softmax_scale: float
) -> jax.Array:
    """Attend from the newest t tokens, which `append` has just written, to all of their row's
    tokens up to themselves.

    Returns:
        [b, t, k, g, h], equal to `numerics.attention` over the whole sequence.

    Raises:
        ValueError: attention is in FP8.
    """
    if recipes[SCORES].fp8 or recipes[VALUES].fp8:
        raise ValueError("a KV cache works in recipe bf16 only: FP8 attention is for training")
    positions = layer.filled[:, None] + jnp.arange(q_btkgh.shape[1])
    mask = positions[:, :, None] >= jnp.arange(layer.k.shape[1])
    call = attention_rows.Call(recipes[SCORES], recipes[VALUES], softmax_scale, q_btkgh.dtype)
    q, k, v = (Quantised(array, None) for array in (q_btkgh, layer.k, layer.v))
    return attention_rows.output(call, q, k, v, mask)[0]
