"""Compute `dot_general` with FP8 operands in all three GEMMs of a linear layer: fprop, dgrad and
wgrad.

    y = dot_general(x, w, (((1,), (0,)), ((), ())), GemmRecipe("current"))

Forward:   y  = (q_x · q_w) * (scale_x * scale_w)          both e4m3
Backward:  dx = (q_g · q_w) * (scale_g * scale_w)          e5m2 (HYBRID) x e4m3
           dw = (q_x · q_g) * (scale_x * scale_g)

The quantised operands of the forward pass are the residuals: one byte per element, and no second
cast. The operands go into `lax.dot_general` as float8 arrays, never through quantise-dequantise
patterns that a compiler may fail to match. With an emulating recipe the float8 values, exact in
bfloat16, are widened just before a bfloat16 GEMM with float32 output.

With `blockwise` scaling x and g are cut into runs of 128 along the dimension that a GEMM contracts,
w into tiles. wgrad contracts tokens: there g is quantised a second time, and x again from its FP8
residual, as in DeepSeek-V3.

State is passed without side effects. Scales of delayed scaling are an argument; the raw amaxes of x
and of the output gradient come back as the *cotangent of `token`*, zeros (zeros again with `static`
scaling, which takes none); a token may return more (tokens.py). Give each call its own:
cotangents of a token used twice are summed. The weight may come already quantised (once a step,
`quantise_weight`); then `w` only receives the gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fp8jax.numerics import blockwise
from fp8jax.numerics.formats import E4M3, E5M2, Quantised
from fp8jax.numerics.gemm_sharding import Placement, moved, pin
from fp8jax.numerics.recipes import ATTENTION_ROLES, GemmRecipe
from fp8jax.numerics.scaling import operand_scale
from fp8jax.numerics.tokens import Token, as_token, report_cast

# The name that quantised tensors carry for remat policies
# (jax.checkpoint_policies.save_only_these_names).
CHECKPOINT_NAME = "fp8"

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


def gemm(
    lhs: Quantised,
    rhs: Quantised,
    dims: DimensionNumbers,
    recipe: GemmRecipe,
    role: str,
    gemm_pass: str,
    *,
    out_dtype: Any,
) -> jax.Array:
    """Compute one GEMM of quantised (or plain) operands, dequantised by a scalar.

    Args:
        lhs: left operand; its scale is a scalar, or None for 1.
        rhs: right operand.
        dims: dimension numbers, as in `lax.dot_general`.
        recipe: with `emulated`, float8 operands are widened to bfloat16 (exact) and accumulated in
            float32, for devices without FP8 units. It also chooses whether Hopper's tensor cores
            accumulate fast.
        role: name of the role, such as `qkv`.
        gemm_pass: `fprop`, `dgrad` or `wgrad`; profiles and compiled programs show
            `fp8jax.gemm[role.pass]`.
        out_dtype: dtype of the result, rounded once.

    Raises:
        ValueError: both operands are e5m2, which no FP8 tensor core takes.
    """
    name = f"{role}.{gemm_pass}"
    if lhs.data.dtype == E5M2 and rhs.data.dtype == E5M2:
        raise ValueError(
            f"GEMM {name}: both operands are e5m2, which no device multiplies in FP8; make one "
            f"of them e4m3"
        )
    with jax.named_scope(f"fp8jax.gemm[{name}]"):
        a, b = lhs.data, rhs.data
        if recipe.emulated:
            # The barriers, here and below, keep XLA's CPU compiler from folding transposes into the
            # bfloat16 GEMM: it makes forms of it that its own runtime then refuses ("unsupported
            # element type for DotThunk", jax 0.10.2) or sums in bfloat16 (jax 0.12: 2% off for 1024
            # terms). It also refuses some batch dimensions that do not lead: transposing them first
            # has no measurable cost.
            a, b, dims = _batch_first(_widen(a), _widen(b), dims)
            a, b = lax.optimization_barrier((a, b))
        exact = a.dtype == jnp.float32 or _is_precise(recipe, role, gemm_pass)
        out = lax.dot_general(
            a,
            b,
            dims,
            precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
            preferred_element_type=accumulator(a.dtype) if recipe.emulated else out_dtype,
        )
        if recipe.emulated:
            out = lax.optimization_barrier(out)
        scale = _product(lhs.scale, rhs.scale)
        return (out if scale is None else out.astype(jnp.float32) * scale).astype(out_dtype)


def _is_precise(recipe: GemmRecipe, role: str, gemm_pass: str) -> bool:
    """Return whether the highest precision is asked for: no fast accumulation of FP8 products;
    attention asks in BF16, too.
    """
    return recipe.precise(gemm_pass) and (recipe.fp8 or role in ATTENTION_ROLES)


def accumulator(dtype: Any) -> Any:
    """Return the dtype in which products of numbers of this dtype are summed: float32, or float64
    for float64.
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x


def _batch_first(
    a: jax.Array, b: jax.Array, dims: DimensionNumbers
) -> tuple[jax.Array, jax.Array, DimensionNumbers]:
    """Return the same dot_general with batch dimensions in front of both operands."""
    contract, batch = list(dims[0]), list(dims[1])
    operands = [a, b]
    for i, x in enumerate(operands):
        order = (*batch[i], *(j for j in range(x.ndim) if j not in batch[i]))
        if order != tuple(range(x.ndim)):
            operands[i] = lax.transpose(x, order)
            contract[i], batch[i] = (
                tuple(order.index(j) for j in contract[i]),
                tuple(range(len(batch[i]))),
            )
    return operands[0], operands[1], ((contract[0], contract[1]), (batch[0], batch[1]))


def _product(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    if a is None or b is None:
        return a if b is None else b
    return a * b


def quantise_weight(
    w: jax.Array, recipe: GemmRecipe, dtype: Any, scale: jax.Array | None = None
) -> Quantised:
    """Return a weight as GEMM operand, quantised by its recipe; cast to `dtype` if the recipe is
    not FP8.

    With delayed scaling a `scale` from earlier steps may be given; by default it is that of w's own
    amax.

    Raises:
        ValueError: scaling is blockwise and the weight is not a matrix.
    """
    if recipe.scaling == "blockwise" and w.ndim != 2:
        raise ValueError(
            f"blockwise scaling takes weights with two dimensions, not {w.shape}; merge "
            f"dimensions before"
        )
    return recipe.quantise(w if recipe.fp8 else w.astype(dtype), scale, "w", axes=(0, 1))[0]


def dot_general(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: DimensionNumbers,
    recipe: GemmRecipe,
    *,
    quantised_w: Quantised | None = None,
    scales: jax.Array | None = None,
    token: Token | jax.Array | None = None,
    placements: tuple[Placement, Placement] | None = None,
    out_dtype: Any = None,
    role: str = "linear",
    counted: jax.Array | None = None,
) -> jax.Array:
    """Compute `lax.dot_general(x, w)` with FP8 operands, forward and backward.

    Args:
        x: activations, bfloat16 or float32.
        w: weight; its gradient has its shape and dtype. Not read if `quantised_w` is given.
        dimension_numbers: as in `lax.dot_general`: contracting dimensions, batch dimensions.
        recipe: scaling, formats, backend.
        quantised_w: the weight as `quantise_weight` made it.
        scales: float32 [2], scales of x and of the output gradient; needed by delayed scaling.
        token: float32 [2] of zeros, whose cotangent is (amax of x, amax of the output gradient); or
            a Token, which may return the effects of the two casts, and the distribution of the
            output gradient, or amaxes by device.
        placements: placements of x and the output gradient on a mesh; their FP8 values are moved
            between devices.
        out_dtype: dtype of the result; None means that of x.
        role: name of the GEMM in profiles and programs.
        counted: bool, x's first two dimensions: the tokens in statistics; None counts all.

    Raises:
        ValueError: scaling is delayed without scales, or blockwise and not of x times a matrix.
    """
    if recipe.scaling == "delayed" and scales is None:
        raise ValueError(
            f"GEMM {role}: delayed scaling needs `scales`, a float32 array [2] for x and the "
            f"output gradient"
        )
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if recipe.scaling == "blockwise" and (w.ndim, len(x_contract), len(x_batch)) != (2, 1, 0):
        raise ValueError(
            f"GEMM {role}: blockwise scaling contracts one dimension of x with one of a matrix, "
            f"without batch dimensions; "
            f"w has shape {w.shape}, dimension_numbers are {dimension_numbers}"
        )
    if quantised_w is None:
        quantised_w = quantise_weight(lax.stop_gradient(w), recipe, x.dtype)
    dims = (
        (tuple(x_contract), tuple(w_contract)),
        (tuple(x_batch), tuple(w_batch)),
    )  # hashable for any argument
    places = placements or (Placement(None, None),) * 2
    call = _Call(dims, recipe, role, jnp.dtype(out_dtype or x.dtype), x.dtype, w.dtype, *places)
    return _dot_general(call, x, w, quantised_w, scales, as_token(token), counted)


class _Call(NamedTuple):
    """The static arguments of one call."""

    dims: DimensionNumbers
    recipe: GemmRecipe
    role: str
    out_dtype: Any
    x_dtype: Any
    w_dtype: Any
    of_x: Placement
    of_g: Placement


class _Residuals(NamedTuple):
    """The residuals of the backward pass: x as cast, in bytes, the weight, and the token's
    cotangent for x.
    """

    qx: Quantised
    qw: Quantised
    scales: jax.Array | None
    token: Token | None
    counted: jax.Array | None
    of_x: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot_general(
    call: _Call,
    x: jax.Array,
    w: jax.Array,
    qw: Quantised,
    scales: jax.Array | None,
    token: Token | None,
    counted: jax.Array | None,
) -> jax.Array:
    return _forward(call, x, w, qw, scales, token, counted)[0]


def _forward(
    call: _Call,
    x: jax.Array,
    w: jax.Array,
    qw: Quantised,
    scales: jax.Array | None,
    token: Token | None,
    counted: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    recipe = call.recipe
    x = pin(x, call.of_x.cast)
    qx, amax = recipe.quantise(x, operand_scale(scales, "x"), "x", axes=call.dims[0][0])
    qx = moved(qx, call.of_x.cast)
    qx = named(qx) if recipe.fp8 else qx
    of_x = report_cast(
        token, x, qx, amax, call.of_x.cast, counted=counted, emulated=recipe.emulated
    )
    of_x = checkpoint_name(of_x, CHECKPOINT_NAME)
    lhs, rhs = _operands(recipe, moved(qx, call.of_x.gemm), qw)
    y = gemm(lhs, rhs, call.dims, recipe, call.role, "fprop", out_dtype=call.out_dtype)
    return pin(y, call.of_g.cast), _Residuals(as_bytes(qx), qw, scales, token, counted, of_x)


def _backward(call: _Call, saved: _Residuals, g: jax.Array) -> tuple[Any, ...]:
    # It is moved a second time, because keeping it would take memory for every layer.
    qx = moved(from_bytes(saved.qx), *call.of_x)
    recipe, dims = call.recipe, call.dims
    g = pin(g if recipe.fp8 else g.astype(call.x_dtype), call.of_g.cast)
    scale = operand_scale(saved.scales, "g")
    qg, amax = recipe.quantise(g, scale, "g", axes=(g.ndim - 1,))
    of_g = report_cast(
        saved.token,
        g,
        qg,
        amax,
        call.of_g.cast,
        spread=True,
        counted=saved.counted,
        emulated=recipe.emulated,
    )
    qg = moved(qg, *call.of_g)
    lhs, rhs = _operands(recipe, qg, saved.qw)
    dx = _transposed_lhs(call, lhs, rhs, qx.data.ndim)
    if recipe.scaling == "blockwise":
        qx, qg, dims = _along_tokens(call, qx, g)
    lhs, rhs = _operands(recipe, qg, qx)
    dw = _transposed_rhs(call, lhs, rhs, dims, saved.qw.data.ndim)
    d_token = None
    if saved.token is not None and saved.of_x is not None and of_g is not None:
        d_token = saved.token.like(jnp.stack([saved.of_x, of_g]))
    return pin(dx, call.of_x.cast), dw, None, None, d_token, None


_dot_general.defvjp(_forward, _backward)


def _operands(recipe: GemmRecipe, *quantised: Quantised) -> list[Quantised]:
    """Return operands for `gemm`: blockwise scales go into the values, exact in bfloat16 if they
    are powers of two.
    """
    if recipe.scaling != "blockwise":
        return list(quantised)
    return [
        blockwise.widen(q, jnp.bfloat16 if recipe.power_of_two else jnp.float32) for q in quantised
    ]


def _along_tokens(
    call: _Call, qx: Quantised, g: jax.Array
) -> tuple[Quantised, Quantised, DimensionNumbers]:
    """Quantise x and g again as matrices, in runs along the tokens that wgrad contracts; add the
    layer's dimension numbers.
    """
    (x_contract, w_contract), none = call.dims
    features = qx.data.shape[x_contract[0]]
    x = jnp.moveaxis(blockwise.widen(qx, jnp.float32).data, x_contract[0], -1)
    tokens = math.prod(x.shape[:-1])
    again, _ = call.recipe.quantise(x.reshape(tokens, features), None, "x", axes=(0,))
    qg, _ = call.recipe.quantise(g.reshape(tokens, g.shape[-1]), None, "g", axes=(0,))
    return again, qg, (((1,), w_contract), none)


def named(q: Quantised) -> Quantised:
    """Let remat policies keep a quantised tensor (name CHECKPOINT_NAME), so that no tensor is cast
    twice.

    The name is put on the bytes: jax.checkpoint passes the floating residuals that it saves through
    `reduce_precision` with e4m3's field widths, which in IEEE arithmetic end at 240, and so turns
    values of e4m3fn up to 448 into NaN.
    """
    bits = checkpoint_name(lax.bitcast_convert_type(q.data, jnp.uint8), CHECKPOINT_NAME)
    scale = q.scale
    if scale is not None and scale.ndim:  # a scalar follows from the amax
        scale = checkpoint_name(scale, CHECKPOINT_NAME)
    return Quantised(lax.bitcast_convert_type(bits, q.data.dtype), scale)


def as_bytes(q: Quantised) -> Quantised:
    """Return an FP8 tensor as it is kept for the backward pass: uint8.

    XLA's CPU compiler widens float8 arrays to float16 and back to update a slice of them, here all
    layers' for each layer: measured, a third of a small model's step.
    """
    return (
        q._replace(data=lax.bitcast_convert_type(q.data, jnp.uint8))
        if q.data.dtype.itemsize == 1
        else q
    )


def from_bytes(q: Quantised) -> Quantised:
    """Invert `as_bytes` for forward operands, which are e4m3."""
    return (
        q._replace(data=lax.bitcast_convert_type(q.data, E4M3)) if q.data.dtype == jnp.uint8 else q
    )


def _remaining(ndim: int, *used: tuple[int, ...]) -> tuple[int, ...]:
    taken = {i for dims in used for i in dims}
    return tuple(i for i in range(ndim) if i not in taken)


def _transposed_lhs(call: _Call, g: Quantised, w: Quantised, x_ndim: int) -> jax.Array:
    """Return the gradient of a dot_general's left operand: g contracted with w over w's own free
    dimensions.
    """
    (x_contract, w_contract), (x_batch, w_batch) = call.dims
    x_free = _remaining(x_ndim, x_contract, x_batch)
    w_free = _remaining(w.data.ndim, w_contract, w_batch)
    batch = tuple(range(len(x_batch)))
    g_free = tuple(range(len(batch) + len(x_free), g.data.ndim))
    dims = ((g_free, w_free), (batch, w_batch))
    out = gemm(g, w, dims, call.recipe, call.role, "dgrad", out_dtype=call.x_dtype)
    # The result has the batch dimensions, x's free ones, then w's contracted ones in w's order;
    # they are brought to x's order.
    by_w = [x_contract[i] for i in sorted(range(len(w_contract)), key=w_contract.__getitem__)]
    return _in_order(out, (*x_batch, *x_free, *by_w))


def _transposed_rhs(
    call: _Call, g: Quantised, x: Quantised, dims: DimensionNumbers, w_ndim: int
) -> jax.Array:
    """Return the gradient of the right operand: x contracted with g over x's free dimensions."""
    product = functools.partial(
        gemm, recipe=call.recipe, role=call.role, gemm_pass="wgrad", out_dtype=call.w_dtype
    )
    (x_contract, w_contract), (x_batch, w_batch) = dims
    x_free = _remaining(x.data.ndim, x_contract, x_batch)
    w_free = _remaining(w_ndim, w_contract, w_batch)
    batch = tuple(range(len(x_batch)))
    g_x_free = tuple(range(len(batch), len(batch) + len(x_free)))
    by_x = [w_contract[i] for i in sorted(range(len(x_contract)), key=x_contract.__getitem__)]
    # Where w is [outputs, inputs], this order needs no transpose.
    if w_free and by_x and w_free[0] < by_x[0]:
        out = product(g, x, ((g_x_free, x_free), (batch, x_batch)))
        return _in_order(out, (*w_batch, *w_free, *by_x))
    out = product(x, g, ((x_free, g_x_free), (x_batch, batch)))
    return _in_order(out, (*w_batch, *by_x, *w_free))


def _in_order(x: jax.Array, names: tuple[int, ...]) -> jax.Array:
    """Transpose an array whose i-th dimension is dimension names[i] of the result."""
    order = tuple(sorted(range(len(names)), key=names.__getitem__))
    return x if order == tuple(range(len(order))) else lax.transpose(x, order)
