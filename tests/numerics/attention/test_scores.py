"""Largest logit and entropy of attention against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.numerics.attention.scores import score_statistics
from fp8jax.numerics.gemm_sharding import Partition
from fp8jax.numerics.recipes import GemmRecipe
from tests.numerics import reference
from tests.numerics.reference import E4M3

SCALES = np.asarray([2.0**-5, 2.0**-9, 1.0], np.float32)


def operands(length, heads=2, groups=3, size=1.0, width=16):
    rng = np.random.default_rng(length)
    return (
        jnp.asarray(rng.standard_normal((2, length, heads, groups, width)) * size, jnp.bfloat16),
        jnp.asarray(rng.standard_normal((2, length, heads, width)) * 0.3, jnp.bfloat16),
    )


def exact(q, k, scales, softmax_scale, segments=None):
    """In float64, a row at a time; scales None: no cast."""
    if scales is not None:
        q, k = (
            reference.quantise(np.asarray(x).astype(np.float32), E4M3, scales[i])
            * np.float64(scales[i])
            for i, x in enumerate((q, k))
        )
    q, k = np.asarray(q).astype(np.float64), np.asarray(k).astype(np.float64)
    largest, entropies = -np.inf, []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
            scores = softmax_scale * np.einsum("kgh,skh->kgs", q[b, t], k[b, seen])
            largest = max(largest, scores.max())
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            entropies.append(-np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1))
    return largest, np.mean(entropies)


@pytest.mark.parametrize("length", [1, 31, 300, 530])
@pytest.mark.parametrize("scaling", ["delayed", "current", "bf16"])
def test_equal_to_float64(scaling, length):
    """Lengths with one chunk, and several with a rest; scores of large queries reach far beyond what exp takes."""
    q, k = operands(length, size=30.0 if length == 300 else 2.0)
    scales = {"delayed": SCALES, "bf16": None}.get(scaling)
    if scaling == "current":
        scales = [reference.scale_of(float(jnp.max(jnp.abs(x))), E4M3) for x in (q, k)]
    found = jax.jit(
        functools.partial(score_statistics, recipe=GemmRecipe(scaling), softmax_scale=0.4)
    )(q, k, scales=jnp.asarray(SCALES))
    largest, entropy = exact(q, k, scales, 0.4)
    np.testing.assert_allclose(found["max_logit"], largest, rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "segmented"), [(1, False), (300, True), (530, False)])
def test_the_kernel_equals_float64(length, segmented):
    """Interpreted; also of queries whose first tiles of keys are all hidden."""
    q, k = operands(length, size=30.0 if length == 300 else 2.0, width=64)
    segments = (
        np.sort(np.random.default_rng(0).integers(0, 3, (2, length)), axis=1) if segmented else None
    )
    run = jax.jit(
        functools.partial(
            score_statistics,
            recipe=GemmRecipe("delayed"),
            softmax_scale=0.4,
            backend="pallas",
            segment_ids=None if segments is None else jnp.asarray(segments, jnp.int32),
        )
    )
    largest, entropy = exact(q, k, SCALES, 0.4, segments)
    found = run(q, k, scales=jnp.asarray(SCALES))
    np.testing.assert_allclose(found["max_logit"], largest, rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=2e-5, atol=1e-5)
    found = run(q, k.at[1, 0, 0, 3].set(jnp.nan), scales=jnp.asarray(SCALES))
    assert np.isinf(found["max_logit"]) and np.isnan(found["entropy"])


def test_documents_are_seen_apart():
    q, k = operands(40)
    segments = np.repeat(np.arange(4), 10)[None] + np.asarray([[0], [9]])
    found = score_statistics(
        q, k, GemmRecipe("bf16"), softmax_scale=1.0, segment_ids=jnp.asarray(segments, jnp.int32)
    )
    np.testing.assert_allclose(
        [found["max_logit"], found["entropy"]], exact(q, k, None, 1.0, segments), rtol=2e-5
    )


def test_uniform_attention_has_the_largest_entropy_and_bad_scores_show():
    q, k = jnp.zeros((1, 8, 1, 1, 4)), jnp.ones((1, 8, 1, 4))
    found = score_statistics(q, k, GemmRecipe("bf16"), softmax_scale=1.0)
    assert float(found["max_logit"]) == 0
    assert float(found["entropy"]) == pytest.approx(np.mean(np.log(np.arange(1, 9))), rel=1e-6)
    found = score_statistics(q, k.at[0, 3].set(jnp.nan), GemmRecipe("bf16"), softmax_scale=1.0)
    assert np.isinf(found["max_logit"]) and np.isnan(found["entropy"])


@pytest.mark.parametrize("spec", [("data",), (None, None, "data"), (None, "data")])
def test_sharded_equals_whole(spec):
    """The maximum to the bit, the mean but for the order of summation; and both what float64 says."""
    q, k = (jnp.concatenate([x, 1.5 * x, -x, 0.5 * x]) for x in operands(64, heads=8))
    run = jax.jit(
        functools.partial(
            score_statistics,
            recipe=GemmRecipe("delayed"),
            softmax_scale=0.3,
            scales=jnp.asarray(SCALES),
        )
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found, whole = (
        run(*(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x in (q, k))),
        run(q, k),
    )
    assert float(found["max_logit"]) == float(whole["max_logit"])
    np.testing.assert_allclose(found["entropy"], whole["entropy"], rtol=1e-6)
    np.testing.assert_allclose(
        [whole["max_logit"], whole["entropy"]], exact(q, k, SCALES, 0.3), rtol=2e-5
    )


def test_the_kernel_is_traced_on_two_devices():
    """Regression: what it returned did not fit `shard_map`, so every step with statistics of a run on two devices raised."""
    mesh = jax.make_mesh(
        (2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(64, width=64))
    run = functools.partial(
        score_statistics,
        recipe=GemmRecipe("current"),
        softmax_scale=0.3,
        backend="pallas",
        partition=Partition("fsdp", None, None, None),
    )
    with jax.set_mesh(mesh):
        found = jax.eval_shape(run, q, k)
    assert found["max_logit"].shape == found["entropy"].shape == ()


def test_as_many_queries_as_an_integer_holds():
    """2**31 of them, traced only: a Python integer of that size overflows where an array is divided by it."""
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((8, 131072, 32, 64, 64), (8, 131072, 32, 64))
    )
    found = jax.eval_shape(
        functools.partial(score_statistics, recipe=GemmRecipe("current"), softmax_scale=0.3), q, k
    )
    assert found["entropy"].shape == ()
