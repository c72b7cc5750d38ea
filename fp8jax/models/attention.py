"""Compute a block's self-attention: one projection to q, k and v, QK regulariser, RoPE, FP8
attention, output.
"""

import functools

import jax
from flax import nnx

from fp8jax.models import kv_cache
from fp8jax.models.architectures import ResolvedModel
from fp8jax.models.gemms import LayerGemms
from fp8jax.models.kv_cache import KVCache
from fp8jax.models.layers import Dense, RMSNorm, Tanh, apply_rope
from fp8jax.models.taps import record, tap
from fp8jax.numerics.attention.definition import SCORES, attention
from fp8jax.numerics.attention.scores import score_statistics
from fp8jax.numerics.gemm_sharding import Partition
from fp8jax.parallel.sharding import RULES, attention_axes


class Attention(nnx.Module):
    """The module of grouped-query attention.

    The projection's weight is [d, k, g + 2, h]: for each of k KV heads its g query heads, its key
    head, its value head. So one GEMM makes all three, and a split over `tensor` keeps each group
    together.
    """

    def __init__(self, config: ResolvedModel, rngs: nnx.Rngs):
        k, g, h = config.kv_heads, config.heads // config.kv_heads, config.head_dim
        self.groups, self.softmax_scale = g, config.softmax_scale
        self.qkv = Dense(
            rngs,
            "qkv",
            (config.width, k, g + 2, h),
            ("embed", "kv_heads", None, "head_dim"),
            std=config.init_std,
        )
        self.out = Dense(
            rngs,
            "attention_out",
            (k, g, h, config.width),
            ("kv_heads", None, "head_dim", "embed"),
            std=config.init_std,
            inputs=3,
        )
        self.q_norm, self.k_norm = _regularisers(config, k, g, h)

    def __call__(
        self,
        x_btd: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        gemms: LayerGemms,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend, [b, t, d] to [b, t, d]; also return this layer's cache, if any, with the t tokens
        added.
        """
        tap("qkv_input", x_btd)
        qkv = self.qkv(x_btd, gemms)
        tap("qkv", qkv.reshape(*qkv.shape[:2], -1))
        q, k, v = qkv[..., : self.groups, :], qkv[..., self.groups, :], qkv[..., self.groups + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tap("q", q)
        tap("k", k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        partition = Partition(
            RULES["batch"], RULES["sequence"], RULES["kv_heads"], attention_axes(k.shape[2])
        )
        spread = functools.partial(
            score_statistics,
            recipe=gemms.recipes[SCORES],
            softmax_scale=self.softmax_scale,
            scales=gemms.scales.get(SCORES),
            segment_ids=segment_ids,
            backend=gemms.attention_backend,
            partition=partition,
            counted=gemms.counted,
        )
        record(SCORES, spread, q, k)
        if cache is not None:
            cache = kv_cache.append(cache, k, v)
        # More than one token is a prompt into an empty cache, so there are no older keys to attend
        # to.
        if cache is not None and x_btd.shape[1] == 1:
            o = kv_cache.attend(q, cache, gemms.recipes, self.softmax_scale)
        else:
            o = attention(
                q,
                k,
                v,
                gemms.recipes,
                softmax_scale=self.softmax_scale,
                segment_ids=segment_ids,
                scales=gemms.scales,
                tokens=gemms.tokens,
                backend=gemms.attention_backend,
                partition=partition,
                counted=gemms.counted,
            )
        return self.out(o, gemms), cache


def _regularisers(
    config: ResolvedModel, k: int, g: int, h: int
) -> tuple[nnx.Module | None, nnx.Module | None]:
    """Return the regularisers of queries and of keys, per head unless the whole projection is
    normalised (OLMo 2).
    """
    kind, eps = config.qk_regulariser, config.norm_eps
    if kind == "none":
        return None, None
    if kind.startswith("tanh"):
        features, trained = None if kind == "tanh" else h, kind != "tanh_kept"
        return Tanh(features, trained=trained), Tanh(features, trained=trained)
    if kind == "rmsnorm_full":
        q_norm = RMSNorm((k, g, h), ("kv_heads", None, "head_dim"), eps=eps)
        return q_norm, RMSNorm((k, h), ("kv_heads", "head_dim"), eps=eps)
    init, trained = None if kind == "rmsnorm_frozen" else 1.0, kind != "rmsnorm_kept"
    q_norm = RMSNorm((h,), ("head_dim",), eps=eps, init=init, trained=trained)
    return q_norm, RMSNorm((h,), ("head_dim",), eps=eps, init=init, trained=trained)
