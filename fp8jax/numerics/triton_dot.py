"""Multiply two FP8 tiles of any formats inside a Pallas kernel for Triton; also two more
instructions.

    s = dot(q, k.T, interpret=False)                 # [m, k] x [k, n], float8 each, to float32
    o = dot(p, v, total=o, interpret=False)          # added to o by the tensor cores

`pallas.triton.dot` (jax 0.10 to 0.12) refuses e4m3 times e5m2, which Hopper's tensor cores
multiply; and it leaves Triton's `max_num_imprecise_acc` at 0, which adds every 32 products to a
second set of registers, by ordinary instructions. Here all products of one call, and a `total`
given, are summed at the tensor core's own precision: about 14 bits of the largest term. For better
sums over many tiles, add up results in float32.

The module uses a private part of JAX, the table of Pallas's lowerings, which is looked up when a
kernel is lowered for a GPU.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton
from jax.extend import core

# A number above a tile's contracted length; not 0 also keeps Triton from folding a float32 addition
# into the product.
_IMPRECISE = 2**30

_dot_p = core.Primitive("fp8jax_triton_dot")


def dot(
    a: jax.Array, b: jax.Array, total: jax.Array | None = None, *, interpret: bool
) -> jax.Array:
    """Return float32 [m, n], the product of float8 tiles [m, k] and [k, n], added to `total` if
    there is one.

    Args:
        a: its last dimension should lie contiguous in memory, or the compiler transposes it through
            shared memory.
        b: its first dimension should, likewise: pass the transpose of a tile [n, k].
        total: float32 [m, n].
        interpret: run in Pallas's interpreter, with exact products and float32 sums.
    """
    if interpret:
        product = lax.dot_general(
            a.astype(jnp.bfloat16),
            b.astype(jnp.bfloat16),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return product if total is None else total + product
    return _dot_p.bind(
        a, b, jnp.zeros((a.shape[0], b.shape[1]), jnp.float32) if total is None else total
    )


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Return 2**x in float32, within two units in the last place; one instruction on a GPU,
    flushing below 2**-126 to zero.

    Without the flush the compiler surrounds each with three more instructions, a measurable part of
    an attention kernel.
    """
    return jnp.exp2(x) if interpret else _inline("ex2.approx.ftz.f32 $0, $1;", x)


def fma(x: jax.Array, y: jax.Array, z: jax.Array, *, interpret: bool) -> jax.Array:
    """Return x y + z of float32 [m, n], y and z broadcast; on a GPU in one instruction, which
    Triton does not make of two.
    """
    y, z = (jnp.broadcast_to(a, x.shape) for a in (y, z))
    return x * y + z if interpret else _inline("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def _inline(instruction: str, *args: jax.Array) -> jax.Array:
    constraints = ",".join(["=f", *["f"] * len(args)])
    [out] = triton.elementwise_inline_asm(
        instruction,
        args=args,
        constraints=constraints,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)],
    )
    return out


@_dot_p.def_abstract_eval
def _shape(a, b, total):
    return jax.core.ShapedArray(total.shape, total.dtype)


def register() -> None:
    """Register the product with Pallas's Triton lowering; call this before lowering a kernel that
    uses it.

    Raises:
        ImportError: this JAX has no such lowering, or has it elsewhere.
    """
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering

    if _dot_p not in lowering.triton_lowering_rules:
        lowering.register_lowering(_dot_p)(
            lambda _, a, b, total: dialect.dot(a, b, total, max_num_imprecise_acc=_IMPRECISE)
        )
