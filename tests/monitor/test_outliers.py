"""Names of statistics in logs, averages over layers, and what is not known, worked out by hand."""

import math

import numpy as np
import pytest

from fp8jax.monitor.outliers import flatten


def stats(**values):
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def test_values_of_layers_and_their_average():
    found = flatten(
        {
            "qkv": stats(kurtosis=[3.0, 5.0], rms=[1.0, 0.5]),
            "attention_scores": stats(max_logit=[7.0, 9.0]),
        }
    )
    assert found == {
        "kurtosis/qkv_layer000": 3.0,
        "kurtosis/qkv_layer001": 5.0,
        "kurtosis/qkv_avg": 4.0,
        "rms/qkv_layer000": 1.0,
        "rms/qkv_layer001": 0.5,
        "rms/qkv_avg": 0.75,
        "max_logit/attention_scores_layer000": 7.0,
        "max_logit/attention_scores_layer001": 9.0,
        "max_logit/attention_scores_max": 9.0,
    }
    assert all(type(value) is float for value in found.values())


def test_layers_have_three_digits_in_their_order():
    found = flatten({"q": stats(rms=np.arange(12.0))})
    assert (
        list(found)[1:] == [f"rms/q_layer{layer:03d}" for layer in range(12)]
        and found["rms/q_layer011"] == 11.0
    )


def test_signal_and_noise_are_a_ratio_in_decibels():
    cast = stats(
        amax=[1.0] * 3,
        scale=[1.0] * 3,
        signal=[100.0, 1.0, 0.0],
        noise=[0.1, 0.0, 0.0],
        tokens=[4.0] * 3,
    )
    found = flatten({"mlp_up.x": cast})
    assert (
        found["snr/mlp_up.x_layer000"] == pytest.approx(30.0)
        and found["snr/mlp_up.x_layer001"] == math.inf
    )
    assert "snr/mlp_up.x_layer002" not in found  # nothing was cast into nothing
    assert not [
        name for name in found if name.startswith(("signal/", "noise/", "tokens/", "rows/"))
    ]


def test_what_was_not_cast_or_of_nothing_is_not_logged():
    """A layer without a cast has scale 0; one that nothing entered has no tokens; a kurtosis may be of no rows by itself."""
    operand = stats(
        amax=[2.0, 4.0, 8.0],
        scale=[0.5, 0.0, 0.5],
        overflow=[0.5, 0.0, 0.0],
        underflow=[0.25, 0.0, 0.0],
        mean=[1.0, 2.0, 0.0],
        kurtosis=[9.0, 0.0, 0.0],
        tokens=[6.0, 6.0, 0.0],
        rows=[6.0, 0.0, 0.0],
    )
    found = flatten({"mlp_up.g": operand})
    assert found == {
        "amax/mlp_up.g_max": 8.0,
        **{f"amax/mlp_up.g_layer00{i}": 2.0 * 2**i for i in range(3)},
        "scale/mlp_up.g_avg": 0.5,
        "scale/mlp_up.g_layer000": 0.5,
        "overflow/mlp_up.g_avg": 0.5,
        "overflow/mlp_up.g_layer000": 0.5,
        "underflow/mlp_up.g_avg": 0.25,
        "underflow/mlp_up.g_layer000": 0.25,
        "mean/mlp_up.g_avg": 1.5,
        "mean/mlp_up.g_layer000": 1.0,
        "mean/mlp_up.g_layer001": 2.0,
        "kurtosis/mlp_up.g_avg": 9.0,
        "kurtosis/mlp_up.g_layer000": 9.0,
        "fp8/saturated_fraction": 0.5,
        "fp8/underflow_fraction": 0.25,
    }


def test_fractions_of_all_casts_are_averages_over_operands_and_layers():
    one = stats(scale=[1.0, 1.0], overflow=[0.1, 0.3], underflow=[0.0, 0.0])
    other = stats(scale=[1.0, 0.0], overflow=[0.2, 0.9], underflow=[0.6, 0.9])
    found = flatten({"qkv.x": one, "qkv.w": other, "q": stats(rms=[1.0, 1.0])})
    assert found["fp8/saturated_fraction"] == pytest.approx(0.2) and found[
        "fp8/underflow_fraction"
    ] == pytest.approx(0.2)
    assert not [name for name in flatten({"q": stats(rms=[1.0])}) if name.startswith("fp8/")]


def test_a_number_that_is_not_one_stays_visible():
    found = flatten({"qkv": stats(kurtosis=[3.0, math.nan], tokens=[2.0, 2.0], rows=[2.0, 2.0])})
    assert math.isnan(found["kurtosis/qkv_layer001"]) and math.isnan(found["kurtosis/qkv_avg"])


def test_nothing_is_nothing():
    assert flatten({}) == {}
