"""List the GEMMs of a traced program (a jaxpr), before compilation.

    traced = jax.jit(step).trace(state, batch)
    gemms = traced_gemms(traced.jaxpr)

The list is cheap (no compilation) and the same on every device. On a device without FP8 units, FP8
arrays are widened just before the dot, so an operand counts as FP8 if only exact widening and
movement of data stand between it and a float8 array.

The list does not say what the compiler makes of a dot (two e5m2 operands count as FP8 here, but no
GPU multiplies them so: read the compiled program), and does not see through arithmetic
(`q.astype(bfloat16) * scale` is not FP8).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from fp8jax.audit.gemms import Gemm, is_fp8, read_fused, read_scope

# Primitives that only move or rename values of their first operand; the others are indices.
_MOVES_FIRST = frozenset(
    (
        "all_gather",
        "all_to_all",
        "broadcast_in_dim",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "layout_constraint",
        "mesh_cast",
        "name",
        "pbroadcast",
        "pcast",
        "ppermute",
        "pvary",
        "reshape",
        "reshard",
        "rev",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    )
)
# Primitives whose result mixes values of several operands: (first, one past the last).
_MIXES = {
    "concatenate": (0, None),
    "select_n": (1, None),
    "dynamic_update_slice": (0, 2),
    "pad": (0, 2),
}

Origins = list[str | None]  # for each value: the float8 dtype that it came from unchanged, or None


class _Place(NamedTuple):
    """The place where a jaxpr runs: its name stack, how often it runs, and whether that number is
    certain.
    """

    scope: str = ""
    count: int = 1
    known: bool = True


def traced_gemms(closed_jaxpr: core.ClosedJaxpr) -> list[Gemm]:
    """Return every dot_general and fused attention of a program, in program order.

    Lengths of scans and the shards of shard_map are multiplied out; the branch of a conditional
    with most FLOPs counts; a while loop counts as one pass, with `count_known` False.

    Args:
        closed_jaxpr: `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr(f)(...)`.

    Returns:
        GEMMs with global shapes (those of one shard inside shard_map) and FLOPs over all devices.

    """
    jaxpr = closed_jaxpr.jaxpr
    return _walk(jaxpr, [None] * len(jaxpr.invars), _Place())[0]


def _walk(jaxpr: core.Jaxpr, inputs: Origins, place: _Place) -> tuple[list[Gemm], Origins]:
    origins = dict(zip(jaxpr.invars, inputs, strict=True))

    def origin(atom: core.Var | core.Literal) -> str | None:
        dtype = str(getattr(atom.aval, "dtype", ""))
        if is_fp8(dtype):
            return dtype
        return None if isinstance(atom, core.Literal) else origins.get(atom)

    gemms = []
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        here = place._replace(
            scope=f"{place.scope}/{stack}" if place.scope and stack else place.scope or stack
        )
        found, outputs = _equation(eqn, [origin(v) for v in eqn.invars], here)
        gemms += found
        origins.update(zip(eqn.outvars, outputs, strict=True))
    return gemms, [origin(v) for v in jaxpr.outvars]


def _unknown(count: int) -> Origins:
    return [None] * count


def _equation(eqn: core.JaxprEqn, inputs: Origins, place: _Place) -> tuple[list[Gemm], Origins]:
    name, nothing = eqn.primitive.name, _unknown(len(eqn.outvars))
    if name == "dot_general":
        return [_dot(eqn, inputs, place)], nothing
    if name.startswith("dot_product_attention_"):
        return [_fused_attention(eqn, inputs, place)], nothing
    if name in _LOOPS:
        return _LOOPS[name](eqn, inputs, place)
    if name == "pallas_call" and read_fused(place.scope):
        return _fused_kernel(eqn, place), nothing
    inner = _inner_jaxprs(eqn)
    if name == "cond":
        return _branches(inner, inputs[1:], place)
    if inner:
        return _call(eqn, inner, inputs, place)
    if name == "optimization_barrier":
        return [], inputs
    return [], [_moved(eqn, inputs)] * len(eqn.outvars)


def _moved(eqn: core.JaxprEqn, inputs: Origins) -> str | None:
    """Return the origin of the result of a primitive without inner jaxprs."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        return inputs[0] if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None
    if name in _MOVES_FIRST:
        return inputs[0]
    if name in _MIXES:
        mixed = inputs[slice(*_MIXES[name])]
        return mixed[0] if len(set(mixed)) == 1 else None
    return None


def _inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    values = []
    for value in eqn.params.values():
        values += value if isinstance(value, (tuple, list)) else [value]
    return [_opened(v) for v in values if isinstance(v, (core.Jaxpr, core.ClosedJaxpr))]


def _opened(jaxpr: Any) -> core.Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _call(
    eqn: core.JaxprEqn, inner: list[core.Jaxpr], inputs: Origins, place: _Place
) -> tuple[list[Gemm], Origins]:
    """Walk what runs inner jaxprs once (jit, custom VJP, remat, shard_map) or once per grid point
    (Pallas).
    """
    nothing = _unknown(len(eqn.outvars))
    if eqn.primitive.name == "shard_map":
        place = place._replace(count=place.count * _shards(eqn))
    elif eqn.primitive.name == "pallas_call":
        grid = eqn.params["grid_mapping"].grid
        static = [size for size in grid if isinstance(size, int)]
        place = place._replace(
            count=place.count * math.prod(static), known=place.known and len(static) == len(grid)
        )
    if len(inner) == 1 and len(inner[0].invars) == len(inputs):
        gemms, outputs = _walk(inner[0], inputs, place)
        return gemms, outputs if len(outputs) == len(nothing) else nothing
    return [
        gemm for jaxpr in inner for gemm in _walk(jaxpr, _unknown(len(jaxpr.invars)), place)[0]
    ], nothing


def _shards(eqn: core.JaxprEqn) -> int:
    """Return over how many devices a shard_map divides its work: the mesh axes that any operand is
    split over.
    """
    named = [
        names if isinstance(names, tuple) else (names,)
        for spec in eqn.params["in_specs"]
        for names in spec
    ]
    axes = {axis for names in named for axis in names if isinstance(axis, str)}
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)


def _scan(eqn: core.JaxprEqn, inputs: Origins, place: _Place) -> tuple[list[Gemm], Origins]:
    body, place = (
        _opened(eqn.params["jaxpr"]),
        place._replace(count=place.count * eqn.params["length"]),
    )
    # The kinds are found by shape, because JAX's versions name these numbers differently: stacked
    # values have one dimension more outside.
    slices = sum(
        _ndim(outer) != _ndim(inner) for outer, inner in zip(eqn.invars, body.invars, strict=True)
    )
    carried = sum(
        _ndim(outer) == _ndim(inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    last = len(inputs) - slices
    return _loop(
        body, inputs[: last - carried], inputs[last - carried : last], inputs[last:], place
    )


def _ndim(atom: core.Var | core.Literal) -> int:
    return getattr(atom.aval, "ndim", 0)


def _while(eqn: core.JaxprEqn, inputs: Origins, place: _Place) -> tuple[list[Gemm], Origins]:
    params = eqn.params
    skipped = params["cond_nconsts"]
    carry = skipped + params["body_nconsts"]
    place = place._replace(known=False)
    return _loop(_opened(params["body_jaxpr"]), inputs[skipped:carry], inputs[carry:], [], place)


_LOOPS = {"scan": _scan, "while": _while}


def _loop(
    body: core.Jaxpr, consts: Origins, carry: Origins, slices: Origins, place: _Place
) -> tuple[list[Gemm], Origins]:
    """Walk a loop's body until the carry's origins are the same before and after."""
    while True:
        gemms, outputs = _walk(body, [*consts, *carry, *slices], place)
        after = [a if a == b else None for a, b in zip(carry, outputs, strict=False)]
        if after == carry:
            return gemms, [*carry, *outputs[len(carry) :]]
        carry = after


def _branches(
    branches: list[core.Jaxpr], inputs: Origins, place: _Place
) -> tuple[list[Gemm], Origins]:
    walked = [_walk(branch, inputs, place) for branch in branches]
    most = max(
        (gemms for gemms, _ in walked), key=lambda gemms: sum(gemm.total_flops for gemm in gemms)
    )
    outputs = zip(*(outputs for _, outputs in walked), strict=True)
    return most, [same[0] if len(set(same)) == 1 else None for same in outputs]


def _dot(eqn: core.JaxprEqn, inputs: Origins, place: _Place) -> Gemm:
    lhs, rhs = (v.aval for v in eqn.invars)
    shape = gemm_shape(lhs.shape, rhs.shape, eqn.params["dimension_numbers"])
    widened = any(
        kind and not is_fp8(str(v.aval.dtype)) for kind, v in zip(inputs, eqn.invars, strict=True)
    )
    return _gemm(
        shape, eqn, inputs, place, "dot (FP8 emulated)" if widened and all(inputs) else "dot", 2
    )


def _fused_attention(eqn: core.JaxprEqn, inputs: Origins, place: _Place) -> Gemm:
    """Return the GEMM of attention by cuDNN: two forward, five backward, with FLOPs of the whole
    square despite masks.
    """
    query, key = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    by_head = eqn.params.get("layout") in (1, "BNTH")
    batch, heads, time = query[0], query[1 if by_head else 2], query[2 if by_head else 1]
    shape = batch * heads, time, key[2 if by_head else 1], query[3]
    fp8 = "fp8" in eqn.primitive.name
    backward = "bwd" in eqn.primitive.name
    return _gemm(shape, eqn, inputs, place, "cuDNN FP8" if fp8 else "cuDNN", 10 if backward else 4)


def _fused_kernel(eqn: core.JaxprEqn, place: _Place) -> list[Gemm]:
    """Return the GEMMs that a kernel's scope names; its first operand is a vector of factors."""
    lhs, rhs = (str(v.aval.dtype) for v in eqn.invars[1:3])
    return [
        Gemm(
            shape=(0, 0, 0, 0),
            lhs_dtype=lhs,
            rhs_dtype=rhs,
            out_dtype=str(eqn.outvars[0].aval.dtype),
            kernel="Pallas",
            count=place.count,
            count_known=place.known,
            **given,
        )
        for given in read_fused(place.scope)
    ]


def _gemm(
    shape: tuple[int, int, int, int],
    eqn: core.JaxprEqn,
    inputs: Origins,
    place: _Place,
    kernel: str,
    factor: int,
) -> Gemm:
    lhs, rhs = (
        kind or str(v.aval.dtype) for kind, v in zip(inputs[:2], eqn.invars[:2], strict=True)
    )
    return Gemm(
        shape=shape,
        lhs_dtype=lhs,
        rhs_dtype=rhs,
        out_dtype=str(eqn.outvars[0].aval.dtype),
        kernel=kernel,
        flops=factor * math.prod(shape),
        count=place.count,
        count_known=place.known,
        **read_scope(place.scope),
    )


def gemm_shape(
    lhs: Sequence[int], rhs: Sequence[int], dimension_numbers: tuple
) -> tuple[int, int, int, int]:
    """Return (batch, m, n, k) of a dot_general of operands of these shapes."""
    (lhs_contract, rhs_contract), (lhs_batch, _) = dimension_numbers
    batch = math.prod(lhs[i] for i in lhs_batch)
    k = math.prod(lhs[i] for i in lhs_contract)
    rhs_k = math.prod(rhs[i] for i in rhs_contract)
    # An empty operand has no elements to divide by its contracted ones.
    m, n = (math.prod(dims) // max(batch * size, 1) for dims, size in ((lhs, k), (rhs, rhs_k)))
    return batch, m, n, k
