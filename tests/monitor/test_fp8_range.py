"""Loads: their units measured on tensors that are really cast, in float64 NumPy."""

import math

import ml_dtypes
import numpy as np
import pytest

from fp8jax.monitor.fp8_range import LOGITS, ROUNDING, loads

FORMATS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
}


def cast(x, name):
    scale = np.abs(x).max() / float(ml_dtypes.finfo(FORMATS[name]).max)
    return (x / scale).astype(np.float32).astype(FORMATS[name]).astype(np.float64) * scale


def snr(x, y):
    return 10 * np.log10(np.mean(x**2) / np.mean((x - y) ** 2))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_of_a_gaussian_tensor(name):
    x = np.random.default_rng(0).normal(size=400_000)
    measured = snr(x, cast(x, name))
    assert measured == pytest.approx(ROUNDING[name], abs=0.3)
    if name == "bf16":  # what is not in FP8 has no load of its own, and six roundings in a logit
        found = loads({"rms/q_layer000": 3.0, "rms/k_layer000": 2.0})
        assert found == {
            (LOGITS, 0): pytest.approx(6 * math.sqrt(6 * 10 ** (-measured / 10)), rel=0.05)
        }
        return
    # A quarter of what costs a bit, which are 6 dB; of a gradient by the format that gradients have.
    operands = {
        "mlp_down.g": name,
        "attention_scores.ds": name,
        "attention_values.do": name,
        "mlp_down.x": "e4m3",
        "mlp_down.w": "e4m3",
    }
    for tensor, of in operands.items():
        found = loads({f"snr/{tensor}_layer001": snr(x, cast(x, of))}, name)
        assert found == {(tensor, 1): pytest.approx(0.25, rel=0.08)}, tensor


def test_a_gradient_in_e4m3_that_has_lost_a_bit_is_at_the_edge():
    """25.5 dB, which is whole for e5m2: it took another bit to be seen."""
    entry = {"snr/mlp_down.g_layer000": 25.5}
    assert loads(entry, "e4m3")["mlp_down.g", 0] == pytest.approx(1.0, rel=0.01)
    assert (
        loads(entry, "e5m2")["mlp_down.g", 0]
        == loads(entry)["mlp_down.g", 0]
        == pytest.approx(0.25, rel=0.01)
    )


@pytest.mark.parametrize(("size_q", "size_k"), [(1.0, 1.0), (6.0, 3.0)])
def test_the_error_of_logits_is_that_of_casting_inputs_weights_queries_and_keys(size_q, size_k):
    rng = np.random.default_rng(1)
    x, w_q, w_k = (
        rng.normal(size=(600, 128)),
        size_q * rng.normal(size=(128, 64)) / 128**0.5,
        size_k * rng.normal(size=(128, 64)) / 128**0.5,
    )
    q, k, rounded_x = x @ w_q, x @ w_k, cast(x, "e4m3")
    rounded_w = cast(np.concatenate([w_q / size_q, w_k / size_k], 1), "e4m3") * np.repeat(
        [size_q, size_k], 64
    )
    rough_q, rough_k = rounded_x @ rounded_w[:, :64], rounded_x @ rounded_w[:, 64:]
    cast_q, cast_k = cast(rough_q, "e4m3"), cast(rough_k, "e4m3")
    measured = np.std((cast_q @ cast_k.T - q @ k.T)[~np.eye(600, dtype=bool)] / 8)
    entry = {
        "rms/q_layer002": np.sqrt(np.mean(q**2)),
        "rms/k_layer002": np.sqrt(np.mean(k**2)),
        "snr/qkv.x_layer002": snr(x, rounded_x),
        "snr/qkv.w_layer002": 31.5,
        "snr/attention_scores.q_layer002": snr(rough_q, cast_q),
        "snr/attention_scores.k_layer002": snr(rough_k, cast_k),
    }
    assert loads(entry)[LOGITS, 2] == pytest.approx(measured, rel=0.1)


def test_attention_in_bf16_rounds_sixteen_times_finer():
    entry = {"rms/q_layer000": 3.0, "rms/k_layer000": 2.0}
    names = ("attention_scores.q", "attention_scores.k", "qkv.x", "qkv.w")
    fp8, mixed = ({f"snr/{name}_layer000": value for name in names} for value in (31.5, math.nan))
    assert loads(entry | fp8)[LOGITS, 0] / loads(entry)[LOGITS, 0] == pytest.approx(16, rel=0.01)
    assert loads(entry | mixed)[LOGITS, 0] == loads(entry)[LOGITS, 0]


def test_a_load_of_one_is_a_bit_of_the_mantissa():
    found = loads(
        {
            "snr/mlp_down.x_layer001": 31.5 - 6.0206,
            "snr/mlp_down.g_layer001": 25.5,
            "snr/qkv.w_layer000": math.inf,
            "snr/qkv.x_layer000": math.nan,
            "snr/qkv.x_avg": 3.0,
        }
    )
    assert found["mlp_down.x", 1] == pytest.approx(1.0, rel=1e-4)
    assert found["mlp_down.g", 1] == pytest.approx(0.25, rel=1e-3)
    assert found["qkv.w", 0] == 0.0 and ("qkv.x", 0) not in found and len(found) == 3
