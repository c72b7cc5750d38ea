"""Calls of the FP8 linear layer, and inputs for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from fp8jax.numerics.gemm import dot_general

PLAIN = (((1,), (0,)), ((), ()))


# name → shape of x, shape of w, dimension numbers
CASES = {
    "matrix": ((5, 24), (24, 7), PLAIN),
    "batch_of_tokens": ((2, 5, 16), (16, 6), (((2,), (0,)), ((), ()))),
    "out_in_weight": ((5, 24), (7, 24), (((1,), (1,)), ((), ()))),
    "out_in_weight_of_tokens": ((2, 3, 16), (6, 16), (((2,), (1,)), ((), ()))),
    "heads_out": ((3, 16), (16, 2, 4), (((1,), (0,)), ((), ()))),
    "heads_in": ((2, 3, 4, 8), (4, 8, 6), (((2, 3), (0, 1)), ((), ()))),
    "permuted_contraction": ((3, 4, 8, 2), (8, 6, 2, 4), (((1, 2, 3), (3, 0, 2)), ((), ()))),
    "permuted_out_of_order": ((4, 3, 8), (5, 8, 4), (((2, 0), (1, 2)), ((), ()))),
    "experts": ((3, 5, 8), (3, 8, 6), (((2,), (1,)), ((0,), (0,)))),
    "experts_inside": ((5, 3, 8, 2), (6, 2, 8, 3), (((2,), (2,)), ((1, 3), (3, 1)))),
    # Regression: XLA's CPU runtime refused fprop of the first (and wgrad of experts_inside) when batch dimensions did not lead.
    "experts_last": ((3, 8, 5), (6, 3, 8), (((1,), (2,)), ((0,), (1,)))),
    "vector": ((9,), (9,), (((0,), (0,)), ((), ()))),
    "outer": ((4,), (3,), (((), ()), ((), ()))),
}


def operands(x_shape, w_shape, dims, dtype=jnp.bfloat16, seed=0, sizes=(1.0, 0.02, 1e-3)):
    """x, w and output gradient as arrays of their dtypes; w is a float32 master weight."""
    rng = np.random.default_rng(seed)
    y_shape = jax.eval_shape(
        lambda a, b: lax.dot_general(a, b, dims),
        jax.ShapeDtypeStruct(x_shape, jnp.float32),
        jax.ShapeDtypeStruct(w_shape, jnp.float32),
    ).shape
    x, w, g = (
        jnp.asarray(rng.normal(size=shape) * size, jnp.float32)
        for shape, size in zip((x_shape, w_shape, y_shape), sizes, strict=True)
    )
    return x.astype(dtype), w, g.astype(dtype)


@functools.partial(jax.jit, static_argnames=("dims", "recipe"))
def run(x, w, g, scales, dims, recipe):
    """y, dx, dw and the token's cotangent."""
    y, vjp = jax.vjp(
        lambda x, w, token: dot_general(x, w, dims, recipe, scales=scales, token=token),
        x,
        w,
        jnp.zeros(2),
    )
    return y, *vjp(g)


@st.composite
def problems(draw):
    """Shapes (odd, 1, empty), which dimensions contract and in which order, magnitudes, zeros and denormals."""
    sizes = st.sampled_from([0, 1, 1, 2, 3, 5, 8])
    contract, batch = draw(st.lists(sizes, max_size=2)), draw(st.lists(sizes, max_size=1))
    x_free, w_free = draw(st.lists(sizes, max_size=2)), draw(st.lists(sizes, max_size=1))
    common = [("b", i, n) for i, n in enumerate(batch)] + [
        ("c", i, n) for i, n in enumerate(contract)
    ]
    x_names = draw(st.permutations(common + [("x", i, n) for i, n in enumerate(x_free)]))
    w_names = draw(st.permutations(common + [("w", i, n) for i, n in enumerate(w_free)]))
    order = draw(st.permutations([name for name in common if name[0] == "c"]))
    dims = (
        (tuple(x_names.index(n) for n in order), tuple(w_names.index(n) for n in order)),
        tuple(tuple(names.index(n) for n in common if n[0] == "b") for names in (x_names, w_names)),
    )
    magnitudes = draw(
        st.tuples(*[st.sampled_from([1e-30, 1e-12, 1e-7, 1e-3, 1.0, 1e4, 1e10, 1e20, 1e30])] * 3)
    )
    kinds = draw(
        st.tuples(*[st.sampled_from(["normal", "normal", "sparse", "zero", "spread"])] * 3)
    )
    shapes = tuple(n for *_, n in x_names), tuple(n for *_, n in w_names)
    return (
        shapes,
        dims,
        magnitudes,
        kinds,
        draw(st.sampled_from([jnp.bfloat16, jnp.float32])),
        draw(st.integers(0, 9)),
    )


def fill(x, kind, rng):
    """Zeros in place of some or all values; or eighty binades of magnitudes, which end in subnormals for tiny tensors."""
    factor = {
        "normal": 1.0,
        "zero": 0.0,
        "sparse": rng.random(x.shape) < 0.3,
        "spread": 2.0 ** -rng.integers(0, 80, x.shape),
    }[kind]
    return jnp.asarray(np.asarray(x).astype(np.float64) * factor, x.dtype)


def result_and_gradients(f, x, w):
    """The cotangent is an argument: a loss inside of the program could be fused with, and so round otherwise."""

    def run(x, w, tokens, g):
        y, vjp = jax.vjp(f, x, w, tokens)
        return y, *vjp(g)

    return jax.jit(run)(x, w, jnp.zeros((2, 2)), jnp.cos(x))
