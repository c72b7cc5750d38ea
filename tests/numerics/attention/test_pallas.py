"""Backend `pallas` of FP8 attention, interpreted on the CPU, against `emulated`; and what its kernels compile to for an H100.

Both multiply exact FP8 values and sum in float32, in another order: where a sum differs in its last bit, some element of P or dS
may round to its neighbour in FP8, an error of 1/16 in one of many terms. Measured over the sweep below: outputs within 1e-3 of the
norm, gradients within 3e-3, amaxes of q, k, v and dO equal, of dS within 1e-4. In an output of the first tokens, which has few terms, one
such element is more than that: the sweep, which meets one in some hundred cases, looks at such rows by themselves.
"""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fp8jax.audit import targets
from fp8jax.numerics import formats, statistics
from fp8jax.numerics.attention import pallas as attention_pallas
from fp8jax.numerics.attention import self_check as self_check_module
from fp8jax.numerics.attention.definition import SCORES, VALUES, attention, check_backend
from fp8jax.numerics.attention.kernels import Tile
from fp8jax.numerics.attention.pallas import FORWARD, KEYS, QUERIES
from fp8jax.numerics.attention.rows import Call, Operands, Residuals, row_factors
from fp8jax.numerics.attention.scores import score_statistics
from fp8jax.numerics.attention.self_check import self_check
from fp8jax.numerics.gemm import CHECKPOINT_NAME
from fp8jax.numerics.gemm_sharding import Partition
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe
from fp8jax.numerics.tokens import AMAX, FULL, Token

PARTITION = Partition(("data", "fsdp"), None, "tensor", "tensor")


def inputs(seed, batch, length, kv_heads, groups, width, magnitudes=(3, 0.1, 20, 1e-3)):
    random = np.random.default_rng(seed)
    few, many = (batch, length, kv_heads, width), (batch, length, kv_heads, groups, width)
    arrays = [
        jnp.asarray(random.normal(size=shape) * size, jnp.bfloat16)
        for shape, size in zip((many, few, few, many), magnitudes, strict=True)
    ]
    return arrays, jnp.asarray(np.sort(random.integers(0, 3, (batch, length))), jnp.int32)


def run(backend, recipe, arrays, segment_ids=None, softmax_scale=0.3, scales=None):
    """O, dq, dk, dv and the amaxes by role."""
    recipes = {SCORES: recipe, VALUES: recipe}
    tokens = {role: jnp.zeros(len(OPERANDS[role])) for role in recipes}

    @jax.jit
    def both(q, k, v, do, tokens):
        def forward(q, k, v, tokens):
            return attention(
                q,
                k,
                v,
                recipes,
                softmax_scale=softmax_scale,
                segment_ids=segment_ids,
                scales=scales,
                tokens=tokens,
                backend=backend,
                partition=PARTITION,
            )

        o, backward = jax.vjp(forward, q, k, v, tokens)
        return o, *backward(do)

    return jax.device_get(both(*arrays, tokens))


def distance(found, expected) -> float:
    found, expected = np.float64(found), np.float64(expected)
    assert found.shape == expected.shape and np.isfinite(found).all()
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300)


def all_but_flips(found, expected, v, most=2):
    """Outputs without the rows that differ most, each of which must be explained by one weight of attention, at most 1, a step of e4m3 off."""
    rows, expected_rows = (np.float64(a).reshape(-1, a.shape[-1]) for a in (found, expected))
    errors = np.linalg.norm(rows - expected_rows, axis=-1)
    order = np.argsort(errors)
    assert errors.max() <= 2.0**-4 * np.linalg.norm(np.float64(v), axis=-1).max()
    return rows[order[:-most]], expected_rows[order[:-most]]


def check(found, expected, tolerance, v=None):
    o, *gradients, amaxes = found
    expected_o, *expected_gradients, expected_amaxes = expected
    assert o.dtype == gradients[0].dtype == jnp.bfloat16
    assert (
        distance(*((o, expected_o) if v is None else all_but_flips(o, expected_o, v))) < tolerance
    )
    assert max(map(distance, gradients, expected_gradients)) < 3 * tolerance
    np.testing.assert_array_equal(amaxes[SCORES][:2], expected_amaxes[SCORES][:2])
    np.testing.assert_array_equal(amaxes[VALUES], expected_amaxes[VALUES])
    np.testing.assert_allclose(amaxes[SCORES][2], expected_amaxes[SCORES][2], rtol=1e-3)


@pytest.mark.parametrize(
    ("length", "scaling", "groups", "width", "segments", "gradient_format"),
    [
        (2, "current", 1, 64, False, "e5m2"),
        (129, "current", 2, 128, True, "e4m3"),
        (300, "delayed", 4, 64, True, "e5m2"),
        (256, "static", 2, 256, False, "e5m2"),
    ],
)
def test_equals_emulated(length, scaling, groups, width, segments, gradient_format):
    recipe = GemmRecipe(scaling, gradient_format=gradient_format, static_gradient_scale=2.0**-20)
    arrays, segment_ids = inputs(length, 2, length, 2, groups, width)
    scales = {
        SCORES: jnp.array([2.0**-5, 2.0**-10, 2.0**-17]),
        VALUES: jnp.array([2.0**-2, 2.0**-22]),
    }
    found, expected = (
        run(backend, recipe, arrays, segment_ids if segments else None, scales=scales)
        for backend in ("pallas", "emulated")
    )
    check(found, expected, 1e-3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_emulated_over_a_sweep(data):
    """Lengths, heads, groups, documents, scales from 1e-4 to 1e4, formats and tiles."""
    length, width = (
        data.draw(st.integers(1, 400)),
        data.draw(st.sampled_from(attention_pallas.HEAD_DIMS)),
    )
    batch, kv_heads, groups = (data.draw(st.integers(1, n)) for n in (2, 2, 3))
    magnitudes = [10.0 ** data.draw(st.floats(-4, 4)) for _ in range(4)]
    arrays, segment_ids = inputs(
        data.draw(st.integers(0, 1000)), batch, length, kv_heads, groups, width, magnitudes
    )
    recipe = GemmRecipe("current", gradient_format=data.draw(st.sampled_from(["e4m3", "e5m2"])))
    softmax_scale = data.draw(st.floats(0.1, 2)) / (magnitudes[0] * magnitudes[1] * width**0.5)
    segment_ids = segment_ids if data.draw(st.booleans()) else None
    found, expected = (
        run(backend, recipe, arrays, segment_ids, softmax_scale)
        for backend in ("pallas", "emulated")
    )
    check(found, expected, 1e-3, v=arrays[2])


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(32, 32), (32, 128), (128, 32), (64, 128), (128, 128)])
def test_any_tile_gives_the_same(tile):
    arrays, segment_ids = inputs(0, 1, 384, 1, 2, 64)
    recipe = GemmRecipe("current")
    call = Call(recipe, recipe, 0.3, jnp.dtype(jnp.bfloat16))
    q, k, v = (
        recipe.quantise(array, None, name)[0]
        for array, name in zip(arrays[:3], ("q", "k", "v"), strict=True)
    )
    tiles = {(kernel, 64): Tile(*tile, 8, 2) for kernel in (FORWARD, QUERIES, KEYS)}

    def outputs(tiles):
        o, weights = attention_pallas.forward(call, Operands(q, k, v, segment_ids), tiles)
        factor, offset = row_factors(call, weights)
        do, _ = recipe.quantise(arrays[3].astype(jnp.float32) / factor[..., None], None, "do")
        delta = jnp.sum(formats.dequantise(do) * o.astype(jnp.float32), axis=-1)
        return (
            o,
            *weights,
            *attention_pallas.backward(
                call, Operands(q, k, v, segment_ids), Residuals(do, offset, delta), None, tiles
            ),
        )

    found, expected = outputs(tiles), outputs(None)
    assert max(map(distance, found, expected)) < 1e-3


def test_padding_to_whole_tiles_leaves_no_trace():
    """A sequence's first tokens, alone and followed by others: the causal mask hides what follows, and padding with it."""
    arrays, _ = inputs(0, 1, 150, 1, 1, 64)
    recipe = GemmRecipe("static")
    o = run("pallas", recipe, arrays)[0]
    for length in (1, 3, 127, 129):
        np.testing.assert_array_equal(
            run("pallas", recipe, [array[:, :length] for array in arrays])[0], o[:, :length]
        )


def test_a_nan_in_the_output_gradient_shows_in_the_amaxes():
    (q, k, v, do), _ = inputs(1, 2, 200, 2, 2, 64)
    amaxes = run("pallas", GemmRecipe("current"), (q, k, v, do.at[1, 3, 1, 0, 5].set(jnp.nan)))[-1]
    assert np.isinf(amaxes[VALUES][1]) and np.isinf(amaxes[SCORES][2])


def test_in_a_scan_with_remat():
    """Layers under scan and checkpoint, policy and all: same gradients and one amax a layer."""
    recipes = dict.fromkeys((SCORES, VALUES), GemmRecipe("current"))
    (q, k, v, do), _ = inputs(2, 1, 130, 1, 2, 64)
    tokens = {role: jnp.zeros((2, len(OPERANDS[role]))) for role in recipes}

    def gradient(backend):
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
        )
        def layer(q, tokens):
            o = attention(q, k, v, recipes, softmax_scale=0.3, tokens=tokens, backend=backend)
            return (o * jnp.bfloat16(0.2)).astype(q.dtype), None

        def loss(q, tokens):
            return jnp.sum(
                jax.lax.scan(layer, q, tokens)[0].astype(jnp.float32) * do.astype(jnp.float32)
            )

        return jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(q, tokens))

    (dq, amaxes), (expected_dq, expected) = gradient("pallas"), gradient("emulated")
    assert distance(dq, expected_dq) < 3e-3
    for role in recipes:
        np.testing.assert_allclose(amaxes[role], expected[role], rtol=2e-2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_sharded_over_batch_and_heads_equals_one_device(sizes):
    mesh = Mesh(
        np.array(jax.devices()).reshape(sizes),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )
    arrays, _ = inputs(3, 8, 130, 2, 2, 64)
    recipe = GemmRecipe("current")
    expected = run("pallas", recipe, arrays)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        found = run("pallas", recipe, [jax.device_put(array, sharding) for array in arrays])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.parametrize(
    ("scaling", "length", "segments"), [("current", 70, False), ("delayed", 140, True)]
)
def test_health_of_the_cast_of_ds(scaling, length, segments):
    """Some clip, some vanish. Which hidden scores are 0 and which -0 is left to the backend."""
    recipes = dict.fromkeys((SCORES, VALUES), GemmRecipe(scaling, gradient_format="e4m3"))
    arrays, segment_ids = inputs(4, 1, length, 1, 2, 64)
    scales = {
        SCORES: jnp.array([2.0**-5, 2.0**-10, 2.0**-13]),
        VALUES: jnp.array([2.0**-2, 2.0**-17]),
    }

    def health(backend):
        tokens = {
            role: Token(jnp.zeros((len(OPERANDS[role]), len(statistics.REPORT))), FULL)
            for role in recipes
        }

        def forward(q, k, v, tokens):
            return attention(
                q,
                k,
                v,
                recipes,
                softmax_scale=2.0 if segments else 0.3,
                tokens=tokens,
                backend=backend,
                scales=scales,
                segment_ids=segment_ids if segments else None,
            )

        backward = jax.jit(lambda q, k, v, do, tokens: jax.vjp(forward, q, k, v, tokens)[1](do)[3])
        found = jax.device_get(backward(*arrays, tokens))
        return {role: token.values for role, token in found.items()}

    found, expected = health("pallas"), health("emulated")
    np.testing.assert_array_equal(found[VALUES][0], expected[VALUES][0])
    np.testing.assert_allclose(
        found[VALUES][1], expected[VALUES][1], rtol=2e-6
    )  # dO over its rows' sums, which tiles add up in another order
    one, other = (
        dict(zip(statistics.HEALTH, rows[SCORES][2], strict=False)) for rows in (found, expected)
    )
    assert one["negative_zero"] <= other["negative_zero"]
    for rows in (one, other):
        rows["zero"] += rows.pop("negative_zero")
    assert (
        one["zero"] > 0.49
        and one["underflow"] > 0
        and (one["overflow"] > 0) == (scaling == "delayed")
    )
    assert one == pytest.approx(other, rel=1e-3)


def test_no_array_of_a_kernel_has_2_to_the_31_elements():
    """Traced, forward and backward: Pallas counts elements of FP8 arrays in 32 signed bits up to 2**32 of them, and reads elsewhere then."""
    recipe = GemmRecipe("delayed")
    recipes, scales = (
        dict.fromkeys((SCORES, VALUES), recipe),
        {SCORES: jnp.ones(3), VALUES: jnp.ones(2)},
    )

    def both(q, k, v, do):
        o, pull = jax.vjp(
            functools.partial(
                attention, recipes=recipes, softmax_scale=0.1, scales=scales, backend="pallas"
            ),
            q,
            k,
            v,
        )
        return o, *pull(do)

    def largest(jaxpr):
        sizes = [0]
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                sizes += [math.prod(x.aval.shape) for x in (*equation.invars, *equation.outvars)]
            else:
                sizes += [largest(inner) for inner in core.jaxprs_in_params(equation.params)]
        return max(sizes)

    def traced(batch, length):
        q, k = (
            jax.ShapeDtypeStruct((batch, length, 8, *groups, 128), jnp.bfloat16)
            for groups in ((4,), ())
        )
        return jax.make_jaxpr(both)(q, k, k, q)

    program = traced(5, 131072)  # 2**31 and a quarter
    assert largest(program.jaxpr) == 3 * 2**29
    assert [x.shape for x in program.out_avals] == [
        (5, 131072, 8, 4, 128),
        (5, 131072, 8, 4, 128),
        *[(5, 131072, 8, 128)] * 2,
    ]
    with pytest.raises(
        ValueError,
        match="pallas: a sequence of 2,147,483,648 elements on one device is more than its 2,147,483,647; split",
    ):
        traced(1, 524288)


def test_what_it_cannot_do_is_said():
    fp8, plain = GemmRecipe("current"), GemmRecipe("bf16")
    with pytest.raises(ValueError, match="no role in BF16; composed and emulated do"):
        check_backend("pallas", {SCORES: fp8, VALUES: plain}, 128)
    with pytest.raises(ValueError, match="no heads of 96 features, only 64, 128, 256"):
        check_backend("pallas", {SCORES: fp8, VALUES: fp8}, 96)
    with pytest.raises(
        ValueError, match="positive softmax scale, not 0.0; composed and emulated take any"
    ):
        run("pallas", fp8, inputs(0, 1, 8, 1, 1, 64)[0], softmax_scale=0.0)


@pytest.mark.parametrize("scaling", ["delayed", "current", "static"])
def test_the_self_check_passes(scaling):
    recipe = GemmRecipe(scaling, static_gradient_scale=2.0**-24)
    errors = self_check("pallas", {SCORES: recipe, VALUES: recipe})
    assert max(errors.values()) < 2e-3


def test_the_self_check_with_statistics_passes_and_refuses_a_wrong_count(monkeypatch):
    monkeypatch.setattr(self_check_module, "LENGTH", 200)
    recipes = {SCORES: GemmRecipe("delayed"), VALUES: GemmRecipe("delayed")}
    errors = self_check("pallas", recipes, statistics=True)
    assert (
        max(errors.values()) < 2e-3
        and {"signal_ds", "noise_ds", "max_logit", "entropy"} < errors.keys()
    )
    original = attention_pallas.scores
    monkeypatch.setattr(
        attention_pallas, "scores", lambda *arguments: [rows * 1.1 for rows in original(*arguments)]
    )
    with pytest.raises(ValueError, match=r"'pallas' disagrees .* entropy 0\.1, max_logit 0\.1"):
        self_check("pallas", recipes, statistics=True)


needs_gpus = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="no compiler for GPUs: requirements-audit.txt",
)


@needs_gpus
@pytest.mark.audit
@pytest.mark.parametrize(
    ("head_dim", "gradient_format", "health"),
    [
        (128, "e5m2", False),
        pytest.param(128, "e5m2", True, marks=pytest.mark.slow),
        pytest.param(64, "e5m2", False, marks=pytest.mark.slow),
        pytest.param(256, "e4m3", False, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_an_h100_in_linear_memory(head_dim, gradient_format, health):
    """Three kernels forward and backward, no square of scores anywhere, four times the temporaries for four times the tokens.

    In steps with statistics, too, with one kernel more for the spread of the scores.
    """
    mesh = Mesh(np.array(targets.resolve("h100:1").devices), ("data",), axis_types=(AxisType.Auto,))
    recipe = GemmRecipe("delayed", emulated=False, gradient_format=gradient_format)
    recipes = {SCORES: recipe, VALUES: recipe}

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(q, k, v, do, scales, tokens):
        def forward(q, k, v, tokens):
            return attention(
                q, k, v, recipes, softmax_scale=0.1, scales=scales, tokens=tokens, backend="pallas"
            )

        o, pull = jax.vjp(forward, q, k, v, tokens)
        spread = (
            score_statistics(
                q, k, recipe, softmax_scale=0.1, scales=scales[SCORES], backend="pallas"
            )
            if health
            else None
        )
        return o, *pull(do), spread

    def compiled(length):
        q, k = array(1, length, 2, 4, head_dim), array(1, length, 2, head_dim)
        scales, tokens = (
            {role: array(len(OPERANDS[role]), *room, dtype=jnp.float32) for role in recipes}
            for room in ((), (len(statistics.REPORT),) * health)
        )
        brings = FULL if health else AMAX
        tokens = {role: Token(values, brings) for role, values in tokens.items()}
        with jax.sharding.use_abstract_mesh(
            mesh.abstract_mesh
        ):  # from jax 0.11 on Pallas asks it which GPU this is for
            return targets.compile_step(
                jax.jit(both).trace(q, k, k, q, scales, tokens), targets.resolve("h100:1")
            )[0]

    programs = [compiled(length) for length in (1024, 4096)]
    text = programs[1].as_text()
    assert (
        text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3 + health
        and "4096,4096" not in text
        and "__cublas" not in text
    )
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert 3.5 < sizes[1] / sizes[0] < 4.5
