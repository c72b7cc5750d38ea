"""Loss and gradients over microbatches whose masks differ, against the mathematics of the whole batch, and what sums are kept in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes
from fp8jax.training import state as state_lib
from fp8jax.training.gradients import GradientSums, gradient_view, gradients

MODEL = {
    "layers": 1,
    "width": 16,
    "ffn_width": 16,
    "heads": 2,
    "kv_heads": 1,
    "dtype": "float32",
    "architecture": "llama3",
}
VOCAB, ROWS, LENGTH, Z_LOSS = 40, 4, 8, 0.05


def masks():
    """[rows, tokens]: a full row, one of a single token, an empty one, and one that begins with padding."""
    mask = np.zeros((ROWS, LENGTH), np.float32)
    mask[0], mask[1, 3], mask[3, 5:] = 1, 1, 1
    return mask


@functools.cache
def sample():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": masks()}


def config_of(microbatches=1, **optimizer):
    return config_lib.from_dict(
        {
            "model": MODEL,
            "fp8": {"recipe": "bf16"},
            "data": {"sequence_length": LENGTH},
            "training": {"steps": 1, "batch_size": ROWS, "microbatches": microbatches},
            "optimizer": {"warmup_steps": 0, "z_loss": Z_LOSS, "gradient_dtype": "float32"}
            | optimizer,
        }
    )


def run(config):
    """Loss, gradients and parameters."""
    definition = define(config.model, VOCAB)
    recipes = model_recipes(config, gated=definition.gated(), emulated=True)
    count = config.training.microbatches
    batch = {
        name: jnp.asarray(a).reshape(count, ROWS // count, LENGTH) for name, a in sample().items()
    }

    def both():
        state = state_lib.initial_state(definition, recipes, config)
        # Ten times what a run starts from, so that tokens matter to each other.
        params = jax.tree.map(lambda p: 10 * p if p.ndim > 1 else p, state.params)
        state = state_lib.state_of(params, recipes, config)
        return *gradients(state, batch, config, definition, recipes)[:2], params

    return definition, recipes, *jax.jit(both)()


@functools.cache
def whole():
    """Loss without, and gradients with the z-loss, from the logits of the whole batch and autodiff of the formula."""
    definition, recipes, loss, grads, params = run(config_of())
    mask = masks()

    def losses(params):
        model = definition.bind(params)
        logits, _ = model({"inputs": jnp.asarray(sample()["inputs"])}, model.prepare(recipes))
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = (
            lse
            - jnp.take_along_axis(logits, jnp.asarray(sample()["targets"])[..., None], axis=-1)[
                ..., 0
            ]
        )
        plain = jnp.sum(jnp.where(mask > 0, nll, 0.0)) / mask.sum()
        return plain + Z_LOSS * jnp.sum(jnp.where(mask > 0, lse**2, 0.0)) / mask.sum(), plain

    (_, plain), wanted = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    return (float(plain), wanted), (float(loss), grads)


def assert_close(wanted, found, error=2e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        assert np.linalg.norm(a) > 0 and np.linalg.norm(
            a - b.astype(np.float32)
        ) <= error * np.linalg.norm(a), path


def test_a_whole_batch_is_the_mean_over_what_counts():
    """Loss and z-loss over the tokens under the mask, whatever row they are in; padding has no gradient."""
    (plain, wanted), (loss, grads) = whole()
    assert loss == pytest.approx(plain, rel=1e-5)
    assert_close(wanted, grads)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_weigh_as_many_tokens_as_they_have(microbatches):
    """One of them has a single token, another none: a mean of means would be another number."""
    (plain, wanted), _ = whole()
    *_, loss, grads, _ = run(config_of(microbatches))
    assert float(loss) == pytest.approx(plain, rel=1e-5)
    assert_close(wanted, grads)


def test_sums_in_bfloat16_have_the_same_direction():
    (_, wanted), _ = whole()
    *_, grads, _ = run(config_of(2, gradient_dtype="bfloat16"))
    kinds = {
        ".".join(key.key for key in path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    assert {dtype for name, dtype in kinds.items() if name.endswith(".w")} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert {dtype for name, dtype in kinds.items() if not name.endswith(".w")} == {
        jnp.dtype(jnp.float32)
    }
    assert_close(wanted, grads, error=0.02)


@pytest.mark.parametrize(
    ("asked", "narrow"), [("mixed", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_only_weights_that_reach_gemms_quantised_are_viewed_in_fewer_bits(asked, narrow):
    """The embedding, tied here to the head, is computed with, and so stays float32, as gains do."""
    config = config_lib.from_dict(
        {"model": MODEL | {"dtype": "bfloat16"}, "optimizer": {"gradient_dtype": asked}}
    )
    shapes = define(config.model, VOCAB).shapes
    view = jax.eval_shape(
        lambda: gradient_view(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), config)
    )
    found = {
        ".".join(key.key for key in path): str(leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(view)
    }
    assert found == {
        name: narrow if name.endswith(".w") and name.startswith("blocks") else "float32"
        for name in found
    }


def test_a_sum_that_cannot_hold_an_addend_is_right_on_average():
    """256 + 0.25 in bfloat16, whose neighbours there are 2 apart: up in an eighth of the elements; another step rounds others."""
    total, grad = (
        {"w": jnp.full((64, 64), 256.0, jnp.bfloat16)},
        {"w": jnp.full((64, 64), 0.25, jnp.bfloat16)},
    )
    config = config_lib.OptimizerConfig(gradient_dtype="bfloat16")
    found = [
        np.asarray(
            GradientSums(config, jnp.int32(step))
            .add(total, grad, jnp.int32(microbatch))["w"]
            .astype(jnp.float32)
        )
        for step, microbatch in ((0, 0), (1, 0), (0, 1))
    ]
    for sums in found:
        assert set(np.unique(sums)) == {256.0, 258.0}
        assert sums.mean() - 256 == pytest.approx(0.25, abs=4 * 2 * np.sqrt(7 / 64 / 4096))
    assert (found[0] != found[1]).any() and (found[0] != found[2]).any()
