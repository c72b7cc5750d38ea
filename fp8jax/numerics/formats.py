"""Take amaxes and scales for FP8 formats, and cast with saturation, keeping NaN.

There is one convention: `x ≈ q * scale`, with `scale = amax / format_max * 2**margin`, rounded up
to a power of two by default. An FP8 value is never passed without its scale:
`Quantised(data, scale)`.

    scale = scale_of(amax(x), E4M3)
    q = quantise(x, scale, E4M3)          # q.data is float8_e4m3fn
    x_again = dequantise(q)               # float32

Two ways to cast give the same bits: the compiler's own conversion (fast where the device has FP8
instructions) and integer arithmetic on the float32 bits (four times faster on a CPU); `emulated`
picks the second.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
E5M2 = jnp.dtype(jnp.float8_e5m2)
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}

_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -126, 126  # both 2**k and 2**-k are normal float32 numbers


class Quantised(NamedTuple):
    """An FP8 array and the float32 factor that gives its values back, or one factor a block
    (numerics/blockwise.py).

    With scale None, data is not quantised.
    """

    data: jax.Array
    scale: jax.Array | None


def max_value(dtype: jnp.dtype) -> float:
    """Return the largest finite value of a format: 448 for e4m3, 57344 for e5m2."""
    return float(jnp.finfo(dtype).max)


def amax(x: jax.Array, *, emulated: bool = False) -> jax.Array:
    """Return the largest magnitude as a float32 scalar; infinity if anything is NaN or infinite; 0
    for an empty array.

    NaN becomes infinity before the reduction: a maximum over a sharded array would drop it.

    Args:
        x: any shape, any floating dtype.
        emulated: use integer arithmetic instead of the compiler's maximum of floats, 10 times
            slower on a CPU; the same bits.
    """
    if emulated:
        return _amax_of_bits(x)
    magnitude = jnp.abs(x)
    magnitude = jnp.where(jnp.isnan(x), jnp.asarray(jnp.inf, x.dtype), magnitude)
    return jnp.max(magnitude, initial=0.0).astype(jnp.float32)


def _amax_of_bits(x: jax.Array) -> jax.Array:
    """Return the largest of the bits without sign: magnitudes have the order of their bits, and
    NaNs come last.
    """
    if x.dtype != jnp.bfloat16:
        x = x.astype(jnp.float32)
    integer = jnp.int16 if x.dtype == jnp.bfloat16 else jnp.int32
    bits = lax.bitcast_convert_type(x, integer) & jnp.iinfo(integer).max
    infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), integer)
    top = jnp.minimum(jnp.max(bits, initial=0), infinity)
    return lax.bitcast_convert_type(top, x.dtype).astype(jnp.float32)


def scale_of(
    largest: jax.Array, dtype: jnp.dtype, *, margin: int = 0, power_of_two: bool = True
) -> jax.Array:
    """Return the scale that brings a largest magnitude to the top of a format, 2**margin below it.

    Args:
        largest: amax, float32, any shape. 0 gives scale 1.
        dtype: E4M3 or E5M2.
        margin: headroom in powers of two.
        power_of_two: return the smallest power of two that is large enough, from exponent bits and
            so exact on every device; otherwise the quotient itself, correctly rounded or one unit
            off, as the device divides.

    Returns:
        float32, the shape of `largest`; always finite, positive and normal.
    """
    largest = largest.astype(jnp.float32)
    if power_of_two:
        scale = _power_of_two_at_least(largest, max_value(dtype), margin)
    else:
        scale = jnp.minimum(largest, jnp.finfo(jnp.float32).max) / max_value(dtype) * 2.0**margin
        scale = jnp.clip(scale, 2.0**_SMALLEST_EXPONENT, 2.0**_LARGEST_EXPONENT)
    return jnp.where(largest > 0, scale, jnp.float32(1))


def _power_of_two_at_least(largest: jax.Array, top: float, margin: int) -> jax.Array:
    """Return 2**(k + margin), with k the smallest integer such that top * 2**k >= largest."""
    bits = lax.bitcast_convert_type(largest, jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32) - 127
    mantissa = bits & 0x7FFFFF
    top_bits = int(np.float32(top).view(np.uint32))
    top_exponent, top_mantissa = (top_bits >> 23) - 127, top_bits & 0x7FFFFF
    k = exponent - top_exponent + (mantissa > top_mantissa).astype(jnp.int32) + margin
    k = jnp.clip(k, _SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    return lax.bitcast_convert_type(((k + 127) << 23).astype(jnp.uint32), jnp.float32)


def cast(x: jax.Array, dtype: jnp.dtype, *, emulated: bool = False) -> jax.Array:
    """Cast to FP8: round to nearest even, clip finite values to the format's maximum, turn NaN and
    infinity into NaN.

    Args:
        x: any floating dtype; computed in float32.
        dtype: E4M3 or E5M2.
        emulated: use integer arithmetic instead of the compiler's conversion; the same bits.
    """
    x = x.astype(jnp.float32)
    if emulated:
        return _cast_by_bits(x, dtype)
    top = max_value(dtype)
    # x - x is 0, or NaN where x is NaN or infinite. A `where` with a constant does the same, but
    # XLA for GPUs moves the constant, broadcast, out of the loop over layers, keeps it in memory
    # and reads it with every cast (seen in programs for H100s).
    return (jnp.clip(x, -top, top) - (x - x)).astype(dtype)  # subtracted, so that -0 stays -0


def _cast_by_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    dropped = 23 - info.nmant
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF

    # Normal numbers: add half a unit (less one bit for an even result), drop the tail, change the
    # exponent's bias.
    rounded = (magnitude + ((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1)) >> dropped
    largest_code = int(np.asarray(info.max, dtype).view(np.uint8))
    normal = jnp.minimum(
        rounded.astype(jnp.int32) - ((127 - _bias(dtype)) << info.nmant), largest_code
    ).astype(jnp.uint32)

    # Subnormal numbers: adding 2**23 quanta lets the float32 adder do the rounding; the code is in
    # the low bits.
    smallest_normal = 1 - _bias(dtype)
    quantum = smallest_normal - info.nmant
    shifted = lax.bitcast_convert_type(magnitude, jnp.float32) + jnp.float32(2.0 ** (23 + quantum))
    subnormal = lax.bitcast_convert_type(shifted, jnp.uint32) - jnp.uint32(
        (23 + quantum + 127) << 23
    )

    code = jnp.where(magnitude < ((smallest_normal + 127) << 23), subnormal, normal)
    code = jnp.where(
        magnitude >= 0x7F800000,
        jnp.uint32(int(np.asarray(np.nan, dtype).view(np.uint8)) & 0x7F),
        code,
    )
    return lax.bitcast_convert_type((code | sign).astype(jnp.uint8), dtype)


def _bias(dtype: jnp.dtype) -> int:
    """Return the exponent bias: 7 for e4m3, 15 for e5m2."""
    return {E4M3: 7, E5M2: 15}[jnp.dtype(dtype)]


def quantise(
    x: jax.Array, scale: jax.Array, dtype: jnp.dtype, *, emulated: bool = False
) -> Quantised:
    """Return the FP8 array of x / scale (float32 arithmetic, never through bfloat16) with its
    scale.

    A quotient beyond float32's range, from a scale about 2**100 times too small, is infinite: NaN,
    not the maximum.
    """
    return Quantised(cast(x.astype(jnp.float32) * (1.0 / scale), dtype, emulated=emulated), scale)


def dequantise(q: Quantised) -> jax.Array:
    """Return the float32 values of a quantised array."""
    data = q.data.astype(jnp.float32)
    return data if q.scale is None else data * q.scale
