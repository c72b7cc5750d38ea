"""Casts, amax and scales against ml_dtypes and exact rational arithmetic."""

import functools
from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.numerics import formats

from . import reference
from .reference import E4M3, E5M2

FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
EMULATED = pytest.mark.parametrize("emulated", [True, False], ids=["bits", "compiler"])

cast = jax.jit(formats.cast, static_argnames=("dtype", "emulated"))
scale_of = jax.jit(formats.scale_of, static_argnames=("dtype", "margin", "power_of_two"))


def same_bits(found, expected):
    """Bit for bit, -0 included; NaN for NaN, whose sign the compiler's own conversion drops."""
    found, expected = np.asarray(found), np.asarray(expected)
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    np.testing.assert_array_equal(found.view(np.uint8)[~nan], expected.view(np.uint8)[~nan])


@FORMATS
@EMULATED
def test_cast_equals_ml_dtypes_on_every_bfloat16(dtype, emulated):
    x = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16)
    found = cast(jnp.asarray(x), dtype, emulated=emulated)
    assert found.dtype == dtype
    same_bits(found, reference.cast(x.astype(np.float32), dtype))


@FORMATS
@EMULATED
def test_cast_equals_ml_dtypes_on_random_float32_bits(dtype, emulated):
    """A million bit patterns: half anywhere, half around the format's range, where ties and subnormals are."""
    rng = np.random.default_rng(0)
    anywhere = rng.integers(0, 2**32, 2**19, np.uint32).view(np.float32)
    exponents = rng.integers(-20, 18, 2**19)
    near = np.ldexp(rng.uniform(-1, 1, 2**19).astype(np.float32), exponents)
    ties = (near.view(np.uint32) & np.uint32(0xFFF00000 if dtype == E4M3 else 0xFFE00000)).view(
        np.float32
    )
    x = np.concatenate(
        [
            anywhere,
            near,
            np.nextafter(ties, np.float32(0)),
            ties,
            np.nextafter(ties, np.float32(np.inf)),
        ]
    )
    same_bits(cast(jnp.asarray(x), dtype, emulated=emulated), reference.cast(x, dtype))


def float32_patterns():
    """Bit patterns, so that subnormals, -0, NaN payloads and infinities come up; and numbers where the formats live."""
    return hnp.arrays(
        np.uint32,
        16,
        elements=st.one_of(
            st.integers(0, 2**32 - 1),
            st.sampled_from(
                [
                    0,
                    1 << 31,
                    1,
                    (1 << 31) | 1,
                    0x7FFFFF,
                    0x7F800000,
                    0xFF800000,
                    0x7FC00000,
                    0x7F800001,
                    0x7F7FFFFF,
                ]
            ),
            st.floats(-65536, 65536, width=32).map(lambda v: int(np.float32(v).view(np.uint32))),
        ),
    )


@FORMATS
@hypothesis.given(bits=float32_patterns())
@reference.examples(300)
def test_cast_of_any_bit_pattern(dtype, bits):
    x = bits.view(np.float32)
    for emulated in (True, False):
        same_bits(cast(jnp.asarray(x), dtype, emulated=emulated), reference.cast(x, dtype))


@EMULATED
@pytest.mark.parametrize(("dtype", "top"), [(E4M3, 448.0), (E5M2, 57344.0)], ids=["e4m3", "e5m2"])
def test_saturation(dtype, top, emulated):
    """Plain astype would make NaN of 465 (e4m3) and infinity of 61440 (e5m2)."""
    x = jnp.asarray(
        [
            top,
            np.nextafter(np.float32(top), np.float32(np.inf)),
            top * 1.04,
            2 * top,
            3.4e38,
            -top * 1.1,
            -3.4e38,
        ],
        jnp.float32,
    )
    found = np.asarray(cast(x, dtype, emulated=emulated)).astype(np.float32)
    np.testing.assert_array_equal(found, [top] * 5 + [-top] * 2)


@FORMATS
@EMULATED
def test_nan_and_infinity_are_not_clipped(dtype, emulated):
    x = jnp.asarray([np.nan, np.inf, -np.inf, 1.0], jnp.float32)
    found = np.asarray(cast(x, dtype, emulated=emulated)).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(found), [True, True, True, False])


@FORMATS
def test_quantise_computes_in_float32(dtype):
    """From bfloat16 inputs and an odd scale: going through bfloat16 would change 3% of the values (measured)."""
    x = np.random.default_rng(1).normal(size=4096).astype(ml_dtypes.bfloat16)
    scale = np.float32(0.0123)
    q = formats.quantise(jnp.asarray(x), jnp.asarray(scale), dtype, emulated=True)
    same_bits(q.data, reference.cast(x.astype(np.float32) * (np.float32(1) / scale), dtype))
    np.testing.assert_array_equal(
        formats.dequantise(q), np.asarray(q.data).astype(np.float32) * scale
    )


def test_max_value():
    assert {name: formats.max_value(dtype) for name, dtype in formats.FORMATS.items()} == {
        "e4m3": 448.0,
        "e5m2": 57344.0,
    }


@EMULATED
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -3.0, 2.0], 3.0),
        ([0.0, -0.0], 0.0),
        ([], 0.0),
        ([1.0, np.nan], np.inf),
        ([np.nan], np.inf),
        ([-np.inf, 5.0], np.inf),
    ],
)
def test_amax(values, expected, dtype, emulated):
    found = jax.jit(functools.partial(formats.amax, emulated=emulated))(jnp.asarray(values, dtype))
    assert found.dtype == jnp.float32
    assert found.shape == ()
    assert float(found) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_amax_of_bits_is_the_magnitude_of_every_number(dtype):
    """Of all numbers of 16 bits, and of float32 numbers of all exponents; NaN is infinite, and so not lost."""
    if dtype == jnp.float32:
        bits = (
            np.random.default_rng(0)
            .integers(0, 2**32, size=2**16, dtype=np.uint64)
            .astype(np.uint32)
        )
        x = np.concatenate(
            [bits.view(np.float32), np.array([-0.0, 1e-45, -1e-40, np.inf, -np.nan], np.float32)]
        )
    else:
        x = np.arange(2**16, dtype=np.uint16).view(dtype)
    expected = np.abs(x.astype(np.float32))
    expected[np.isnan(expected)] = np.inf
    found = jax.jit(jax.vmap(functools.partial(formats.amax, emulated=True)))(
        jnp.asarray(x)[:, None]
    )
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), expected.view(np.uint32))


@EMULATED
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 100.0])
@pytest.mark.parametrize("position", [0, 13, 63])
def test_amax_of_a_sharded_array_keeps_one_bad_value(bad, position, dtype, emulated):
    """A maximum over a sharded array drops NaN on the way through the all-reduce (measured, jax 0.10.2)."""
    x = np.arange(64, dtype=np.float32)
    x[position] = bad
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    found = jax.jit(functools.partial(formats.amax, emulated=emulated))(
        jax.device_put(jnp.asarray(x, dtype), sharding)
    )
    expected = np.inf if np.isnan(bad) else bad
    assert [float(np.asarray(shard.data)) for shard in found.addressable_shards] == [expected] * 8


def amaxes():
    """Positive float32 numbers of all sizes, normal ones; exact multiples of the formats' maxima among them."""
    bits = st.integers(0x00800000, 0x7F7FFFFF).map(lambda b: float(np.uint32(b).view(np.float32)))
    edges = st.tuples(
        st.sampled_from([448.0, 57344.0, 256.0, 1.0]),
        st.integers(-120, 100),
        st.sampled_from([-1, 0, 1]),
    )
    beside = edges.map(
        lambda e: float(
            np.nextafter(np.float32(np.ldexp(e[0], e[1])), np.float32(e[2] * np.inf))
            if e[2]
            else np.ldexp(e[0], e[1])
        )
    )
    return st.one_of(bits, beside)


@FORMATS
@hypothesis.given(largest=amaxes(), margin=st.integers(0, 8))
@reference.examples(200)
def test_scale_is_the_smallest_power_of_two_that_fits(dtype, largest, margin):
    """top * scale / 2**margin >= amax, and half of it would not do: in exact rational arithmetic."""
    scale = np.asarray(
        functools.partial(scale_of, dtype=dtype, margin=margin)(jnp.float32(largest))
    )
    assert scale.dtype == np.float32
    assert int(scale.view(np.uint32)) & 0x7FFFFF == 0, "not a power of two"
    exact, top = Fraction(float(scale)) / 2**margin, Fraction(reference.TOP[dtype])
    fits, half_fits = top * exact >= Fraction(largest), top * exact / 2 >= Fraction(largest)
    at_bottom, at_top = float(scale) == 2.0**-126, float(scale) == 2.0**126
    assert fits or at_top
    assert not half_fits or at_bottom


@FORMATS
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("margin", [0, 3, 40])
def test_scale_is_finite_positive_normal_for_any_amax(dtype, power_of_two, margin):
    """And so is its inverse: subnormal scales would be flushed, their inverses infinite."""
    bits = np.concatenate(
        [
            np.arange(0, 2**31, 2**15 + 1),
            [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000],
        ]
    )
    scale = np.asarray(
        scale_of(
            jnp.asarray(bits.astype(np.uint32).view(np.float32)),
            dtype,
            margin=margin,
            power_of_two=power_of_two,
        )
    )
    assert np.all((scale >= 2.0**-126) & (scale <= 2.0**126))


@FORMATS
@pytest.mark.parametrize("power_of_two", [True, False])
def test_scale_of_zero_is_one(dtype, power_of_two):
    found = scale_of(jnp.zeros((2, 3), jnp.float32), dtype, margin=2, power_of_two=power_of_two)
    np.testing.assert_array_equal(found, np.ones((2, 3), np.float32))


@FORMATS
@hypothesis.given(largest=amaxes(), margin=st.integers(0, 4))
@reference.examples(100)
def test_unrounded_scale_is_the_quotient_within_an_ulp(dtype, largest, margin):
    found = float(
        functools.partial(scale_of, dtype=dtype, margin=margin, power_of_two=False)(
            jnp.float32(largest)
        )
    )
    exact = min(
        max(Fraction(largest) / Fraction(reference.TOP[dtype]) * 2**margin, Fraction(2) ** -126),
        Fraction(2) ** 126,
    )
    # The quotient may be subnormal before the margin multiplies it: then it is flushed, and clipped to 2**-126.
    hypothesis.assume(largest / reference.TOP[dtype] >= 2.0**-125)
    assert abs(Fraction(found) - exact) <= exact * Fraction(2) ** -23


@FORMATS
@hypothesis.given(largest=amaxes())
@reference.examples(100)
def test_a_tensor_never_saturates_under_its_own_scale(dtype, largest):
    """Quantised with margin 0, the largest value lands in the top binade, unclipped."""
    hypothesis.assume(2.0**-100 < largest < 2.0**120)
    scale = scale_of(jnp.float32(largest), dtype)
    ratio = Fraction(largest) / Fraction(float(scale))
    assert Fraction(reference.TOP[dtype]) / 2 < ratio <= Fraction(reference.TOP[dtype])
