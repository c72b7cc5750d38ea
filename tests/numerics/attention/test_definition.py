"""FP8 attention, backend `emulated`, against float64 NumPy written from its docstring; and the bf16 recipe against jax.nn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.gemm import CHECKPOINT_NAME
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe
from tests.numerics.attention_calls import Attention, close, inputs

CURRENT, DELAYED, BF16 = GemmRecipe("current"), GemmRecipe("delayed"), GemmRecipe("bf16")
# Neither equal nor fitting: q and dO saturate here and there, ds and do lose small values.
SCALES = {SCORES: (2.0**-8, 2.0**-7, 2.0**-20), VALUES: (2.0**-6, 2.0**-22)}


@functools.partial(jax.jit, static_argnames=("recipes", "softmax_scale"))
def run(q, k, v, do, recipes, softmax_scale=0.25, segment_ids=None, scales=None):
    """o, dq, dk, dv and the tokens' cotangents; `recipes` is (scores, values)."""
    recipes = dict(zip((SCORES, VALUES), recipes, strict=True))
    tokens = {
        role: jnp.zeros(len(OPERANDS[role])) for role, recipe in recipes.items() if recipe.fp8
    }
    o, vjp = jax.vjp(
        lambda q, k, v, tokens: attention(
            q,
            k,
            v,
            recipes,
            softmax_scale=softmax_scale,
            segment_ids=segment_ids,
            scales=scales,
            tokens=tokens,
        ),
        q,
        k,
        v,
        tokens,
    )
    return o, *vjp(do)


def check(arrays, recipes, *, wide=False, **options):
    scales = options.pop("scales", None)
    segment_ids = options.pop("segment_ids", None)
    *found, tokens = run(
        *arrays,
        recipes,
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
        scales=scales
        and {role: jnp.asarray(values, jnp.float32) for role, values in scales.items()},
        **options,
    )
    expected = Attention(
        *map(np.asarray, arrays), recipes, segment_ids=segment_ids, scales=scales, **options
    )
    for name, array in zip(("o", "dq", "dk", "dv"), found, strict=True):
        assert array.dtype == arrays[0].dtype
        close(array, getattr(expected, name), name, wide)
    for role in tokens:
        for name, amax in zip(OPERANDS[role], np.asarray(tokens[role]), strict=True):
            # The amaxes of inputs are exact; that of dO to two units, of its division and the sum of P; that of dS, which is
            # computed, to accumulation error and to float32's spacing at the largest logit, which S and the factor bring into P.
            accumulation = 1e-2 if wide else max(1e-4, 3 * 2.0**-23 * expected.largest_logit)
            rtol = {"ds": accumulation, "do": 2.0**-22}.get(name, 0)
            np.testing.assert_allclose(amax, expected.tokens[name], rtol=rtol, err_msg=name)
    return expected


@pytest.mark.parametrize(
    "shape",
    [(2, 12, 2, 3, 8), (1, 17, 1, 1, 16), (2, 5, 3, 1, 4)],
    ids=["grouped", "one_head", "ungrouped"],
)
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_seven_gemms_equal_the_reference(shape, scaling):
    recipe = {"current": CURRENT, "delayed": DELAYED}[scaling]
    check(inputs(shape), (recipe, recipe), scales=SCALES if scaling == "delayed" else None)


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_one_token_attends_to_itself_alone(scaling):
    """So O is v, dV is dO, and dQ and dK are 0: dP and what is subtracted from it are the same sum, but for its order."""
    q, k, v, do = inputs((2, 1, 2, 2, 8))
    recipe = {"current": CURRENT, "delayed": DELAYED}[scaling]
    scales = {role: jnp.asarray(values, jnp.float32) for role, values in SCALES.items()}
    o, dq, dk, dv, _ = run(q, k, v, do, (recipe, recipe), scales=scales)
    expected = Attention(*map(np.asarray, (q, k, v, do)), (recipe, recipe), scales=SCALES)
    close(o, expected.o, "o")
    close(dv, expected.dv, "dv")
    largest = float(jnp.max(jnp.linalg.norm(do, axis=-1))) * float(
        jnp.max(jnp.linalg.norm(v, axis=-1))
    )
    for found, other in ((dq, k), (dk, q)):
        assert float(jnp.max(jnp.abs(found))) < 1e-6 * 0.25 * largest * float(
            jnp.max(jnp.abs(other))
        )


@pytest.mark.parametrize(
    "recipe",
    [
        GemmRecipe("current", gradient_format="e4m3"),
        GemmRecipe("current", margin=2),
        GemmRecipe("current", emulated=False),
        GemmRecipe("current", power_of_two=False),
    ],
    ids=["e4m3_gradients", "margin", "fp8_dots", "unrounded"],
)
def test_recipes(recipe):
    check(inputs(), (recipe, recipe))


def test_bfloat16_activations():
    check(inputs(dtype=jnp.bfloat16), (CURRENT, CURRENT), wide=True)
    check(inputs(dtype=jnp.bfloat16), (DELAYED, DELAYED), wide=True, scales=SCALES)


def test_large_logits():
    """Scores of some hundreds: one key takes all, exp2 would overflow without the row's maximum."""
    expected = check(inputs(seed=2), (CURRENT, CURRENT), softmax_scale=40.0)
    assert np.all(np.isfinite(expected.o))


@pytest.mark.parametrize(
    "recipes",
    [(CURRENT, BF16), (BF16, CURRENT), (DELAYED, CURRENT), (BF16, DELAYED)],
    ids=["scores_only", "values_only", "delayed_current", "bf16_delayed"],
)
def test_roles_have_recipes_of_their_own(recipes):
    check(inputs(), recipes, scales=SCALES)


SEGMENTS = np.asarray([[0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 4]])


@pytest.mark.parametrize("recipes", [(CURRENT, CURRENT), (BF16, BF16)], ids=["fp8", "bf16"])
def test_segments(recipes):
    check(inputs(), recipes, segment_ids=SEGMENTS)


def test_other_documents_do_not_matter():
    """Changing one document leaves another's outputs as they were, bit for bit (delayed: the scales are given)."""
    q, k, v, do = inputs()
    scales = {role: jnp.asarray(values, jnp.float32) for role, values in SCALES.items()}
    ids = jnp.asarray(SEGMENTS, jnp.int32)
    one = run(q, k, v, do, (DELAYED, DELAYED), segment_ids=ids, scales=scales)
    other = run(
        q,
        k.at[0, 4:7].mul(-3),
        v.at[0, 4:7].add(1),
        do,
        (DELAYED, DELAYED),
        segment_ids=ids,
        scales=scales,
    )
    assert not np.array_equal(one[0][0, 4:7], other[0][0, 4:7])
    for found, before in zip(other[:4], one[:4], strict=True):
        np.testing.assert_array_equal(
            np.delete(np.asarray(found)[0], np.s_[4:7], 0),
            np.delete(np.asarray(before)[0], np.s_[4:7], 0),
        )


def test_the_future_does_not_matter():
    q, k, v, do = inputs()
    scales = {role: jnp.asarray(values, jnp.float32) for role, values in SCALES.items()}
    one = run(q, k, v, do, (DELAYED, DELAYED), scales=scales)[0]
    other = run(q, k.at[:, 7:].set(5), v.at[:, 7:].set(-5), do, (DELAYED, DELAYED), scales=scales)[
        0
    ]
    np.testing.assert_array_equal(one[:, :7], other[:, :7])
    assert not np.array_equal(one[:, 7:], other[:, 7:])


@pytest.mark.parametrize("segmented", [False, True])
def test_bf16_recipe_is_plain_softmax_attention(segmented):
    q, k, v, do = inputs()
    b, t, n, g, h = q.shape
    ids = jnp.asarray(SEGMENTS, jnp.int32) if segmented else None
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) if segmented else None

    def plain(q, k, v):
        return jax.nn.dot_product_attention(
            q.reshape(b, t, n * g, h), k, v, mask=mask, scale=0.25, is_causal=True
        ).reshape(q.shape)

    expected, vjp = jax.vjp(plain, q, k, v)
    *found, tokens = run(q, k, v, do, (BF16, BF16), segment_ids=ids)
    assert tokens == {}
    for array, wanted in zip(found, (expected, *vjp(do)), strict=True):
        np.testing.assert_allclose(
            array, wanted, rtol=2e-5, atol=2e-6 * float(jnp.max(jnp.abs(wanted)))
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "do"])
def test_bad_numbers_are_seen(which, bad):
    """The operand's own amax is infinite, and what depends on it is NaN."""
    arrays = list(inputs())
    arrays[which] = arrays[which].at[(1, 4) + (0,) * (arrays[which].ndim - 2)].set(bad)
    o, dq, dk, dv, tokens = run(*arrays, (CURRENT, CURRENT))
    role, index = [(SCORES, 0), (SCORES, 1), (VALUES, 0), (VALUES, 1)][which]
    assert np.isposinf(tokens[role][index])
    assert np.isposinf(tokens[SCORES][2])  # dS
    assert np.any(np.isnan(dq)) and np.any(np.isnan(dk))
    if which == 3:
        assert np.all(np.isfinite(o)) and np.any(np.isnan(dv))
    else:
        assert np.any(np.isnan(o[1, 4:])) and np.all(np.isfinite(o[0]))
        # A GEMM multiplies a value that no earlier query may see by its P of 0; and 0 times NaN is NaN.
        assert which == 2 or np.all(np.isfinite(o[1, :4]))


def test_residuals_are_fp8():
    """Of q, k and v, one byte an element; and no probabilities."""
    q, k, v, _ = inputs((2, 12, 2, 3, 8), jnp.bfloat16)
    recipes = {SCORES: CURRENT, VALUES: CURRENT}
    _, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, recipes, softmax_scale=0.25), q, k, v)
    saved = sorted(
        (leaf.shape, leaf.dtype.itemsize) for leaf in jax.tree.leaves(vjp) if leaf.size > 3
    )
    o, level, total = (q.shape, 2), (q.shape[:4], 4), (q.shape[:4], 4)
    assert saved == sorted([(q.shape, 1), (k.shape, 1), (v.shape, 1), o, level, total])


@pytest.mark.parametrize("policy", ["save_fp8", "nothing"])
def test_rematerialisation_changes_nothing(policy):
    """Regression: see test_dot_general; here q, k and v are saved by name."""
    policies = {
        "save_fp8": jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }
    q, k, v, do = inputs()
    recipes = {SCORES: CURRENT, VALUES: CURRENT}

    def plain(q, k, v, tokens):
        return attention(q, k, v, recipes, softmax_scale=0.25, tokens=tokens)

    def both(f):
        def run(*args):
            o, vjp = jax.vjp(f, *args[:-1])
            return o, *vjp(args[-1])

        return jax.jit(run)(q, k, v, {SCORES: jnp.zeros(3), VALUES: jnp.zeros(2)}, do)

    for found, expected in zip(
        *(
            jax.tree.leaves(both(f))
            for f in (jax.checkpoint(plain, policy=policies[policy]), plain)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_delayed_scaling_needs_scales():
    q, k, v, _ = inputs()
    with pytest.raises(
        ValueError, match=r"delayed scaling of attention_values needs scales\['attention_values'\]"
    ):
        attention(
            q,
            k,
            v,
            {SCORES: CURRENT, VALUES: DELAYED},
            softmax_scale=1.0,
            scales={SCORES: jnp.ones(3)},
        )
