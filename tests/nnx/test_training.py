"""The program of docs/library.md, and the same with scan, remat, microbatches and a mesh; its checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fp8jax
from fp8jax.nnx.scaling import role_scalings

FP8 = fp8jax.Recipe(scaling="delayed", history_length=8)
WIDTH, LAYERS, BATCH = 32, 2, 64


class MLP(nnx.Module):
    def __init__(self, recipe, rngs):
        linear = functools.partial(fp8jax.nnx.Linear, dtype=jnp.bfloat16, recipe=recipe)
        self.up = linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        # The last bit of a GeLU may differ with the number of rows on a device; ReLU is exact.
        return x + self.down(nnx.relu(self.up(x))).astype(x.dtype)


class Deep(nnx.Module):
    """Layers made by vmap, scanned and rematerialised."""

    def __init__(self, recipe, rngs):
        make = nnx.vmap(functools.partial(MLP, recipe), in_axes=0, out_axes=0)
        self.layers = make(rngs.fork(split=LAYERS))

    def __call__(self, x):
        run = nnx.scan(
            nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return run(x, self.layers)


def batches():
    x = jax.random.normal(jax.random.key(1), (40, BATCH, WIDTH))
    w = jax.random.normal(jax.random.key(2), (WIDTH, WIDTH)) / WIDTH**0.5
    # Noise that no model can learn, as in data of use: the loss ends near 1.
    return x, jnp.tanh(x @ w) + jax.random.normal(jax.random.key(3), x.shape)


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@functools.partial(nnx.jit, static_argnames="microbatches")
def step(model, optimizer, x, y, *, microbatches):
    xs, ys = (a.reshape(-1, microbatches, *a.shape[1:]) for a in (x, y))
    total, loss = None, 0.0
    for i in range(microbatches):
        gradient = fp8jax.nnx.value_and_grad(loss_fn, update=False)
        part, grads = gradient(model, xs[:, i], ys[:, i])
        grads = jax.tree.map(lambda g: g / microbatches, grads)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        loss += part / microbatches
    fp8jax.nnx.update_scaling(model)
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(model, total)
    return loss


def start(make, recipe):
    model = make(recipe, nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


def train(model, optimizer, steps, *, microbatches=1, place=lambda a: a):
    x, y = batches()
    for i in steps:
        loss = step(model, optimizer, place(x[i]), place(y[i]), microbatches=microbatches)
    return float(loss)


def histories(model):
    return [np.asarray(state.history[...]) for _, state in role_scalings(model)]


@pytest.mark.parametrize(("make", "microbatches"), [(MLP, 1), (Deep, 4)])
def test_the_loss_is_within_a_percent_of_the_unquantised(make, microbatches):
    fp8, plain = (
        train(*start(make, recipe), range(40), microbatches=microbatches) for recipe in (FP8, None)
    )
    assert fp8 != plain
    assert abs(fp8 / plain - 1) < 0.01
    assert plain < 1.6  # 2.8 at the start


@pytest.mark.parametrize(("microbatches", "axis"), [(4, AxisType.Auto), (1, AxisType.Explicit)])
def test_amaxes_on_eight_devices_are_bit_equal(microbatches, axis):
    single = start(Deep, FP8)
    train(*single, range(1), microbatches=microbatches)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    model, optimizer = start(Deep, FP8)
    for node in (model, optimizer):
        state = jax.device_put(nnx.state(node), NamedSharding(mesh, PartitionSpec()))
        nnx.update(node, state)
    split = NamedSharding(mesh, PartitionSpec("data"))
    train(
        model,
        optimizer,
        range(1),
        microbatches=microbatches,
        place=lambda a: jax.device_put(a, split),
    )
    for one, other in zip(histories(model), histories(single[0]), strict=True):
        assert one[..., 0].all()
        np.testing.assert_array_equal(one, other)


def test_a_restored_checkpoint_continues_bit_for_bit(tmp_path):
    model, optimizer = start(MLP, FP8)
    train(model, optimizer, range(2))
    saved = nnx.to_pure_dict(nnx.state((model, optimizer)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
    again = start(MLP, FP8)
    state = nnx.state(again)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(again, state)
    assert train(model, optimizer, range(2, 4)) == train(*again, range(2, 4))
    for one, other in zip(histories(model), histories(again[0]), strict=True):
        assert one[..., 3].all()
        np.testing.assert_array_equal(one, other)


def test_after_calibration_scales_come_from_the_history_alone():
    x, y = batches()
    model, _ = start(MLP, FP8)
    fp8jax.nnx.calibrate(model, loss_fn, x[0], y[0])
    found = [state for _, state in role_scalings(model)]
    assert all(state.known for state in found)
    calibrated = np.asarray(model(x[1]))
    for state in found:
        state.known = False
    np.testing.assert_array_equal(calibrated, model(x[1]))
    # A scale of 0 is an empty history to a model that was not calibrated, and an error of ours to one that was.
    found[0].scale.set_value(jnp.zeros(2))
    assert np.isfinite(model(x[1])).all()
    found[0].known = True
    assert not np.isfinite(model(x[1])).all()
