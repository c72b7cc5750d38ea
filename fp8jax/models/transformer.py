"""Define the decoder: embedding, a stack of blocks under scan, head (FOG paper, appendix B).

    model = Transformer(architectures.resolve(config.model, vocab_size), vocab_size, nnx.Rngs(params=0))
    gemms = model.prepare(recipes, scales, tokens)          # quantises the weights
    logits_btv, taps = model(batch, gemms)

Block: h = x + Npost1(Attention(Npre1(x))), y = h + Npost2(FFN(Npre2(h))); any norm may be absent,
and the residual stream itself is never normalised. Blocks are stacked (their parameters have a
leading axis of layers) and run under `jax.lax.scan`; if recipes differ by layer, the scan is split
into runs of equal layers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fp8jax.models import gemms as gemms_lib
from fp8jax.models import taps as taps_lib
from fp8jax.models.architectures import ResolvedModel
from fp8jax.models.attention import Attention
from fp8jax.models.feed_forward import FeedForward
from fp8jax.models.gemms import Gemms, LayerGemms
from fp8jax.models.kv_cache import KVCache
from fp8jax.models.layers import (
    Embedding,
    LayerScale,
    RMSNorm,
    matrix,
    rope_frequencies,
    rope_table,
)
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.numerics.cross_entropy import linear_cross_entropy
from fp8jax.numerics.gemm import CHECKPOINT_NAME, dot_general
from fp8jax.numerics.tokens import Token
from fp8jax.parallel.mesh import HOST_MEMORY
from fp8jax.parallel.sharding import constrain, shards

BRANCH = "branch"  # checkpoint name of a branch's output, before its norm


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """The static choices of one forward pass: rematerialisation, and whether statistics are
    collected.
    """

    remat: str = "none"
    collect: bool = False
    pooled_kurtosis: bool = False


class Block(nnx.Module):
    """The module of one layer."""

    def __init__(self, config: ResolvedModel, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, (config.width,), ("embed",), eps=config.norm_eps)
        self.attention, self.feed_forward = Attention(config, rngs), FeedForward(config, rngs)
        self.pre_attention, self.pre_ffn = (norm(), norm()) if config.pre_norm else (None, None)
        self.post_attention, self.post_ffn = _branch_output(config), _branch_output(config)

    def __call__(
        self,
        x_btd: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        gemms: LayerGemms,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Apply the block, [b, t, d] to [b, t, d]; also return this layer's cache, if any."""
        with jax.named_scope("attention"):
            branch, cache = self.attention(
                _apply(self.pre_attention, x_btd), rope, segment_ids, gemms, cache
            )
            branch = checkpoint_name(branch, BRANCH)
            x_btd = x_btd + _apply(self.post_attention, branch)
        with jax.named_scope("feed_forward"):
            branch = self.feed_forward(_apply(self.pre_ffn, x_btd), gemms)
            branch = checkpoint_name(branch, BRANCH)
            x_btd = x_btd + _apply(self.post_ffn, branch)
        x_btd = constrain(x_btd, "batch", "residual", None)
        taps_lib.tap("activation", x_btd)
        return x_btd, cache

    def gemm_weights(self) -> dict[str, jax.Array]:
        """Return role → weight of every linear GEMM."""
        dense = [
            self.attention.qkv,
            self.attention.out,
            self.feed_forward.gate,
            self.feed_forward.up,
            self.feed_forward.down,
        ]
        return {layer.role: layer.w[...] for layer in dense if layer is not None}


def _branch_output(config: ResolvedModel) -> nnx.Module | None:
    if config.branch_output == "none":
        return None
    if config.branch_output == "layerscale":
        return LayerScale(config.width, config.branch_gain_init)
    return RMSNorm((config.width,), ("embed",), eps=config.norm_eps, init=config.branch_gain_init)


def _apply(module: nnx.Module | None, x: jax.Array) -> jax.Array:
    return x if module is None else module(x)


class Transformer(nnx.Module):
    """A decoder-only language model; `config` must be resolved (models/architectures.py)."""

    def __init__(self, config: ResolvedModel, vocab_size: int, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(config.dtype)
        self.embedding = Embedding(rngs, vocab_size, config.width, config.init_std)
        make_blocks = nnx.vmap(lambda r: Block(config, r), in_axes=0, out_axes=0)
        self.blocks = make_blocks(rngs.split(config.layers))
        self.final_norm = (
            RMSNorm((config.width,), ("embed",), eps=config.norm_eps) if config.final_norm else None
        )
        self.head = None if config.tied_embeddings else _Head(config, vocab_size, rngs)

    def head_weight(self) -> jax.Array:
        """Return the head's weight, [vocab, embed]."""
        return (self.embedding if self.head is None else self.head).w[...]

    def prepare(
        self,
        recipes: ModelRecipes,
        scales: Mapping[str, jax.Array] = MappingProxyType({}),
        tokens: Mapping[str, Token] = MappingProxyType({}),
    ) -> Gemms:
        """Quantise all weights once; no gradient flows through this, because it reaches the weights
        through wgrad.

        Args:
            recipes: recipes of every layer and the head.
            scales: role → float32 [layers, operands], from the scaling state; needed by delayed
                scaling.
            tokens: role → token, stacked over layers; without them no amaxes are returned.
        """
        weights = jax.lax.stop_gradient(self.blocks.gemm_weights())
        head = gemms_lib.quantise_head(
            jax.lax.stop_gradient(self.head_weight()), recipes, self.dtype, scales
        )
        quantised = gemms_lib.quantise_weights(
            weights, recipes, self.dtype, scales, looped=self.config.scan_layers
        )
        return Gemms(recipes, quantised, head, dict(scales), dict(tokens))

    def weight_amaxes(self, recipes: ModelRecipes) -> dict[str, jax.Array]:
        """Return the amaxes of weights under delayed scaling, by entry of the scaling state
        ('qkv.w').
        """
        return gemms_lib.weight_amaxes(
            self.blocks.gemm_weights() | {gemms_lib.HEAD: self.head_weight()[None]}, recipes
        )

    def weight_health(self, gemms: Gemms) -> taps_lib.Taps:
        """Return the health of the casts of `prepare`, by weight ('mlp_up.w')."""
        recipes = gemms.recipes
        out = gemms_lib.weight_health(self.blocks.gemm_weights(), gemms.weights, recipes)
        return out | gemms_lib.head_health(self.head_weight(), gemms.head, recipes)

    def __call__(
        self,
        batch: dict[str, jax.Array],
        gemms: Gemms,
        options: ForwardOptions = ForwardOptions(),
    ) -> tuple[jax.Array, taps_lib.Taps]:
        """Compute logits and statistics.

        Args:
            batch: `inputs` int32 [b, t]; optionally `positions` and `segment_ids`, int32 [b, t].
            gemms: from `prepare`.
            options: static.

        Returns:
            float32 logits [b, t, v]; taps, each statistic stacked over layers (empty unless
            options.collect).
        """
        x_btd, taps, _ = self._hidden(batch, gemms, options)
        return self._logits(x_btd, gemms, _counted(batch, options)), taps

    def chunked_losses(
        self,
        batch: dict[str, jax.Array],
        gemms: Gemms,
        chunk: int,
        options: ForwardOptions = ForwardOptions(),
    ) -> tuple[jax.Array, jax.Array, taps_lib.Taps]:
        """Compute the parts of a loss without the logits of all tokens and the whole vocabulary
        (numerics/cross_entropy.py).

        Args:
            batch: as for a call, and `targets` int32 [b, t].
            gemms: from `prepare`.
            chunk: rows of the vocabulary at a time, on each device.
            options: static.

        Returns:
            Negative log-likelihoods of the targets and log-partitions, float32 [b, t]; taps.
        """
        x_btd, taps, _ = self._hidden(batch, gemms, options)
        nll, lse = linear_cross_entropy(
            x_btd,
            self.head_weight(),
            batch["targets"],
            gemms.recipes.head,
            chunk=chunk,
            shards=shards("vocab"),
            quantised_w=gemms.head,
            scales=gemms.head_scales(),
            token=gemms.head_token(),
            role=gemms_lib.HEAD,
            counted=_counted(batch, options),
        )
        return nll, lse, taps

    def extend(
        self, inputs_bt: jax.Array, cache: KVCache, gemms: Gemms
    ) -> tuple[jax.Array, KVCache]:
        """Compute logits of tokens that follow those in a cache (models/kv_cache.py); t is 1 unless
        the cache is empty.

        Args:
            inputs_bt: int32; `cache.filled + t` must not exceed the capacity.
            cache: not changed.
            gemms: from `prepare`, with recipes in `bf16`.

        Returns:
            float32 logits [b, t, v], as in the uncached forward pass; the cache with t more tokens
            per row.
        """
        length = inputs_bt.shape[1]
        batch = {"inputs": inputs_bt, "positions": cache.filled[:, None] + jnp.arange(length)}
        x_btd, _, cache = self._hidden(batch, gemms, ForwardOptions(), cache)
        return self._logits(x_btd, gemms), cache._replace(filled=cache.filled + length)

    def _hidden(
        self,
        batch: dict[str, jax.Array],
        gemms: Gemms,
        options: ForwardOptions,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, taps_lib.Taps, Any]:
        """Compute the head's input, [b, t, d]."""
        inputs = batch["inputs"]
        positions = (
            batch["positions"] if "positions" in batch else jnp.arange(inputs.shape[1])[None]
        )
        length = inputs.shape[1] if cache is None else cache.k.shape[2]
        rope = rope_table(
            positions, rope_frequencies(self.config, length), self.config.rope_attention_factor
        )
        x_btd = self.embedding(inputs, self.config.input_scale, self.dtype)
        x_btd = constrain(x_btd, "batch", "residual", None)
        given = _BlockInputs(rope, batch.get("segment_ids"), _counted(batch, options), cache)
        x_btd, taps, cache = self._run_blocks(x_btd, given, gemms, options)
        return constrain(_apply(self.final_norm, x_btd), "batch", "sequence", None), taps, cache

    def _run_blocks(
        self, x_btd: jax.Array, inputs: "_BlockInputs", gemms: Gemms, options: ForwardOptions
    ) -> tuple[jax.Array, taps_lib.Taps, KVCache | None]:
        """Run all blocks, one segment of equal layers after another."""
        graph, params = nnx.split(self.blocks)
        cache = inputs.cache
        kv = None if cache is None else cache[:2]
        found: list[taps_lib.Taps] = []
        caches = []
        for number, (first, last, _) in enumerate(gemms.recipes.segments()):
            # Compilers unroll a loop of one step.
            looped = self.config.scan_layers and last - first > 1
            layer = _rematerialised(_layer(graph, inputs, options), options.remat, looped)
            mine = gemms_lib.layers_of((params, kv), first, last)
            stacked = (*mine, gemms.segment(number))
            unroll = 1 if looped else last - first
            x_btd, (taps, added) = jax.lax.scan(layer, x_btd, stacked, unroll=unroll)
            found.append(taps.unpack() if taps else {})
            caches.append(added)
        if cache is not None:
            keys, values = (jnp.concatenate(parts) for parts in zip(*caches, strict=True))
            cache = cache._replace(k=keys, v=values)
        return x_btd, _join(found), cache

    def _logits(
        self, x_btd: jax.Array, gemms: Gemms, counted: jax.Array | None = None
    ) -> jax.Array:
        return dot_general(
            x_btd,
            self.head_weight(),
            (((2,), (1,)), ((), ())),
            gemms.recipes.head,
            quantised_w=gemms.head,
            scales=gemms.head_scales(),
            token=gemms.head_token(),
            out_dtype=jnp.float32,
            role=gemms_lib.HEAD,
            counted=counted,
        )


class _BlockInputs(NamedTuple):
    """The inputs of every block besides the residual stream and its own GEMMs."""

    rope: tuple[jax.Array, jax.Array]
    segment_ids: jax.Array | None
    counted: jax.Array | None
    cache: KVCache | None


def _layer(graph: nnx.GraphDef, inputs: _BlockInputs, options: ForwardOptions) -> Any:
    """Return the scan's body: one block, from its slices of parameters, cache and GEMMs."""
    rope, segment_ids, counted, cache = inputs

    def layer(x: jax.Array, stacked: Any) -> tuple[jax.Array, Any]:
        params, kv, gemms = stacked
        collecting = taps_lib.collecting(
            options.collect, pooled=options.pooled_kurtosis, counted=counted
        )
        with collecting as taps:
            block = nnx.merge(graph, params)
            mine = None if cache is None else KVCache(kv[0], kv[1], cache.filled)
            y, mine = block(x, rope, segment_ids, gemms.layer(counted), mine)
        packed = taps_lib.pack(taps) if taps else taps
        return y, (packed, None if mine is None else mine[:2])

    return layer


def _counted(batch: dict[str, jax.Array], options: ForwardOptions) -> jax.Array | None:
    """Return the tokens in statistics, without padding."""
    return batch["mask"] > 0 if options.collect and "mask" in batch else None


class _Head(nnx.Module):
    def __init__(self, config: ResolvedModel, vocab_size: int, rngs: nnx.Rngs):
        self.w = matrix(rngs, (vocab_size, config.width), ("vocab", "embed"), config.init_std)


def _rematerialised(layer: Any, remat: str, looped: bool) -> Any:
    """Return the layer, recomputed in the backward pass by `remat`.

    In a loop, whose backward pass is a loop of its own, no compiler sees that a value was computed
    before; elsewhere barriers hide it.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "save_fp8": policies.save_only_these_names(CHECKPOINT_NAME),
        "save_branches": policies.save_only_these_names(CHECKPOINT_NAME, BRANCH),
        "offload_fp8": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[CHECKPOINT_NAME],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=not looped)


def _join(found: list[taps_lib.Taps]) -> taps_lib.Taps:
    """Join taps of all segments, each statistic concatenated over layers; zero, as without tokens,
    for layers without it.
    """
    if len(found) == 1:
        return found[0]
    lengths = [jax.tree.leaves(taps)[0].shape[0] if jax.tree.leaves(taps) else 0 for taps in found]
    names = dict.fromkeys(
        (name, key) for taps in found for name, stats in taps.items() for key in stats
    )
    out: taps_lib.Taps = {}
    for name, key in names:
        parts = [
            taps[name][key] if name in taps else jnp.zeros((n,))
            for taps, n in zip(found, lengths, strict=True)
        ]
        out.setdefault(name, {})[key] = jnp.concatenate(parts)
    return out
