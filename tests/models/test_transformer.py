"""Rematerialisation in the compiled program: what is to be computed again is, whether layers run in a loop or one after another."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes
from fp8jax.models.transformer import ForwardOptions

FORWARD = 5  # GEMMs of a layer's forward pass that its backward pass needs again: all but mlp_down


@functools.cache
def operations(*, layers, scan_layers, remat):
    """How often each operation is in the compiled gradient of a model with GeLU, in BF16."""
    model = {
        "architecture": "fog_opt",
        "layers": layers,
        "width": 48,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
    }
    config = config_lib.from_dict(
        {"model": model | {"scan_layers": scan_layers}, "fp8": {"recipe": "bf16"}}
    )
    definition = define(config.model, 128)
    recipes = model_recipes(config, gated=False, emulated=True)

    def loss(params, inputs):
        bound = definition.bind(params)
        return jnp.mean(
            bound({"inputs": inputs}, bound.prepare(recipes), ForwardOptions(remat))[0] ** 2
        )

    inputs = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    text = jax.jit(jax.grad(loss)).lower(definition.shapes, inputs).compile().as_text()
    return collections.Counter(re.findall(r"= \S+ ([a-z\-]+)\(", text))


@pytest.mark.parametrize(
    ("layers", "scan_layers", "copies"),
    [(2, False, 2), (1, True, 1), (2, True, 1)],
    ids=["unrolled", "a loop of one", "a loop"],
)
def test_blocks_are_computed_again(layers, scan_layers, copies):
    """`copies` of a layer are in the program; without a barrier, compilers would keep what the forward pass computed."""
    whole, again = (
        operations(layers=layers, scan_layers=scan_layers, remat=remat)["dot"]
        for remat in ("none", "full")
    )
    assert again - whole == FORWARD * copies


@pytest.mark.parametrize(
    ("layers", "scan_layers", "copies"),
    [(2, False, 2), (1, True, 1), (2, True, 1)],
    ids=["unrolled", "a loop of one", "a loop"],
)
def test_activations_keep_their_inputs_alone(layers, scan_layers, copies):
    """GeLU's erf is computed in the forward pass and in the backward pass of every layer."""
    assert operations(layers=layers, scan_layers=scan_layers, remat="none")["erf"] == 2 * copies
