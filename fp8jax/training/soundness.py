"""Check that a state is finite, which it may not be after a fault of memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fp8jax.training.state import TrainState


def first_unsound(state: TrainState, replicated: NamedSharding) -> str | None:
    """Return the name of the first array, of those that every step builds on, that is not finite;
    None if all are.

    Args:
        state: a state on the devices.
        replicated: a sharding over all of them, so that every process knows.
    """
    items = {
        "parameter": state.params,
        "scaling": state.scaling,
        "optimizer state": state.opt_state,
    }
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_are_finite(replicated)([leaf for _, leaf in leaves]))
    names = (
        f"{path[0].key} {jax.tree_util.keystr(path[1:], simple=True, separator='.')}"
        for path, _ in leaves
    )
    return next((name for name, fine in zip(names, finite, strict=True) if not fine), None)


@functools.lru_cache(maxsize=4)
def _are_finite(replicated: NamedSharding) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(
        lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]),
        out_shardings=replicated,
    )
