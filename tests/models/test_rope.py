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
    return layers.rope_frequencies(architectures.resolve(config.model, 128))


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


def test_linear_scaling_slows_every_pair():
    np.testing.assert_allclose(
        frequencies(rope_scaling="linear", rope_scaling_factor=4.0), frequencies() / 4, rtol=1e-15
    )


def test_yarn_keeps_what_turns_often_and_slows_what_does_not():
    """Peng et al. 2023, section 3.2, pair by pair, with the bounds rounded to whole pairs as in their code."""
    factor, context, fast, slow, theta = 16.0, 4096, 32.0, 1.0, 10000.0
    pair = [
        128 * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (fast, slow)
    ]
    first, last = math.floor(pair[0]), math.ceil(pair[1])
    expected = []
    for i in range(64):
        frequency, slowed = theta ** (-i / 64), min(max((i - first) / (last - first), 0.0), 1.0)
        expected.append(frequency * (1 - slowed) + frequency / factor * slowed)
    found = frequencies(
        rope_scaling="yarn",
        rope_scaling_factor=factor,
        rope_original_context=context,
        rope_theta=theta,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (
        0 < first < last < 64
        and found[0] == 1
        and found[-1] == pytest.approx(theta ** (-63 / 64) / 16)
    )


def test_dynamic_scaling_begins_where_the_original_context_ends():
    model = {"rope_scaling": "dynamic", "rope_scaling_factor": 2.0, "rope_original_context": 100}
    config = architectures.resolve(
        config_lib.from_dict({"model": {"width": 128, "heads": 1, "kv_heads": 1} | model}).model,
        128,
    )
    for length in (1, 99, 100):
        np.testing.assert_array_equal(layers.rope_frequencies(config, length), frequencies())
    base = 500000.0 * (2.0 * 250 / 100 - 1) ** (128 / 126)
    np.testing.assert_allclose(
        layers.rope_frequencies(config, 250), [base ** (-i / 64) for i in range(64)], rtol=1e-12
    )


def test_a_factor_on_queries_and_keys_is_one_on_cos_and_sin():
    positions = jnp.arange(5)[None]
    for one, other in zip(
        layers.rope_table(positions, frequencies()),
        layers.rope_table(positions, frequencies(), 1.25),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(one) * np.float32(1.25), other)


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
    np.testing.assert_allclose(
        np.asarray(cos) + 1j * np.asarray(sin),
        np.exp(1j * positions[..., None] * model),
        rtol=0,
        atol=1.5e-6,
    )


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(config_lib.ConfigError, match="rope_high_freq_factor"):
        frequencies(rope_scaling_factor=8.0, rope_low_freq_factor=4.0, rope_high_freq_factor=1.0)


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    """Against the transposed matrix in float64, with an attention factor and positions of each row."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), jnp.float32) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 50, (2, 5)), jnp.int32)
    table = layers.rope_table(positions, np.geomspace(1, 1e-3, 4), 1.25)
    found = jax.vjp(lambda x: layers.apply_rope(x, table), x)[1](g)[0]
    cos, sin = (np.asarray(part, np.float64)[:, :, None] for part in table)
    first, second = np.split(np.asarray(g, np.float64), 2, axis=-1)
    expected = np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (
        jax.vjp(lambda x: layers.apply_rope(x, table), x.astype(jnp.bfloat16))[1](
            g.astype(jnp.bfloat16)
        )[0].dtype
        == jnp.bfloat16
    )
