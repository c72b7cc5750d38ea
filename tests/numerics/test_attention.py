"""FP8 attention, backend `emulated`, against float64 NumPy written from its docstring; and the bf16 recipe against jax.nn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics.attention import SCORES, VALUES, attention
from fp8jax.numerics.dot_general import CHECKPOINT_NAME
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe

from . import reference
from .reference import E4M3, E5M2

CURRENT, DELAYED, BF16 = GemmRecipe("current"), GemmRecipe("delayed"), GemmRecipe("bf16")
# Neither equal nor fitting: q and dO saturate here and there, ds and do lose small values.
SCALES = {SCORES: (2.0**-8, 2.0**-7, 2.0**-20), VALUES: (2.0**-6, 2.0**-22)}


def inputs(shape=(2, 12, 2, 3, 8), dtype=jnp.float32, seed=0):
    """q_btkgh, k_bskh, v_bskh, do_btkgh of different sizes."""
    b, t, k, _, h = shape
    rng = np.random.default_rng(seed)
    shapes = shape, (b, t, k, h), (b, t, k, h), shape
    return tuple(
        jnp.asarray(rng.normal(size=s) * size, dtype)
        for s, size in zip(shapes, (2.0, 0.9, 1.3, 0.01), strict=True)
    )


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


class Attention:
    """The definition, one head of one sequence after another. A role that is not FP8 keeps its operands as they are.

    Everything is float64 but the casts, which are made of float32 values.
    """

    def __init__(self, q, k, v, do, recipes, softmax_scale=0.25, segment_ids=None, scales=None):
        self.recipes, self.scales, self.tokens, self.largest_logit = recipes, scales, {}, 0.0
        shape = q.shape
        dtype = q.dtype
        q, k, v, do = (np.asarray(a).astype(np.float64) for a in (q, k, v, do))
        q, k, v = self._cast(q, 0, 0), self._cast(k, 0, 1), self._cast(v, 1, 0)
        (q, self.tokens["q"]), (k, self.tokens["k"]), (v, self.tokens["v"]) = q, k, v
        c = softmax_scale * math.log2(math.e)
        o, p, factor = np.zeros(shape), np.zeros((*shape[:4], shape[1])), np.ones((*shape[:4], 1))
        for b, t, n, g in np.ndindex(*shape[:4]):
            seen = [
                s
                for s in range(t + 1)
                if segment_ids is None or segment_ids[b, s] == segment_ids[b, t]
            ]
            logits = k[b, seen, n] @ q[b, t, n, g] * c
            unnormalised = np.exp2(logits - np.ceil(logits.max()))
            self.largest_logit = max(self.largest_logit, np.abs(logits).max())
            weights = self._probability(unnormalised)
            o[b, t, n, g] = (weights @ v[b, seen, n] / weights.sum()).astype(dtype)
            p[b, t, n, g, seen] = unnormalised / weights.sum()
            if recipes[1].fp8:  # at most 2**6 of the sum goes into dO
                factor[b, t, n, g] = weights.sum() / 2.0 ** max(
                    math.floor(math.log2(weights.sum())) + 1 - 6, 0
                )
        self.o = o
        do, self.tokens["do"] = self._cast(
            (do / factor).astype(np.float32).astype(np.float64), 1, 1
        )
        p = p * factor
        ds, self.tokens["ds"] = self._cast(
            p * (np.einsum("btkgh,bskh->btkgs", do, v) - np.sum(do * o, -1, keepdims=True)), 0, 2
        )
        self.dv = np.einsum("btkgs,btkgh->bskh", self._probability(p), do)
        self.dq = np.einsum("btkgs,bskh->btkgh", ds, k) * softmax_scale
        self.dk = np.einsum("btkgs,btkgh->bskh", ds, q) * softmax_scale

    def _cast(self, x, role, index):
        recipe, name = self.recipes[role], (SCORES, VALUES)[role]
        if not recipe.fp8:
            return x, None
        operand = OPERANDS[name][index]
        dtype = E5M2 if recipe.gradient_format == "e5m2" and operand in ("ds", "do") else E4M3
        largest = float(np.float32(reference.amax(x)))
        scale = (
            self.scales[name][index]
            if recipe.scaling == "delayed"
            else reference.scale_of(largest, dtype, recipe.margin, recipe.power_of_two)
        )
        return reference.quantise(x, dtype, scale) * float(scale), largest

    def _probability(self, p):
        return reference.quantise(p, E4M3, 1 / 256) / 256 if self.recipes[1].fp8 else p


def close(found, expected, what, wide=False):
    """Equal to float32 accumulation, but for the few elements that a cast, falling on a tie, takes the other way.

    Such a flip moves an element of P, dS by a 16th or an 8th of itself, in one row: so at most 2% of elements may be off at
    all, and the norm of the difference stays below 1e-3. `wide`: results, and O in dS, are rounded to bfloat16.
    """
    found = np.asarray(found).astype(np.float64)
    assert found.shape == expected.shape
    error, size = np.abs(found - expected), np.abs(expected).max()
    norm = np.linalg.norm(error) / max(np.linalg.norm(expected), 1e-300)
    if wide:
        assert norm < 0.02, f"{what}: {norm:.3g}"
        return
    assert norm < 1e-3, f"{what}: {norm:.3g}"
    assert np.mean(error > 1e-5 * size) <= 0.02, (
        f"{what}: {np.mean(error > 1e-5 * size):.3g} of the elements"
    )


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
