"""RoPE: frequencies against Llama 3.1's published rule, worked through pair by pair; angles against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models import architectures, layers


def frequencies(**model):
    config = config_lib.from_dict({"model": {"width": 128, "heads": 1, "kv_heads": 1} | model})
    return layers.rope_frequencies(architectures.resolve(config.model))


def test_without_scaling_the_frequencies_are_powers_of_the_base():
    np.testing.assert_allclose(frequencies(), [500000.0 ** (-i / 64) for i in range(64)], rtol=1e-7)


def test_llama_3_scaling_slows_long_wavelengths_only():
    factor, low, high, context = 8.0, 1.0, 4.0, 8192
    expected = []
    for i in range(64):
        frequency = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > context / low:
            frequency /= factor
        elif wavelength >= context / high:
            smooth = (context / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
    found = frequencies(rope_scaling_factor=factor)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    changed = found / frequencies()
    assert changed[0] == 1 and changed[-1] == 1 / 8 and ((changed > 0.2) & (changed < 0.9)).any()


@pytest.mark.parametrize("theta", [1.0, 10000.0, 500000.0, 1e9])
def test_angles_are_exact_at_every_position(theta):
    """To 2**24 positions, traced, as with document masks; float32 loses all of an angle there."""
    rng = np.random.default_rng(0)
    edges = [0, 1, 4095, 65535, 65536, 131071, 131072, 10**6, 2**24 - 1, 2**24]
    positions = np.concatenate([edges, rng.integers(0, 2**24, 500)]).astype(np.int32)[None]
    model = frequencies(rope_theta=theta)
    cos, sin = jax.jit(lambda positions: layers.rope_table(positions, model))(positions)
    angles = positions[..., None].astype(np.float64) * theta ** (-np.arange(0, 128, 2) / 128)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (1, 510, 64)
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-6)


def test_scaled_angles_are_exact_as_well():
    model = frequencies(rope_scaling_factor=8.0)
    positions = np.array([[131072, 10**6 + 1]])
    cos, sin = layers.rope_table(jnp.asarray(positions), model)
    np.testing.assert_allclose(np.asarray(cos) + 1j * np.asarray(sin), np.exp(1j * positions[..., None] * model), rtol=0, atol=1.5e-6)


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(config_lib.ConfigError, match="rope_high_freq_factor"):
        frequencies(rope_scaling_factor=8.0, rope_low_freq_factor=4.0, rope_high_freq_factor=1.0)
