"""Outlier statistics against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.numerics import formats, statistics
from fp8jax.numerics.attention import rows as attention_rows
from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe
from fp8jax.numerics.tokens import FULL, Token

from . import reference
from .reference import E4M3, E5M2, kurtosis, spread_of

RECIPE = GemmRecipe("current")
SIZES = pytest.mark.parametrize("size", [1.0, 1e10, 1e-12])
BEYOND_SQUARES = pytest.mark.parametrize("size", [1.0, 1e10, 1e-12, 1e30, 1e-30])


def heavy(shape, size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, shape) * size, jnp.float32)


def taken(x, pooled=False):
    return statistics.choose(statistics.distribution(x), pooled=pooled)["kurtosis"]


def moments(x):
    return {
        name: value for name, value in statistics.distribution(x).items() if name in ("mean", "rms")
    }


@SIZES
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 33), (2, 5, 3, 2, 16)], ids=["features", "heads"])
def test_kurtosis(shape, pooled, size):
    """float32 fourth powers overflow at 1e10 and vanish at 1e-12."""
    x = heavy(shape, size)
    np.testing.assert_allclose(taken(x, pooled=pooled), kurtosis(x, pooled), rtol=2e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_kurtosis_of_tokens_of_very_different_sizes(pooled):
    """Each token counts the same, whatever its size; pooled, the large ones rule."""
    x = heavy((2, 6, 16), 1.0) * jnp.logspace(-8, 8, 12, dtype=jnp.float32).reshape(2, 6, 1)
    np.testing.assert_allclose(taken(x, pooled=pooled), kurtosis(x, pooled), rtol=2e-5)
    assert abs(kurtosis(x) - kurtosis(x, True)) > 1


@pytest.mark.parametrize("pooled", [False, True])
def test_zero_tokens_are_left_out(pooled):
    x = heavy((3, 4, 16), 1.0).at[1].set(0).at[0, 2].set(0)
    np.testing.assert_allclose(taken(x, pooled=pooled), kurtosis(x, pooled), rtol=2e-5)
    assert float(taken(jnp.zeros((2, 3, 8)), pooled=pooled)) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kurtosis_of_a_gaussian_is_three_and_of_one_hot_the_width(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 64, 1024)).astype(
        dtype
    )  # in bfloat16 its tails are short: 2.92
    assert abs(float(taken(x)) - 3) < 0.03
    assert float(
        taken(5 * jax.nn.one_hot(jnp.arange(6).reshape(2, 3), 40, dtype=dtype))
    ) == pytest.approx(40, rel=1e-5)
    assert float(taken(jnp.full((2, 3, 8), -2, dtype))) == pytest.approx(1, rel=1e-6)


@BEYOND_SQUARES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments(dtype, size):
    x = (heavy((3, 5, 16), size) + jnp.float32(size)).astype(dtype)
    exact = np.asarray(x).astype(np.float64)
    found = moments(x)
    np.testing.assert_allclose(found["mean"], exact.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["rms"], np.sqrt(np.mean(exact**2)), rtol=1e-5)


def health(x, recipe=RECIPE, operand="x", scale=None, axes=()):
    """By name, jitted."""

    def run(x):
        return statistics.health(x, recipe.quantise(x, scale, operand, axes=axes)[0])

    return dict(zip(statistics.HEALTH, np.asarray(jax.jit(run)(x)).tolist(), strict=True))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 0.013])
def test_health_counts_what_the_cast_does(dtype, scale):
    """Against casting every element: beyond the maximum; not zero but zero after, -0 too; zeros and -0 from the start; error."""
    rng = np.random.default_rng(0)
    top, smallest = reference.TOP[dtype], float(jnp.finfo(dtype).smallest_subnormal)
    edges = np.asarray(
        [
            top,
            1.0001 * top,
            smallest / 2,
            -smallest / 2,
            smallest * 0.501,
            0.0,
            0.0,
            0.0,
            -0.0,
            1e-42 / scale,
            -1e-42 / scale,
        ]
    )
    values = (
        np.concatenate([np.ldexp(rng.uniform(-1, 1, 994), rng.integers(-30, 24, 994)), edges])
        * scale
    )
    x = values.astype(np.float32)
    cast = reference.quantise(x, dtype, scale)
    found = health(
        jnp.asarray(x), GemmRecipe("delayed"), "x" if dtype == E4M3 else "g", jnp.float32(scale)
    )
    normal = np.abs(x) >= reference.TINY
    assert (found["amax"], found["scale"]) == (np.abs(x).max(), np.float32(scale))
    assert found["underflow"] == pytest.approx(np.mean(normal & (cast == 0)))
    assert found["overflow"] == pytest.approx(
        np.mean(np.abs(x * (np.float32(1) / np.float32(scale))) > top)
    )
    assert 0 < found["underflow"] < 0.6 and 0 < found["overflow"] < 0.6
    assert (found["zero"] * x.size, found["negative_zero"] * x.size) == pytest.approx((4, 2))
    exact = x.astype(np.float64) / scale
    assert found["signal"] == pytest.approx(np.mean(exact**2), rel=1e-5)
    assert found["noise"] == pytest.approx(np.mean((exact - cast) ** 2), rel=1e-5)


def test_health_of_blocks():
    """Each element against the scale of its block; the largest scale stands for all."""
    x = heavy((6, 300), 1.0).at[2].mul(1e6)
    found = health(x, GemmRecipe("blockwise"), axes=(1,))
    cast = reference.quantise_blocks(np.asarray(x), (1,), E4M3, reference.scale_of)
    exact = np.asarray(x).astype(np.float64)
    assert found["scale"] == reference.scale_of(float(np.abs(exact).max()), E4M3)
    assert (found["overflow"], found["underflow"]) == (
        0,
        pytest.approx(np.mean((exact != 0) & (cast == 0))),
    )
    assert found["signal"] / found["noise"] == pytest.approx(
        np.sum(exact**2) / np.sum((exact - cast) ** 2), rel=1e-4
    )


def test_health_of_bad_zero_and_empty_tensors():
    """NaN and infinity show in the amax."""
    assert np.isposinf(health(jnp.asarray([1.0, jnp.nan]))["amax"])
    assert health(jnp.zeros((2, 3)))["zero"] == 1
    assert health(-jnp.zeros((2, 3)))["negative_zero"] == 1
    assert health(jnp.zeros((0, 3))) == dict.fromkeys(statistics.HEALTH, 0) | {"scale": 1}


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")])
@pytest.mark.parametrize("scaling", ["current", "static", "blockwise"])
def test_health_of_a_sharded_tensor(scaling, spec):
    """All but signal and noise to the bit."""
    x = heavy((8, 16, 256), 1e3).at[0, 1, :7].set(0).at[3, 3, 3].set(-0.0)
    placed = jax.device_put(
        x,
        NamedSharding(
            jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            PartitionSpec(*spec),
        ),
    )
    found, expected = (health(a, GemmRecipe(scaling), axes=(2,)) for a in (placed, x))
    assert {name: found[name] for name in statistics.HEALTH[:6]} == {
        name: expected[name] for name in statistics.HEALTH[:6]
    }
    assert (found["signal"], found["noise"]) == pytest.approx(
        (expected["signal"], expected["noise"]), rel=1e-5
    )


def test_counts_beyond_float32_are_exact():
    """16777217 ones are one more than float32 sums hold; a third of them is still counted to the unit."""

    @jax.jit
    def count(mask):
        return statistics._count(
            statistics._by_row(jnp.zeros(mask.shape, jnp.int32), mask.astype(jnp.int32))[1][None],
            mask.shape[-1],
        )[0]

    assert float(count(jnp.ones((2**12 + 1, 2**12), bool))) == (2**12 + 1) * 2**12
    assert float(count(jnp.arange(3 * 2**23) % 3 == 0)) == 2**23


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ((3, 1000), 2**30),
        ((8, 4, 16), 2**26),
        ((8, 4, 16), 2**28),
        ((2**12, 5), 2**23),
        ((7,), 2**31 - 1),
    ],
)
def test_counts_beyond_int32_do_not_wrap(shape, most):
    """Against NumPy's int64: summed in limbs, by dimensions first, or both."""
    rows = np.random.default_rng(0).integers(most // 2, most, (2, *shape), endpoint=True)
    found = jax.jit(statistics._count, static_argnums=1)(jnp.asarray(rows, jnp.int32), most)
    np.testing.assert_allclose(found, rows.reshape(2, -1).sum(axis=1), rtol=3e-7)


def test_underflow_of_many_rows():
    """From 8.4 million rows on the sum of the counts' low bytes does not fit an int32."""
    number = 2**23 + 2**17
    counts = [jnp.full((number,), 255, jnp.int32)] * 4
    energies = [jnp.ones((number,), jnp.float32)] * 2
    found = statistics.from_rows(jnp.float32(1), jnp.float32(1), counts, energies, 255 * number)
    np.testing.assert_allclose(found[2:6], 1, rtol=1e-6)


@pytest.mark.parametrize(
    "shape", [(2**20, 2**11, 2), (2**11, 2**20), (2, 2**16, 2**16), (2**9, 2**13, 2**8, 2**13)]
)
def test_statistics_of_tensors_beyond_2_31_elements_are_traced(shape):
    """A Python integer in an array's arithmetic is an int32."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    q = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
    traced = jax.eval_shape(
        lambda x, q: statistics.health(x, formats.Quantised(q, jnp.float32(1))), x, q
    )
    assert traced.shape == (len(statistics.HEALTH),)
    if len(shape) > 2:
        assert set(jax.eval_shape(statistics.distribution, x)) == {
            *statistics.DISTRIBUTION,
            *statistics.WEIGHTS,
        }


@pytest.mark.parametrize("scaling", ["static", "current"])
def test_combine_equals_the_whole_batch(scaling):
    """Statistics of four microbatches make those of the batch: means, root mean squares, maxima; energies in one unit."""
    x = heavy((8, 4, 32), 1.0) * jnp.exp2(jnp.arange(8.0) // 2)[:, None, None]

    def of(x):
        return {"qkv": moments(x) | {"kurtosis": taken(x)} | health(x, GemmRecipe(scaling))}

    parts = [of(part) for part in jnp.split(x, 4)]
    combined = statistics.combine(
        jax.tree.map(lambda *values: jnp.stack([jnp.float32(v) for v in values]), *parts)
    )
    whole = of(x)["qkv"]
    assert combined["qkv"].keys() == whole.keys()
    depends_on_scale = ("noise", "underflow") if scaling == "current" else ()
    for name, value in whole.items():
        if name not in depends_on_scale:
            np.testing.assert_allclose(combined["qkv"][name], value, rtol=1e-5, err_msg=name)


COUNTED = np.array([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6], bool)


@pytest.mark.parametrize("shape", [(3, 6, 33), (3, 6, 2, 4, 16)], ids=["features", "heads"])
def test_padding_does_not_count(shape):
    """Numbers of a tensor are those of the tensor with its padding cut out, whatever lies there; amax and scale are the cast's."""
    x = heavy(shape, 3.0).at[0, 1].set(1e3).at[0, 4].set(jnp.nan).at[2, 5].set(0)
    samples = [np.asarray(x)[i][COUNTED[i]].astype(np.float64) for i in (0, 2)]
    rows = np.concatenate(samples).reshape(-1, shape[-1])
    found = jax.jit(statistics.distribution)(x, COUNTED)
    assert found["mean"] == pytest.approx(rows.mean(), rel=1e-5) and found["rms"] == pytest.approx(
        np.sqrt(np.mean(rows**2)), rel=1e-5
    )
    assert found["kurtosis"] == pytest.approx(kurtosis(rows[None]), rel=2e-5)
    pooled = [np.mean(s**4) / np.mean(s**2) ** 2 for s in samples]
    assert found["pooled_kurtosis"] == pytest.approx(np.mean(pooled), rel=2e-5)
    heads = len(rows) / 9
    assert [found[name] for name in statistics.WEIGHTS] == [9, 8 * heads, 2]
    x, scale, delayed = jnp.nan_to_num(x) / 64, jnp.float32(2.0**-12), GemmRecipe("delayed")
    got = jax.jit(
        lambda x: statistics.health(x, delayed.quantise(x, scale, "x")[0], counted=COUNTED)
    )(x)
    wanted = health(jnp.asarray(rows / 64, jnp.float32), delayed, scale=scale)
    assert wanted["overflow"] > 0 and wanted["zero"] > 0
    np.testing.assert_allclose(got[1:], [wanted[name] for name in statistics.HEALTH[1:]], rtol=1e-5)
    assert got[0] == pytest.approx(1e3 / 64)


def test_of_padding_alone_nothing_is_known():
    """And finite it is, all of it."""
    x, none = heavy((3, 6, 32), 1.0), jnp.zeros((3, 6), bool)
    found = dict(
        zip(
            statistics.REPORT,
            statistics.report(x, RECIPE.quantise(x, None, "x")[0], spread=True, counted=none),
            strict=True,
        )
    )
    assert {name for name, value in found.items() if value != 0} == {"amax", "scale"}


def test_combine_weighs_by_what_entered():
    """A microbatch of padding alone counts for nothing, one of few tokens for little; of no tokens at all nothing is known."""
    stats = {
        "tokens": [6.0, 0, 2],
        "rows": [3.0, 0, 0],
        "mean": [1.0, 9, 5],
        "rms": [1.0, jnp.inf, 3],
        "kurtosis": [20.0, 0, 0],
        "max_logit": [-4.0, 7, -5],
        "amax": [2.0, 0, 1e-3],
        "scale": [2.0**-7, 1, 2.0**-18],
        "signal": [64.0, 0, 64],
        "zero": [0.25, 1, 0.5],
        "overflow": [0.0, jnp.nan, 0.5],
    }
    found = statistics.combine(
        {"x": {name: jnp.asarray(values)[:, None] for name, values in stats.items()}}
    )["x"]
    wanted = {
        "tokens": 8,
        "rows": 3,
        "mean": 2,
        "rms": 3**0.5,
        "kurtosis": 20,
        "max_logit": -4,
        "amax": 2,
        "scale": 2.0**-7,
        "signal": (6 * 64 + 2 * 64 * 2.0**-22) / 8,
        "zero": 0.3125,
        "overflow": 0.125,
    }
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(
        wanted, rel=1e-6
    )
    none = statistics.combine(
        {
            "x": {
                "tokens": jnp.zeros(2),
                "mean": jnp.ones(2),
                "rms": jnp.ones(2),
                "max_logit": jnp.ones(2),
            }
        }
    )["x"]
    assert {name: float(value) for name, value in none.items()} == {
        "tokens": 0,
        "mean": 0,
        "rms": 0,
        "max_logit": 0,
    }


LAYER = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("scaling", ["delayed", "current", "static", "blockwise"])
def test_tokens_with_room_bring_back_health(scaling):
    """Of x and of g, as if taken by hand; gradients and the amaxes as with narrow tokens, to the bit."""
    recipe = GemmRecipe(scaling, static_gradient_scale=2.0**-12)
    x, w, g = heavy((2, 40, 300), 3.0, 1), heavy((300, 20), 0.1, 2), heavy((2, 40, 20), 1e-4, 3)
    scales = jnp.asarray([2.0**-5, 2.0**-24], jnp.float32)

    @jax.jit
    def run(token):
        y, vjp = jax.vjp(
            lambda *args: dot_general(*args[:2], LAYER, recipe, scales=scales, token=args[2]),
            x,
            w,
            token,
        )
        return y, *vjp(g)

    *narrow, amaxes = run(jnp.zeros(2))
    *wide, found = run(Token(jnp.zeros((2, len(statistics.REPORT))), FULL))
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(a, b)
    found, spread = np.split(found.values, [len(statistics.HEALTH)], axis=1)
    np.testing.assert_array_equal(spread[0], [0, 0, 0, 0, 80, 0, 0])
    np.testing.assert_allclose(spread[1], [*spread_of(g), 80, 80, 2], rtol=2e-5)
    np.testing.assert_array_equal(found[:, 0], [jnp.max(jnp.abs(x)), jnp.max(jnp.abs(g))])
    if scaling != "static":
        np.testing.assert_array_equal(found[:, 0], amaxes)
    for row, array, operand, scale in (
        (found[0], x, "x", scales[0]),
        (found[1], g, "g", scales[1]),
    ):
        expected = health(array, recipe, operand, scale, axes=(2,))
        np.testing.assert_allclose(row, [expected[name] for name in statistics.HEALTH], rtol=1e-6)


def divided_by_rows(recipes, scales, q, k, v, do):
    """What of dO is cast: each row over its sum of cast probabilities."""
    call = attention_rows.Call(recipes[SCORES], recipes[VALUES], 0.8, q.dtype)
    operands = [
        recipes[role].quantise(x, scales[role][i], name)[0]
        for role, i, name, x in ((SCORES, 0, "q", q), (SCORES, 1, "k", k), (VALUES, 0, "v", v))
    ]
    _, weights = attention_rows.output(
        call, *operands, attention_rows.visible(0, q.shape[1], q.shape[1])
    )
    return do.astype(jnp.float32) / attention_rows.row_factors(call, weights)[0][..., None]


@pytest.mark.parametrize(
    "scalings",
    [("delayed", "current"), ("current", "static"), ("static", "delayed"), ("bf16", "current")],
)
def test_attention_brings_back_health(scalings):
    """Of all five operands; chunked as whole but for which hidden scores are 0 and which -0, and for rounding in dS."""
    recipes = {
        role: GemmRecipe(scaling, static_gradient_scale=2.0**-12)
        for role, scaling in zip((SCORES, VALUES), scalings, strict=True)
    }
    q, k, v, do = (
        heavy(shape, size, 5)
        for shape, size in (
            ((1, 600, 1, 2, 8), 3.0),
            ((1, 600, 1, 8), 0.1),
            ((1, 600, 1, 8), 20.0),
            ((1, 600, 1, 2, 8), 1e-3),
        )
    )
    scales = {
        SCORES: jnp.asarray([2.0**-5, 2.0**-10, 2.0**-17]),
        VALUES: jnp.asarray([2.0**-2, 2.0**-22]),
    }
    width = len(statistics.REPORT)
    tokens = {role: Token(jnp.zeros((len(OPERANDS[role]), width)), FULL) for role in recipes}

    def run(backend):
        @jax.jit
        def both(tokens):
            return jax.vjp(
                lambda t: attention(
                    q, k, v, recipes, softmax_scale=0.8, scales=scales, tokens=t, backend=backend
                ),
                tokens,
            )[1](do)[0]

        return {role: np.asarray(found.values) for role, found in both(tokens).items()}

    whole, chunked = run("emulated"), run("composed")
    cast_do = divided_by_rows(recipes, scales, q, k, v, do)
    for role, rows in whole.items():
        for i, (name, array) in enumerate(
            zip(OPERANDS[role], {SCORES: (q, k), VALUES: (v, cast_do)}[role], strict=False)
        ):
            found, spread = np.split(rows[i], [len(statistics.HEALTH)])
            expected = health(array, recipes[role], name, scales[role][i])
            np.testing.assert_allclose(
                found, [expected[key] for key in statistics.HEALTH], rtol=1e-5, err_msg=name
            )
            np.testing.assert_array_equal(chunked[role][i], rows[i])
            wanted = [*spread_of(do), 600, 1200, 1] if name == "do" else [0, 0, 0, 0, 600, 0, 0]
            np.testing.assert_allclose(spread, wanted, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(whole[SCORES][2, 0], chunked[SCORES][2, 0], rtol=1e-4)
    if recipes[SCORES].fp8:
        one, other = (
            dict(zip(statistics.HEALTH, rows[SCORES][2], strict=False)) for rows in (whole, chunked)
        )
        for found in (one, other):
            found["zero"] += found.pop("negative_zero")
        assert one["zero"] > 0.49  # hidden
        assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-4)
