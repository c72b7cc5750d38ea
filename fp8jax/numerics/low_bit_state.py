"""Keep numbers in fewer bits between steps: stochastic rounding, FP16 and FP8 with a scale per
block, remainders of a byte.

    data, scale = encode(m, "fp8", bits)              # a first moment; bits = random_bits(m.shape, seed)
    data, scale = encode(v, "float16", bits, root=True)   # a second moment: its square root is stored
    m = decode(data, scale)                           # float32 again
    high, low = split(w, jnp.bfloat16)                # 24 bits per number, rounded to nearest; w ≈ join(high, low)

Rounding is stochastic because a moving average changes by less than half a unit of 8 bits in most
steps, and rounding to the nearest would undo the change every time. Rounded up with a probability
equal to the fraction, averages stay right.

Scales are of blocks (128 numbers along the last dimension, powers of two) because moments of one
matrix lie many powers of ten apart, row by row. The root of a second moment is stored because
squares of gradients span twice the powers of two that gradients do. A value that is not zero is not
stored as zero there, because the update divides by it.

The value read is the square of the stored one, and squares of numbers whose mean is right are too
large on average, by the variance of the rounding. So roots are rounded up with the probability that
makes the mean of their squares right.

Operands of GEMMs are quantised elsewhere (formats.py, blockwise.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.numerics import blockwise, formats

FORMATS = {
    "float32": jnp.dtype(jnp.float32),
    "bfloat16": jnp.dtype(jnp.bfloat16),
    "float16": jnp.dtype(jnp.float16),
    "fp8": formats.E4M3,
}
# These formats need a scale, because their range is too small.
SCALED = ("float16", "fp8")
_REMAINDER_STEPS = 256  # steps of a remainder in one unit in the last place


def random_bits(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Return 32 random bits for each element, a function of its index and the seed alone, so the
    same on any mesh.

    The hash has a few integer operations (`lowbias32`, C. Wellons, Prospecting for Hash Functions,
    2018), which compilers fuse with their use; JAX's own generator writes its bits to memory first.
    It is good enough for rounding only.

    Args:
        shape: shape of the result.
        seed: uint32 scalar.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    # The seed comes first, because values of the index alone would be computed while compiling, and
    # kept as a constant.
    first = _mix(seed + jnp.uint32(0x9E3779B9))
    return _mix(_mix(index ^ first) + _mix(first))


def seed_of(step: jax.Array, number: jax.Array | int) -> jax.Array:
    """Return a seed for the array of this number in this step."""
    return _mix(step.astype(jnp.uint32)) + jnp.asarray(number).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def round_stochastic(
    x: jax.Array, dtype: Any, bits: jax.Array, *, squares: bool = False
) -> jax.Array:
    """Round to one of the two neighbours in `dtype`, so that the mean is x; beyond the largest
    finite number, to that.

    Args:
        x: float32, any shape. NaN and infinity do not change, if the format has them.
        dtype: a floating format of at most 16 bits.
        bits: uint32 like x, uniformly distributed.
        squares: make the mean of squares x squared instead; x must not be negative.
    """
    info = jnp.finfo(dtype)
    quantum = _quantum(x, dtype)
    if squares:
        rounded = _up_by_squares(x * (1.0 / quantum), bits) * quantum
    else:
        # The random number has as many bits as x has below the quantum, so the sum is exact.
        share = (bits >> (9 + info.nmant)).astype(jnp.float32) * jnp.float32(
            2.0 ** (info.nmant - 23)
        )
        rounded = jnp.floor(x * (1.0 / quantum) + share) * quantum
    top = float(info.max)
    return jnp.where(jnp.isfinite(x), jnp.clip(rounded, -top, top), x).astype(dtype)


def _up_by_squares(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Return one of the integers around x, so that the mean of squares is x squared."""
    below = jnp.floor(x)
    probability = (x - below) * (x + below) / (2 * below + 1)
    return below + (_uniform(bits) < probability).astype(jnp.float32)


def _uniform(bits: jax.Array) -> jax.Array:
    """Return float32 numbers in [0, 1) from random bits."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _quantum(x: jax.Array, dtype: Any) -> jax.Array:
    """Return the distance of neighbours in `dtype` at x, float32, a normal power of two, exact from
    exponent bits.
    """
    info = jnp.finfo(dtype)
    exponent = ((lax.bitcast_convert_type(x, jnp.uint32) >> 23) & 0xFF).astype(jnp.int32) - 127
    exponent = jnp.maximum(exponent, max(int(info.minexp), info.nmant - 126)) - info.nmant
    return lax.bitcast_convert_type(((exponent + 127) << 23).astype(jnp.uint32), jnp.float32)


def encode(
    x: jax.Array, name: str, bits: jax.Array, *, root: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Return an array in a storage format.

    Args:
        x: float32; with `root`, not negative.
        name: one of FORMATS.
        bits: uint32 like x, for stochastic rounding.
        root: store the square root in formats that are scaled, and no positive number as zero.

    Returns:
        Data in the format; float32 scales, one for each 128 elements along the last dimension, or
        None.
    """
    dtype = FORMATS[name]
    if name == "float32":
        return x, None
    if name not in SCALED or x.ndim == 0:
        return round_stochastic(x, dtype, bits), None
    x = jnp.sqrt(x) if root else x
    axis = x.ndim - 1
    scale = formats.scale_of(blockwise.amax(x, (axis,)), dtype)
    data = round_stochastic(x * (1.0 / blockwise.spread(scale, x.shape)), dtype, bits, squares=root)
    if root:
        data = jnp.where(
            (x > 0) & (data == 0), jnp.finfo(dtype).smallest_subnormal.astype(dtype), data
        )
    return data, scale


def decode(data: jax.Array, scale: jax.Array | None, *, root: bool = False) -> jax.Array:
    """Return the float32 values of what `encode` returned, with the same `root`."""
    x = data.astype(jnp.float32)
    if scale is None:
        return x
    x = x * blockwise.spread(scale, x.shape)
    return jnp.square(x) if root else x


def split(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Split a number into the nearest one in a 16-bit format and, in an int8, the rest in 256ths of
    the spacing there.

    Three bytes hold 8 bits more than the format's own; Kahan's compensation needs four bytes.
    """
    top = float(jnp.finfo(dtype).max)
    high = jnp.clip(x, -top, top).astype(dtype)
    near = high.astype(jnp.float32)
    low = jnp.round((x - near) * (_REMAINDER_STEPS / _quantum(near, dtype)))
    return high, jnp.clip(low, -127, 127).astype(jnp.int8)


def join(high: jax.Array, low: jax.Array) -> jax.Array:
    """Return float32 numbers, inverting `split`."""
    near = high.astype(jnp.float32)
    return near + low.astype(jnp.float32) * (_quantum(near, high.dtype) * (1.0 / _REMAINDER_STEPS))
