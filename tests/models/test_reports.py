"""What a step with statistics hands on: amaxes for the scaling state, statistics for the log."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from fp8jax.models import gemms
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.numerics import statistics
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe

FP8, PLAIN = GemmRecipe("delayed", history_length=4), GemmRecipe("bf16")
WIDTH = len(statistics.REPORT)


def recipes():
    """Two layers; mlp_down is in FP8 in the first alone, qkv nowhere."""
    roles = ("qkv", "mlp_up", "mlp_down", "attention_scores")
    first = dict.fromkeys(roles, FP8) | {"qkv": PLAIN}
    return ModelRecipes(
        (first, first | {"mlp_down": PLAIN}), dataclasses.replace(FP8, scaling="current")
    )


def reports():
    """Each entry another number: 100 (layer + 1) + 20 (operand + 1) + its place in REPORT."""
    layers, names = np.arange(2)[:, None, None], np.arange(WIDTH)
    return {
        role: jnp.asarray(
            100 * (layers + 1) + 20 * (np.arange(len(OPERANDS[role]))[:, None] + 1) + names,
            jnp.float32,
        )
        for role in ("qkv", "mlp_up", "mlp_down", "attention_scores")
    }


def test_amaxes_are_the_first_entry_where_a_layer_is_in_fp8():
    """A step with statistics must push what one without would have pushed, nothing else of the report."""
    amaxes, _ = gemms.read_reports(reports(), recipes(), pooled=False)
    at = statistics.REPORT.index("amax")
    np.testing.assert_array_equal(amaxes["mlp_up"], np.array([[120, 140], [220, 240]]) + at)
    np.testing.assert_array_equal(amaxes["mlp_down"], np.array([[120 + at, 140 + at], [0, 0]]))
    np.testing.assert_array_equal(
        amaxes["attention_scores"], np.array([[120, 140, 160], [220, 240, 260]]) + at
    )
    assert set(amaxes) == {"mlp_up", "mlp_down", "attention_scores"}
    state = gemms.init_scaling(recipes())
    pushed = gemms.update_scaling(state, amaxes, recipes())
    np.testing.assert_array_equal(pushed["mlp_up"]["history"][..., 0], amaxes["mlp_up"])


def test_statistics_keep_their_names():
    _, health = gemms.read_reports(reports(), recipes(), pooled=False)
    for role in ("mlp_up", "mlp_down", "attention_scores"):
        for i, operand in enumerate(OPERANDS[role]):
            found = health[f"{role}.{operand}"]
            assert set(statistics.HEALTH) <= set(found)
            for name in statistics.HEALTH:
                place = 20 * (i + 1) + statistics.REPORT.index(name)
                np.testing.assert_array_equal(found[name], [100 + place, 200 + place])
    assert set(health["qkv.x"]) == {"amax", *statistics.WEIGHTS}  # not cast: nothing else is known
    spread = {"mean", "rms", "kurtosis"}
    assert set(health["qkv.g"]) == spread | {"amax", "tokens", "rows"} and not spread & set(
        health["mlp_up.x"]
    )
    _, pooled = gemms.read_reports(reports(), recipes(), pooled=True)
    places = [statistics.REPORT.index(name) for name in ("kurtosis", "pooled_kurtosis")]
    assert [float(found["mlp_up.g"]["kurtosis"][0]) for found in (health, pooled)] == [
        140 + place for place in places
    ]
    assert "pooled_kurtosis" not in pooled["mlp_up.g"]


def test_an_amax_of_one_device_that_is_not_a_number_is_seen():
    amax = np.array(
        [[[1.0, np.nan], [3.0, 2.0]], [[0.5, 0.25], [4.0, 5.0]]], np.float32
    )  # [layers, operands, devices]
    found = gemms.over_devices({"qkv": jnp.asarray(amax), "lm_head": jnp.asarray([[np.nan, 2.0]])})
    np.testing.assert_array_equal(found["qkv"], [[np.inf, 3], [0.5, 5]])
    np.testing.assert_array_equal(found["lm_head"], [[np.inf, 2]])
