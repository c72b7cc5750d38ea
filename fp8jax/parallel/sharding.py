"""Logical axes, and the one table that maps them to mesh axes.

Parameters and activations name their dimensions (`embed`, `heads`, ...); `RULES` gives the mesh
axes that split each.

    sharding = named_sharding(mesh, ("layers", "embed", "mlp"))
    x_btd = constrain(x_btd, "batch", "residual", None)      # inside jit, under jax.set_mesh(mesh)

The sequence has two names. Between GEMMs, where only tokens matter, it is `residual` and split as
far as it goes, so norms, residual additions and what they keep for the backward pass take a part of
the memory; within GEMMs whose features are split over `tensor` it is `sequence`. Attention takes
whole sequences, with heads split over `sequence` instead where they divide.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "residual": ("sequence", "tensor"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    None: None,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the mesh axes of an array whose dimensions have these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Return the sharding of such an array on a mesh; without axes it is replicated."""
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the sharding of an activation; outside `jax.set_mesh` return it unchanged."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def shards(axis: str) -> int:
    """Return the number of parts of a logical axis on the mesh of `jax.set_mesh`; 1 outside of it."""
    mesh, names = jax.sharding.get_abstract_mesh(), RULES[axis]
    if mesh.empty or names is None:
        return 1
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def activation_specs(features: str | None) -> tuple[PartitionSpec, PartitionSpec]:
    """Return specs of [b, t, features] between GEMMs, and as a block's GEMM takes it; `features` is
    the logical axis.
    """
    if features == "embed":
        return partition_spec(("batch", "residual", None)), partition_spec(
            ("batch", "sequence", None)
        )
    spec = partition_spec(("batch", "sequence", features))
    return spec, spec


def attention_axes(kv_heads: int) -> tuple[str, ...]:
    """Return the mesh axes that split KV heads while attention has whole sequences: `sequence` too,
    if heads suffice.
    """
    sizes, axes = jax.sharding.get_abstract_mesh().shape, ("tensor", "sequence")
    return axes if kv_heads % math.prod(sizes.get(axis, 1) for axis in axes) == 0 else axes[:1]
