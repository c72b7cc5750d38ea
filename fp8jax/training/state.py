"""The state of a run as one pytree, with its sharding and its start.

A run continues bit for bit from this state alone; the data's position is the step.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax.models import gemms
from fp8jax.models.definition import Definition
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.parallel.sharding import named_sharding
from fp8jax.training import state_formats
from fp8jax.training.bad_steps import Health
from fp8jax.training.optimizer import make_transform

State = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The steps taken, parameters, FP8 scaling state, optimizer state, and the record of bad steps."""

    step: jax.Array
    params: Any
    scaling: Any
    opt_state: Any
    health: Health

    def items(self) -> dict[str, Any]:
        """Return the entries of a checkpoint, which can be restored one without another."""
        return {
            "params": self.params,
            "scaling": self.scaling,
            "opt_state": self.opt_state,
            "counters": {"step": self.step, "health": self.health},
        }

    @staticmethod
    def from_items(items: dict[str, Any]) -> "TrainState":
        """Return the state of entries, inverting `items`."""
        return TrainState(
            params=items["params"],
            scaling=items["scaling"],
            opt_state=items["opt_state"],
            **items["counters"],
        )


def initial_state(definition: Definition, recipes: ModelRecipes, config: Any) -> TrainState:
    """Return fresh parameters and all else empty; jit this with out_shardings. Scales are not
    calibrated yet.
    """
    return state_of(definition.init(config.training.seed), recipes, config)


def state_of(params: Any, recipes: ModelRecipes, config: Any) -> TrainState:
    """Return the state of float32 parameters, with all else empty."""
    step = jnp.zeros((), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes freely
        # The barrier keeps compilers from rounding zeros while compiling, which takes them minutes.
        fresh = jax.lax.optimization_barrier(
            (params, make_transform(config.optimizer).init(params), step)
        )
        params, opt_state = state_formats.pack(config.optimizer, *fresh)
    return TrainState(step, params, gemms.init_scaling(recipes), opt_state, Health.initial())


def abstract_state(
    definition: Definition, recipes: ModelRecipes, config: Any, mesh: Mesh
) -> TrainState:
    """Return shapes, dtypes and shardings of the state, without allocating it.

    Parameters and moments are sharded by their logical axes, all else is replicated.
    """
    shapes = jax.eval_shape(lambda: initial_state(definition, recipes, config))
    by_path = {
        _names(path): axes
        for path, axes in jax.tree_util.tree_leaves_with_path(definition.axes, is_leaf=_is_axes)
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharded(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The path of a moment, or of its scales, ends like that of its parameter.
        names = _names(path)
        axes = next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), None)
        sharding = replicated if axes is None else _fitting(named_sharding(mesh, axes), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(sharded, shapes)


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding without axes that do not divide a dimension, such as that of scales, of
    which there are few.
    """
    sizes = [
        math.prod(
            sharding.mesh.shape[axis]
            for axis in ((names,) if isinstance(names, str) else names or ())
        )
        for names in sharding.spec
    ]
    spec = (
        names if size % count == 0 else None
        for names, size, count in zip(sharding.spec, shape, sizes, strict=True)
    )
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path
    )
