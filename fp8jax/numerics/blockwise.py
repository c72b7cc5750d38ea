"""Quantise blockwise: a scale for each run of 128 elements, or for each tile of 128 x 128, instead
of one per tensor.

    q, largest = quantise(x_td, (1,), scale_of, E4M3, emulated=True)    # 1 x 128: q.scale is [t, ceil(d / 128)]
    q, largest = quantise(w_df, (0, 1), scale_of, E4M3, emulated=True)  # 128 x 128: q.scale is [ceil(d / 128), ceil(f / 128)]
    x = widen(q, jnp.bfloat16)                                          # the values again

As in DeepSeek-V3 (arXiv 2412.19437, section 3.3): runs lie along the dimension that a GEMM
contracts, so a tensor that two GEMMs contract along different dimensions is quantised twice. The
last block of a dimension may be shorter.

The module has no FP8 GEMMs. A scale that changes along the contracted dimension cannot leave the
sum, and there is no kernel for it; operands are widened with their scales first. Powers of two
times FP8 values are exact in bfloat16, other scales in float32 up to one rounding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fp8jax.numerics import formats
from fp8jax.numerics.formats import Quantised

BLOCK = 128


def amax(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the largest magnitude of each block, float32; infinity where a block holds NaN or
    infinity.

    Args:
        x: any shape.
        axes: dimensions cut into blocks; the others keep their size in the result.
    """
    largest = jnp.abs(x)
    # NaN becomes infinity before any reduction, as in `formats.amax`.
    largest = jnp.where(jnp.isnan(x), jnp.asarray(jnp.inf, x.dtype), largest).astype(jnp.float32)
    for axis in axes:
        blocks = -(-x.shape[axis] // BLOCK)
        padding = [
            (0, blocks * BLOCK - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)
        ]
        shape = *largest.shape[:axis], blocks, BLOCK, *largest.shape[axis + 1 :]
        largest = jnp.max(jnp.pad(largest, padding).reshape(shape), axis=axis + 1, initial=0.0)
    return largest


def quantise(
    x: jax.Array,
    axes: tuple[int, ...],
    scale_of: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    *,
    emulated: bool,
) -> tuple[Quantised, jax.Array]:
    """Cast with a scale for each block.

    Args:
        x: any shape, any floating dtype.
        axes: dimensions cut into blocks.
        scale_of: scales from amaxes, elementwise.
        dtype: FP8 format.
        emulated: as in `formats.cast`.

    Returns:
        FP8 data with float32 scales, one per block; and the amax of the whole tensor.
    """
    largest = amax(x, axes)
    scale = scale_of(largest)
    q = formats.quantise(x, spread(scale, x.shape), dtype, emulated=emulated)
    return Quantised(q.data, scale), jnp.max(largest, initial=0.0)


def spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a scale for each element of an array of this shape; a scalar stays a scalar."""
    if scale.ndim == 0:
        return scale
    for axis, size in enumerate(shape):
        if scale.shape[axis] != size:
            scale = jnp.repeat(scale, BLOCK, axis=axis)[(slice(None),) * axis + (slice(size),)]
    return scale


def widen(q: Quantised, dtype: jnp.dtype) -> Quantised:
    """Return the values, multiplied by their scales, as a plain operand."""
    data = q.data.astype(jnp.float32)
    return Quantised(
        (data if q.scale is None else data * spread(q.scale, data.shape)).astype(dtype), None
    )
