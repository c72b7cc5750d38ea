"""Linen models with `dot_general_cls`: state in flax's collection, replaced by its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import fp8jax

RECIPE = fp8jax.Recipe("delayed", history_length=4, emulated=True)
X = jax.random.normal(jax.random.key(0), (8, 16))
STATE = "_overwrite_with_gradient"


def product(recipe=RECIPE):
    return functools.partial(fp8jax.linen.DotGeneral, recipe=recipe)


class Once(nn.Module):
    recipe: fp8jax.Recipe | None = RECIPE

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dot_general_cls=product(self.recipe))(x)
        return nn.DenseGeneral((4, 4), dot_general_cls=product(self.recipe))(jnp.sin(x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(16, use_bias=False, dot_general_cls=product())
        return dense(dense(x))


def loss_of(model):
    return lambda variables, x: jnp.sum(model.apply(variables, x) ** 2)


def test_without_a_recipe_it_is_linens_bit_for_bit():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((4, 4))(jnp.sin(nn.Dense(16)(x)))

    ours, theirs = Once(None), Plain()
    variables = theirs.init(jax.random.key(1), X)
    assert jax.tree.structure(ours.init(jax.random.key(1), X)) == jax.tree.structure(variables)
    np.testing.assert_array_equal(ours.apply(variables, X), theirs.apply(variables, X))


def test_flaxs_train_state_trains_and_keeps_histories():
    model = Once()
    variables = model.init(jax.random.key(1), X)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(1e-3))

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(loss_of(model))(state.params, X)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(3):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[2] < losses[0]
    kept = state.params[STATE]["Dense_0"]["DotGeneral_0"]
    np.testing.assert_array_equal(kept["history"][0], [np.abs(X).max()] * 3 + [0])
    assert kept["history"][1, :3].all()
    assert kept["scale"].all()


def test_a_layer_called_twice_keeps_the_larger_amax_and_a_sum_is_not_silent():
    model = Twice()
    variables = model.init(jax.random.key(1), X)
    loss = loss_of(model)
    _, grads = jax.jit(fp8jax.linen.value_and_grad(loss))(variables, X)
    kernel = variables["params"]["Dense_0"]["kernel"]
    found = grads[STATE]["Dense_0"]["DotGeneral_0"]
    largest = max(np.abs(X).max(), np.abs(X @ kernel).max())
    np.testing.assert_allclose(found["history"][0, 0], largest, rtol=0.05)
    np.testing.assert_array_equal(found["uses"], 1)
    added = jax.grad(loss)(variables, X)
    assert np.isnan(loss(variables | {STATE: added[STATE]}, X))
    again = jax.grad(loss)(variables | {STATE: added[STATE]}, X)
    assert np.isnan(loss(variables | {STATE: again[STATE]}, X))
    with pytest.raises(ValueError, match="inside jax.jit"):
        fp8jax.linen.value_and_grad(loss)(variables, X)


def test_microbatches_are_combined_by_maximum():
    model = Once()
    variables = model.init(jax.random.key(1), X)
    gradient = jax.jit(fp8jax.linen.value_and_grad(loss_of(model)))
    parts = [gradient(variables, part)[1] for part in (X[:4], X[4:])]
    together = fp8jax.linen.combine(*parts)
    found = together[STATE]["Dense_0"]["DotGeneral_0"]
    np.testing.assert_array_equal(found["history"][0, 0], np.abs(X).max())
    np.testing.assert_array_equal(found["uses"], 1)
    bias = [part["params"]["Dense_0"]["bias"] for part in parts]
    np.testing.assert_allclose(together["params"]["Dense_0"]["bias"], bias[0] + bias[1])


def test_an_einsum_is_jnps():
    model = fp8jax.linen.Einsum(fp8jax.Recipe("current", emulated=True))
    w = jax.random.normal(jax.random.key(2), (16, 2, 4))
    y = model.apply({}, "bd,dnh->nbh", X, w)
    expected = np.einsum("bd,dnh->nbh", X, w)
    assert np.linalg.norm(y - expected) < 0.08 * np.linalg.norm(expected)
