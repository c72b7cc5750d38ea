"""Compute causal attention with all seven GEMMs on FP8 operands: two forward, five backward.

    o_btkgh = attention(q_btkgh, k_bskh, v_bskh, recipes, softmax_scale=0.125, scales=scales, tokens=tokens)

Letters: b batch, t query time, s key time, k KV heads, g query heads per KV head, h head dim.
Backend `emulated` takes all rows at once and is the definition of what is computed; `composed`
takes them in chunks, in memory linear in the sequence length; `pallas` is one fused kernel forward
and two backward, for Hopper GPUs. Where no GEMM is in FP8, `cudnn` is NVIDIA's flash attention. The
definition does not depend on blocking:

forward    S = q·k                                        e4m3 x e4m3
           P~ = exp2(S·c - ceil(m)), m the row maximum in base 2, cast to e4m3 at the fixed scale 1/256
           O = (P~·v) / w, w = rowsum(P~)                 e4m3 x e4m3
backward   S and P~ again, cast alike; dO~ = dO / w, cast to the gradient format
           dV = P~ᵀ·dO~                                   e4m3 x gradient format
           dP = dO~·vᵀ                                    gradient format x e4m3
           dS = P~ * (dP - rowsum(dO~ * O)), P~ before its cast; cast to the gradient format before the softmax scale
           dQ = dS·k, dK = dSᵀ·q                          gradient format x e4m3

with c = softmax_scale * log2(e); w, and dO~ in all places, are of the values as cast. Softmax, its
sums and all accumulation are float32. Three things follow, which hold for every backend and are
tested:

- The weights of O sum to 1 for any rounding of P~, and dV takes the same ones.
- A row of dS sums to 0, up to the rounding of O and of the weights, for any common part of the values: dP and what is
  subtracted from it come from one dO~. (From dO before its cast, dW_k of a trained model's last layer was wrong by 105%.)
- Because ceil(m) is an integer, moving to another block's maximum multiplies P~ by an exact power of two.

P~ is relative to its row, so flat rows keep their precision at any length: dV loses less than 1% of
its magnitude at 131072 keys. The loss is this: a probability below 2**-18 of its row's largest
casts to zero, one below 2**-14 to few bits. With n keys that is at most n * 2**-18 / w of the row's
mass in O and dV (of n equal ones nothing, as w is n); only a row that gives a few keys much and
100,000 others almost nothing each, together as much, comes near. Where w is above 2**6 the rest of
it, an exact power of two, is taken from P~ and not from dO, whose format ends, too: in dV, a
probability below 2**-23 is then lost as well.

The residuals are q, k, v in FP8, O in the activations' dtype, ceil(m) and w. As in `dot_general`,
raw amaxes come back as the cotangents of tokens: (q, k, dS) for role attention_scores, (v, dO~) for
attention_values; and as there, tokens may bring back `statistics.REPORT`, of dO~ with the
distribution of dO. dS is counted over the whole square of scores, hidden ones zero. A role in BF16
casts to the activations' dtype; with attention_values in it, dO is not divided.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fp8jax.numerics import formats, statistics
from fp8jax.numerics.attention import composed as attention_composed
from fp8jax.numerics.attention import pallas as attention_pallas
from fp8jax.numerics.attention import rows as attention_rows
from fp8jax.numerics.attention.rows import Call, Operands, Residuals, Weights
from fp8jax.numerics.gemm import CHECKPOINT_NAME, as_bytes, from_bytes, named
from fp8jax.numerics.gemm_sharding import Partition, Placement, moved, pin, placements
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.scaling import operand_scale
from fp8jax.numerics.tokens import FULL, Token, as_token, report_amax, report_cast

SCORES, VALUES = "attention_scores", "attention_values"
BACKENDS = ("emulated", "composed", "pallas")
CUDNN = "cudnn"  # one more backend, for BF16 alone, the usual choice for BF16 on a GPU
# Blockwise scaling of P and dS would make results depend on how rows are chunked; no backend
# supports it.
SCALINGS = (
    "delayed",
    "current",
    "static",
    "bf16",
)  # scalings with one scale per tensor, the same for every chunk


def attention(
    q_btkgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    recipes: Mapping[str, GemmRecipe],
    *,
    softmax_scale: float,
    segment_ids: jax.Array | None = None,
    scales: Mapping[str, jax.Array] | None = None,
    tokens: Mapping[str, Token | jax.Array] | None = None,
    backend: str = "emulated",
    partition: Partition | None = None,
    counted: jax.Array | None = None,
) -> jax.Array:
    """Compute causal grouped-query attention.

    Args:
        q_btkgh: queries, KV heads outside, query heads of each group inside.
        k_bskh: keys, as long as the queries.
        v_bskh: values, likewise.
        recipes: a GemmRecipe for `attention_scores` and one for `attention_values`; scaling `bf16`
            leaves a role's operands in the dtype of the inputs.
        softmax_scale: factor on the scores.
        segment_ids: int32 [b, t]; tokens attend within their own segment only. None means one
            segment.
        scales: role → float32 scales, in the order of `recipes.OPERANDS`; needed by delayed
            scaling.
        tokens: role → zeros of the same shapes, whose cotangents are raw amaxes; or a Token, which
            may bring back more.
        backend: one of BACKENDS, each with FP8 or emulated GEMMs as the recipe has them;
            or CUDNN, on a GPU, for recipes in `bf16` and without segment_ids.
        partition: mesh axes that split the operands, which `pallas` needs. FP8 values are moved
            between devices.
        counted: bool [b, t]: the tokens in statistics; None counts all.

    Returns:
        O, [b, t, k, g, h], in the dtype of q.

    Raises:
        ValueError: the backend is unknown or does not support a recipe's scaling, or delayed
            scaling has no scales.
    """
    check_backend(backend, recipes, q_btkgh.shape[-1])
    if backend == CUDNN:
        return _cudnn(q_btkgh, k_bskh, v_bskh, softmax_scale, segment_ids)
    for role in (SCORES, VALUES):
        if recipes[role].scaling == "delayed" and (scales is None or role not in scales):
            raise ValueError(f"attention: delayed scaling of {role} needs scales[{role!r}]")
    scales = {role: scales[role] for role in (SCORES, VALUES) if role in scales} if scales else {}
    asked = {role: as_token((tokens or {}).get(role)) for role in (SCORES, VALUES)}
    given = {role: token for role, token in asked.items() if token is not None}
    health = SCORES in given and given[SCORES].brings == FULL
    call = Call(recipes[SCORES], recipes[VALUES], softmax_scale, q_btkgh.dtype, health, partition)
    return _attention(backend, call, q_btkgh, k_bskh, v_bskh, segment_ids, scales, given, counted)


def check_backend(backend: str, recipes: Mapping[str, GemmRecipe], head_dim: int) -> None:
    """Raise ValueError, which names the alternatives, if a backend is unknown or does not support
    the two roles' recipes.
    """
    if backend not in (*BACKENDS, CUDNN):
        raise ValueError(f"{backend!r} is not one of {', '.join((*BACKENDS, CUDNN))}")
    for role in (SCORES, VALUES):
        if backend == CUDNN and recipes[role].fp8:
            raise ValueError(f"{role}: {CUDNN} is for BF16 alone; {', '.join(BACKENDS)} do FP8")
        if recipes[role].scaling not in SCALINGS:
            raise ValueError(
                f"{role}: attention has no {recipes[role].scaling} scaling, only "
                f"{', '.join(SCALINGS)}"
            )
    if backend == "pallas" and not all(recipes[role].fp8 for role in (SCORES, VALUES)):
        raise ValueError("pallas has no role in BF16; composed and emulated do")
    if backend == "pallas" and head_dim not in attention_pallas.HEAD_DIMS:
        dims = ", ".join(map(str, attention_pallas.HEAD_DIMS))
        raise ValueError(
            f"pallas has no heads of {head_dim} features, only {dims}; composed and emulated take any"
        )


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: jax.Array | None
) -> jax.Array:
    """Compute attention by backend `cudnn`; its gradient is cuDNN's own."""
    if segment_ids is not None:
        raise ValueError(f"attention: {CUDNN} has no document masks; {', '.join(BACKENDS)} do")
    b, t, kv_heads, groups, h = q.shape
    o = jax.nn.dot_product_attention(
        q.reshape(b, t, kv_heads * groups, h),
        k,
        v,
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return o.reshape(q.shape)


Reports = dict[str, tuple[jax.Array | None, ...]]


class _Saved(NamedTuple):
    """The residuals of the backward pass: operands in bytes, the result, its weights, and the
    operands' reports.
    """

    operands: Operands
    o: jax.Array
    weights: Weights
    reports: Reports
    scales: dict[str, jax.Array]
    tokens: dict[str, Token]
    counted: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    backend: str,
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scales: dict[str, jax.Array],
    tokens: dict[str, Token],
    counted: jax.Array | None,
) -> jax.Array:
    return _forward(backend, call, q, k, v, segment_ids, scales, tokens, counted)[0]


def _forward(
    backend: str,
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    scales: dict[str, jax.Array],
    tokens: dict[str, Token],
    counted: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    many, few, rows = placements(call.partition, "btkgh", "bskh", "btkg")
    q, k, v = pin(q, many.cast), pin(k, few.cast), pin(v, few.cast)
    qq, amax_q = call.scores.quantise(q, _scale(scales, SCORES, "q"), "q")
    qk, amax_k = call.scores.quantise(k, _scale(scales, SCORES, "k"), "k")
    qv, amax_v = call.values.quantise(v, _scale(scales, VALUES, "v"), "v")
    qq, qk, qv = moved(qq, many.cast), moved(qk, few.cast), moved(qv, few.cast)
    qq, qk = (named(qq), named(qk)) if call.scores.fp8 else (qq, qk)
    qv = named(qv) if call.values.fp8 else qv
    given = Operands(moved(qq, many.gemm), moved(qk, few.gemm), moved(qv, few.gemm), segment_ids)
    o, weights = _FORWARD[backend](call, given)
    o = pin(o, many.cast)
    weights = Weights(*(pin(row, rows.cast) for row in weights))
    report = functools.partial(report_cast, counted=counted)
    of_q = report(tokens.get(SCORES), q, qq, amax_q, many.cast)
    of_k = report(tokens.get(SCORES), k, qk, amax_k, few.cast)
    of_v = report(tokens.get(VALUES), v, qv, amax_v, few.cast)
    reports: Reports = {SCORES: (of_q, of_k), VALUES: (of_v,)}
    o, weights, reports = checkpoint_name((o, weights, reports), CHECKPOINT_NAME)
    kept = Operands(as_bytes(qq), as_bytes(qk), as_bytes(qv), segment_ids)
    return o, _Saved(kept, o, weights, reports, scales, tokens, counted)


def _backward(backend: str, call: Call, saved: _Saved, do: jax.Array) -> tuple[Any, ...]:
    many, few, rows = placements(call.partition, "btkgh", "bskh", "btkg")
    operands = _operands(saved.operands, many, few)
    do = pin(do, many.cast)
    factor, offset = attention_rows.row_factors(call, saved.weights)
    shared = do.astype(jnp.float32) / factor[..., None] if call.values.fp8 else do
    qdo, amax_do = call.values.quantise(shared, _scale(saved.scales, VALUES, "do"), "do")
    # It is taken from the cast dO, as dP is: otherwise rows of dS do not sum to 0, by as much as
    # the values have in common.
    delta = jnp.sum(formats.dequantise(qdo) * saved.o.astype(jnp.float32), axis=-1)
    if call.scores.scaling == "static":
        scale = call.scores.static_scale("ds")
    else:
        scale = _scale(saved.scales, SCORES, "ds")
    residuals = Residuals(moved(qdo, *many), pin(offset, rows.gemm), pin(delta, rows.gemm))
    dq, dk, dv, of_ds = _BACKWARD[backend](call, operands, residuals, scale)
    of_ds = _report_ds(call, saved, of_ds, do)
    token = saved.tokens.get(VALUES)
    of_do = report_cast(token, shared, qdo, amax_do, many.cast, counted=saved.counted)
    of_do = _with_spread(token, of_do, do, saved.counted)
    found = {SCORES: (*saved.reports[SCORES], of_ds), VALUES: (*saved.reports[VALUES], of_do)}
    dq, dk, dv = pin(dq, many.cast), pin(dk, few.cast), pin(dv, few.cast)
    d_tokens = {role: _stacked(found[role], token) for role, token in saved.tokens.items()}
    return dq, dk, dv, None, None, d_tokens, None


def _operands(kept: Operands, many: Placement, few: Placement) -> Operands:
    """Return the operands of the forward pass again, from bytes, for the GEMMs."""
    q = moved(from_bytes(kept.q), *many)
    k = moved(from_bytes(kept.k), *few)
    v = moved(from_bytes(kept.v), *few)
    return Operands(q, k, v, kept.segment_ids)


def _report_ds(
    call: Call, saved: _Saved, of_ds: jax.Array | None, do: jax.Array
) -> jax.Array | None:
    """Return the token's cotangent for dS, from a backend's report: its amax by head, or its
    health.
    """
    if of_ds is None:
        return None
    if call.health:
        return statistics.of_gradient(of_ds, do.shape, saved.counted)
    if SCORES not in saved.tokens:
        return of_ds
    (heads,) = placements(call.partition, "bk")
    return report_amax(saved.tokens[SCORES], of_ds, heads.gemm, formats.amax(of_ds))


def _with_spread(
    token: Token | None, of_do: jax.Array | None, do: jax.Array, counted: jax.Array | None
) -> jax.Array | None:
    """Return the report of dO, with the distribution of dO itself, not of its rows as cast."""
    if of_do is None or token is None or token.brings != FULL:
        return of_do
    spread = statistics.distribution(do, counted)
    names = *statistics.DISTRIBUTION, *statistics.WEIGHTS
    of_cast = of_do[: len(statistics.HEALTH)]
    return jnp.concatenate([of_cast, jnp.stack([spread[name] for name in names])])


def _stacked(reports: tuple[jax.Array | None, ...], token: Token) -> Token:
    """Return a token's cotangent; zeros without reports, as with fixed scales."""
    known = [report for report in reports if report is not None]
    if len(known) < len(reports):
        return token.like(jnp.zeros_like(token.values))
    return token.like(jnp.stack(known))


_attention.defvjp(_forward, _backward)


def _all_forward(call: Call, x: Operands) -> tuple[jax.Array, Weights]:
    """Compute backend `emulated`'s forward pass: all rows at once."""
    length = x.q.data.shape[1]
    return attention_rows.output(
        call, x.q, x.k, x.v, attention_rows.visible(0, length, length, x.segment_ids)
    )


def _all_backward(
    call: Call, x: Operands, residuals: Residuals, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return gradients of q, k, v in the dtype of activations, and dS's amax by head, [b, k] (or
    None), or its health.
    """
    length = x.q.data.shape[1]
    mask = attention_rows.visible(0, length, length, x.segment_ids)
    p, ds = attention_rows.score_gradient(call, x.q, x.k, x.v, residuals, mask)
    qds, _ = call.scores.quantise(ds if call.scores.fp8 else ds.astype(call.dtype), scale, "ds")
    dq, dk, dv = attention_rows.input_gradients(call, p, qds, x.q, x.k, residuals.do)
    dk, dv = attention_rows.swap_heads(dk), attention_rows.swap_heads(dv)
    largest = (
        attention_rows.amax_by_head(ds, emulated=call.scores.emulated)
        if call.scores.measured
        else None
    )
    of_ds = statistics.health(ds, qds) if call.health else largest
    return dq.astype(call.dtype), dk.astype(call.dtype), dv.astype(call.dtype), of_ds


_FORWARD = {
    "emulated": _all_forward,
    "composed": attention_composed.forward,
    "pallas": attention_pallas.forward,
}
_BACKWARD = {
    "emulated": _all_backward,
    "composed": attention_composed.backward,
    "pallas": attention_pallas.backward,
}


def _scale(scales: Mapping[str, jax.Array], role: str, operand: str) -> jax.Array | None:
    return operand_scale(scales.get(role), operand, role)
