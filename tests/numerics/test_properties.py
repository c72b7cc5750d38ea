"""Any problem, every scaling: shapes that are odd or empty, any dimensions, zeros, denormals, scales from 2**-110 to 2**110."""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from fp8jax.numerics.recipes import GemmRecipe
from tests.numerics.gemm_calls import fill, operands, problems, run

from . import reference

MAGNITUDES = st.sampled_from([1e-37, 1e-20, 1e-7, 1.0, 1e4, 1e20, 1e37])
KINDS = st.sampled_from(["normal", "normal", "sparse", "zero", "spread"])


def arrays(shapes, dims, magnitudes, kinds, dtype, seed):
    """x, w, g; and the same as the reference takes them, for numbers below float32's normal range are zeros here."""
    rng = np.random.default_rng(seed)
    filled = [
        fill(a, kind, rng)
        for a, kind in zip(operands(*shapes, dims, dtype, seed, magnitudes), kinds, strict=True)
    ]
    return filled, [
        reference.flush(np.asarray(a).astype(np.float64)).astype(np.asarray(a).dtype)
        for a in filled
    ]


def agree(found, expected):
    for array, name in zip(found, ("y", "dx", "dw"), strict=True):
        value, bound = getattr(expected, name)
        # Quotients beyond float32 are infinite, and so NaN after the cast: seen, not clipped into a plausible number.
        seen = np.isnan(value)
        assert np.all(np.isnan(np.asarray(array).astype(np.float64))[seen]), name
        reference.agrees(
            np.where(seen, np.zeros((), array.dtype), array),
            np.where(seen, 0, value),
            np.where(seen, 0, bound),
            what=name,
        )


def in_range(expected):
    """Whether float32 holds the products of scales; what happens outside of it, test_dot_general says."""
    return all(2.0**-126 <= p < 2.0**127 for p in expected.scale_products())


@hypothesis.given(
    problem=problems(),
    exponents=st.tuples(*[st.integers(-110, 110)] * 3),
    scaling=st.sampled_from(["delayed", "static"]),
)
@reference.examples(25)
def test_given_scales_however_unfit(problem, exponents, scaling):
    """Everything saturates, everything vanishes, or something between: as the definition says, never anything else."""
    shapes, dims, magnitudes, kinds, dtype, seed = problem
    of_x, of_w, of_g = np.ldexp(1.0, exponents)
    given, (x, w, g) = arrays(shapes, dims, magnitudes, kinds, dtype, seed)
    if scaling == "static":
        recipe = GemmRecipe("static", static_weight_scale=of_w, static_gradient_scale=of_g)
        expected = reference.Linear(x, w, g, dims, None, scales=(1.0, of_g), weight_scale=of_w)
    else:
        recipe = GemmRecipe("delayed")
        expected = reference.Linear(x, w, g, dims, reference.scale_of, scales=(of_x, of_g))
    hypothesis.assume(in_range(expected))
    *found, token = run(*given, jnp.asarray([of_x, of_g], jnp.float32), dims, recipe)
    agree(found, expected)
    # The largest magnitude may be a subnormal number, which the CPU takes for zero.
    np.testing.assert_allclose(
        token, expected.tokens * (scaling == "delayed"), rtol=0, atol=reference.TINY
    )


@st.composite
def layers(draw):
    """x[..., k, ...] times a matrix, [k, n] or [n, k], with dimensions below, at and beyond the size of a block."""
    k, n = (
        draw(st.sampled_from([0, 1, 5, 128, 131, 260])),
        draw(st.sampled_from([0, 1, 3, 128, 130])),
    )
    free = draw(st.lists(st.sampled_from([0, 1, 2, 129]), max_size=2))
    place = draw(st.integers(0, len(free)))
    transposed = draw(st.booleans())
    shapes = (*free[:place], k, *free[place:]), (n, k) if transposed else (k, n)
    dims = (((place,), (int(transposed),)), ((), ()))
    magnitudes, kinds = draw(st.tuples(*[MAGNITUDES] * 3)), draw(st.tuples(*[KINDS] * 3))
    return (
        shapes,
        dims,
        magnitudes,
        kinds,
        draw(st.sampled_from([jnp.bfloat16, jnp.float32])),
        draw(st.integers(0, 9)),
    )


@hypothesis.given(layer=layers(), margin=st.integers(0, 2))
@reference.examples(20)
def test_blockwise(layer, margin):
    given, (x, w, g) = arrays(*layer)
    *found, token = run(*given, None, layer[1], GemmRecipe("blockwise", margin=margin))
    expected = reference.BlockwiseLinear(
        x, w, g, layer[1], lambda amax, dtype: reference.scale_of(amax, dtype, margin)
    )
    # Float32 overflows on the way where terms of a sum do, whatever their sum.
    hypothesis.assume(
        all(np.all(bound < 1e31) for _, bound in (expected.y, expected.dx, expected.dw))
    )
    agree(found, expected)
    np.testing.assert_allclose(token, expected.tokens, rtol=0, atol=reference.TINY)
