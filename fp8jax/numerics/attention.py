"""Causal attention with all seven GEMMs on FP8 operands: two forward, five backward.

    o_btkgh = attention(q_btkgh, k_bskh, v_bskh, recipes, softmax_scale=0.125, scales=scales, tokens=tokens)

Letters: b batch, t query time, s key time, k KV heads, g query heads a KV head, h head dim. `emulated`, below, is the
definition of what is computed; other backends must agree with it. Written so that blocking does not matter:

forward    S = q·k                                        e4m3 x e4m3
           P~ = exp2(S·c - ceil(m)), m the row maximum in base 2, cast to e4m3 at the fixed scale 1/256
           O = (P~·v) / rowsum(P~ before the cast)        e4m3 x e4m3
backward   S again; P = exp2(S·c - lse), cast like P~
           dV = Pᵀ·dO                                     e4m3 x gradient format
           dP = dO·vᵀ                                     gradient format x e4m3
           dS = P * (dP - rowsum(dO * O)), cast to the gradient format before the softmax scale
           dQ = dS·k, dK = dSᵀ·q                          gradient format x e4m3

with c = softmax_scale * log2(e). Softmax, its sums and all accumulation are float32. Because ceil(m) is an integer, moving
to another block's maximum multiplies P~ by an exact power of two. A probability below 2**-18 of its row's largest casts to
zero: with n keys at most n * 2**-18 of a row's mass is lost (1.6% at 4096 keys, and only if nearly all mass is that thin).

The residuals are q, k, v in FP8, O in the activations' dtype and the log-sum-exp. As in `dot_general`, raw amaxes come back
as the cotangents of tokens: (q, k, dS) for role attention_scores, (v, dO) for attention_values.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fp8jax.numerics import formats
from fp8jax.numerics.dot_general import CHECKPOINT_NAME, gemm, named
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.recipes import GemmRecipe

SCORES, VALUES = "attention_scores", "attention_values"

# P is at most 1, so 1/256 uses e4m3 up to 256 of 448: the next power of two would saturate.
P_SCALE = 1.0 / 256
LOG2_E = math.log2(math.e)

# Dimension numbers: (contracting lhs, rhs), (batch lhs, rhs). S is [b, k, t, g, s].
_QK = (((4,), (3,)), ((0, 2), (0, 2)))      # q_btkgh · k_bskh → S_bktgs, also dP = dO · v
_PV = (((4,), (1,)), ((0, 1), (0, 2)))      # P_bktgs · v_bskh → O_bktgh, also dQ = dS · k
_PTDO = (((2, 3), (1, 3)), ((0, 1), (0, 2)))  # P_bktgs · dO_btkgh → dV_bksh, also dK = dSᵀ · q


def attention(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, recipes: Mapping[str, GemmRecipe], *,
              softmax_scale: float, segment_ids: jax.Array | None = None, scales: Mapping[str, jax.Array] | None = None,
              tokens: Mapping[str, jax.Array] | None = None) -> jax.Array:
    """Causal grouped-query attention.

    Args:
        q_btkgh: queries, KV heads outside, query heads of each group inside.
        k_bskh: keys, as long as the queries.
        v_bskh: values, likewise.
        recipes: a GemmRecipe for `attention_scores` and one for `attention_values`; scaling `bf16` leaves a role's operands
            in the dtype of the inputs.
        softmax_scale: factor on the scores.
        segment_ids: int32 [b, t]; tokens attend within their own segment only. None: one segment.
        scales: role → float32 scales, in the order of `recipes.OPERANDS`; needed by delayed scaling.
        tokens: role → zeros of the same shapes, whose cotangents are raw amaxes.

    Returns:
        O, [b, t, k, g, h], in the dtype of q.
    """
    pair = recipes[SCORES], recipes[VALUES]
    for role, recipe in zip((SCORES, VALUES), pair, strict=True):
        if recipe.scaling == "delayed" and (scales is None or role not in scales):
            raise ValueError(f"attention: delayed scaling of {role} needs scales[{role!r}]")
    scales = {role: scales[role] for role in (SCORES, VALUES) if role in scales} if scales else {}
    tokens = {role: tokens[role] for role in (SCORES, VALUES) if role in tokens} if tokens else {}
    return _attention(pair, softmax_scale, q_btkgh, k_bskh, v_bskh, segment_ids, scales, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(recipes, softmax_scale, q, k, v, segment_ids, scales, tokens):
    return _forward(recipes, softmax_scale, q, k, v, segment_ids, scales, tokens)[0]


def _forward(recipes, softmax_scale, q, k, v, segment_ids, scales, tokens):
    score, value = recipes
    qq, amax_q = score.quantise(q, _scale(scales, SCORES, 0), "q")
    qk, amax_k = score.quantise(k, _scale(scales, SCORES, 1), "k")
    qv, amax_v = value.quantise(v, _scale(scales, VALUES, 0), "v")
    qq, qk = (named(qq), named(qk)) if score.fp8 else (qq, qk)
    qv = named(qv) if value.fp8 else qv
    logits = _logits(qq, qk, segment_ids, softmax_scale, score)
    # A row without any visible key has a maximum of -inf; 0 in its place makes its probabilities 0, not NaN.
    ceiling = jnp.ceil(jnp.max(logits, axis=-1, keepdims=True))
    ceiling = jnp.where(jnp.isneginf(ceiling), 0.0, ceiling)
    p = jnp.exp2(logits - ceiling)
    total = jnp.sum(p, axis=-1, keepdims=True)
    o = gemm(_quantise_p(p, value, v.dtype), qv, _PV, out_dtype=jnp.float32, emulated=value.emulated,
             name="attention_values.fprop")
    o = _swap_heads(o / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
    lse = jnp.where(total > 0, ceiling + jnp.log2(total), jnp.inf)
    amaxes = {SCORES: (amax_q, amax_k), VALUES: (amax_v,)}
    o, lse, amaxes = checkpoint_name((o, lse, amaxes), CHECKPOINT_NAME)
    return o, (qq, qk, qv, o, lse, amaxes, segment_ids, scales, tokens)


def _backward(recipes, softmax_scale, saved, do):
    qq, qk, qv, o, lse, amaxes, segment_ids, scales, tokens = saved
    score, value = recipes
    qdo, amax_do = value.quantise(do, _scale(scales, VALUES, 1), "do")
    p = jnp.exp2(_logits(qq, qk, segment_ids, softmax_scale, score) - lse)
    wide = {"out_dtype": jnp.float32, "precise": True}
    scored, valued = wide | {"emulated": score.emulated}, wide | {"emulated": value.emulated}
    dv = gemm(_quantise_p(p, value, do.dtype), qdo, _PTDO, **valued, name="attention_values.wgrad")
    dp = gemm(qdo, qv, _QK, **valued, name="attention_values.dgrad")
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    ds = p * (dp - jnp.moveaxis(delta, 1, 2)[..., None])
    qds, amax_ds = score.quantise(ds if score.fp8 else ds.astype(do.dtype), _scale(scales, SCORES, 2), "ds")
    dq = gemm(qds, qk, _PV, **scored, name="attention_scores.dgrad") * softmax_scale
    dk = gemm(qds, qq, _PTDO, **scored, name="attention_scores.wgrad") * softmax_scale
    found = {SCORES: (*amaxes[SCORES], amax_ds), VALUES: (*amaxes[VALUES], amax_do)}
    d_tokens = {role: jnp.stack(found[role]) for role in tokens}
    return (_swap_heads(dq).astype(do.dtype), _swap_heads(dk).astype(do.dtype), _swap_heads(dv).astype(do.dtype), None, None, d_tokens)


_attention.defvjp(_forward, _backward)


def _scale(scales: Mapping[str, jax.Array], role: str, index: int) -> jax.Array | None:
    return scales[role][index] if role in scales else None


def _logits(qq: Quantised, qk: Quantised, segment_ids: jax.Array | None, softmax_scale: float, recipe: GemmRecipe) -> jax.Array:
    """Scores in base 2, [b, k, t, g, s] float32, -inf where a query may not look."""
    s = gemm(qq, qk, _QK, out_dtype=jnp.float32, emulated=recipe.emulated, name="attention_scores.fprop")
    length = s.shape[-1]
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jnp.where(visible[:, None, :, None, :], s * (softmax_scale * LOG2_E), -jnp.inf)


def _quantise_p(p: jax.Array, recipe: GemmRecipe, dtype: jnp.dtype) -> Quantised:
    """P at its fixed scale; plain cast where the role is not FP8."""
    if not recipe.fp8:
        return Quantised(p.astype(dtype), None)
    return formats.quantise(p, jnp.float32(P_SCALE), formats.E4M3, emulated=recipe.emulated)


def _swap_heads(x: jax.Array) -> jax.Array:
    """[b, k, t, ...] to [b, t, k, ...]."""
    return jnp.moveaxis(x, 1, 2)
