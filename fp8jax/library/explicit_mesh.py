"""Run a function whose operands are split over a mesh with explicit axes (`jax.make_mesh`'s
default) as over one with automatic axes.

In explicit mode every intermediate array has a type with its sharding, and a GEMM that sums over a
split dimension is an error unless it says how its result is split. Backward passes do so
everywhere. The compiler places what is inside; operands and result keep their types.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def place_inside(
    f: Callable[..., jax.Array],
    arrays: Any,
    dims: Sequence[tuple[jax.Array, int]],
) -> jax.Array:
    """Return f(arrays), with explicit axes automatic inside.

    Args:
        f: function of a pytree of arrays.
        arrays: the pytree.
        dims: for each dimension of the result, an array and the dimension of it that is split
            alike.
    """
    meshes = [jax.typeof(x).sharding.mesh for x, _ in dims]
    explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
    if not explicit:
        return f(arrays)
    spec = _spec(dims)
    inside: Any = jax.sharding.auto_axes(f, out_sharding=NamedSharding(explicit[0], spec))
    return inside(arrays)


def _spec(dims: Sequence[tuple[jax.Array, int]]) -> PartitionSpec:
    """Return how a result is split: each mesh axis splits the first dimension that asks for it."""
    taken: set[Any] = set()
    out = []
    for x, dim in dims:
        spec = jax.typeof(x).sharding.spec
        names = spec[dim] if dim < len(spec) else None
        names = names if isinstance(names, tuple) else (names,)
        kept = tuple(name for name in names if name is not None and name not in taken)
        taken |= set(kept)
        out.append(kept or None)
    return PartitionSpec(*out)
