"""The chunked loss against the plain one: float64, FP8 with each scaling, sharded over eight devices, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax.numerics import statistics
from fp8jax.numerics.cross_entropy import linear_cross_entropy
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.tokens import AMAX, FULL, Token

DIMS = (((2,), (1,)), ((), ()))
Z = 0.3


def inputs(dtype=jnp.float32, b=2, t=5, d=16, v=103, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((b, t, d)) * 2, rng.standard_normal((v, d))
    targets = rng.integers(0, v, (b, t))
    targets[0, -1], targets[0, 0] = v - 1, np.argmax(w @ x[0, 0])  # the last row, and the likeliest
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(w, dtype),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(rng.random((b, t)), dtype),
    )


def total(nll, lse, mask):
    return jnp.sum((nll + Z * lse**2) * mask)


def plain(x, w, targets, mask, recipe=None, **given):
    logits = (
        dot_general(x, w, DIMS, recipe, **given, out_dtype=jnp.float32, role="lm_head")
        if recipe
        else jnp.einsum("btd,vd->btv", x, w)
    )
    lse = jax.nn.logsumexp(logits, axis=-1)
    return total(lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], lse, mask)


def chunked(x, w, targets, mask, recipe, **given):
    return total(*linear_cross_entropy(x, w, targets, recipe, **given), mask)


def largest_error(found, expected):
    return max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize(
    ("chunk", "shards", "v"),
    [(16, 1, 103), (103, 1, 103), (1000, 1, 103), (8, 2, 104), (13, 8, 104), (1, 1, 7)],
)
@pytest.mark.parametrize("emulated", [True, False])
def test_equal_to_plain_in_float64(chunk, shards, v, emulated):
    """Value and gradients, z-loss included, whatever the chunks."""
    with jax.enable_x64(True):
        x, w, targets, mask = inputs(jnp.float64, v=v)
        recipe = GemmRecipe("bf16", emulated=emulated)
        expected = jax.value_and_grad(plain, (0, 1))(x, w, targets, mask)
        found = jax.value_and_grad(chunked, (0, 1))(
            x, w, targets, mask, recipe, chunk=chunk, shards=shards
        )
        assert found[0].dtype == jnp.float64 and found[1][1].dtype == jnp.float64
        assert largest_error(found, expected) < 1e-13


def test_logits_far_apart_stay_finite():
    """Where exp(logit) overflows, or vanishes in all chunks but one."""
    with jax.enable_x64(True):
        x, w, targets, mask = inputs(jnp.float64)
        x = x * 1e3
        expected = jax.value_and_grad(plain, (0, 1))(x, w, targets, mask)
        found = jax.value_and_grad(chunked, (0, 1))(
            x, w, targets, mask, GemmRecipe("bf16"), chunk=10
        )
        assert np.isfinite(float(found[0])) and largest_error(found, expected) < 1e-12


@pytest.mark.parametrize("scaling", ["delayed", "current", "static"])
@pytest.mark.parametrize("shards", [1, 4])
def test_fp8_gemms_are_those_of_the_plain_head(scaling, shards):
    """The same casts, so equal but for the order of sums; and the token brings back the same amaxes, or the same health of casts."""
    x, w, targets, mask = inputs(v=128, d=32)
    x = x / 4
    recipe = GemmRecipe(scaling, static_gradient_scale=2.0**-9)
    scales = jnp.array([2.0**-5, 2.0**-9]) if scaling == "delayed" else None
    # Rounding P to e5m2 moves an element by up to 1/8 where the two logits differ in their last bits.
    for token in (
        Token(jnp.zeros(2), AMAX),
        Token(jnp.zeros((2, len(statistics.REPORT))), FULL),
    ):

        def graded(function, token=token, **given):
            return jax.value_and_grad(
                lambda x, w, token: function(
                    x, w, targets, mask, recipe, scales=scales, token=token, **given
                ),
                (0, 1, 2),
            )(x, w, token)

        loss, (dx, dw, d_token) = graded(plain)
        found, (fx, fw, f_token) = graded(chunked, chunk=24, shards=shards)
        assert abs(found - loss) < 1e-6 * abs(loss)
        assert largest_error((fx, fw), (dx, dw)) < 2e-3
        unknown = [
            statistics.REPORT.index(name)
            for name in ("kurtosis", "pooled_kurtosis", "rows", "sequences")
        ]
        known = d_token.values
        if token.brings == FULL:
            known = known.at[1, jnp.asarray(unknown)].set(0)
        np.testing.assert_allclose(f_token.values, known, rtol=1e-5, atol=1e-7)
        nothing = scaling == "static" and token.brings == AMAX
        assert nothing or float(jnp.max(jnp.abs(d_token.values))) > 0
    exact = jax.grad(plain, (0, 1))(x, w, targets, mask)
    assert 1e-3 < largest_error((fx, fw), exact) < 0.15  # FP8 it is


@pytest.mark.parametrize("where", ["likeliest", "unlikeliest"])
def test_the_amax_is_the_gradients(where):
    """Of a token whose target is all but sure, and of one whose target is hopeless; a NaN is infinite."""
    x, w, _, mask = inputs(v=64, b=1, t=1)
    targets = (jnp.argmax if where == "likeliest" else jnp.argmin)(
        jnp.einsum("btd,vd->btv", x, w), axis=-1
    )
    recipe = GemmRecipe("current")

    def amaxes(function, x=x, **given):
        return jax.grad(lambda token: function(x, w, targets, mask, recipe, token=token, **given))(
            jnp.zeros(2)
        )

    np.testing.assert_allclose(amaxes(chunked, chunk=9), amaxes(plain), rtol=1e-6)
    assert np.isinf(np.asarray(amaxes(chunked, x.at[0, 0, 0].set(jnp.nan), chunk=9))).all()


@pytest.mark.parametrize("scaling", ["bf16", "delayed"])
def test_sharded_over_vocabulary_width_and_batch(scaling):
    """Eight devices against one; no collective carries logits, and the rows of dW stay where the rows of W are."""
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    arrays = inputs(b=4, t=8, d=32, v=512)
    specs = P("fsdp"), P("tensor", "fsdp"), P("fsdp"), P("fsdp")
    recipe, scales = GemmRecipe(scaling), jnp.array([2.0**-5, 2.0**-9])

    def both(shards, x, w, targets, mask):
        def loss(x, w, token):
            return chunked(
                x, w, targets, mask, recipe, scales=scales, token=token, chunk=32, shards=shards
            )

        return jax.value_and_grad(loss, (0, 1, 2))(x, w, jnp.zeros(2))

    expected = jax.jit(functools.partial(both, 1))(*arrays)
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]
    out = None, (NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P("tensor", "fsdp")), None)
    compiled = jax.jit(functools.partial(both, 4), out_shardings=out).lower(*placed).compile()
    assert largest_error(compiled(*placed), expected) < 1e-3
    # A chunk of logits is 4 x 8 x 4 x 32 numbers; what is sent is rows of W and dW, parts of dx, and numbers a token.
    lines = [
        line
        for line in compiled.as_text().splitlines()
        if " all-reduce(" in line or " all-gather(" in line
    ]
    assert lines and not any(
        "[2,8,1,32]" in line or "[4,8,4,32]" in line or "[2,8,128]" in line for line in lines
    )


def test_temporaries_do_not_grow_with_the_vocabulary():
    """4096 tokens: with all logits four times the vocabulary takes four times the memory, with chunks none more beside dW."""

    def temporaries(function, v):
        def array(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype)

        def step(x, w, targets, mask):
            return jax.grad(function, (0, 1))(x, w, targets, mask)

        given = (
            array(1, 4096, 64),
            array(v, 64),
            array(1, 4096, dtype=jnp.int32),
            array(1, 4096, dtype=jnp.float32),
        )
        return jax.jit(step).lower(*given).compile().memory_analysis().temp_size_in_bytes

    def in_chunks(*arrays):
        return chunked(*arrays, GemmRecipe("bf16"), chunk=4096)

    def whole(*arrays):
        return plain(*arrays, GemmRecipe("bf16"))

    small, large = (temporaries(in_chunks, v) for v in (32768, 131072))
    rows = 64 * (131072 - 32768)
    assert (
        large - small < 8 * rows
    )  # W, dW in chunks and as a result: some bytes a weight, none a logit
    assert temporaries(whole, 32768) > 4096 * 32768 * 4 > 2 * large


def test_what_cannot_be_computed_is_refused():
    x, w, targets, _ = inputs()
    for recipe, options, words in (
        (GemmRecipe("blockwise"), {}, "blockwise scaling has no chunked loss"),
        (GemmRecipe("delayed"), {}, "delayed scaling needs"),
        (GemmRecipe("bf16"), {"shards": 2}, "2 shards do not divide a vocabulary of 103"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(x, w, targets, recipe, chunk=8, **options)
