"""Decoding with a cache against the plain forward pass over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models import kv_cache
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes

MICRO = {"layers": 2, "width": 32, "ffn_width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8}
LENGTH, CAPACITY = 12, 16
PROMPTS = np.array([5, 1, 8])  # tokens of each row that go in at once


def decoded(dtype: str, architecture: str, recipe: str = "bf16"):
    """Logits of every position past the prompt: (uncached, cached), float32 [b, t, v], NaN before it."""
    config = config_lib.from_dict({"model": MICRO | {"architecture": architecture, "dtype": dtype}})
    definition = define(config.model, 64)
    recipes = model_recipes(
        config, gated=definition.gated(), emulated=True, recipe=recipe
    ).scaled_by("current")
    # Large weights: with those of an untrained model attention is nearly uniform, and a wrong mask hardly shows.
    params = jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, definition.init(0))
    ids = np.random.default_rng(0).integers(0, 64, (3, LENGTH)).astype(np.int32)

    @jax.jit
    def run(params, ids):
        model = definition.bind(params)
        prepared = model.prepare(recipes)
        whole, _ = model({"inputs": ids}, prepared)
        cache = kv_cache.empty(model.config, 3, CAPACITY)
        # Right-padded prompts: what stands in the padding's slots must never be seen.
        _, cache = model.extend(
            jnp.where(jnp.arange(LENGTH) < PROMPTS[:, None], ids, 63), cache, prepared
        )
        cache = cache._replace(filled=jnp.asarray(PROMPTS, jnp.int32))

        def one(cache, _):
            token = jnp.take_along_axis(ids, cache.filled[:, None], axis=1, mode="clip")
            logits, cache = model.extend(token, cache, prepared)
            return cache, logits[:, 0]

        return whole, jax.lax.scan(one, cache, length=LENGTH - 1)[1]

    whole, steps = (np.asarray(x) for x in run(params, ids))
    cached = np.full_like(whole, np.nan)
    for row, start in enumerate(PROMPTS):
        cached[row, start:] = steps[: LENGTH - start, row]
    return np.where(np.isnan(cached), np.nan, whole), cached


@pytest.mark.parametrize("architecture", config_lib.ARCHITECTURES)
def test_cached_logits_equal_uncached_ones(architecture):
    whole, cached = decoded("float32", architecture)
    np.testing.assert_allclose(cached, whole, atol=2e-5 * np.nanmax(np.abs(whole)))


@pytest.mark.parametrize("architecture", ["fog_max", "llama3"])
def test_in_bfloat16_within_rounding(architecture):
    exact, _ = decoded("float32", architecture)
    whole, cached = decoded("bfloat16", architecture)
    rounding = np.sqrt(np.nanmean((whole - exact) ** 2))
    assert np.sqrt(np.nanmean((cached - whole) ** 2)) <= rounding


def test_fp8_attention_is_refused():
    with pytest.raises(ValueError, match="bf16 only"):
        decoded("bfloat16", "fog_max", "fp8_dpa")
