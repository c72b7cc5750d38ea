"""Drop-in layers against flax's own, and their FP8 products against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax

FP8 = fp8jax.Recipe("current", emulated=True)
X = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))

LAYERS = {
    "Linear": lambda lib, **kw: lib.Linear(8, 6, **kw),
    "LinearGeneral": lambda lib, **kw: lib.LinearGeneral((3, 8), (4, 2), axis=(-2, -1), **kw),
    "batched": lambda lib, **kw: lib.LinearGeneral(8, 6, batch_axis={0: 2}, **kw),
    "Einsum": lambda lib, **kw: lib.Einsum("btnd,dnf->bntf", (8, 3, 6), (3, 6), **kw),
    "Einsum ...": lambda lib, **kw: lib.Einsum("...d,fd->...f", (6, 8), **kw),
}


def forward_and_gradient(layer, x=X):
    def loss(layer, x):
        y = layer(x)
        weights = jnp.sin(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(weights * y.astype(jnp.float32)), y

    (_, y), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, *jax.tree.leaves(grads)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_without_a_recipe_it_is_flaxs_layer_bit_for_bit(name, dtype):
    kwargs = {"dtype": dtype, "bias_init": nnx.initializers.normal()}
    ours = LAYERS[name](fp8jax.nnx, recipe=None, rngs=nnx.Rngs(1), **kwargs)
    theirs = LAYERS[name](nnx, rngs=nnx.Rngs(1), **kwargs)
    pairs = zip(forward_and_gradient(ours), forward_and_gradient(theirs), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_fp8_is_near_flaxs_float32_forward_and_backward(name):
    ours = LAYERS[name](fp8jax.nnx, recipe=FP8, rngs=nnx.Rngs(1))
    theirs = LAYERS[name](nnx, rngs=nnx.Rngs(1))
    pairs = zip(forward_and_gradient(ours), forward_and_gradient(theirs), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        error = np.linalg.norm(np.float64(one) - other) / np.linalg.norm(other)
        assert error < 0.08
    y, plain = ours(X), theirs(X)
    assert np.abs(y - plain).max() > 0


def test_the_product_is_that_of_operands_cast_by_hand():
    """An FP8 Linear against float64 with ml_dtypes' cast at power-of-two scales."""
    layer = fp8jax.nnx.Linear(8, 6, recipe=FP8, use_bias=False, rngs=nnx.Rngs(0))

    def cast(a):
        a = np.float64(a)
        scale = 2.0 ** np.ceil(np.log2(np.abs(a).max() / 448))
        return np.float64(np.float32(a / scale).astype(jnp.float8_e4m3fn)) * scale

    np.testing.assert_allclose(layer(X), cast(X) @ cast(layer.kernel[...]), rtol=1e-5, atol=1e-6)


def test_an_einsum_that_is_no_single_gemm_is_refused():
    layer = fp8jax.nnx.Einsum("ab,cd->ac", (8, 6), recipe=FP8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'b' is repeated or summed"):
        layer(jnp.ones((3, 4)))


def test_a_recipe_that_is_none_of_ours_is_refused():
    with pytest.raises(TypeError, match="Linear: recipe='delayed' is neither"):
        fp8jax.nnx.Linear(2, 2, recipe="delayed", rngs=nnx.Rngs(0))
