"""Amaxes of layers used in every way that NNX has: the maximum over uses, in the history once a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
from fp8jax.nnx.scaling import RoleScaling, role_scalings

RECIPE = fp8jax.Recipe("delayed", history_length=4, emulated=True)
X = jax.random.normal(jax.random.key(1), (8, 4, 16))


def layer(recipe=RECIPE, seed=0):
    return fp8jax.nnx.Linear(16, 16, recipe=recipe, use_bias=False, rngs=nnx.Rngs(seed))


def amaxes(model):
    """The newest amaxes of all roles, by path."""
    found = role_scalings(model)
    return {".".join(map(str, path)): np.asarray(s.history[..., 0]) for path, s in found}


def newest(loss, model, *args):
    """The model's only amaxes after a gradient of `loss`."""
    nnx.jit(lambda model, *args: fp8jax.nnx.value_and_grad(loss)(model, *args))(model, *args)
    (found,) = amaxes(model).values()
    return found


def by_hand(x):
    """Amaxes of two calls of one layer: its inputs and output gradients, recorded in float32, with the product in FP8."""
    model = layer(fp8jax.Recipe("current", emulated=True))

    def loss(zeros):
        y = model(x) + zeros[0]
        return jnp.sum((model(y) + zeros[1]) ** 2), y

    zeros = jnp.zeros((2, *x.shape))
    grads, y = jax.jit(jax.grad(loss, has_aux=True))(zeros)
    return [max(float(jnp.max(jnp.abs(a))) for a in pair) for pair in ((x, y), grads)]


def twice(model, x):
    return jnp.sum(model(model(x)) ** 2)


def scanned(model, x):
    return jnp.sum(jax.lax.scan(lambda y, _: (model(y), None), x, length=2)[0] ** 2)


def rematerialised(model, x):
    inner = nnx.remat(lambda model, x: model(x))
    return jnp.sum(inner(model, inner(model, x)) ** 2)


def mapped(model, x):
    return jnp.sum(jax.vmap(lambda row: model(model(row)))(x) ** 2)


def nnx_mapped(model, x):
    run = nnx.vmap(lambda model, row: model(model(row)), in_axes=(None, 0))
    return jnp.sum(run(model, x) ** 2)


def nested_jit(model, x):
    return jnp.sum(nnx.jit(lambda model, x: model(model(x)))(model, x) ** 2)


def microbatched_inside(model, x):
    parts = x.reshape(4, 2, *x.shape[1:])
    losses = jax.lax.map(lambda part: jnp.sum(model(model(part)) ** 2), parts)
    return jnp.sum(losses)


@pytest.mark.parametrize(
    "loss",
    [twice, scanned, rematerialised, mapped, nnx_mapped, nested_jit, microbatched_inside],
)
def test_a_layer_called_twice_pushes_the_larger_amax(loss):
    np.testing.assert_allclose(newest(loss, layer(), X), by_hand(X), rtol=0.02)


def test_the_amax_of_the_input_is_that_of_the_input_exactly():
    found = newest(lambda model, x: jnp.sum(model(x)), layer(), X)
    np.testing.assert_array_equal(found, [np.max(np.abs(X)), 1.0])


def test_microbatches_push_their_maximum_once():
    model = layer()

    @nnx.jit
    def step(model, parts):
        grads = []
        for part in parts:
            grads.append(fp8jax.nnx.value_and_grad(twice, update=False)(model, part)[1])
        fp8jax.nnx.update_scaling(model)
        return grads

    parts = X.reshape(4, 2, 4, 16)
    step(model, parts)
    history = np.asarray(model.scaling.history[...])
    np.testing.assert_allclose(history[:, 0], by_hand(X), rtol=0.02)
    assert not history[:, 1:].any()
    assert not np.asarray(model.scaling.amax[...]).any()


def test_layers_stacked_by_vmap_and_scanned_each_have_their_own():
    make = nnx.vmap(lambda rngs: layer_of(rngs), in_axes=0, out_axes=0)

    def layer_of(rngs):
        return fp8jax.nnx.Linear(16, 16, recipe=RECIPE, use_bias=False, rngs=rngs)

    model = make(nnx.Rngs(0).fork(split=3))

    def loss(model, x):
        run = nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return jnp.sum(run(x, model) ** 2)

    found = newest(loss, model, X)
    assert found.shape == (3, 2)
    y, kernels = X, np.asarray(model.kernel[...])
    for i in range(3):
        np.testing.assert_allclose(found[i, 0], np.max(np.abs(y)), rtol=0.05)
        y = y @ kernels[i]


def test_the_first_step_takes_the_amax_of_the_moment():
    """Delayed scaling with an empty history gives what current scaling gives, bit for bit, gradients as well."""

    def loss(model, x):
        return jnp.sum(model(x * 1e-3) ** 2)

    run = nnx.jit(lambda model, x: fp8jax.nnx.value_and_grad(loss)(model, x))
    delayed = run(layer(), X)
    current = run(layer(fp8jax.Recipe("current", emulated=True)), X)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(delayed), jax.tree.leaves(current))


def test_own_gradients_update_the_scaling_and_an_added_amax_is_refused():
    filtered = nnx.DiffState(0, (nnx.Param, fp8jax.nnx.Scaling))
    model = layer()
    _, grads = nnx.value_and_grad(lambda m, x: jnp.sum(m(x)), argnums=filtered)(model, X)
    fp8jax.nnx.update_scaling(model, grads)
    np.testing.assert_array_equal(model.scaling.history[:, 0], [np.max(np.abs(X)), 1.0])
    _, grads = nnx.value_and_grad(twice, argnums=filtered)(model, X)
    with pytest.raises(ValueError, match="called 2 times"):
        fp8jax.nnx.update_scaling(model, grads)
    _, grads = nnx.value_and_grad(twice)(model, X)
    with pytest.raises(ValueError, match=r"no amaxes of scaling among the gradients.*nnx.Param"):
        fp8jax.nnx.update_scaling(model, grads)


def test_twice_outside_jit_is_one_clear_line():
    with pytest.raises(ValueError, match="inside nnx.jit"):
        fp8jax.nnx.value_and_grad(twice)(layer(), X)


def test_an_amax_that_is_not_finite_changes_no_scale():
    model = layer()
    newest(twice, model, X)
    before = np.asarray(model.scaling.scale[...])
    newest(twice, model, X.at[0, 0, 0].set(jnp.nan))
    np.testing.assert_array_equal(model.scaling.scale[...], before)
    assert np.isfinite(model.scaling.history[...]).all()


def test_gradients_are_of_parameters_alone_for_models_and_arrays():
    def loss(model, x):
        return jnp.sum(model(x) ** 2), "aux"

    gradient = fp8jax.nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), (of_model, of_x) = gradient(layer(), X)
    assert aux == "aux"
    assert value.shape == ()
    assert of_x.shape == X.shape
    assert set(nnx.to_flat_state(of_model).paths) == {("kernel",)}


def test_scaling_state_is_neither_parameter_nor_optimizer_state():
    state = RoleScaling(RECIPE, "any name at all")
    assert not jax.tree.leaves(nnx.state(state, nnx.Param))
    assert len(jax.tree.leaves(nnx.state(state, fp8jax.nnx.Scaling))) == 3


def test_shard_map_is_refused_in_one_line():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("data")

    def loss(model, x):
        definition, state = nnx.split(model)
        run = jax.shard_map(
            lambda state, x: nnx.merge(definition, state)(x),
            mesh=mesh,
            in_specs=(jax.P(), split),
            out_specs=split,
        )
        return jnp.sum(run(state, x))

    with pytest.raises(ValueError, match="delayed scaling inside shard_map would add"):
        fp8jax.nnx.value_and_grad(loss)(layer(), X)


def test_a_scan_over_microbatches_keeps_their_maximum():
    @nnx.jit
    def step(model, parts):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def body(model, part):
            loss, _ = fp8jax.nnx.value_and_grad(twice, update=False)(model, part)
            return model, loss

        model, losses = body(model, parts)
        fp8jax.nnx.update_scaling(model)
        return model, losses

    model, _ = step(layer(), X.reshape(4, 2, 4, 16))
    history = np.asarray(model.scaling.history[...])
    np.testing.assert_allclose(history[:, 0], by_hand(X), rtol=0.02)
    assert not history[:, 1:].any()


def test_arguments_by_name_and_as_a_decorator_are_those_of_nnx():
    @fp8jax.nnx.value_and_grad(has_aux=True)
    def gradient(model, x, scale=2.0):
        return scale * jnp.sum(model(x)), scale

    model = layer()
    (_, scale), grads = gradient(x=X, model=model)
    assert scale == 2.0
    assert len(jax.tree.leaves(grads)) == 1
    np.testing.assert_array_equal(model.scaling.history[:, 0], [np.max(np.abs(X)), 2.0])
    with pytest.raises(TypeError, match="b can only be given by keyword"):
        fp8jax.nnx.value_and_grad(lambda m, *, b: jnp.sum(m(b)))(model, b=X)
