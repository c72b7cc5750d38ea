"""Histories and scales of delayed scaling over several steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics import scaling
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe

from . import reference
from .reference import E4M3, E5M2

RECIPES = {
    "qkv": GemmRecipe("delayed", history_length=4),
    "mlp_up": GemmRecipe("current"),
    "mlp_down": GemmRecipe("bf16"),
    "attention_scores": GemmRecipe("delayed", history_length=2),
    "attention_values": GemmRecipe("current"),
}


def test_state_and_tokens_have_the_shapes_of_their_roles():
    """State for delayed roles only; tokens for every role in FP8."""
    state = scaling.init(RECIPES, layers=3)
    assert {role: (s["history"].shape, s["scale"].shape) for role, s in state.items()} == {
        "qkv": ((3, 2, 4), (3, 2)),
        "attention_scores": ((3, 3, 2), (3, 3)),
    }
    assert all(
        np.all(np.asarray(s["history"]) == 0) and np.all(np.asarray(s["scale"]) == 1)
        for s in state.values()
    )
    tokens = scaling.zero_tokens(RECIPES, layers=3)
    assert {role: token.shape for role, token in tokens.items()} == {
        "qkv": (3, 2),
        "mlp_up": (3, 2),
        "attention_scores": (3, 3),
        "attention_values": (3, 2),
    }
    assert not any(np.any(np.asarray(token)) for token in tokens.values())


@pytest.mark.parametrize("reduction", ["max", "most_recent"])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_scales_follow_the_history(length, margin, power_of_two, reduction):
    """Ten steps, against a list of amaxes; e5m2 for gradients; other layers and operands do not mix."""
    recipe = GemmRecipe(
        "delayed",
        history_length=length,
        history_reduction=reduction,
        margin=margin,
        power_of_two=power_of_two,
    )
    recipes = {"qkv": recipe, "attention_scores": recipe}
    state, rng = scaling.init(recipes, layers=2), np.random.default_rng(0)
    seen = {role: [] for role in recipes}
    for _ in range(10):
        amaxes = {
            role: (rng.lognormal(sigma=6, size=(2, len(OPERANDS[role])))).astype(np.float32)
            for role in recipes
        }
        state = scaling.update(state, {role: jnp.asarray(a) for role, a in amaxes.items()}, recipes)
        for role in recipes:
            seen[role].insert(0, amaxes[role])
            window = np.stack(seen[role][:length])
            largest = window.max(axis=0) if reduction == "max" else window[0]
            formats = [E5M2 if operand in ("g", "ds") else E4M3 for operand in OPERANDS[role]]
            expected = [
                [
                    reference.scale_of(float(row[i]), dtype, margin, power_of_two)
                    for i, dtype in enumerate(formats)
                ]
                for row in largest
            ]
            np.testing.assert_allclose(
                state[role]["scale"], expected, rtol=0 if power_of_two else 2e-7
            )
            history = np.asarray(state[role]["history"])
            np.testing.assert_array_equal(np.moveaxis(history, -1, 0)[: len(window)], window)
            np.testing.assert_array_equal(history[..., len(window) :], 0)


@pytest.mark.parametrize("reduction", ["max", "most_recent"])
def test_an_amax_of_zero_keeps_the_scale(reduction):
    """With `max` as long as the history holds nothing else; with `most_recent` at once."""
    recipes = {"qkv": GemmRecipe("delayed", history_length=2, history_reduction=reduction)}
    state = scaling.init(recipes, layers=1)
    state = scaling.update(state, {"qkv": jnp.zeros((1, 2))}, recipes)
    np.testing.assert_array_equal(state["qkv"]["scale"], [[1, 1]])
    state = scaling.update(state, {"qkv": jnp.asarray([[448 / 4, 57344 * 8.0]])}, recipes)
    for _ in range(3):
        np.testing.assert_array_equal(state["qkv"]["scale"], [[1 / 4, 8]])
        state = scaling.update(state, {"qkv": jnp.zeros((1, 2))}, recipes)
    np.testing.assert_array_equal(state["qkv"]["history"], np.zeros((1, 2, 2)))


def test_operands_are_separate():
    """A zero of one operand does not keep another's scale."""
    recipes = {"qkv": GemmRecipe("delayed", history_length=1)}
    state = scaling.update(
        scaling.init(recipes, 1), {"qkv": jnp.asarray([[0.0, 57344.0 / 2]])}, recipes
    )
    np.testing.assert_array_equal(state["qkv"]["scale"], [[1, 0.5]])


def test_roles_without_state_may_have_amaxes():
    """They are watched, not used."""
    state = scaling.init(RECIPES, layers=1)
    amaxes = {
        role: jnp.ones_like(token) for role, token in scaling.zero_tokens(RECIPES, layers=1).items()
    }
    updated = scaling.update(state, amaxes, RECIPES)
    assert set(updated) == {"qkv", "attention_scores"}
    np.testing.assert_array_equal(updated["qkv"]["scale"], [[2.0**-8, 2.0**-15]])


@pytest.mark.parametrize("power_of_two", [True, False])
def test_weights_have_entries_of_their_own(power_of_two):
    """Of linear roles under delayed scaling; their scales are those of e4m3, from the largest amax of the history."""
    recipe = GemmRecipe(
        "delayed", weight_scaling="delayed", history_length=2, power_of_two=power_of_two
    )
    recipes = {
        "qkv": recipe,
        "attention_scores": recipe,
        "mlp_up": GemmRecipe("current", weight_scaling="delayed"),
    }
    state = scaling.init(recipes, layers=3)
    assert set(state) == {"qkv", "qkv.w", "attention_scores"}
    assert state["qkv.w"]["history"].shape == (3, 1, 2) and state["qkv.w"]["scale"].shape == (3, 1)
    others = {"qkv": jnp.ones((3, 2)), "attention_scores": jnp.ones((3, 3))}
    expected = []
    for largest in (8.0, 3.0, 5.0):
        amax = np.asarray([[largest], [1.0], [0.0]], np.float32)
        state = scaling.update(state, others | {"qkv.w": jnp.asarray(amax)}, recipes)
        expected.append(np.asarray(state["qkv.w"]["scale"])[:, 0])
    wanted = [
        [
            reference.scale_of(top, E4M3, 0, power_of_two),
            reference.scale_of(1.0, E4M3, 0, power_of_two),
            1.0,
        ]
        for top in (8.0, 8.0, 5.0)
    ]
    np.testing.assert_allclose(expected, wanted, rtol=0 if power_of_two else 2e-7)
    np.testing.assert_array_equal(state["qkv.w"]["history"][0], [[5.0, 3.0]])
