"""The FP8 linear layer against float64 NumPy, and the bf16 recipe against plain JAX."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from fp8jax.numerics import gemm as module
from fp8jax.numerics.gemm import CHECKPOINT_NAME, dot_general, quantise_weight
from fp8jax.numerics.recipes import GemmRecipe
from tests.numerics.gemm_calls import (
    CASES,
    PLAIN,
    fill,
    operands,
    problems,
    result_and_gradients,
    run,
)

from . import reference
from .reference import E4M3, E5M2


def check(x, w, g, dims, recipe, scales=None):
    """Runs a layer and compares all it returns with the reference; returns the reference."""
    y, dx, dw, token = run(
        x, w, g, None if scales is None else jnp.asarray(scales, jnp.float32), dims, recipe
    )
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    scale_for = functools.partial(
        reference.scale_of, margin=recipe.margin, power_of_two=recipe.power_of_two
    )
    expected = reference.Linear(
        *map(np.asarray, (x, w, g)),
        dims,
        scale_for,
        {"e4m3": E4M3, "e5m2": E5M2}[recipe.gradient_format],
        scales,
    )
    np.testing.assert_array_equal(token, expected.tokens)
    for found, name in ((y, "y"), (dx, "dx"), (dw, "dw")):
        reference.agrees(found, *getattr(expected, name), what=name)
    return expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", CASES)
def test_current_scaling_equals_the_reference(case, dtype):
    x_shape, w_shape, dims = CASES[case]
    check(*operands(x_shape, w_shape, dims, dtype), dims, GemmRecipe("current"))


@pytest.mark.parametrize(
    "case", ["matrix", "heads_in", "out_in_weight_of_tokens", "experts_inside"]
)
def test_delayed_scaling_uses_the_scales_it_is_given(case):
    """Unequal ones, neither fitting: x saturates, g loses its smallest values."""
    x_shape, w_shape, dims = CASES[case]
    expected = check(
        *operands(x_shape, w_shape, dims), dims, GemmRecipe("delayed"), scales=(2.0**-9, 2.0**-4)
    )
    assert np.max(np.abs(expected.quantised["x"])) == 448  # saturated, as meant


@pytest.mark.parametrize(
    "recipe",
    [
        GemmRecipe("current", power_of_two=False),
        GemmRecipe("current", power_of_two=False, margin=2),
        GemmRecipe("current", margin=3),
        GemmRecipe("current", gradient_format="e4m3"),
        GemmRecipe("delayed", power_of_two=False, margin=1, gradient_format="e4m3"),
    ],
    ids=["unrounded", "unrounded_margin", "margin", "e4m3_gradients", "delayed_unrounded"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_margins_formats_and_unrounded_scales(recipe, dtype):
    """Unrounded scales and small sums: a cast that falls on a tie may go the other way, so the seed is one without ties."""
    x_shape, w_shape, dims = CASES["batch_of_tokens"]
    scales = (0.0123, 3.3e-5) if recipe.scaling == "delayed" else None
    check(*operands(x_shape, w_shape, dims, dtype, seed=3), dims, recipe, scales)


@pytest.mark.parametrize("case", ["matrix", "heads_in", "permuted_contraction", "experts"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_fp8_dots_agree_with_emulated_ones(case, dtype):
    """emulated=False hands float8 arrays to lax.dot_general, which the CPU can do too."""
    x_shape, w_shape, dims = CASES[case]
    check(*operands(x_shape, w_shape, dims, dtype), dims, GemmRecipe("current", emulated=False))


@pytest.mark.parametrize("emulated", [True, False])
def test_gemms_take_the_operands_that_the_recipe_says(emulated):
    """In the program: float8 in all three GEMMs, or bfloat16 in all three where emulated; accumulated in float32 there."""
    x, w, g = operands(*CASES["matrix"])
    recipe = GemmRecipe("current", emulated=emulated)
    text = run.lower(x, w, g, None, PLAIN, recipe).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 3
    if emulated:
        assert all(line.count("xbf16>") == 2 and "xf32>" in line for line in dots)
    else:
        assert sum(line.count("xf8E4M3FN>") for line in dots) == 4
        assert sum(line.count("xf8E5M2>") for line in dots) == 2


@hypothesis.given(problem=problems())
@reference.examples(60)
def test_any_shape_and_magnitude(problem):
    shapes, dims, magnitudes, kinds, dtype, seed = problem
    rng = np.random.default_rng(seed)
    x, w, g = (
        fill(a, kind, rng)
        for a, kind in zip(operands(*shapes, dims, dtype, seed, magnitudes), kinds, strict=True)
    )
    x_, w_, g_ = (np.asarray(a) for a in (x, w, g))
    products = reference.Linear(x_, w_, g_, dims, reference.scale_of).scale_products()
    # Outside of float32's range the product of two scales is zero or infinite: see the test below.
    hypothesis.assume(all(2.0**-126 <= p < 2.0**127 for p in products))
    check(x, w, g, dims, GemmRecipe("current"))


def test_a_product_of_scales_beyond_float32_is_never_a_plausible_number():
    """Operands that are both below 1e-17, or both above 1e21: results flush to zero or turn infinite or NaN, none is wrong."""
    for size, seen in ((1e-18, lambda y: y == 0), (1e25, lambda y: ~np.isfinite(y))):
        x, w, g = operands(*CASES["matrix"], jnp.float32, sizes=(size, size, 1.0))
        y = np.asarray(run(x, w, g, None, PLAIN, GemmRecipe("current"))[0])
        assert np.all(seen(y))


@pytest.mark.parametrize("case", CASES)
def test_bf16_recipe_is_plain_jax(case):
    """In float32, gradients included; and tokens stay zero."""
    x_shape, w_shape, dims = CASES[case]
    x, w, g = operands(x_shape, w_shape, dims, jnp.float32)
    y, dx, dw, token = run(x, w, g, None, dims, GemmRecipe("bf16"))
    expected, vjp = jax.vjp(
        lambda x, w: lax.dot_general(x, w, dims, precision=lax.Precision.HIGHEST), x, w
    )
    for found, plain in zip((y, dx, dw), (expected, *vjp(g)), strict=True):
        np.testing.assert_allclose(
            found, plain, rtol=1e-6, atol=1e-6 * float(jnp.max(jnp.abs(plain)))
        )
    np.testing.assert_array_equal(token, np.zeros(2))


@pytest.mark.parametrize("case", ["batch_of_tokens", "out_in_weight_of_tokens", "experts"])
@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_recipe_in_bfloat16(case, emulated):
    """bfloat16 operands, float32 accumulation, one rounding; wgrad comes out in the float32 of the master weight."""
    x_shape, w_shape, dims = CASES[case]
    x, w, g = operands(x_shape, w_shape, dims)
    y, dx, dw, _ = run(x, w, g, None, dims, GemmRecipe("bf16", emulated=emulated))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x_s, w_s, y_s = reference.letters(dims, x.ndim, w.ndim)
    x_, w_, g_ = (np.asarray(a.astype(jnp.bfloat16)).astype(np.float64) for a in (x, w, g))
    for found, a, b, subscripts in (
        (y, x_, w_, f"{x_s},{w_s}->{y_s}"),
        (dx, g_, w_, f"{y_s},{w_s}->{x_s}"),
        (dw, x_, g_, f"{x_s},{y_s}->{w_s}"),
    ):
        value, magnitude, terms = reference.products(a, b, subscripts)
        reference.agrees(found, value, (terms + 4) * reference.EPS32 * magnitude)


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_token_cotangents_are_raw_amaxes(scaling):
    """Of x and of g as they were, before cast and scale; a token that is not wanted may be left out."""
    x, w, g = operands(*CASES["heads_in"], sizes=(300.0, 1.0, 1e-9))
    scales = jnp.asarray([2.0, 0.5], jnp.float32)
    dims = CASES["heads_in"][2]
    token = run(x, w, g, scales, dims, GemmRecipe(scaling))[3]
    np.testing.assert_array_equal(
        token, np.float32([np.abs(np.asarray(a).astype(np.float32)).max() for a in (x, g)])
    )
    dx = jax.vjp(lambda x: dot_general(x, w, dims, GemmRecipe(scaling), scales=scales), x)[1](g)[0]
    assert dx.shape == x.shape


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_are_seen(bad, scaling, emulated):
    """One bad value of x: its token is infinite, its row of y NaN. One of g: the same for g and dx."""
    recipe, scales = GemmRecipe(scaling, emulated=emulated), jnp.ones(2, jnp.float32)
    x, w, g = operands(*CASES["matrix"])
    y, dx, dw, token = run(x.at[2, 3].set(bad), w, g, scales, PLAIN, recipe)
    np.testing.assert_array_equal(np.isinf(token), [True, False])
    assert np.all(np.isnan(np.asarray(y[2]).astype(np.float32)))
    assert np.all(np.isnan(np.asarray(dw[3])))
    y, dx, dw, token = run(x, w, g.at[2, 3].set(bad), scales, PLAIN, recipe)
    np.testing.assert_array_equal(np.isinf(token), [False, True])
    assert np.all(np.isnan(np.asarray(dx[2]).astype(np.float32)))
    assert np.all(np.isnan(np.asarray(dw[:, 3])))


def test_a_bad_weight_is_seen():
    x, w, g = operands(*CASES["matrix"])
    y = run(x, w.at[3, 2].set(np.nan), g, None, PLAIN, GemmRecipe("current"))[0]
    assert np.all(np.isnan(np.asarray(y[:, 2]).astype(np.float32)))


def test_two_e5m2_operands_are_refused():
    q = module.Quantised(jnp.ones((4, 4), jnp.float8_e5m2), jnp.float32(1))
    for emulated in (True, False):
        with pytest.raises(ValueError, match="GEMM mlp_up.*both operands are e5m2"):
            recipe = GemmRecipe("current", emulated=emulated)
            module.gemm(q, q, PLAIN, recipe, "mlp_up", "fprop", out_dtype=jnp.bfloat16)


def test_delayed_scaling_needs_scales():
    x, w, _ = operands(*CASES["matrix"])
    with pytest.raises(ValueError, match="GEMM qkv: delayed scaling needs `scales`"):
        dot_general(x, w, PLAIN, GemmRecipe("delayed"), role="qkv")


def test_negative_dimension_numbers_are_refused():
    """They would be taken for free dimensions by the backward pass."""
    x, w, _ = operands(*CASES["matrix"])
    with pytest.raises(TypeError, match="nonnegative"):
        dot_general(x, w, (((-1,), (0,)), ((), ())), GemmRecipe("current"))


@pytest.mark.parametrize("quantised_before", [True, False])
def test_residuals_are_one_byte_an_element(quantised_before):
    """No wide copy of x or w waits for the backward pass."""
    x, w, _ = operands((16, 32), (32, 24), PLAIN)
    recipe = GemmRecipe("current")
    qw = quantise_weight(w, recipe, x.dtype) if quantised_before else None
    _, vjp = jax.vjp(
        lambda x, w, token: dot_general(x, w, PLAIN, recipe, quantised_w=qw, token=token),
        x,
        w,
        jnp.zeros(2),
    )
    saved = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size > 2]
    assert sorted(leaf.shape for leaf in saved) == [(16, 32), (32, 24)]
    assert {leaf.dtype.itemsize for leaf in saved} == {1}


def test_a_weight_quantised_before_gives_the_same():
    """Once a step, outside of the microbatch loop: same numbers, and the gradient still lands on w."""
    x, w, g = operands(*CASES["matrix"])
    recipe = GemmRecipe("current")

    @jax.jit
    def outside(x, w, g):
        def layer(x, w, token):
            return dot_general(
                x, w, PLAIN, recipe, quantised_w=quantise_weight(w, recipe, x.dtype), token=token
            )

        y, vjp = jax.vjp(layer, x, w, jnp.zeros(2))
        return y, *vjp(g)

    for found, plain in zip(outside(x, w, g), run(x, w, g, None, PLAIN, recipe), strict=True):
        np.testing.assert_array_equal(found, plain)


def test_quantised_weight_is_what_is_read():
    """w itself only receives the gradient."""
    x, w, _ = operands(*CASES["matrix"])
    recipe = GemmRecipe("current")
    y = dot_general(
        x, jnp.full_like(w, np.nan), PLAIN, recipe, quantised_w=quantise_weight(w, recipe, x.dtype)
    )
    np.testing.assert_array_equal(y, dot_general(x, w, PLAIN, recipe))


def test_out_dtype():
    """float32 logits of bfloat16 activations; their float32 gradient is taken as it is."""
    x, w, _ = operands(*CASES["matrix"])
    g = jnp.asarray(np.random.default_rng(5).normal(size=(5, 7)), jnp.float32)
    recipe = GemmRecipe("current")
    y, vjp = jax.vjp(lambda x, w: dot_general(x, w, PLAIN, recipe, out_dtype=jnp.float32), x, w)
    dx, dw = vjp(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    expected = reference.Linear(*map(np.asarray, (x, w, g)), PLAIN, reference.scale_of)
    for found, name in ((y, "y"), (dx, "dx"), (dw, "dw")):
        reference.agrees(found, *getattr(expected, name), what=name)


def two_layers(x, w, tokens):
    recipe = GemmRecipe("current")
    h = dot_general(x, w[0], PLAIN, recipe, token=tokens[0])
    return dot_general(jnp.tanh(h), w[1], PLAIN, recipe, token=tokens[1])


def stacked(dtype):
    return (
        operands((6, 16), (16, 16), PLAIN, dtype)[0],
        jnp.stack([operands((6, 16), (16, 16), PLAIN, seed=seed)[1] for seed in (1, 2)]),
    )


@pytest.mark.parametrize("policy", ["save_fp8", "nothing"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rematerialisation_changes_nothing(policy, dtype):
    """Regression: the saved residuals went through reduce_precision, where e4m3 ends at 240; values up to 448 became NaN."""
    policies = {
        "save_fp8": jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }
    x, w = stacked(dtype)
    quantised = np.asarray(quantise_weight(w[0], GemmRecipe("current"), dtype).data).astype(
        np.float32
    )
    assert np.max(np.abs(quantised)) > 240  # else this would show nothing
    plain = result_and_gradients(two_layers, x, w)
    remat = result_and_gradients(jax.checkpoint(two_layers, policy=policies[policy]), x, w)
    for found, expected in zip(remat, plain, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_changes_nothing(remat):
    """Stacked layers under lax.scan, with and without remat: tokens come back one row a layer.

    In float32: of unrolled bfloat16 layers XLA may leave out the rounding between two (xla_allow_excess_precision).
    """

    def layer(h, inputs):
        return jnp.tanh(
            dot_general(h, inputs[0], PLAIN, GemmRecipe("current"), token=inputs[1])
        ), None

    def unrolled(x, w, tokens):
        for i in range(2):
            x, _ = layer(x, (w[i], tokens[i]))
        return x

    x, w = stacked(jnp.float32)
    body = (
        jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME))
        if remat
        else layer
    )
    scanned = result_and_gradients(lambda x, w, tokens: lax.scan(body, x, (w, tokens))[0], x, w)
    for found, expected in zip(scanned, result_and_gradients(unrolled, x, w), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scaling", ["current", "bf16"])
@pytest.mark.parametrize("emulated", [True, False])
def test_transposed_results_on_the_cpu(scaling, emulated):
    """Regression: XLA folded the transpose into the bfloat16 GEMM, which jax 0.10.2 then refused to run and jax 0.12 sums in bfloat16.

    What a CPU trains with, emulated, never comes to that. A bfloat16 result asked of XLA itself has no better sum than XLA's.
    """
    x, w, g = operands(*CASES["matrix"])
    recipe = GemmRecipe(scaling, emulated=emulated)

    @jax.jit
    def transposed(x, w, g):
        y, vjp = jax.vjp(lambda x, w: dot_general(x.T, w, PLAIN, recipe).T, x.T, w)
        return y, *vjp(g.T)

    y, dx, dw, _ = run(x, w, g, None, PLAIN, recipe)
    exact = emulated or recipe.fp8 or jax.__version_info__ < (0, 11)
    for found, expected in zip(transposed(x, w, g), (y.T, dx.T, dw), strict=True):
        found, expected = (np.asarray(a, np.float64) for a in (found, expected))
        assert np.linalg.norm(found - expected) <= (0 if exact else 0.01) * np.linalg.norm(expected)


def test_stacked_calls_have_tokens_of_their_own():
    """A token used twice would come back as a sum: the reason for one a call. Microbatches in a scan keep them apart."""
    x, w, _ = operands(*CASES["matrix"])

    def loss(tokens):
        one = lambda x, token: jnp.sum(
            dot_general(x, w, PLAIN, GemmRecipe("current"), token=token).astype(jnp.float32)
        )
        return one(x, tokens[0]) + one(3 * x, tokens[1])

    found = jax.grad(loss)(jnp.zeros((2, 2)))
    largest = float(np.abs(np.asarray(x).astype(np.float32)).max())
    np.testing.assert_array_equal(
        found, np.asarray([[largest, 1], [float(ml_dtypes.bfloat16(3 * largest)), 1]], np.float32)
    )
