"""FP8 GEMMs and attention on plain arrays, without modules: `dot_general`, `attention`, `kurtosis`.

    y_btf = dot_general(x_btd, w_df, (((2,), (0,)), ((), ())), Recipe("current"))
    o_btnh = attention(q_btnh, k_bskh, v_bskh, recipe, softmax_scale=0.125)

All are differentiable where their inputs are, with FP8 GEMMs in the backward pass, too. There is no
hidden state: scales of delayed scaling are arguments, amaxes the cotangents of tokens. Without
scales the amax of the moment is taken.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.library.explicit_mesh import place_inside
from fp8jax.library.recipe import Recipe, check_recipe
from fp8jax.numerics import gemm as gemm_lib
from fp8jax.numerics import statistics
from fp8jax.numerics.attention import definition
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.tokens import Token


def dot_general(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: Any,
    recipe: Recipe | None,
    *,
    scales: jax.Array | None = None,
    token: Token | jax.Array | None = None,
    role: str = "linear",
    precision: Any = None,
    preferred_element_type: Any = None,
    known: bool = False,
) -> jax.Array:
    """Compute `lax.dot_general(x, w)` with FP8 operands, forward and backward.

    Args:
        x: activations, floating.
        w: weight, floating; its scale is that of its amax.
        dimension_numbers: as in `lax.dot_general`: ((x's contracting, w's), (x's batch, w's)).
        recipe: how; None computes `lax.dot_general` itself.
        scales: float32 [2], scales of x and of the output gradient under delayed scaling; 0 stands
            for an unknown one, and None for two of them: then the amax of the moment gives the
            scale.
        token: float32 [2] of zeros, whose cotangent is (amax of x, amax of the output gradient).
            Cotangents of one used twice are summed: give each call its own.
        role: any name; profiles and programs show it.
        precision: as in `lax.dot_general`, for recipe None; FP8 GEMMs have the recipe's.
        preferred_element_type: dtype of the result; None means that of x.
        known: whether no scale is 0.

    Raises:
        TypeError: recipe is no recipe, or an operand is not floating.
        ValueError: shapes do not fit; one line names them.
    """
    check_recipe(recipe, "fp8jax.dot_general")
    dims = _normal(dimension_numbers, x, w)
    if recipe is None:
        return lax.dot_general(
            x, w, dims, precision=precision, preferred_element_type=preferred_element_type
        )
    _check_floating(x=x, w=w)
    gemms = recipe.gemm(known=known, stateless=scales is None)

    def product(arrays: Any) -> jax.Array:
        x, w, scales, token = arrays
        x, w, as_matrix, shape = _as_matrix(x, w, dims)
        y = gemm_lib.dot_general(
            x,
            w,
            as_matrix,
            gemms,
            scales=scales,
            token=token,
            role=role,
            out_dtype=preferred_element_type,
        )
        return y.reshape(shape)

    return place_inside(product, (x, w, scales, token), _split_alike(x, w, dims))


def _normal(dims: Any, x: jax.Array, w: jax.Array) -> gemm_lib.DimensionNumbers:
    """Return dimension numbers as tuples of integers from 0 on, after a check of the sizes."""
    (x_contract, w_contract), (x_batch, w_batch) = dims
    pairs = []
    for ours, theirs in ((x_contract, w_contract), (x_batch, w_batch)):
        ours = tuple(int(i) % x.ndim for i in ours)
        theirs = tuple(int(i) % w.ndim for i in theirs)
        if [x.shape[i] for i in ours] != [w.shape[i] for i in theirs]:
            raise ValueError(
                f"fp8jax.dot_general: dimensions {ours} of x {x.shape} and {theirs} of w "
                f"{w.shape} differ in size"
            )
        pairs.append((ours, theirs))
    return pairs[0], pairs[1]


def _check_floating(**operands: jax.Array) -> None:
    for name, operand in operands.items():
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise TypeError(f"fp8jax.dot_general: {name} is {operand.dtype}, not floating")


def _split_alike(
    x: jax.Array, w: jax.Array, dims: gemm_lib.DimensionNumbers
) -> list[tuple[jax.Array, int]]:
    """Return for each dimension of a product the operand that it comes from, and which of its
    dimensions.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dims
    of_x = (*x_batch, *_rest(x.ndim, *x_contract, *x_batch))
    of_w = _rest(w.ndim, *w_contract, *w_batch)
    return [(x, i) for i in of_x] + [(w, i) for i in of_w]


def _as_matrix(
    x: jax.Array, w: jax.Array, dims: gemm_lib.DimensionNumbers
) -> tuple[jax.Array, jax.Array, gemm_lib.DimensionNumbers, tuple[int, ...]]:
    """Return the same product with a weight [*batch, inputs, outputs], and the shape of its result.

    XLA's CPU compiler refuses some bfloat16 GEMMs that contract several dimensions, and blocks of
    128 x 128 are those of a matrix.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dims
    w_free = _rest(w.ndim, *w_contract, *w_batch)
    x_free = _rest(x.ndim, *x_contract, *x_batch)
    sizes = [x.shape[i] for i in (*x_batch, *x_free)]
    shape = (*sizes, *(w.shape[i] for i in w_free))
    if len(w_contract) == len(w_free) == 1:
        return x, w, dims, shape
    outputs = math.prod(w.shape[i] for i in w_free)
    inputs = math.prod(w.shape[i] for i in w_contract)
    batch = tuple(range(len(w_batch)))
    w = lax.transpose(w, (*w_batch, *w_contract, *w_free))
    w = w.reshape(*w.shape[: len(batch)], inputs, outputs)
    x = lax.transpose(x, (*x_batch, *x_free, *x_contract)).reshape(*sizes, inputs)
    return x, w, (((x.ndim - 1,), (len(batch),)), (batch, batch)), shape


def _rest(ndim: int, *taken: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in taken)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    recipe: Recipe | None,
    *,
    softmax_scale: float | None = None,
    segment_ids: jax.Array | None = None,
    scales: Mapping[str, jax.Array] | None = None,
    tokens: Mapping[str, Token | jax.Array] | None = None,
    backend: str = "composed",
    known: bool = False,
) -> jax.Array:
    """Compute causal attention, with grouped queries or not, all seven GEMMs in FP8.

    Query head i attends to KV head i // (n / k heads), as everywhere.

    Args:
        q: queries [b, t, n, h].
        k: keys [b, s, k, h], with s equal to t, and n a multiple of k.
        v: values [b, s, k, h].
        recipe: how; None computes the same in the dtype of the inputs.
        softmax_scale: factor on the scores; None means 1 / sqrt(h).
        segment_ids: integers [b, t]; tokens attend within their own segment only.
        scales: `attention_scores` → float32 [3] for q, k and dS, `attention_values` → [2] for v and
            dO, as in `dot_general`.
        tokens: the same names → zeros of those shapes, whose cotangents are amaxes.
        backend: `composed`, memory linear in t; `emulated`, all rows at once; `pallas`, one kernel,
            on Hopper GPUs.
        known: whether no scale is 0.

    Returns:
        [b, t, n, h], in the dtype of q.

    Raises:
        TypeError: recipe is no recipe.
        ValueError: shapes or dtypes do not fit.
    """
    check_recipe(recipe, "fp8jax.attention")
    check_attention(q, k, v, segment_ids)
    h, groups = q.shape[3], q.shape[2] // k.shape[2]
    gemms = GemmRecipe("bf16")
    if recipe is not None:
        gemms = recipe.gemm(known=known, stateless=scales is None)
    scale = 1 / math.sqrt(h) if softmax_scale is None else softmax_scale

    def attend(arrays: Any) -> jax.Array:
        q, k, v, segment_ids, scales, tokens = arrays
        o = definition.attention(
            q.reshape(*q.shape[:2], k.shape[2], groups, h),
            k,
            v,
            {definition.SCORES: gemms, definition.VALUES: gemms},
            softmax_scale=scale,
            segment_ids=segment_ids,
            scales=scales,
            tokens=tokens,
            backend=backend,
        )
        return o.reshape(q.shape)

    alike = [(q, i) for i in range(4)]
    return place_inside(attend, (q, k, v, segment_ids, scales, tokens), alike)


def check_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> None:
    """Raise ValueError, whose one line names shape or dtype, if these are not operands of
    `attention`.
    """
    where = "fp8jax.attention"
    for name, x, letters in (
        ("q", q, "b, t, n, h"),
        ("k", k, "b, s, k, h"),
        ("v", v, "b, s, k, h"),
    ):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{where}: {name} is {x.dtype}{list(x.shape)}, not a floating array [{letters}]"
            )
    if k.shape != v.shape:
        raise ValueError(
            f"{where}: k {list(k.shape)} and v {list(v.shape)} differ; both are [b, s, k, h]"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{where}: q {list(q.shape)} and k {list(k.shape)} differ in batch or head dimension"
        )
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{where}: {q.shape[1]} queries and {k.shape[1]} keys; it is causal, so both are as many"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{where}: {q.shape[2]} query heads are not a multiple of {k.shape[2]} KV heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{where}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype"
        )
    if segment_ids is None:
        return
    if segment_ids.shape != q.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"{where}: segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}, not "
            f"integers {list(q.shape[:2])}"
        )


def kurtosis(x: jax.Array, *, counted: jax.Array | None = None, pooled: bool = False) -> jax.Array:
    """Return the uncentred kurtosis of an activation, float32: 3 for a Gaussian, the number of
    features at most.

    It is the mean over tokens of mean(x^4) / mean(x^2)^2 over the features, the outlier statistic
    of the FOG paper (arXiv 2505.20524); tokens of zeros are left out. It is not differentiable.

    Args:
        x: [..., features], floating; [batch, tokens, ..., features] if `counted` or `pooled` is
            given.
        counted: bool [batch, tokens]: the tokens that count; None counts all.
        pooled: take each sequence, tokens x features, as one sample.

    Raises:
        ValueError: x is no such array.
    """
    least = 3 if pooled or counted is not None else 1
    if x.ndim < least or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"fp8jax.kurtosis: {x.dtype}{list(x.shape)} is not a floating array [..., features]"
        )
    x = x.reshape((1,) * max(3 - x.ndim, 0) + x.shape)
    found = statistics.distribution(lax.stop_gradient(x), counted)
    return found["pooled_kurtosis" if pooled else "kurtosis"]
