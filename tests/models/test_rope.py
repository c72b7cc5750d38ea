"""RoPE frequencies against Llama 3.1's published rule, worked through pair by pair."""

import math

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
    assert changed[0] == 1 and changed[-1] == np.float32(1 / 8) and ((changed > 0.2) & (changed < 0.9)).any()


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(config_lib.ConfigError, match="rope_high_freq_factor"):
        frequencies(rope_scaling_factor=8.0, rope_low_freq_factor=4.0, rope_high_freq_factor=1.0)
