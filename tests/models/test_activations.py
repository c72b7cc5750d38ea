"""Nonlinearities and their gradients against float64 formulas written here, and Smooth-SwiGLU's arithmetic around its GEMM."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.models import activations

X = np.array([-6.0, -1.7, -0.3, -1e-7, 0.0, 1e-3, 0.4, 1.3, 7.0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def d_silu(x):
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def normal_cdf(x):
    return np.array([0.5 * (1 + math.erf(a / math.sqrt(2))) for a in x])


def values_and_gradient(function, *inputs):
    """The values, and the gradient of their sum with respect to each input, float32."""
    inputs = [jnp.asarray(a, jnp.float32) for a in inputs]
    values, pull = jax.vjp(function, *inputs)
    return values, pull(jnp.ones_like(values))


def test_gelu_is_the_exact_one():
    values, (gradient,) = values_and_gradient(activations.gelu, X)
    density = np.exp(-(X**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(values, X * normal_cdf(X), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, normal_cdf(X) + X * density, rtol=1e-5, atol=1e-6)


def test_relu2():
    values, (gradient,) = values_and_gradient(activations.relu2, X)
    np.testing.assert_allclose(values, np.maximum(X, 0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * np.maximum(X, 0), rtol=1e-6)


@pytest.mark.parametrize(("positive", "negative"), [(0.8, 0.8), (0.3, 1.1)])
def test_xielu(positive, negative):
    """With the curvatures of the start, and with others: ap x² + b x above 0, an (e^x - 1 - x) + b x below."""
    module = activations.XIELU()
    if (positive, negative) == (0.8, 0.8):
        at_start = jax.nn.softplus(module.alpha_p[...]), 0.5 + jax.nn.softplus(module.alpha_n[...])
        np.testing.assert_allclose(at_start, 0.8, rtol=1e-6)
    else:
        module.alpha_p[...] = jnp.float32(np.log(np.expm1(positive)))
        module.alpha_n[...] = jnp.float32(np.log(np.expm1(negative - 0.5)))
    values, (gradient,) = values_and_gradient(module, X)
    below = negative * (np.expm1(np.minimum(X, -1e-6)) - X)
    np.testing.assert_allclose(
        values, np.where(X > 0, positive * X**2, below) + 0.5 * X, rtol=2e-6, atol=1e-7
    )
    slope = np.where(X > 0, 2 * positive * X, negative * np.expm1(X)) + 0.5
    slope[(X > -1e-6) & (X <= 0)] = (
        0.5 - negative
    )  # as the formula has it, e^min(x, -1e-6) is constant there
    np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=2e-6)


def test_swiglu_gates_with_the_gate():
    gate, up = X, X[::-1] + 0.5
    values, gradients = values_and_gradient(activations.swiglu, gate, up)
    np.testing.assert_allclose(values, silu(gate) * up, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients, [d_silu(gate) * up, silu(gate)], rtol=1e-5, atol=1e-6)


def test_smooth_swiglu_has_no_gradient_through_its_scale():
    """Each token is divided by its largest |up|; one of zeros by 1; the divisor counts as a constant."""
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5)) * 30
    up[1, 2] = 0.0
    largest = np.abs(up).max(-1, keepdims=True)
    s = np.where(largest > 0, largest, 1.0)
    bounded, found = activations.smooth_swiglu(
        jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32)
    )
    np.testing.assert_allclose(found, s, rtol=1e-6)
    np.testing.assert_allclose(bounded, silu(gate) * up / s, rtol=1e-5, atol=1e-6)
    _, (d_gate, d_up) = values_and_gradient(
        lambda gate, up: activations.smooth_swiglu(gate, up)[0], gate, up
    )
    np.testing.assert_allclose(d_gate, d_silu(gate) * up / s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_up, silu(gate) / s, rtol=1e-5, atol=1e-6)
    _, (none,) = values_and_gradient(
        lambda up: activations.smooth_swiglu(jnp.asarray(gate, jnp.float32), up)[1], up
    )
    np.testing.assert_array_equal(none, 0)


@pytest.mark.parametrize("name", ["gelu", "relu2", "swiglu"])
def test_results_have_the_dtype_of_what_comes_in(name):
    x = jnp.asarray(X, jnp.bfloat16)
    out = getattr(activations, name)(*[x] * (2 if name == "swiglu" else 1))
    assert out.dtype == jnp.bfloat16 and activations.XIELU()(x).dtype == jnp.bfloat16


def test_gradients_of_sums_computed_by_themselves_are_the_same():
    """A recomputed function has the gradients of the plain one, whichever are computed apart, with static arguments and None."""

    def plain(x, power, alpha, gain=None):
        y = jnp.tanh(alpha * x.astype(jnp.float32)) ** power
        return (y if gain is None else y * gain).astype(x.dtype)

    recomputed = activations.pointwise(plain, static_argnums=(1,), summed_argnums=(2, 3))
    rng = np.random.default_rng(0)
    x, g = jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.bfloat16)
    alpha, gain = jnp.float32(0.5), jnp.asarray(rng.normal(size=8), jnp.float32)
    for arrays in ((x, alpha), (x, alpha, gain)):
        expected = jax.vjp(lambda x, *rest: plain(x, 2, *rest), *arrays)[1](g)
        found = jax.vjp(lambda x, *rest: recomputed(x, 2, *rest), *arrays)[1](g)
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
