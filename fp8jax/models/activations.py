"""The nonlinearities of the FFN: xIELU, GeLU, squared ReLU, and the two gated ones (FOG paper,
section 3 and appendix B).

All compute in float32 and return the dtype of their input. A function under `pointwise` keeps no
float32 array for the backward pass, only its inputs: the rest is cheaper to compute again than to
move through memory (GeLU alone would keep three arrays).
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

GATED = ("swiglu", "smooth_swiglu")


def pointwise(
    function: Callable[..., Any],
    static_argnums: tuple[int, ...] = (),
    summed_argnums: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Return the same function, differentiated from its inputs alone.

    A compiler that sees the same value computed twice keeps the first, which would undo this
    outside of loops; `_again` hides that they are the same. The barriers of `jax.checkpoint` would
    do so as well, but stand between the function and its neighbours, which then no kernel fuses.

    Args:
        function: any function of arrays.
        static_argnums: arguments that are no arrays.
        summed_argnums: arguments whose gradients are sums over all tokens, and are computed by
            themselves. Where a compiler would keep a float32 array of what they share with the
            other gradients, this
            costs less.
    """

    @functools.wraps(function)
    def recomputed(*args: Any) -> Any:
        arrays = {n: arg for n, arg in enumerate(args) if n not in static_argnums}

        def computed(arrays: dict[int, Any]) -> Any:
            return function(*(arrays.get(n, arg) for n, arg in enumerate(args)))

        def gradients(arrays: dict[int, Any], g: Any) -> tuple[dict[int, Any]]:
            def of(argnums: Iterable[int], one: float) -> dict[int, Any]:
                mine = {n: _again(arrays[n], one) for n in argnums}
                others = {n: _again(arrays[n], one) for n in arrays if n not in mine}
                return jax.vjp(lambda mine: computed(mine | others), mine)[1](g)[0]

            summed = [n for n in arrays if n in summed_argnums]
            others = [n for n in arrays if n not in summed]
            return (of(others, 1.0) | of(summed, -1.0),)

        call = jax.custom_vjp(computed)
        call.defvjp(lambda arrays: (call(arrays), arrays), gradients)
        return call(arrays)

    return recomputed


def _again(arrays: Any, one: float) -> Any:
    """Return arrays times `one`, 1 or -1, twice, the first time without telling the compiler;
    exact, and no pass of its own.
    """

    def again(x: jax.Array) -> jax.Array:
        return one * (x * jax.lax.optimization_barrier(jnp.full((), one, x.dtype)))

    return jax.tree.map(again, arrays)


class XIELU(nnx.Module):
    """xIELU with trained positive and negative curvature, both 0.8 at the start (Huang and Schlag
    2024).
    """

    beta, eps = 0.5, -1e-6

    def __init__(self):
        self.alpha_p = nnx.Param(jnp.full((), math.log(math.expm1(0.8)), jnp.float32), axes=())
        self.alpha_n = nnx.Param(
            jnp.full((), math.log(math.expm1(0.8 - self.beta)), jnp.float32), axes=()
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ap x² + b x for x > 0, otherwise an (expm1(min(x, eps)) - x) + b x."""
        return _xielu(x, self.alpha_p[...], self.alpha_n[...], self.beta, self.eps)


@pointwise
def _xielu(
    x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array, beta: float, eps: float
) -> jax.Array:
    wide = x.astype(jnp.float32)
    positive = jax.nn.softplus(alpha_p) * wide * wide
    negative = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(wide, eps)) - wide)
    return (jnp.where(wide > 0, positive, negative) + beta * wide).astype(x.dtype)


@pointwise
def gelu(x: jax.Array) -> jax.Array:
    """Return the exact GeLU."""
    wide = x.astype(jnp.float32)
    # erf, unlike erfc in jax.nn.gelu, is one instruction for XLA, and keeps the whole function in
    # one fusion.
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


@pointwise
def relu2(x: jax.Array) -> jax.Array:
    """Return the squared ReLU."""
    return (jax.nn.relu(x.astype(jnp.float32)) ** 2).astype(x.dtype)


@pointwise
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return silu(gate) * up."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


@pointwise
def smooth_swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return silu(gate) * up / s and s, the largest |up| of each token, which bounds the input of
    the next FP8 GEMM.

    No gradient flows through s (Fishman et al. 2024); s = 0 counts as 1. The caller multiplies the
    GEMM's output by s.
    """
    s = jnp.max(jnp.abs(jax.lax.stop_gradient(up.astype(jnp.float32))), axis=-1, keepdims=True)
    s = jnp.where(s > 0, s, 1.0)
    return (jax.nn.silu(gate.astype(jnp.float32)) * (up.astype(jnp.float32) / s)).astype(
        up.dtype
    ), s
