"""Tokens whose cotangents combine by maximum, however often a layer is called.

    amaxes = as_maximum(zeros)           # once, where the gradient starts
    token = gemm_token(amaxes, x)        # at each GEMM: float32, for numerics' dot_general

The amax of a gradient comes back as a cotangent, and JAX adds cotangents wherever a value is used
twice: weight tying, a loop that closes over a layer, `vmap` over examples. Flax has a dtype whose
cotangents JAX combines by maximum instead (`flax.linen.fp8_ops.fm32`, from which its own FP8 layers
profit), and `as_maximum` turns float32 into it. Only `vmap` of a custom VJP still adds, with a sum
of its own: `_spread` tells when the examples are mapped and the token is not, and takes the maximum.

Tokens end with a count of uses: where someone differentiates the float32 token itself, cotangents
are added, and a count above 1 tells.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.fp8_ops import fm32
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@jax.custom_vjp
def as_maximum(amaxes: jax.Array) -> jax.Array:
    """Return float32 amaxes as the dtype whose cotangents combine by maximum; their own is float32,
    at least 0.
    """
    return lax.convert_element_type(amaxes, fm32)


def _as_maximum_backward(_: None, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.maximum(lax.convert_element_type(g, jnp.float32), 0.0),)


as_maximum.defvjp(lambda amaxes: (as_maximum(amaxes), None), _as_maximum_backward)


def gemm_token(amaxes: jax.Array, x: jax.Array) -> jax.Array:
    """Return a token for one GEMM, float32 [operands].

    Args:
        amaxes: [operands + 1], from `as_maximum`, or float32.
        x: an operand of the GEMM.
    """
    return _with_use(as_float32(amaxes, x))


def as_float32(amaxes: jax.Array, x: jax.Array) -> jax.Array:
    """Return amaxes from `as_maximum` as float32, whose cotangents are combined by maximum; float32
    unchanged.

    Args:
        amaxes: any shape.
        x: an operand of the GEMM that uses them.

    Raises:
        ValueError: this is inside shard_map, which adds the cotangents of its shards.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            "fp8jax: delayed scaling inside shard_map would add the amaxes of shards; "
            "split arrays with jit's shardings instead, or use a recipe with current scaling"
        )
    if amaxes.dtype != fm32:
        return amaxes
    return _as_float32(_spread.bind(amaxes, lax.stop_gradient(x)))


@jax.custom_vjp
def _as_float32(amaxes: jax.Array) -> jax.Array:
    return lax.convert_element_type(amaxes, jnp.float32)


_as_float32.defvjp(
    lambda amaxes: (_as_float32(amaxes), None),
    lambda _, g: (lax.convert_element_type(g, fm32),),
)


@jax.custom_vjp
def _with_use(amaxes: jax.Array) -> jax.Array:
    return amaxes[:-1]


_with_use.defvjp(
    lambda amaxes: (_with_use(amaxes), None),
    lambda _, g: (jnp.concatenate([g, jnp.ones(1, jnp.float32)]),),
)


@jax.custom_vjp
def _copies(amaxes: jax.Array, like: jax.Array) -> jax.Array:
    """Return a copy of the amaxes for each of the leading dimension of `like`; the cotangent is the
    copies' maximum.
    """
    wide = lax.convert_element_type(amaxes, jnp.float32)
    copies = jnp.broadcast_to(wide, (like.shape[0], *wide.shape))
    return lax.convert_element_type(copies, fm32)


def _copies_backward(_: None, g: jax.Array) -> tuple[jax.Array, None]:
    largest = jnp.max(lax.convert_element_type(g, jnp.float32), axis=0)
    return lax.convert_element_type(largest, fm32), None


_copies.defvjp(lambda amaxes, like: (_copies(amaxes, like), None), _copies_backward)

# The identity of its first argument, which follows the second into a vmap.
_spread = Primitive("fp8jax_token")
_spread.def_impl(lambda amaxes, like: amaxes)
_spread.def_abstract_eval(lambda amaxes, like: amaxes)
mlir.register_lowering(_spread, mlir.lower_fun(lambda amaxes, like: amaxes, multiple_results=False))


def _jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    amaxes, like = primals
    out = _spread.bind(amaxes, like)
    if isinstance(tangents[0], ad.Zero):
        return out, ad.Zero.from_primal_value(out)
    return out, _spread.bind(tangents[0], like)


def _transpose(g: Any, amaxes: Any, like: Any) -> tuple[Any, None]:
    return g, None


def _batch(given: Any, dims: Any) -> tuple[Any, Any]:
    amaxes, like = given
    if dims[0] is not None:
        # Each example has a token of its own already.
        return amaxes, dims[0]
    return _copies(amaxes, jnp.moveaxis(like, dims[1], 0)), 0


ad.primitive_jvps[_spread] = _jvp
ad.primitive_transposes[_spread] = _transpose
batching.primitive_batchers[_spread] = _batch
