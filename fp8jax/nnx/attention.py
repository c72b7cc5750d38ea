"""Attention with FP8 GEMMs for NNX models: a module with its scaling state, and flax's
MultiHeadAttention.

    attend = Attention(recipe=recipe)
    o_btnh = attend(q_btnh, k_bskh, v_bskh, segment_ids=segments)

    layer = MultiHeadAttention(num_heads=8, in_features=512, recipe=recipe, decode=False, rngs=rngs)
    y = layer(x, is_causal=True)

FP8 attention is causal, from tokens to themselves, without dropout, bias or another mask. A call of
MultiHeadAttention that asks for something else runs flax's attention in the dtype of the
activations, with a warning that says why; its four projections are in FP8 all the same.
"""

import warnings
from typing import Any

import jax
import numpy as np
from flax import nnx

from fp8jax.library.functions import attention
from fp8jax.library.recipe import Recipe, check_recipe
from fp8jax.nnx.convert import convert_layer
from fp8jax.nnx.scaling import RoleScaling

SCORES, VALUES = "attention_scores", "attention_values"


class Attention(nnx.Module):
    """`fp8jax.attention` with the state of delayed scaling.

    Args:
        recipe: a `fp8jax.Recipe`; None computes in the dtype of the inputs.
        leading: shape of the layers stacked in this module; () for one.
    """

    def __init__(self, recipe: Recipe | None = None, leading: tuple[int, ...] = ()):
        check_recipe(recipe, "fp8jax.nnx.Attention")
        self.recipe = recipe
        self.scores, self.values = nnx.data(None), nnx.data(None)
        if recipe is not None and recipe.has_state:
            self.scores = RoleScaling(recipe, SCORES, leading)
            self.values = RoleScaling(recipe, VALUES, leading)

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        softmax_scale: float | None = None,
        segment_ids: jax.Array | None = None,
        backend: str = "composed",
    ) -> jax.Array:
        """Compute causal attention; arguments, result and errors are those of `fp8jax.attention`."""
        scores, values = self.scores, self.values
        if scores is None or values is None:
            scales = tokens = None
        else:
            scales = {SCORES: scores.scales(), VALUES: values.scales()}
            tokens = {SCORES: scores.token(q), VALUES: values.token(v)}
        return attention(
            q,
            k,
            v,
            self.recipe,
            softmax_scale=softmax_scale,
            segment_ids=segment_ids,
            scales=scales,
            tokens=tokens,
            backend=backend,
            known=scores is not None and scores.known,
        )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` with FP8 GEMMs: the four projections, and attention where the
    call allows it.

    Args:
        num_heads: number of query heads.
        in_features: number of input features.
        *args: the other positional arguments of flax's layer.
        recipe: a `fp8jax.Recipe`; None is flax's layer.
        **kwargs: the other arguments of flax's layer.
    """

    recipe: Recipe | None
    core: Attention | None

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *args: Any,
        recipe: Recipe | None = None,
        **kwargs: Any,
    ):
        check_recipe(recipe, "fp8jax.nnx.MultiHeadAttention")
        self.set_core(recipe)
        super().__init__(num_heads, in_features, *args, **kwargs)
        if recipe is None:
            return
        for name in ("query", "key", "value", "out"):
            setattr(self, name, convert_layer(getattr(self, name), recipe, role=name))

    def set_core(self, recipe: Recipe | None, leading: tuple[int, ...] = ()) -> None:
        """Set the recipe of attention itself, with new scaling state."""
        self.recipe = recipe
        self.core = nnx.data(None) if recipe is None else Attention(recipe, leading)

    @property
    def attention_fn(self) -> Any:
        """Return the attention: the recipe's, or with recipe None what flax was given."""
        return self.plain_attention if self.core is None else self._attend

    @attention_fn.setter
    def attention_fn(self, given: Any) -> None:
        self.plain_attention = given

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        reason = why_not(query, key, options)
        if reason or self.core is None:
            warnings.warn(f"fp8jax: attention not in FP8: {reason}", stacklevel=2)
            return self.plain_attention(query, key, value, **options)
        q, k, v = nnx.nn.dtypes.promote_dtype((query, key, value), dtype=options["dtype"])
        rows = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
        return self.core(*rows).reshape(q.shape)


def why_not(query: jax.Array, key: jax.Array, options: dict[str, Any]) -> str:
    """Return why a call of flax's `attention_fn` cannot be in FP8; '' if it can."""
    mask = options.get("mask")
    dropout = options.get("dropout_rate", 0.0) > 0 and not options.get("deterministic")
    causal_mask = mask is not None and _is_causal(mask, query.shape[-3])
    if dropout:
        return "dropout"
    if options.get("bias") is not None:
        return "a bias on scores"
    if options.get("module") is not None:
        return "weights are asked for (sow_weights)"
    if query.shape[-3] != key.shape[-3]:
        return f"{query.shape[-3]} queries and {key.shape[-3]} keys"
    if mask is not None and not causal_mask:
        return "a mask that is not known to be the causal one; pass is_causal=True without a mask"
    if mask is None and not options.get("is_causal"):
        return "it is not causal; pass is_causal=True"
    return ""


def _is_causal(mask: Any, length: int) -> bool:
    """Return whether a mask is known to be causal while tracing, as a constant made outside jit is."""
    if isinstance(mask, jax.core.Tracer) or mask.shape[-2:] != (length, length):
        return False
    return bool(np.all(np.asarray(mask, bool) == np.tri(length, dtype=bool)))
