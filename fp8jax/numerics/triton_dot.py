"""A matrix product of two FP8 tiles inside a Pallas kernel for Triton, whatever their formats.

    s = dot(q, k.T, interpret=False)        # [m, k] x [k, n], float8 each, to float32

Why it is not `pallas.triton.dot` (jax 0.10 to 0.12): that one refuses e4m3 times e5m2, which Hopper's tensor cores multiply;
and it leaves Triton's `max_num_imprecise_acc` at 0, which adds every 32 products to a second set of registers, by ordinary
instructions. Here one call accumulates at the tensor core's own precision (about 14 bits, over at most a tile's 128 products),
and what is summed over many tiles the kernel adds up in float32, so that no error grows with the sequence.

It uses private parts of JAX: the table of Pallas's lowerings. They are looked up when a kernel is lowered for a GPU.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import mlir

# Anything above a tile's contracted length; not 0 also keeps Triton from folding a float32 addition into the product.
_IMPRECISE = 2**30

_dot_p = core.Primitive("fp8jax_triton_dot")


def dot(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """float32 [m, n] of float8 tiles [m, k] and [k, n].

    Args:
        a: its last dimension should lie contiguous in memory, or the compiler transposes it through shared memory.
        b: its first dimension should, likewise: pass the transpose of a tile [n, k].
        interpret: in Pallas's interpreter: exact products, float32 sums.
    """
    if interpret:
        return lax.dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), (((1,), (0,)), ((), ())),
                               preferred_element_type=jnp.float32)
    return _dot_p.bind(a, b)


@_dot_p.def_abstract_eval
def _shape(a, b):
    return jax.core.ShapedArray((a.shape[0], b.shape[1]), jnp.float32)


def register() -> None:
    """Makes the product known to Pallas's Triton lowering; call before lowering a kernel that uses it.

    Raises:
        ImportError: this JAX has no such lowering, or keeps it elsewhere.
    """
    from jax._src.pallas.triton import lowering

    if _dot_p in lowering.triton_lowering_rules:
        return
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect

    def lower(ctx, a, b):
        [out] = ctx.avals_out
        kind = ir.RankedTensorType.get(out.shape, mlir.dtype_to_ir_type(jnp.dtype(jnp.float32)))
        zeros = lowering._zeros(kind)
        return dialect.dot(a, b, zeros, max_num_imprecise_acc=_IMPRECISE)

    lowering.register_lowering(_dot_p)(lower)
