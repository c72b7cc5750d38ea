"""Define a model without its parameters, which can be initialised, bound to parameters, sharded and
counted.

    definition = define(config)                   # allocates nothing
    params = definition.init(seed)                # nested dictionary of arrays
    logits, taps = definition.bind(params)(batch, gemms)

Parameters travel as plain nested dictionaries; NNX modules exist only inside a step.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from fp8jax.config import ModelConfig
from fp8jax.models import architectures
from fp8jax.models.architectures import ResolvedModel
from fp8jax.models.transformer import Transformer

Params = dict[str, Any]
STACKED = "blocks"


@dataclasses.dataclass(frozen=True)
class Definition:
    """A resolved model config and the structure of its parameters.

    Attributes:
        config: every switch filled.
        shapes: like the parameters, of jax.ShapeDtypeStruct.
        axes: like the parameters, of tuples of logical axes (parallel/sharding.py).
    """

    config: ResolvedModel
    graph: nnx.GraphDef
    state: nnx.State
    shapes: Params
    axes: Params

    @property
    def vocab_size(self) -> int:
        """Return the rows of the embedding."""
        return self.config.vocab_size

    def init(self, seed: int) -> Params:
        """Return float32 parameters; jit this with out_shardings to make them in place."""
        model = Transformer(self.config, self.vocab_size, nnx.Rngs(params=seed))
        return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])

    def bind(self, params: Params) -> Transformer:
        """Return the module with these parameters, which may be tracers."""
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state)

    def parameter_count(self) -> int:
        """Return the number of trained numbers, embedding and head included."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def gated(self) -> bool:
        """Return whether the FFN has a gate GEMM."""
        return architectures.gated(self.config)


def define(config: ModelConfig, vocab_size: int) -> Definition:
    """Return the definition of the model of a config; `vocab_size` is the tokenizer's if the config
    leaves it open.
    """
    resolved = architectures.resolve(config, vocab_size)
    graph, state, _ = nnx.split(
        nnx.eval_shape(lambda: Transformer(resolved, vocab_size, nnx.Rngs(params=0))),
        nnx.Param,
        ...,
    )
    # NNX variables are leaves here; their metadata names the axes, and blocks have one more, in
    # front.
    axes = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata("axes")
        _insert(axes, path, ("layers", *names) if path[0] == STACKED else names)
    shapes = nnx.to_pure_dict(state)
    return Definition(resolved, graph, state, shapes, axes)


def _insert(tree: Params, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
