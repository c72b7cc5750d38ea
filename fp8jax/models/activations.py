"""Nonlinearities of the FFN: xIELU, GeLU, squared ReLU, and the two gated ones (FOG paper, section 3 and appendix B).

All compute in float32 and return the dtype of their input.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

GATED = ("swiglu", "smooth_swiglu")


class XIELU(nnx.Module):
    """xIELU with trained positive and negative curvature, both 0.8 at the start (Huang and Schlag 2024)."""

    beta, eps = 0.5, -1e-6

    def __init__(self):
        self.alpha_p = nnx.Param(jnp.full((), math.log(math.expm1(0.8)), jnp.float32), axes=())
        self.alpha_n = nnx.Param(jnp.full((), math.log(math.expm1(0.8 - self.beta)), jnp.float32), axes=())

    def __call__(self, x: jax.Array) -> jax.Array:
        """X > 0: ap x² + b x; else an (expm1(min(x, eps)) - x) + b x."""
        wide = x.astype(jnp.float32)
        positive = jax.nn.softplus(self.alpha_p[...]) * wide * wide
        negative = (self.beta + jax.nn.softplus(self.alpha_n[...])) * (jnp.expm1(jnp.minimum(wide, self.eps)) - wide)
        return (jnp.where(wide > 0, positive, negative) + self.beta * wide).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GeLU."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def relu2(x: jax.Array) -> jax.Array:
    """Squared ReLU."""
    return (jax.nn.relu(x.astype(jnp.float32)) ** 2).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


def smooth_swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(gate) * up / s and s, the largest |up| of each token: the FP8 GEMM after it sees a bounded input.

    No gradient flows through s (Fishman et al. 2024); s = 0 counts as 1. The caller multiplies the GEMM's output by s.
    """
    s = jnp.max(jnp.abs(jax.lax.stop_gradient(up.astype(jnp.float32))), axis=-1, keepdims=True)
    s = jnp.where(s > 0, s, 1.0)
    return (jax.nn.silu(gate.astype(jnp.float32)) * (up.astype(jnp.float32) / s)).astype(up.dtype), s
