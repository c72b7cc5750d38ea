"""Stochastic rounding, scaled moments and remainders, against ml_dtypes' casts and NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax.numerics import low_bit_state

SIXTEEN = [jnp.bfloat16, jnp.float16]
ALL = [*SIXTEEN, jnp.float8_e4m3fn]


def bits_of(x, seed=0):
    return low_bit_state.random_bits(x.shape, jnp.uint32(seed))


def spread_out(rng, shape):
    """Both signs, many powers of two."""
    return jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.uniform(-12, 6, shape), jnp.float32)


def neighbours(x, dtype):
    """The numbers of a format around each x, float64, by ml_dtypes' cast to nearest and one step further."""
    nearest = x.astype(dtype)
    as_ints = nearest.view(np.uint8 if nearest.dtype.itemsize == 1 else np.uint16)
    magnitude_up = np.abs(x.astype(np.float64)) > np.abs(nearest.astype(np.float64))
    other = (
        (as_ints.astype(np.int32) + np.where(magnitude_up, 1, -1))
        .astype(as_ints.dtype)
        .view(nearest.dtype)
    )
    pair = np.stack(
        [
            nearest.astype(np.float64),
            np.where(x == nearest.astype(x.dtype), nearest, other).astype(np.float64),
        ]
    )
    return np.min(pair, axis=0), np.max(pair, axis=0)


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: jnp.dtype(d).name)
def test_rounds_to_a_neighbour_and_right_on_average(dtype):
    x = np.asarray(spread_out(np.random.default_rng(0), (64,)))
    low, high = neighbours(x, jnp.dtype(dtype))
    many = np.asarray(
        low_bit_state.round_stochastic(
            jnp.broadcast_to(x, (20000, 64)), dtype, bits_of(jnp.zeros((20000, 64)))
        ),
        np.float64,
    )
    assert ((many == low) | (many == high)).all()
    # The mean of n draws from two values lies within 5 standard deviations.
    step = high - low
    share = np.divide(x - low, step, out=np.zeros_like(low), where=step > 0)
    assert (
        np.abs(many.mean(0) - x) <= 5 * step * np.sqrt(share * (1 - share) / 20000) + 1e-3 * step
    ).all()


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: jnp.dtype(d).name)
def test_what_a_format_holds_stays(dtype):
    """Every number of the format, subnormal ones too, whatever the random bits; larger ones clip; NaN and infinity stay."""
    codes = (
        np.arange(256, dtype=np.uint8)
        if jnp.dtype(dtype).itemsize == 1
        else np.arange(65536, dtype=np.uint16)
    )
    values = codes.view(jnp.dtype(dtype)).astype(np.float32)
    # bfloat16 shares float32's smallest numbers, which are rounded to multiples of 2**-126.
    values = values[np.isfinite(values) & ((np.abs(values) >= 2.0**-119) | (values == 0))]
    top = float(jnp.finfo(dtype).max)
    for bits in (
        jnp.zeros(values.shape, jnp.uint32),
        jnp.full(values.shape, 0xFFFFFFFF, jnp.uint32),
    ):
        np.testing.assert_array_equal(
            np.asarray(
                low_bit_state.round_stochastic(jnp.asarray(values), dtype, bits), np.float32
            ),
            values,
        )
        edge = low_bit_state.round_stochastic(
            jnp.array([np.finfo(np.float32).max, -np.inf, np.nan]), dtype, bits[:3]
        )
        assert (
            float(edge[0]) == top and not np.isfinite(float(edge[1])) and np.isnan(float(edge[2]))
        )


def test_random_bits_are_uniform_and_differ_by_seed_and_mesh_free():
    a, b = (np.asarray(low_bit_state.random_bits((512, 257), jnp.uint32(seed))) for seed in (1, 2))
    for shift in (0, 7, 24, 31):
        assert (
            abs(((a >> shift) & 1).mean() - 0.5) < 0.005
            and abs((((a ^ b) >> shift) & 1).mean() - 0.5) < 0.005
        )
        assert abs((((a[1:] ^ a[:-1]) >> shift) & 1).mean() - 0.5) < 0.005
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharded = jax.jit(
        lambda: low_bit_state.random_bits((512, 256), jnp.uint32(1)),
        out_shardings=jax.NamedSharding(mesh, jax.P("x", "y")),
    )()
    np.testing.assert_array_equal(sharded, low_bit_state.random_bits((512, 256), jnp.uint32(1)))


@pytest.mark.parametrize("name", low_bit_state.SCALED)
def test_small_moments_survive_beside_large_ones(name):
    """Rows 1e8 apart in one matrix, and 1e4 within a block, as gradients are."""
    rng = np.random.default_rng(0)
    m = (
        rng.standard_normal((6, 300))
        * 10.0 ** rng.uniform(-2, 2, (6, 300))
        * 10.0 ** np.linspace(-12, -4, 6)[:, None]
    )
    largest = 2.0**-3 if name == "fp8" else 2.0**-10
    for x, root in ((m, False), (m**2, True)):
        data, scale = low_bit_state.encode(
            jnp.asarray(x, jnp.float32), name, bits_of(jnp.asarray(x)), root=root
        )
        assert data.dtype == low_bit_state.FORMATS[name] and scale.shape == (6, 3)
        again = np.asarray(low_bit_state.decode(data, scale, root=root), np.float64)
        # Relative to the element where it is a normal number of its block, which more than 4 powers of ten below the largest need not be.
        big = np.abs(m) > 1e-3 * np.abs(m).max(1, keepdims=True)
        error = np.abs(again - x) / np.abs(x)
        assert (error[big] < (2.5 if root else 1.0) * largest).all()
        assert np.isfinite(again).all() and (not root or (again > 0).all())


@pytest.mark.parametrize("name", low_bit_state.FORMATS)
@pytest.mark.parametrize("root", [False, True], ids=["first", "second"])
def test_moments_are_right_on_average(name, root):
    """The mean over draws, against float64: of each number within 5 standard errors, of all together within 2e-4."""
    rng, draws = np.random.default_rng(0), 4000
    m = (
        rng.uniform(1, 2, 128)
        * 10.0 ** rng.uniform(-3, 0, 128)
        * (1 if root else rng.choice([-1, 1], 128))
    ).astype(np.float32)
    x = m**2 if root else m
    bits = bits_of(jnp.zeros((draws, 128)), 7)
    encoded = low_bit_state.encode(jnp.broadcast_to(x, (draws, 128)), name, bits, root=root)
    ratios = np.asarray(low_bit_state.decode(*encoded, root=root), np.float64) / x.astype(
        np.float64
    )
    error = np.abs(ratios.mean(0) - 1) / (ratios.std(0) / draws**0.5 + 1e-6)
    assert error.max() < 5 and abs(ratios.mean() - 1) < 2e-4 + 3 * ratios.std() / ratios.size**0.5


def test_an_average_of_little_changes_does_not_stand_still():
    """A second moment that falls by 0.5% a step, less than half a unit of e4m3 or bfloat16, falls; to nearest it would not."""

    @jax.jit
    def fall(state, i):
        data, scale = state
        v = low_bit_state.decode(data, scale, root=True) * 0.995
        return low_bit_state.encode(v, "fp8", bits_of(v, i), root=True), None

    start = low_bit_state.encode(
        jnp.full((8, 128), 3e-9), "fp8", bits_of(jnp.zeros((8, 128))), root=True
    )
    (data, scale), _ = jax.lax.scan(fall, start, jnp.arange(200, dtype=jnp.uint32))
    found = float(low_bit_state.decode(data, scale, root=True).mean())
    assert found == pytest.approx(3e-9 * 0.995**200, rel=0.25)
    stuck = float(jnp.float32(0.25).astype(jnp.float8_e4m3fn)) * 0.995**0.5
    assert float(jnp.float32(stuck).astype(jnp.float8_e4m3fn)) == 0.25


@pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda d: jnp.dtype(d).name)
def test_split_holds_eight_bits_more(dtype):
    x = spread_out(np.random.default_rng(1), (4096,))
    high, low = low_bit_state.split(x, dtype)
    assert high.dtype == dtype and low.dtype == jnp.int8
    np.testing.assert_array_equal(
        np.asarray(high), np.asarray(x).astype({2: jnp.dtype(dtype)}[high.dtype.itemsize])
    )
    again = np.asarray(low_bit_state.join(high, low), np.float64)
    magnitude = np.maximum(
        np.abs(np.asarray(high, np.float64)), 2.0 ** int(jnp.finfo(dtype).minexp)
    )
    unit = 2.0 ** (np.floor(np.log2(magnitude)) - jnp.finfo(dtype).nmant)
    assert (np.abs(again - np.asarray(x, np.float64)) <= unit / 256).all()
    once = low_bit_state.split(jnp.asarray(again, jnp.float32), dtype)
    np.testing.assert_array_equal(low_bit_state.join(*once), jnp.asarray(again, jnp.float32))


def test_casts_agree_with_ml_dtypes():
    """With random bits that stand for one half, rounding is to nearest wherever there is no tie."""
    x = np.asarray(spread_out(np.random.default_rng(2), (4096,)))
    half = jnp.full(x.shape, 1 << 31, jnp.uint32)
    for dtype, reference in (
        (jnp.bfloat16, ml_dtypes.bfloat16),
        (jnp.float16, np.float16),
        (jnp.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    ):
        found = np.asarray(low_bit_state.round_stochastic(jnp.asarray(x), dtype, half), np.float32)
        np.testing.assert_array_equal(found, x.astype(reference).astype(np.float32))
