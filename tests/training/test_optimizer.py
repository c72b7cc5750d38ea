"""Updates against AdamW, AdEMAMix and Muon written in float64 NumPy, which parameters decay, and the schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes
from fp8jax.training import optimizer, step
from fp8jax.training.state import state_of

MODEL = {"layers": 2, "width": 12, "ffn_width": 8, "heads": 6, "kv_heads": 2, "head_dim": 4}
# None of these is a default, and no two are equal.
FIELDS = {
    "b1": 0.8,
    "b2": 0.98,
    "b3": 0.995,
    "alpha": 3.0,
    "eps": 1e-3,
    "weight_decay": 0.3,
    "clip_norm": 1.0,
    "learning_rate": 0.05,
    "warmup_steps": 4,
    "final_learning_rate": 0.01,
    "decay_fraction": 0.25,
}
# These programs run once: what they are optimised for does not pay.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NORMS = (8.0, 0.1)  # of the gradients of two steps: the first is clipped, the second is not
MATRICES = {
    "embedding.w",
    "head.w",
    *(
        f"blocks.{name}.w"
        for name in (
            "attention.qkv",
            "attention.out",
            "feed_forward.gate",
            "feed_forward.up",
            "feed_forward.down",
        )
    ),
}


def config_of(name="adamw", **model):
    return config_lib.from_dict(
        {
            "model": MODEL | model,
            "fp8": {"recipe": "bf16"},
            "optimizer": FIELDS | {"name": name},
            "training": {"steps": 16, "batch_size": 2},
            "data": {"sequence_length": 4},
        }
    )


def by_name(tree):
    """Arrays in float64 by 'blocks.attention.qkv.w'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        ".".join(key.key for key in path): np.asarray(leaf, np.float64) for path, leaf in leaves
    }


def gradients_of(like, seed, norm):
    """Random arrays like these, their global norm as asked for, that lie powers of ten apart."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(like)
    raw = [rng.normal(size=leaf.shape) * 10.0 ** rng.uniform(-2, 0) for leaf in leaves]
    whole = np.sqrt(sum(np.sum(g**2) for g in raw))
    return structure.unflatten([np.asarray(g / whole * norm, np.float32) for g in raw])


def two_steps(config, monkeypatch):
    """Parameters before, after one and after two steps of the real program whose gradients are given; the gradients; metrics."""
    definition = define(config.model, 10)
    recipes = model_recipes(config, gated=definition.gated(), emulated=True)
    start = gradients_of(definition.shapes, 7, 3.0)
    state, given, metrics = (
        jax.jit(lambda: state_of(start, recipes, config), compiler_options=QUICK)(),
        [],
        [],
    )
    params = [jax.device_get(state.params)]
    # The gradients are the batch.
    monkeypatch.setattr(
        step, "gradients", lambda _, batch, *__, **___: (jnp.float32(2.5), batch, {}, {})
    )
    one = jax.jit(
        lambda state, grads: step.train_step(state, grads, config, definition, recipes)[:2],
        compiler_options=QUICK,
    )
    for number, norm in enumerate(NORMS):
        given.append(gradients_of(start, number, norm))
        state, found = one(state, given[-1])
        params.append(jax.device_get(state.params))
        metrics.append(found)
    return [by_name(tree) for tree in params], [by_name(tree) for tree in given], metrics


def clipped(grads):
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    return {name: g / max(norm / FIELDS["clip_norm"], 1.0) for name, g in grads.items()}


def average(values, decay):
    """Exponential moving average from zero."""
    total = 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
    return total


def adam(history):
    """Adam's direction after these gradients (Kingma and Ba 2015)."""
    count, b1, b2 = len(history), FIELDS["b1"], FIELDS["b2"]
    first = average(history, b1) / (1 - b1**count)
    second = average([g**2 for g in history], b2) / (1 - b2**count)
    return first / (np.sqrt(second) + FIELDS["eps"])


def ademamix(history):
    """AdEMAMix's (Pagliardini et al. 2024): the slow average has no bias correction."""
    count, b1, b2 = len(history), FIELDS["b1"], FIELDS["b2"]
    first = average(history, b1) / (1 - b1**count) + FIELDS["alpha"] * average(
        history, FIELDS["b3"]
    )
    second = average([g**2 for g in history], b2) / (1 - b2**count)
    return first / (np.sqrt(second) + FIELDS["eps"])


def orthogonalised(matrix):
    """Five Newton-Schulz steps (Jordan et al. 2024), scaled to a root mean square of 0.2 (Liu et al. 2025)."""
    x = matrix / (np.linalg.norm(matrix) + FIELDS["eps"])
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x * 0.2 * np.sqrt(max(matrix.shape))


def muon(name, history):
    """Muon's direction of a block's matrices, layer by layer, inputs by outputs; Adam's of all else."""
    if not (name.startswith("blocks.") and name in MATRICES):
        return adam(history)
    momentum = 0.95 * average(history, 0.95) / (1 - 0.95 ** (len(history) + 1)) + 0.05 * history[
        -1
    ] / (1 - 0.95 ** len(history))
    inputs = 3 if name == "blocks.attention.out.w" else 1
    out = []
    for layer in momentum:
        rows = int(np.prod(layer.shape[:inputs]))
        out.append(orthogonalised(layer.reshape(rows, -1)).reshape(layer.shape))
    return np.stack(out)


DIRECTIONS = {
    "adamw": lambda _, history: adam(history),
    "ademamix": lambda _, history: ademamix(history),
    "muon": muon,
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_two_updates_equal_the_papers(name, monkeypatch):
    """Clip, direction, decay of matrices alone, learning rate; what is logged is the norm before the clip."""
    params, grads, metrics = two_steps(config_of(name), monkeypatch)
    seen = [clipped(g) for g in grads]
    for count in (1, 2):
        rate = FIELDS["learning_rate"] * count / FIELDS["warmup_steps"]
        assert float(metrics[count - 1]["learning_rate"]) == pytest.approx(rate, rel=1e-6)
        assert float(metrics[count - 1]["grad_norm"]) == pytest.approx(NORMS[count - 1], rel=1e-5)
        assert float(metrics[count - 1]["loss"]) == 2.5 and int(metrics[count - 1]["bad_step"]) == 0
        for leaf, before in params[count - 1].items():
            decay = FIELDS["weight_decay"] * before if leaf in MATRICES else 0.0
            wanted = rate * (DIRECTIONS[name](leaf, [g[leaf] for g in seen[:count]]) + decay)
            found = before - params[count][leaf]
            # float32 parameters near 0.1 hold an update of 0.01 to 1e-6.
            np.testing.assert_allclose(
                found, wanted, rtol=2e-4, atol=2e-7, err_msg=f"{leaf}, step {count}"
            )


@pytest.mark.parametrize("architecture", config_lib.ARCHITECTURES)
def test_matrices_decay_and_nothing_else(architecture):
    definition = define(config_of(architecture=architecture, tied_embeddings=False).model, 10)
    found = {
        ".".join(key.key for key in path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(
            optimizer.decayed(definition.shapes)
        )
    }
    gate = {"blocks.feed_forward.gate.w"} if definition.gated() else set()
    assert {name for name, decays in found.items() if decays} == MATRICES - {
        "blocks.feed_forward.gate.w"
    } | gate
    assert any(not decays for decays in found.values())


def test_without_a_clip_the_gradient_is_what_it_is():
    config = dataclasses.replace(config_of().optimizer, clip_norm=0.0, weight_decay=0.0, eps=1.0)
    transform, params = optimizer.make_transform(config), {"w": jnp.ones((2, 2))}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes freely
        update, _ = transform.update({"w": jnp.full((2, 2), 8.0)}, transform.init(params), params)
    np.testing.assert_allclose(update["w"], 8 / 9, rtol=1e-6)


def test_learning_rate_schedule():
    """Warm-up from the first step on, constant, then 1 - sqrt of the progress to the final rate, which the last step has."""
    config = config_lib.from_dict(
        {
            "training": {"steps": 100},
            "optimizer": {
                "warmup_steps": 10,
                "learning_rate": 1.0,
                "final_learning_rate": 0.1,
                "decay_fraction": 0.2,
            },
        }
    )
    rates = np.asarray(jax.vmap(lambda i: optimizer.learning_rate(config, i))(jnp.arange(100)))
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[9:80], 1.0)
    np.testing.assert_allclose(
        rates[80:], 0.1 + 0.9 * (1 - np.sqrt(np.arange(1, 21) / 20)), atol=1e-6
    )
    none = config_lib.from_dict(
        {
            "training": {"steps": 4},
            "optimizer": {"warmup_steps": 0, "decay_fraction": 0.0, "learning_rate": 0.5},
        }
    )
    assert [float(optimizer.learning_rate(none, jnp.int32(i))) for i in range(4)] == [0.5] * 4
