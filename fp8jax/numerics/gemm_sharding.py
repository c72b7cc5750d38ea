"""Place operands of GEMMs on a mesh: cast them where they are, and move only bytes between devices.

    x = pin(x, placement.cast)                       # as it is: tokens split over all axes that split the residual stream
    q = moved(recipe.quantise(x, ...)[0], *placement)     # as the GEMM takes it: the gather moves FP8 bytes
    token = amax_by_device(x, placement.cast)        # no communication; the maximum over devices is taken later

Without a mesh (`jax.set_mesh`) no array is pinned. Mesh axes are not known here: specs come from
parallel/sharding.py.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from fp8jax.numerics import formats
from fp8jax.numerics.formats import Quantised


class Placement(NamedTuple):
    """The placement of one operand: how it is split where it is cast, and how the GEMM takes it."""

    cast: PartitionSpec | None
    gemm: PartitionSpec | None


class Partition(NamedTuple):
    """The mesh axes that split attention's operands.

    Batch, sequence and KV heads are split outside; only batch and KV heads inside, where sequences
    are whole.
    """

    batch: Any
    sequence: Any
    heads: Any
    inner_heads: Any

    def of(self, letters: str) -> Placement:
        """Return the placement of an array with these dimensions, such as 'btkgh': outside, and
        where attention is computed.
        """
        outside = {"b": self.batch, "t": self.sequence, "s": self.sequence, "k": self.heads}
        inside = {"b": self.batch, "k": self.inner_heads}
        return Placement(
            *(
                PartitionSpec(*(axes.get(letter) for letter in letters))
                for axes in (outside, inside)
            )
        )


def placements(partition: Partition | None, *letters: str) -> list[Placement]:
    """Return placements of attention's arrays with these dimensions; without a partition, the
    compiler chooses.
    """
    return [Placement(None, None) if partition is None else partition.of(word) for word in letters]


def pin(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """Constrain an array to a spec; None leaves it to the compiler."""
    if spec is None or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def moved(q: Quantised, *specs: PartitionSpec | None) -> Quantised:
    """Move values from one place to the next; unless they are pinned where they are cast, their
    source is moved instead.
    """
    for spec in specs:
        q = q._replace(data=pin(q.data, spec))
    return q


def amax_by_device(
    x: jax.Array, spec: PartitionSpec | None, like: jax.Array, *, emulated: bool = False
) -> jax.Array:
    """Return each device's largest magnitude in its own part of an array, without communication.

    Args:
        x: an array split by `spec`.
        spec: spec of x; None means replicated.
        like: float32, a dimension for each mesh axis, of the axis's size.
        emulated: as for `formats.amax`.

    Returns:
        float32, the shape of `like`, one number on each device; its maximum is `formats.amax(x)`,
        bit for bit.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def of_part(part: jax.Array) -> jax.Array:
        return formats.amax(part, emulated=emulated).reshape((1,) * like.ndim)

    return jax.shard_map(
        of_part,
        mesh=mesh,
        in_specs=spec or PartitionSpec(),
        out_specs=PartitionSpec(*mesh.axis_names),
        check_vma=False,
    )(x)
