"""Amax and scales of sharded tensors: bit-equal to unsharded ones, and the same on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.numerics import formats, scaling
from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.recipes import GemmRecipe

RECIPE = GemmRecipe("current")
DELAYED = GemmRecipe("delayed", history_length=2)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def place(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def layer(x, w, g, state):
    """Gradients of an FP8 layer with tokens, and the delayed scaling updated from them."""
    tokens = jnp.zeros(2)
    y, vjp = jax.vjp(
        lambda x, w, t: dot_general(x, w, (((2,), (0,)), ((), ())), RECIPE, token=t), x, w, tokens
    )
    *gradients, amaxes = vjp(g)
    return y, gradients, scaling.update(state, {"qkv": amaxes[None]}, {"qkv": DELAYED})


def arrays():
    """Each row of the batch has another largest value, so that every device's own maximum differs."""
    rng = np.random.default_rng(0)
    sizes = np.ldexp(1.0, np.arange(8))[::-1, None, None]
    x, g = rng.normal(size=(8, 4, 32)) * sizes, rng.normal(size=(8, 4, 16)) * sizes * 1e-6
    return (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(rng.normal(size=(32, 16)), jnp.float32),
        jnp.asarray(g, jnp.bfloat16),
    )


def check_agreement(found, expected):
    """What a run's devices must have in common: every device's copy of amaxes and scales, bit for bit the unsharded ones."""
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).shape == wanted.shape, "not replicated"
            np.testing.assert_array_equal(
                np.asarray(shard.data).view(np.uint32),
                np.asarray(wanted).view(np.uint32),
                err_msg=f"{shard.device}",
            )


@pytest.mark.parametrize(
    ("of_x", "of_w"),
    [
        ((("data", "fsdp"),), ()),
        ((("data", "fsdp"),), ("fsdp",)),
        (("data",), (None, "fsdp")),
        (("data", None, "fsdp"), ("fsdp",)),
        ((None, "fsdp", "data"), ("data", "fsdp")),
    ],
    ids=["batch", "fsdp", "fsdp_columns", "contraction", "sequence"],
)
def test_amaxes_and_scales_of_a_sharded_layer(mesh, of_x, of_w):
    x, w, g = arrays()
    state = scaling.init({"qkv": DELAYED}, 1)
    *results, expected = jax.jit(layer)(x, w, g, state)
    of_g = (*of_x[:2], None) if len(of_x) == 3 else of_x
    sharded = (
        place(mesh, x, *of_x),
        place(mesh, w, *of_w),
        place(mesh, g, *of_g),
        place(mesh, state),
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    *found, state = jax.jit(layer, out_shardings=(None, None, replicated))(*sharded)
    check_agreement(state, expected)
    # With the same operands and scales, the products agree to float32 accumulation and, in bfloat16, one rounding.
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(results), strict=True):
        leaf, wanted = np.asarray(leaf).astype(np.float64), np.asarray(wanted).astype(np.float64)
        np.testing.assert_allclose(leaf, wanted, rtol=2**-7, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "spec", [(("data", "fsdp"),), ("data", None, "fsdp")], ids=["batch", "heads"]
)
def test_amaxes_of_sharded_attention(mesh, spec):
    rng = np.random.default_rng(1)
    sizes = np.ldexp(1.0, np.arange(8))[:, None, None, None]
    q = jnp.asarray(rng.normal(size=(8, 8, 4, 1, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(8, 8, 4, 8)) * sizes, jnp.float32) for _ in range(2))

    def amaxes(q, k, v):
        tokens = {SCORES: jnp.zeros(3), VALUES: jnp.zeros(2)}
        recipes = {SCORES: RECIPE, VALUES: RECIPE}
        return jax.vjp(lambda t: attention(q, k, v, recipes, softmax_scale=0.1, tokens=t), tokens)[
            1
        ](q)[0]

    expected = jax.jit(amaxes)(q, k, v)
    replicated = NamedSharding(mesh, PartitionSpec())
    found = jax.jit(amaxes, out_shardings=replicated)(*(place(mesh, a, *spec) for a in (q, k, v)))
    # The amax of dS is a computed number: equal on all devices, and to the unsharded one up to accumulation.
    np.testing.assert_allclose(found[SCORES][2], expected[SCORES][2], rtol=1e-5)
    check_agreement(
        found, {SCORES: expected[SCORES].at[2].set(found[SCORES][2]), VALUES: expected[VALUES]}
    )


def test_nan_on_one_device_reaches_all(mesh):
    """A maximum over a sharded array drops NaN: it has to be infinity before."""
    x, w, g = arrays()
    *_, state = jax.jit(layer)(
        place(mesh, x.at[6, 1, 2].set(jnp.nan), ("data", "fsdp")),
        place(mesh, w, "fsdp"),
        place(mesh, g, ("data", "fsdp")),
        place(mesh, scaling.init({"qkv": DELAYED}, 1)),
    )
    for shard in state["qkv"]["history"].addressable_shards:
        np.testing.assert_array_equal(np.isposinf(shard.data), [[[True, False], [False, False]]])


@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_reduction_is_detected(mesh, monkeypatch, broken):
    """Each device takes the maximum of its own shard for that of the tensor, as per-device code without pmax does (and as
    cuDNN's attention did under jit): the agreement check fails. With pmax in the same place it passes.
    """
    x, w, g = arrays()
    state = scaling.init({"qkv": DELAYED}, 1)
    *_, expected = jax.jit(layer)(x, w, g, state)
    whole = formats.amax

    def per_device(x, **options):
        if x.ndim != 3:  # the weight, whole on every device
            return whole(x, **options)
        of_shard = (
            (lambda x: whole(x, **options))
            if broken
            else (lambda x: jax.lax.pmax(whole(x, **options), ("data", "fsdp")))
        )
        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=PartitionSpec(("data", "fsdp")),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(x)

    monkeypatch.setattr(formats, "amax", per_device)
    *_, found = jax.jit(lambda *args: layer(*args))(
        place(mesh, x, ("data", "fsdp")),
        place(mesh, w),
        place(mesh, g, ("data", "fsdp")),
        place(mesh, state),
    )
    if broken:
        with pytest.raises(AssertionError):
            check_agreement(found, expected)
    else:
        check_agreement(found, expected)
