"""Look up rows of an embedding table that is split over the mesh, and sum the gradient into it.

    x_btd = lookup(table_vd, ids_bt, scale=50.0, dtype=jnp.bfloat16)     # inside jit, under jax.set_mesh(mesh)

The table is split by rows over `tensor` and by columns over `fsdp`, the tokens over all axes
(sharding.py). A compiler would gather the whole global batch on every device for the gradient, and
move float32. Here each device looks up its own rows and columns for the tokens of its `fsdp`
neighbours; activations are moved, in their dtype. The gradient is summed in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.parallel.sharding import partition_spec, shards

_TABLE, _IDS, _ROWS = (
    partition_spec(("vocab", "embed")),
    partition_spec(("batch", "sequence")),
    partition_spec(("batch", "residual", None)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_vd: jax.Array, ids_bt: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """Return table[ids] * scale in `dtype`, [b, t, d]; scaled in float32, rounded once."""
    return _forward(table_vd, ids_bt, scale, dtype)[0]


def _forward(
    table: jax.Array, ids: jax.Array, scale: float, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    mesh = jax.sharding.get_abstract_mesh()
    rows = functools.partial(_rows, scale=scale, dtype=dtype)
    if not _is_split(mesh, ids):
        return rows(table, ids, {}), (ids, table)
    run = jax.shard_map(
        functools.partial(rows, sizes=dict(mesh.shape)),
        mesh=mesh,
        in_specs=(_TABLE, _IDS),
        out_specs=_ROWS,
        check_vma=False,
    )
    return run(table, ids), (ids, table)


def _backward(
    scale: float, _: Any, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None]:
    ids, table = saved
    mesh = jax.sharding.get_abstract_mesh()
    scatter = functools.partial(_scatter, scale=scale, dtype=table.dtype)
    if not _is_split(mesh, ids):
        return scatter(ids, g, vocab=table.shape[0], sizes={}), None
    vocab = table.shape[0] // mesh.shape["tensor"]
    run = jax.shard_map(
        functools.partial(scatter, vocab=vocab, sizes=dict(mesh.shape)),
        mesh=mesh,
        in_specs=(_IDS, _ROWS),
        out_specs=_TABLE,
        check_vma=False,
    )
    return run(ids, g), None


lookup.defvjp(_forward, _backward)


def _is_split(mesh: Any, ids: jax.Array) -> bool:
    """Return whether there are tokens for every device; generating text has one per sequence, and
    no gradient.
    """
    if mesh.empty or mesh.size == 1:
        return False
    return ids.shape[0] % shards("batch") == 0 and ids.shape[1] % shards("residual") == 0


def _rows(
    table: jax.Array, ids: jax.Array, sizes: dict[str, int], *, scale: float, dtype: Any
) -> jax.Array:
    """Return one device's tokens, from the rows and columns that it and its neighbours hold."""
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    ids, mine = _local(ids, table.shape[0], fsdp, tensor)
    x = jnp.where(mine[..., None], (table[ids] * scale).astype(dtype), 0)
    if tensor > 1:  # every row comes from one device, the others add zeros
        x = lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)
    return lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True) if fsdp > 1 else x


def _scatter(
    ids: jax.Array, g: jax.Array, *, vocab: int, sizes: dict[str, int], scale: float, dtype: Any
) -> jax.Array:
    """Return one device's part of the table's gradient, summed over all tokens."""
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    ids, mine = _local(ids, vocab, fsdp, tensor)
    g = lax.all_to_all(g, "fsdp", split_axis=2, concat_axis=0, tiled=True) if fsdp > 1 else g
    g = lax.all_gather(g, "tensor", axis=1, tiled=True) if tensor > 1 else g
    values = jnp.where(mine[..., None], g.astype(dtype) * scale, 0)
    out = jnp.zeros((vocab, g.shape[-1]), dtype).at[ids].add(values)
    others = tuple(axis for axis in ("data", "sequence") if sizes.get(axis, 1) > 1)
    return lax.psum(out, others) if others else out


def _local(ids: jax.Array, vocab: int, fsdp: int, tensor: int) -> tuple[jax.Array, jax.Array]:
    """Return tokens of all `fsdp` neighbours as numbers of this device's rows, 0 if another's; and
    which are its own.
    """
    ids = lax.all_gather(ids, "fsdp", axis=0, tiled=True) if fsdp > 1 else ids
    if tensor == 1:
        return ids, jnp.ones(ids.shape, bool)
    ids = ids - lax.axis_index("tensor") * vocab
    mine = (ids >= 0) & (ids < vocab)
    return jnp.where(mine, ids, 0), mine
