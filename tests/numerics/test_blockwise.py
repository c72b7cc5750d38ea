"""Blockwise scaling: blocks one by one, the layer against float64, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics import blockwise
from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.gemm import CHECKPOINT_NAME, dot_general, quantise_weight
from fp8jax.numerics.recipes import GemmRecipe
from tests.numerics.gemm_calls import PLAIN, operands, result_and_gradients, run

from . import reference
from .reference import E4M3, E5M2

BLOCKWISE = GemmRecipe("blockwise")
# name → shape of x, shape of w, dimension numbers
CASES = {
    "whole_blocks": ((256, 128), (128, 256), PLAIN),
    "odd": ((150, 200), (200, 130), PLAIN),
    "tokens": ((3, 50, 140), (140, 20), (((2,), (0,)), ((), ()))),
    "out_in_weight": ((2, 70, 140), (130, 140), (((2,), (1,)), ((), ()))),
    "contracted_first": ((140, 5, 30), (140, 7), (((0,), (0,)), ((), ()))),
    "one_token": ((1, 300), (300, 3), PLAIN),
    "empty": ((0, 5), (5, 3), PLAIN),
    "nothing_contracted": ((4, 0), (0, 3), PLAIN),
}


def uneven(array):
    """The same with magnitudes that differ from place to place by up to 2**16: one scale a tensor would flush much of it."""
    rng = np.random.default_rng(7)
    exponents = sum(
        rng.integers(-4, 5, n).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        for axis, n in enumerate(array.shape)
    )
    return (array.astype(jnp.float32) * jnp.asarray(np.ldexp(1.0, exponents), jnp.float32)).astype(
        array.dtype
    )


def check(x, w, g, dims, recipe):
    y, dx, dw, token = run(x, w, g, None, dims, recipe)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    scale_for = functools.partial(
        reference.scale_of, margin=recipe.margin, power_of_two=recipe.power_of_two
    )
    expected = reference.BlockwiseLinear(
        *map(np.asarray, (x, w, g)),
        dims,
        scale_for,
        {"e4m3": E4M3, "e5m2": E5M2}[recipe.gradient_format],
    )
    np.testing.assert_array_equal(token, expected.tokens)
    for found, name in ((y, "y"), (dx, "dx"), (dw, "dw")):
        reference.agrees(found, *getattr(expected, name), what=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_layer_equals_the_reference(case, dtype):
    x_shape, w_shape, dims = CASES[case]
    check(*map(uneven, operands(x_shape, w_shape, dims, dtype)), dims, BLOCKWISE)


@pytest.mark.parametrize(
    "recipe",
    [GemmRecipe("blockwise", margin=2), GemmRecipe("blockwise", gradient_format="e4m3")],
    ids=["margin", "e4m3_gradients"],
)
def test_recipes(recipe):
    check(*operands(*CASES["odd"]), PLAIN, recipe)


def test_unrounded_scales():
    """Against float64 up to casts that fall on a tie: 1e-3 of the norm."""
    x, w, g = operands(*CASES["odd"], jnp.float32)
    found = run(x, w, g, None, PLAIN, GemmRecipe("blockwise", power_of_two=False))
    expected = reference.BlockwiseLinear(
        *map(np.asarray, (x, w, g)),
        PLAIN,
        functools.partial(reference.scale_of, power_of_two=False),
    )
    for array, (wanted, _) in zip(found, (expected.y, expected.dx, expected.dw), strict=False):
        assert np.linalg.norm(np.float64(array) - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("shape", "axes", "blocks"),
    [
        ((3, 300), (1,), (3, 3)),
        ((300, 3), (0,), (3, 3)),
        ((300, 130), (0, 1), (3, 2)),
        ((2, 5, 128), (2,), (2, 5, 1)),
        ((129, 1), (0, 1), (2, 1)),
        ((0, 7), (1,), (0, 1)),
        ((7, 0), (1,), (7, 0)),
        ((1, 1), (0, 1), (1, 1)),
    ],
)
def test_scales_and_values_of_blocks(shape, axes, blocks):
    x = np.random.default_rng(0).normal(size=shape) * np.ldexp(
        1.0, np.random.default_rng(1).integers(-20, 20, shape)
    )
    q, largest = BLOCKWISE.quantise(jnp.asarray(x, jnp.float32), None, "x", axes=axes)
    assert q.scale.shape == blocks
    assert q.data.dtype == E4M3
    assert float(largest) == reference.amax(x.astype(np.float32))
    np.testing.assert_array_equal(
        blockwise.widen(q, jnp.float32).data,
        reference.quantise_blocks(x.astype(np.float32), axes, E4M3, reference.scale_of),
    )
    np.testing.assert_array_equal(
        blockwise.widen(q, jnp.bfloat16).data.astype(jnp.float32),
        blockwise.widen(q, jnp.float32).data,
    )


def test_a_local_outlier_costs_only_its_block():
    """Where one scale for the tensor makes zeros of everything else."""
    x = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    x[3, 5] = 1e8
    blocks = np.asarray(
        blockwise.widen(
            BLOCKWISE.quantise(jnp.asarray(x), None, "x", axes=(1,))[0], jnp.float32
        ).data
    )
    whole = GemmRecipe("current").quantise(jnp.asarray(x), None, "x")[0]
    assert np.count_nonzero(blocks) == x.size - 127
    assert np.count_nonzero(np.asarray(whole.data).astype(np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_are_seen(bad):
    x, w, g = operands(*CASES["odd"])
    y, _, dw, token = run(x.at[2, 3].set(bad), w, g, None, PLAIN, BLOCKWISE)
    np.testing.assert_array_equal(np.isinf(token), [True, False])
    assert np.all(np.isnan(np.asarray(y[2]).astype(np.float32))) and np.all(
        np.isnan(np.asarray(dw[3]))
    )
    y, dx, dw, token = run(x, w, g.at[2, 3].set(bad), None, PLAIN, BLOCKWISE)
    np.testing.assert_array_equal(np.isinf(token), [False, True])
    assert np.all(np.isnan(np.asarray(dx[2]).astype(np.float32))) and np.all(
        np.isnan(np.asarray(dw[:, 3]))
    )


def two_layers(x, w, tokens):
    h = dot_general(x, w[0], PLAIN, BLOCKWISE, token=tokens[0])
    return dot_general(jnp.tanh(h), w[1], PLAIN, BLOCKWISE, token=tokens[1])


@pytest.mark.parametrize(
    "policy",
    [
        jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME),
        jax.checkpoint_policies.nothing_saveable,
    ],
    ids=["save_fp8", "nothing"],
)
def test_rematerialisation_changes_nothing(policy):
    x, _, _ = operands((6, 140), (140, 140), PLAIN, jnp.float32)
    w = jnp.stack([operands((6, 140), (140, 140), PLAIN, seed=seed)[1] for seed in (1, 2)])
    plain = result_and_gradients(two_layers, x, w)
    for found, expected in zip(
        result_and_gradients(jax.checkpoint(two_layers, policy=policy), x, w), plain, strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_residuals_are_fp8_with_their_scales():
    x, w, _ = operands((256, 384), (384, 130), PLAIN)
    qw = quantise_weight(w, BLOCKWISE, x.dtype)
    _, vjp = jax.vjp(lambda x, w: dot_general(x, w, PLAIN, BLOCKWISE, quantised_w=qw), x, w)
    saved = sorted(
        (leaf.shape, leaf.dtype.itemsize) for leaf in jax.tree.leaves(vjp) if leaf.size > 2
    )
    assert saved == [((3, 2), 4), ((256, 3), 4), ((256, 384), 1), ((384, 130), 1)]


def test_what_it_refuses():
    """A GPU, which has no kernel for it; anything but x times a matrix; attention."""
    with pytest.raises(ValueError, match="blockwise scaling has no FP8 kernel"):
        GemmRecipe("blockwise", emulated=False)
    x, w = jnp.ones((4, 2, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(
        ValueError,
        match=r"GEMM qkv: blockwise scaling contracts one dimension .*w has shape \(2, 3, 5\)",
    ):
        dot_general(x, w, (((1, 2), (0, 1)), ((), ())), BLOCKWISE, role="qkv")
    with pytest.raises(
        ValueError, match="GEMM experts: blockwise scaling .* without batch dimensions"
    ):
        dot_general(x, jnp.ones((4, 3)), (((2,), (1,)), ((0,), (0,))), BLOCKWISE, role="experts")
    with pytest.raises(ValueError, match=r"weights with two dimensions, not \(2, 3, 5\)"):
        quantise_weight(w, BLOCKWISE, jnp.bfloat16)
    q, k = jnp.ones((1, 4, 1, 1, 8)), jnp.ones((1, 4, 1, 8))
    for backend in ("emulated", "composed"):
        with pytest.raises(
            ValueError,
            match="attention_values: attention has no blockwise scaling, only delayed, current, static, bf16",
        ):
            attention(
                q,
                k,
                k,
                {SCORES: GemmRecipe("current"), VALUES: BLOCKWISE},
                softmax_scale=1.0,
                backend=backend,
            )
