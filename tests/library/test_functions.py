"""The functions on arrays against float64, numpy and scipy's definitions, and their errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax

CURRENT = fp8jax.Recipe("current", emulated=True)
MATMUL = (((1,), (0,)), ((), ()))


def relative(found, expected):
    return np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(k, s) for k, s in zip(keys, ((8, 32), (32, 16), (8, 16)), strict=True)
    ]


@pytest.mark.parametrize("recipe", [CURRENT, fp8jax.Recipe("delayed", emulated=True), None])
def test_dot_general_and_its_gradients_against_float64(operands, recipe):
    x, w, g = operands
    y, pull = jax.vjp(lambda x, w: fp8jax.dot_general(x, w, MATMUL, recipe), x, w)
    dx, dw = pull(g)
    x, w, g = map(np.float64, operands)
    bound = 0.1 if recipe else 1e-5
    assert relative(y, x @ w) < bound
    assert relative(dx, g @ w.T) < bound
    assert relative(dw, x.T @ g) < bound


def test_dot_general_takes_negative_dimensions_and_any_role(operands):
    x, w, _ = operands
    plain = fp8jax.dot_general(x, w, MATMUL, CURRENT)
    other = fp8jax.dot_general(x, w, (((-1,), (-2,)), ((), ())), CURRENT, role="my role.1")
    np.testing.assert_array_equal(plain, other)


def test_a_token_brings_amaxes_and_scale_0_is_the_amax_of_the_moment(operands):
    x, w, g = operands
    delayed = fp8jax.Recipe("delayed", emulated=True)

    def product(token, scales, recipe=delayed):
        return fp8jax.dot_general(x, w, MATMUL, recipe, scales=scales, token=token)

    y, pull = jax.vjp(lambda token: product(token, jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_array_equal(y, fp8jax.dot_general(x, w, MATMUL, CURRENT))
    np.testing.assert_array_equal(pull(g)[0], [np.abs(x).max(), np.abs(g).max()])
    coarse = product(jnp.zeros(2), jnp.full(2, 2.0**8))
    assert relative(coarse, y) > 0.1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"recipe": "current"}, TypeError, "recipe='current' is neither"),
        ({"x": jnp.ones((8, 31))}, ValueError, r"\(1,\) of x \(8, 31\) and \(0,\) of w \(32, 16\)"),
        ({"x": jnp.ones((8, 32), jnp.int8)}, TypeError, "x is int8, not floating"),
    ],
)
def test_dot_general_names_what_does_not_fit(operands, change, error, says):
    given = {"x": operands[0], "w": operands[1], "dims": MATMUL, "recipe": CURRENT} | change
    with pytest.raises(error, match=says):
        fp8jax.dot_general(given["x"], given["w"], given["dims"], given["recipe"])


def attention64(q, k, v, scale, segments=None):
    """Causal attention of [b, t, n, h] and [b, s, k, h] in float64 NumPy."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.float64(x), repeats, axis=2) for x in (k, v))
    scores = scale * np.einsum("btnh,bsnh->bnts", np.float64(q), k)
    seen = np.tri(q.shape[1], dtype=bool)[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("recipe", [CURRENT, fp8jax.Recipe(emulated=True), None])
@pytest.mark.parametrize("segments", [None, np.repeat([[0, 1], [0, 2]], 8, axis=1)])
def test_attention_against_float64(recipe, segments):
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, 16, 4, 8))
    k, v = (jax.random.normal(key, (2, 16, 2, 8)) for key in keys[1:])
    given = None if segments is None else jnp.asarray(segments)
    o = fp8jax.attention(q, k, v, recipe, softmax_scale=0.5, segment_ids=given)
    assert o.shape == q.shape
    assert relative(o, attention64(q, k, v, 0.5, segments)) < (0.1 if recipe else 1e-4)


def test_attentions_gradients_are_near_those_of_jax_nn():
    keys = jax.random.split(jax.random.key(2), 4)
    q, g = (jax.random.normal(key, (2, 16, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 16, 2, 8)) for key in keys[2:])
    ours = functools.partial(fp8jax.attention, recipe=CURRENT)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    found, expected = (jax.vjp(lambda *a, f=f: f(*a), q, k, v)[1](g) for f in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, np.float64(other)) < 0.15


def test_unknown_scales_of_attention_are_those_of_the_moment():
    q = jax.random.normal(jax.random.key(3), (1, 8, 2, 8))
    scales = {"attention_scores": jnp.zeros(3), "attention_values": jnp.zeros(2)}
    delayed = fp8jax.Recipe("delayed", emulated=True)

    def gradient(recipe, **kwargs):
        return jax.grad(lambda q: jnp.sum(jnp.sin(fp8jax.attention(q, q, q, recipe, **kwargs))))(q)

    expected = gradient(CURRENT)
    for backend in ("composed", "emulated"):
        found = gradient(delayed, scales=scales, backend=backend)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": (2, 8, 4)}, r"q is float32\[2, 8, 4\], not a floating array \[b, t, n, h\]"),
        ({"v": (2, 8, 2, 4)}, r"k \[2, 8, 2, 8\] and v \[2, 8, 2, 4\] differ"),
        ({"q": (2, 4, 4, 8)}, "4 queries and 8 keys"),
        ({"q": (2, 8, 3, 8)}, "3 query heads are not a multiple of 2 KV heads"),
        ({"q": (1, 8, 4, 8)}, "differ in batch or head dimension"),
        ({"segment_ids": (2, 7)}, r"segment_ids is float32\[2, 7\], not integers \[2, 8\]"),
    ],
)
def test_attention_names_what_does_not_fit(change, says):
    shapes = {"q": (2, 8, 4, 8), "k": (2, 8, 2, 8), "v": (2, 8, 2, 8)} | change
    with pytest.raises(ValueError, match=says):
        fp8jax.attention(recipe=CURRENT, **{name: jnp.ones(s) for name, s in shapes.items()})


def test_kurtosis_against_numpy_in_any_shape():
    x = np.random.default_rng(0).standard_t(5, (2, 3, 64))
    expected = np.mean(np.mean(x**4, -1) / np.mean(x**2, -1) ** 2)
    for shape in ((2, 3, 64), (6, 64)):
        found = fp8jax.kurtosis(jnp.asarray(x.reshape(shape), jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    pooled = np.mean([np.mean(row**4) / np.mean(row**2) ** 2 for row in x.reshape(2, -1)])
    found = fp8jax.kurtosis(jnp.asarray(x, jnp.float32), pooled=True)
    np.testing.assert_allclose(found, pooled, rtol=1e-4)
    with pytest.raises(ValueError, match=r"int32\[3\] is not a floating array"):
        fp8jax.kurtosis(jnp.arange(3))


def test_taps_of_an_own_model_are_collected():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    with fp8jax.collecting() as found:
        fp8jax.tap("mlp", x)
    np.testing.assert_allclose(found["mlp"]["kurtosis"], fp8jax.kurtosis(x), rtol=1e-6)


@pytest.mark.parametrize("axis", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_split_operands_give_the_same_gradients_and_amaxes(axis):
    """Rows of x over eight devices, and the weight's outputs: jax.make_mesh's explicit axes as well."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis, axis))
    keys = jax.random.split(jax.random.key(4), 3)
    x, w = jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 6))
    q = jax.random.normal(keys[2], (4, 8, 2, 8))
    current = fp8jax.Recipe("delayed", emulated=True)

    def loss(x, w, q, token):
        y = fp8jax.dot_general(x, w, MATMUL, current, scales=jnp.zeros(2), token=token)
        o = fp8jax.attention(q, q, q, current)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(o))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    specs = (("data",), (None, "model"), ("data",))
    placed = [
        jax.device_put(a, jax.NamedSharding(mesh, jax.P(*spec)))
        for a, spec in zip((x, w, q), specs, strict=True)
    ]
    found, expected = gradient(*placed, jnp.zeros(2)), gradient(x, w, q, jnp.zeros(2))
    np.testing.assert_array_equal(found[3][0], expected[3][0])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
