"""The z-loss: what it adds to gradients, against autodiff of its formula, and that the reported loss leaves it out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes
from fp8jax.training import state as state_lib
from fp8jax.training.gradients import gradients


def test_z_loss_adds_its_gradient_and_is_not_reported():
    values = {
        "model": {
            "layers": 1,
            "width": 32,
            "ffn_width": 32,
            "heads": 2,
            "kv_heads": 1,
            "dtype": "float32",
        },
        "fp8": {"recipe": "bf16"},
    }
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 128, (2, 1, 2, 16))
    batch = {
        "inputs": inputs,
        "targets": targets,
        "mask": (rng.random((1, 2, 16)) > 0.3).astype(np.float32),
    }
    batch = {
        name: jnp.asarray(a, jnp.float32 if name == "mask" else jnp.int32)
        for name, a in batch.items()
    }

    def run(weight, loss_chunk=0):
        config = config_lib.from_dict(
            values | {"optimizer": {"z_loss": weight}, "training": {"loss_chunk": loss_chunk}}
        )
        definition = define(config.model, 128)
        recipes = model_recipes(config, gated=definition.gated(), emulated=True)
        state = state_lib.initial_state(definition, recipes, config)
        loss, grads, _, _ = jax.jit(lambda s, b: gradients(s, b, config, definition, recipes))(
            state, batch
        )
        return loss, grads, definition, recipes, state.params

    plain, grads, definition, recipes, params = run(0.0)
    loss, grads_z, *_ = run(0.5)
    assert loss == plain

    def z_loss(params):
        model = definition.bind(params)
        logits, _ = model(
            jax.tree.map(lambda a: a[0], batch),
            definition.bind(params).prepare(recipes),
        )
        mask = batch["mask"][0]
        return 0.5 * jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * mask) / mask.sum()

    expected = jax.tree.map(jnp.add, grads, jax.grad(z_loss)(params))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads_z), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-6 * float(jnp.abs(a).max()), err_msg=str(path)
        )
    assert (
        max(
            float(jnp.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_z), strict=True)
        )
        > 1e-3
    )

    chunked, grads_chunked, *_ = run(0.5, loss_chunk=48)  # of 128 rows: two chunks and a rest
    assert chunked == pytest.approx(float(loss), rel=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads_z), jax.tree.leaves(grads_chunked), strict=True
    ):
        np.testing.assert_allclose(
            b, a, rtol=1e-4, atol=1e-6 * float(jnp.abs(a).max()), err_msg=str(path)
        )
