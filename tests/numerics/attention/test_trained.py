"""What FP8 attention, and nothing else in FP8, makes of the gradients of a model that has been trained a little."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common as configs
from fp8jax import config as config_lib
from fp8jax.data import pipeline
from fp8jax.models.model_recipes import model_recipes
from fp8jax.numerics.compiling import compiler_options
from fp8jax.training.evaluation import load_run
from fp8jax.training.losses import token_losses
from tests.helpers.runs import train

LINEAR = "qkv=bf16,attention_out=bf16,mlp_up=bf16,mlp_down=bf16"


def trained(workdir, steps=34):
    """Train `tiny` in the default architecture for some steps, in short sequences; the model and its next batch."""
    values = configs.make("tiny", architecture="fog_max", recipe="bf16")
    values.training.update({"steps": steps, "batch_size": 8})
    values.data.sequence_length = 128
    values.optimizer.warmup_steps = 10
    values.monitor.every = 0
    values.log.report_minutes = 0
    values.mesh.fsdp = 1
    assert train(config_lib.from_dict(values), workdir) == 0
    model, step = load_run(workdir, devices=jax.devices()[:1])
    batch = pipeline.train_batches(model.plan.config)[step + 3]
    return model, {name: jnp.asarray(batch[name][:4]) for name in ("inputs", "targets", "mask")}


def gradient_of_qkv(model, batch, recipe, overrides=""):
    """float64 [layers, features, KV heads, query heads and k and v, h]."""
    config = dataclasses.replace(
        model.plan.config,
        fp8=dataclasses.replace(
            model.plan.config.fp8, recipe=recipe, scaling="current", overrides=overrides
        ),
    )
    recipes = model_recipes(config, gated=model.plan.definition.gated(), emulated=True)

    def loss(params):
        bound = model.plan.definition.bind(params)
        logits, _ = bound(batch, bound.prepare(recipes))
        return jnp.sum(token_losses(logits, batch["targets"]) * batch["mask"]) / batch["mask"].sum()

    found = jax.jit(jax.grad(loss), compiler_options=compiler_options("cpu"))(model.params)
    return np.asarray(found["blocks"]["attention"]["qkv"]["w"], np.float64)


@pytest.mark.slow
def test_gradients_of_query_and_key_weights_of_every_layer(tmp_path):
    """With delta from dO before its cast: 0.57 for queries and 1.05 for keys in the last layer."""
    model, batch = trained(tmp_path / "run")
    expected, found = (
        gradient_of_qkv(model, batch, "bf16"),
        gradient_of_qkv(model, batch, "fp8_dpa", LINEAR),
    )
    groups = expected.shape[3] - 2
    for part in (np.s_[:groups], np.s_[groups : groups + 1]):
        difference, whole = (
            np.linalg.norm(x[:, :, :, part].reshape(len(x), -1), axis=1)
            for x in (found - expected, expected)
        )
        assert (difference / whole).max() <= 0.15, difference / whole
