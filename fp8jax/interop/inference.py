"""A model made ready to compute with, and nothing more: weights cast to BF16 once, rows spread over the mesh.

    model, step = training.evaluation.load_run("runs/fp8_base-tiny")
    inference = Inference(model)

What is computed is in generation.py (text) and scoring.py (log-likelihoods).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.data import tokenizer
from fp8jax.data.tokenizer import Tokenizer
from fp8jax.models import gemms
from fp8jax.models.definition import LoadedModel
from fp8jax.models.gemms import ModelRecipes
from fp8jax.models.transformer import PreparedGemms, Transformer
from fp8jax.parallel.mesh import emulates_fp8
from fp8jax.parallel.sharding import RULES


class Bound(NamedTuple):
    """The model as functions under `Inference.call` see it."""

    model: Transformer
    recipes: ModelRecipes
    prepared: PreparedGemms
    tokenizer: Tokenizer


class Inference:
    """A loaded model, its tokenizer, and its compiled functions.

    Attributes:
        config: of the run.
        tokenizer: of its text.
        context: tokens that the model was trained to see at once, config.data.sequence_length.
        replicas: a batch must have a multiple of so many rows.
    """

    def __init__(self, model: LoadedModel):
        self.config, self._definition, self._params, self._mesh = model
        self.tokenizer = tokenizer.load(self.config.data.tokenizer)
        self.context = self.config.data.sequence_length
        self.replicas = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        emulated = emulates_fp8(self.config, self._mesh.devices.flat[0])
        self._recipes = gemms.model_recipes(self.config, gated=self._definition.gated(), emulated=emulated, recipe="bf16")
        self._compiled: dict[Callable, Any] = {}
        self._prepared = jax.jit(lambda params: self._definition.bind(params).prepare(self._recipes, {}, {}))(self._params)

    def call(self, function: Callable, *arrays: Any) -> Any:
        """function(Bound, *arrays), jitted: compiled once for every function and shapes.

        Arrays on the host must be the same on all processes, and results that go there replicated.
        """
        if function not in self._compiled:
            def run(params, prepared, *arrays):
                with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                    return function(Bound(self._definition.bind(params), self._recipes, prepared, self.tokenizer), *arrays)

            self._compiled[function] = jax.jit(run)
        return self._compiled[function](self._params, self._prepared, *arrays)

    def put(self, rows: np.ndarray) -> jax.Array:
        """[b, ...] on the devices, b split over the replicas."""
        return jax.device_put(rows, NamedSharding(self._mesh, PartitionSpec(RULES["batch"])))
