"""Prepare a loaded model to compute with: weights cast to BF16 once, rows spread over the mesh.

runner = Runner(definition, params, mesh, recipes)
logits = runner.call(function, runner.put(ids_bt))            # function(Bound, ids_bt), compiled once
runner.fetch(logits)                                          # a numpy array, on every process
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax.models.definition import Definition, Params
from fp8jax.models.gemms import Gemms
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.models.transformer import Transformer
from fp8jax.numerics.compiling import compiler_options
from fp8jax.parallel.mesh import replicas
from fp8jax.parallel.sharding import RULES, constrain


class Bound(NamedTuple):
    """The model for functions under `Runner.call`."""

    model: Transformer
    gemms: Gemms


class Runner:
    """A loaded model and its compiled functions.

    Args:
        definition: definition of the model.
        params: its parameters, or their shapes if no function is run.
        mesh: their devices.
        recipes: recipes of the GEMMs, without scaling state.

    Attributes:
        replicas: the rows of a batch must be a multiple of this.
        vocab_size: logits per token: rows of the table, padding included.
    """

    def __init__(self, definition: Definition, params: Params, mesh: Mesh, recipes: ModelRecipes):
        self.vocab_size = definition.vocab_size
        self.replicas = replicas(mesh)
        self._definition = definition
        self._params = params
        self._mesh = mesh
        self._recipes = recipes
        self._compiled: dict[Callable, Any] = {}
        self._options = compiler_options(mesh.devices.flat[0].platform)
        self._prepare = jax.jit(
            lambda params: self._definition.bind(params).prepare(self._recipes),
            compiler_options=self._options,
        )

    @functools.cached_property
    def _gemms(self) -> Gemms:
        return self._prepare(self._params)

    def call(self, function: Callable, *arrays: Any) -> Any:
        """Call function(Bound, *arrays), jitted, compiled once per function and shapes; host arrays
        are equal on all processes.
        """
        return self._jitted(function)(self._params, self._gemms, *arrays)

    def abstract_weights(self) -> tuple[Any, tuple[Any, ...]]:
        """Return the jitted function that prepares the weights, and its arguments, which may be
        shapes as well as arrays.
        """
        return self._prepare, (self._params,)

    def abstract_call(self, function: Callable, *arrays: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the jitted function that `call` runs, and its arguments, which may be shapes as
        well as arrays.
        """
        return self._jitted(function), (
            self._params,
            jax.eval_shape(self._prepare, self._params),
            *arrays,
        )

    def _jitted(self, function: Callable) -> Any:
        if function not in self._compiled:

            def run(params, gemms, *arrays):
                with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                    return function(Bound(self._definition.bind(params), gemms), *arrays)

            self._compiled[function] = jax.jit(run, compiler_options=self._options)
        return self._compiled[function]

    def put(self, rows: np.ndarray) -> jax.Array:
        """Put [b, ...] on the devices, b split over the replicas."""
        return jax.device_put(rows, NamedSharding(self._mesh, PartitionSpec(RULES["batch"])))

    def fetch(self, array: jax.Array) -> np.ndarray:
        """Return the whole array on the host, with its parts on any processes."""
        return np.asarray(
            array
            if array.is_fully_addressable
            else multihost_utils.process_allgather(array, tiled=True)
        )


def pin_rows(x: jax.Array) -> jax.Array:
    """Split [b, ...] as `Runner.put` does, for results that are inputs again, so that their
    functions are compiled once.
    """
    return constrain(x, "batch")
