"""Outlier statistics against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics import statistics
from fp8jax.numerics.formats import E4M3, E5M2

from . import reference

SIZES = pytest.mark.parametrize("size", [1.0, 1e10, 1e-12])


def kurtosis(x, pooled=False):
    """FOG.md section 5, in float64: of each token, or of each sequence, not centred; zero ones left out."""
    x = np.asarray(x).astype(np.float64)
    samples = x.reshape(x.shape[0], -1) if pooled else x.reshape(-1, x.shape[-1])
    samples = samples[np.any(samples != 0, axis=1)]
    return np.mean(np.mean(samples**4, axis=1) / np.mean(samples**2, axis=1) ** 2) if len(samples) else 0.0


def heavy(shape, size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, shape) * size, jnp.float32)


@SIZES
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 33), (2, 5, 3, 2, 16)], ids=["features", "heads"])
def test_kurtosis(shape, pooled, size):
    """float32 fourth powers overflow at 1e10 and vanish at 1e-12."""
    x = heavy(shape, size)
    np.testing.assert_allclose(statistics.kurtosis(x, pooled=pooled), kurtosis(x, pooled), rtol=2e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_kurtosis_of_tokens_of_very_different_sizes(pooled):
    """Each token counts the same, whatever its size; pooled, the large ones rule."""
    x = heavy((2, 6, 16), 1.0) * jnp.logspace(-8, 8, 12, dtype=jnp.float32).reshape(2, 6, 1)
    np.testing.assert_allclose(statistics.kurtosis(x, pooled=pooled), kurtosis(x, pooled), rtol=2e-5)
    assert abs(kurtosis(x) - kurtosis(x, True)) > 1


@pytest.mark.parametrize("pooled", [False, True])
def test_zero_tokens_are_left_out(pooled):
    x = heavy((3, 4, 16), 1.0).at[1].set(0).at[0, 2].set(0)
    np.testing.assert_allclose(statistics.kurtosis(x, pooled=pooled), kurtosis(x, pooled), rtol=2e-5)
    assert float(statistics.kurtosis(jnp.zeros((2, 3, 8)), pooled=pooled)) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kurtosis_of_a_gaussian_is_three_and_of_one_hot_the_width(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 64, 1024)).astype(dtype)  # in bfloat16 its tails are short: 2.92
    assert abs(float(statistics.kurtosis(x)) - 3) < 0.03
    assert float(statistics.kurtosis(5 * jax.nn.one_hot(jnp.arange(6).reshape(2, 3), 40, dtype=dtype))) == pytest.approx(40, rel=1e-5)
    assert float(statistics.kurtosis(jnp.full((2, 3, 8), -2, dtype))) == pytest.approx(1, rel=1e-6)


@SIZES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments(dtype, size):
    x = (heavy((3, 5, 16), size) + jnp.float32(size)).astype(dtype)
    exact = np.asarray(x).astype(np.float64)
    found = statistics.moments(x)
    np.testing.assert_allclose(found["mean"], exact.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["rms"], np.sqrt(np.mean(exact**2)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 0.013])
def test_cast_losses_count_what_the_cast_does(dtype, scale):
    """Against casting every element: non-zero ones that become zero; those beyond the format's maximum."""
    rng = np.random.default_rng(0)
    edges = np.asarray([reference.TOP[dtype], 1.0001 * reference.TOP[dtype], float(jnp.finfo(dtype).smallest_subnormal) / 2,
                        float(jnp.finfo(dtype).smallest_subnormal) * 0.501, 0.0, -0.0])
    values = np.concatenate([np.ldexp(rng.uniform(-1, 1, 994), rng.integers(-30, 24, 994)), edges]) * scale
    x = values.astype(np.float32)
    cast = reference.quantise(x, dtype, scale)
    scaled = x * (np.float32(1) / np.float32(scale))
    found = statistics.cast_losses(jnp.asarray(x), jnp.float32(scale), dtype)
    assert float(found["underflow"]) == pytest.approx(np.mean((x != 0) & (cast == 0)))
    assert float(found["overflow"]) == pytest.approx(np.mean(np.abs(scaled) > reference.TOP[dtype]))
    assert 0 < float(found["underflow"]) < 0.6 and 0 < float(found["overflow"]) < 0.6
    assert (float(found["amax"]), float(found["scale"])) == (np.abs(x).max(), np.float32(scale))


def test_cast_losses_of_a_bad_tensor():
    """The amax says it."""
    assert np.isposinf(statistics.cast_losses(jnp.asarray([1.0, jnp.nan]), jnp.float32(1), E4M3)["amax"])


def test_combine_equals_the_whole_batch():
    """Statistics of four microbatches make those of the batch: means, root mean squares, maxima."""
    x = heavy((8, 4, 32), 1.0)

    def of(x):
        return {"qkv": statistics.moments(x) | {"kurtosis": statistics.kurtosis(x)} | statistics.cast_losses(x, jnp.float32(2.0**-8), E4M3)}

    parts = [of(part) for part in jnp.split(x, 4)]
    combined = statistics.combine(jax.tree.map(lambda *values: jnp.stack(values), *parts))
    assert combined["qkv"].keys() == of(x)["qkv"].keys()
    for name, value in of(x)["qkv"].items():
        np.testing.assert_allclose(combined["qkv"][name], value, rtol=1e-5, err_msg=name)
