"""Static scaling: fixed scales, and no pass over a tensor to find one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe
from tests.numerics.attention_calls import Attention, close, inputs
from tests.numerics.gemm_calls import CASES, PLAIN, operands, run

from . import reference

STATIC = GemmRecipe("static", static_weight_scale=2.0**-6, static_gradient_scale=2.0**-10)


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "case", ["matrix", "heads_in", "out_in_weight_of_tokens", "experts_inside"]
)
def test_static_scaling_equals_the_reference(case, dtype, emulated):
    x_shape, w_shape, dims = CASES[case]
    x, w, g = operands(x_shape, w_shape, dims, dtype)
    recipe = GemmRecipe(
        "static", static_weight_scale=2.0**-6, static_gradient_scale=2.0**-10, emulated=emulated
    )
    y, dx, dw, token = run(x, w, g, None, dims, recipe)
    expected = reference.Linear(
        *map(np.asarray, (x, w, g)), dims, None, scales=(1.0, 2.0**-10), weight_scale=2.0**-6
    )
    for found, name in ((y, "y"), (dx, "dx"), (dw, "dw")):
        reference.agrees(found, *getattr(expected, name), what=name)
    np.testing.assert_array_equal(token, np.zeros(2))


@pytest.mark.parametrize(
    ("unit", "margin", "power_of_two", "expected"),
    [
        (1.0, 0, True, 1.0),
        (0.02, 0, True, 2.0**-5),
        (2.0**-6, 0, True, 2.0**-6),
        (0.02, 2, True, 2.0**-3),
        (0.02, 0, False, 0.02),
        (0.02, 1, False, 0.04),
        (1 / 4096, 0, True, 2.0**-12),
    ],
)
def test_scales(unit, margin, power_of_two, expected):
    """Rounded up to powers of two; margins count as with every other scaling."""
    recipe = GemmRecipe(
        "static",
        static_weight_scale=unit,
        static_gradient_scale=2 * unit,
        margin=margin,
        power_of_two=power_of_two,
    )
    found = {
        operand: float(recipe.static_scale(operand))
        for operand in ("w", "g", "ds", "do", "x", "q", "v")
    }
    assert found == {
        "w": np.float32(expected),
        **dict.fromkeys(("g", "ds", "do"), np.float32(2 * expected)),
        **dict.fromkeys(("x", "q", "v"), 2.0**margin),
    }


def reductions(f, *args):
    """How often a compiled program takes a maximum over something."""
    text = jax.jit(f).lower(*args).compile().as_text()
    maxima = {line.split()[0] for line in text.splitlines() if line.startswith("%") and "{" in line}
    bodies = {
        name
        for name in maxima
        if f"{name} (" in text
        and " maximum(" in text.split(f"\n{name} (", 1)[-1].split("\n}", 1)[0]
    }
    return sum(
        f"to_apply={name}" in line
        for line in text.splitlines()
        if " reduce(" in line
        for name in bodies
    )


def gradients(recipe):
    def layer(x, w, g, token):
        y, vjp = jax.vjp(
            lambda *args: dot_general(*args[:2], PLAIN, recipe, token=args[2]), x, w, token
        )
        return y, *vjp(g)

    return layer


def test_the_compiled_program_has_no_amax():
    """Of x, w and g with `current`, of none with `static`."""
    x, w, g = operands(*CASES["matrix"])
    token = jnp.zeros(2)
    assert reductions(gradients(GemmRecipe("current")), x, w, g, token) == 3
    assert reductions(gradients(STATIC), x, w, g, token) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_are_seen(bad):
    """Not by an amax: by NaN in the results."""
    x, w, g = operands(*CASES["matrix"])
    y = run(x.at[2, 3].set(bad), w, g, None, PLAIN, STATIC)[0]
    assert np.all(np.isnan(np.asarray(y[2]).astype(np.float32)))
    dw = run(x, w, g.at[2, 3].set(bad), None, PLAIN, STATIC)[2]
    assert np.all(np.isnan(np.asarray(dw[:, 3])))


def attend(recipes, backend, arrays):
    """O, dq, dk, dv and the tokens' cotangents."""
    tokens = {role: jnp.zeros(len(OPERANDS[role])) for role in recipes}

    @jax.jit
    def both(q, k, v, do, tokens):
        o, vjp = jax.vjp(
            lambda q, k, v, tokens: attention(
                q, k, v, recipes, softmax_scale=0.25, tokens=tokens, backend=backend
            ),
            q,
            k,
            v,
            tokens,
        )
        return o, *vjp(do)

    return both(*arrays, tokens)


@pytest.mark.parametrize("backend", ["emulated", "composed"])
def test_attention_equals_the_reference(backend):
    """Seven GEMMs at fixed scales: those of delayed scaling, if it were given the same."""
    arrays = inputs((2, 12, 2, 3, 8))
    *found, tokens = attend({SCORES: STATIC, VALUES: STATIC}, backend, arrays)
    delayed = GemmRecipe("delayed")
    scales = {SCORES: (1.0, 1.0, 2.0**-10), VALUES: (1.0, 2.0**-10)}
    expected = Attention(*map(np.asarray, arrays), (delayed, delayed), scales=scales)
    for name, array in zip(("o", "dq", "dk", "dv"), found, strict=True):
        close(array, getattr(expected, name), name)
    assert not any(np.any(np.asarray(token)) for token in tokens.values())


@pytest.mark.parametrize(
    "scalings", [("static", "current"), ("bf16", "static"), ("current", "static")]
)
def test_attention_roles_mix(scalings):
    """Chunked as whole; a fixed role reports no amax, a measured one does."""
    recipes = {
        role: GemmRecipe(scaling, static_gradient_scale=2.0**-10)
        for role, scaling in zip((SCORES, VALUES), scalings, strict=True)
    }
    arrays = inputs((1, 300, 1, 2, 8), jnp.bfloat16)
    found, expected = (attend(recipes, backend, arrays) for backend in ("composed", "emulated"))
    for array, wanted in zip(found[:4], expected[:4], strict=True):
        array, wanted = np.float64(array), np.float64(wanted)
        assert np.linalg.norm(array - wanted) < 2e-4 * np.linalg.norm(wanted)
    for role, scaling in zip((SCORES, VALUES), scalings, strict=True):
        assert np.all((np.asarray(found[-1][role]) > 0) == (scaling == "current"))


def test_unit_variance_loses_little():
    """What static scaling is for: N(0, 1) at scale 1, relative error as of any e4m3 cast."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (64, 1024)))
    q, amax = STATIC.quantise(jnp.asarray(x), None, "x")
    error = np.asarray(q.data).astype(np.float64) * float(q.scale) - x
    assert amax is None
    assert 10 * math.log10(np.sum(x.astype(np.float64) ** 2) / np.sum(error**2)) > 30
