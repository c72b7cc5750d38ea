"""The GEMMs of a model as one handle: recipes, quantised weights, scales, and the tokens that
return amaxes.

    gemms = model.prepare(recipes, scales, tokens)      # once a step; Gemms, a pytree
    logits, taps = model(batch, gemms, options)
    gemms.segment(0)                                    # a run of equal layers, stacked, for the scan
    gemms.segment(0).layer(counted)                     # in the scan's body: the input of one layer's modules

Recipes are static; model_recipes.py derives them from a config.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fp8jax.models.model_recipes import HEAD, LayerRecipes, ModelRecipes
from fp8jax.models.taps import Taps
from fp8jax.numerics import formats, statistics
from fp8jax.numerics import recipes as recipes_lib
from fp8jax.numerics import scaling as scaling_lib
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.gemm import quantise_weight
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.tokens import AMAX, AMAX_BY_DEVICE, FULL, Brings, Token

_WIDTH = len(statistics.REPORT)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "scales", "tokens", "counted"],
    meta_fields=["recipes", "attention_backend"],
)
@dataclasses.dataclass(frozen=True)
class LayerGemms:
    """The GEMMs of one layer, or of a segment of equal layers, whose arrays have a leading axis of
    layers.

    Attributes:
        recipes: role → recipe.
        attention_backend: backend of attention.
        weights: role → quantised weight, [inputs, outputs].
        scales: role → float32 [operands], of the roles in FP8.
        tokens: role → token; each is used once.
        counted: bool [b, t]: the tokens of text in statistics; None counts all, or there are none.
    """

    recipes: LayerRecipes
    attention_backend: str
    weights: dict[str, Quantised]
    scales: dict[str, jax.Array]
    tokens: dict[str, Token]
    counted: jax.Array | None = None

    def layer(self, counted: jax.Array | None) -> "LayerGemms":
        """Return this layer, taken from a segment, with the tokens of text in its statistics."""
        return dataclasses.replace(self, counted=counted)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "head", "scales", "tokens"],
    meta_fields=["recipes"],
)
@dataclasses.dataclass(frozen=True)
class Gemms:
    """All GEMMs of a model.

    Attributes:
        recipes: recipes of every layer and the head.
        weights: role → quantised weight, stacked over layers; one dictionary per segment of equal
            layers.
        head: the head's quantised weight, [vocab, embed].
        scales: role → float32 [layers, operands].
        tokens: role → token, stacked over layers; empty if nothing is to be returned.
    """

    recipes: ModelRecipes
    weights: list[dict[str, Quantised]]
    head: Quantised
    scales: dict[str, jax.Array]
    tokens: dict[str, Token]

    def with_tokens(self, tokens: dict[str, Token]) -> "Gemms":
        """Return the same GEMMs with these tokens."""
        return dataclasses.replace(self, tokens=tokens)

    def segment(self, number: int) -> LayerGemms:
        """Return the GEMMs of a segment, as `ModelRecipes.segments` numbers them.

        The amax or scale of a role that is not in FP8 in these layers is not changed, and stays at
        zero.
        """
        first, last, recipes = self.recipes.segments()[number]
        fp8 = {role for role, recipe in recipes.items() if recipe.fp8}
        scales = {role: scale for role, scale in self.scales.items() if role in fp8}
        tokens = {
            role: token
            for role, token in self.tokens.items()
            if role in fp8 or token.brings == FULL and role in recipes
        }
        scales, tokens = layers_of((scales, tokens), first, last)
        backend = self.recipes.backend_of(first)
        return LayerGemms(recipes, backend, self.weights[number], scales, tokens)

    def head_scales(self) -> jax.Array | None:
        """Return the scales of the head's operands, float32 [operands]; None if it needs none."""
        return self.scales[HEAD][0] if HEAD in self.scales else None

    def head_token(self) -> Token | None:
        """Return the head's token, if it has one."""
        if HEAD not in self.tokens:
            return None
        token = self.tokens[HEAD]
        return token.like(token.values[0])


def init_scaling(recipes: ModelRecipes) -> scaling_lib.Scaling:
    """Return the empty scaling state of a model; see numerics/scaling.py."""
    out: scaling_lib.Scaling = {}
    for role, (layers, recipe) in recipes.by_role().items():
        out |= scaling_lib.init({role: recipe}, layers)
    return out


def update_scaling(
    scaling: scaling_lib.Scaling, amaxes: scaling_lib.Tokens, recipes: ModelRecipes
) -> scaling_lib.Scaling:
    """Return the state after a step with these amaxes."""
    return scaling_lib.update(
        scaling, amaxes, {role: recipe for role, (_, recipe) in recipes.by_role().items()}
    )


def zero_amaxes(recipes: ModelRecipes, brings: Brings = AMAX) -> scaling_lib.Tokens:
    """Return initial amaxes, role → zeros, of every role in FP8.

    Args:
        recipes: recipes of the model.
        brings: AMAX: float32 [layers, operands]. AMAX_BY_DEVICE: on a mesh, the blocks' roles with
            delayed scaling, which waits for no amax, have a dimension for each mesh axis: no device
            asks another for its amaxes before `over_devices`, once a step.
    """
    out: scaling_lib.Tokens = {}
    for role, (layers, recipe) in recipes.by_role().items():
        out |= scaling_lib.zero_tokens({role: recipe}, layers)
    if brings == AMAX:
        return out
    by_device = _by_device(recipes)
    return {role: _spread(amax) if role in by_device else amax for role, amax in out.items()}


def _by_device(recipes: ModelRecipes) -> set[str]:
    """Return the roles whose amaxes may come back by device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return set()
    by_role = recipes.by_role()
    return {role for role, (_, r) in by_role.items() if r.scaling == "delayed" and role != HEAD}


def _spread(amax: jax.Array) -> jax.Array:
    """Return zeros with one more dimension for each mesh axis, split over it."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(None, None, *mesh.axis_names)
    zeros = jnp.zeros((*amax.shape, *mesh.axis_sizes))
    return jax.lax.with_sharding_constraint(zeros, spec)


def zero_tokens(recipes: ModelRecipes, brings: Brings = AMAX) -> dict[str, Token]:
    """Return one token per GEMM call site, stacked over layers.

    Args:
        recipes: recipes of the model.
        brings: what they return. AMAX_BY_DEVICE is used where it saves communication, AMAX
            elsewhere. For AMAX, every role in FP8 has a token; for FULL, every role of the blocks,
            in FP8 or not, and an FP8 head.
    """
    if brings == FULL:
        return {
            role: Token(jnp.zeros((layers, len(recipes_lib.OPERANDS[role]), _WIDTH)), FULL)
            for role, (layers, recipe) in recipes.by_role().items()
            if recipe.fp8 or role != HEAD
        }
    by_device = _by_device(recipes) if brings == AMAX_BY_DEVICE else set()
    return {
        role: Token(amax, AMAX_BY_DEVICE if role in by_device else AMAX)
        for role, amax in zero_amaxes(recipes, brings).items()
    }


def over_devices(amaxes: scaling_lib.Tokens) -> scaling_lib.Tokens:
    """Return amaxes of whole tensors, [layers, operands], from those by device; infinite for NaN,
    which a maximum may lose.
    """
    known = {role: jnp.where(jnp.isnan(amax), jnp.inf, amax) for role, amax in amaxes.items()}
    return {role: jnp.max(amax, axis=tuple(range(2, amax.ndim))) for role, amax in known.items()}


def read_reports(
    found: scaling_lib.Tokens, recipes: ModelRecipes, *, pooled: bool
) -> tuple[scaling_lib.Tokens, Taps]:
    """Read the cotangents of tokens for FULL: raw amaxes as those for AMAX, and statistics by
    operand.

    Args:
        found: role → float32 [layers, operands, statistics].
        recipes: recipes of the model.
        pooled: which kurtosis to keep.

    Returns:
        Role → amaxes, 0 in layers that are not in FP8; 'mlp_up.g' → statistic → float32 [layers],
        those of casts 0 without a cast.
    """
    amaxes, health = {}, {}
    for role, token in found.items():
        fp8 = [recipe.fp8 for recipe in recipes.of_role(role)]
        if any(fp8):
            amaxes[role] = jnp.where(jnp.asarray(fp8)[:, None], token[..., 0], 0.0)
        for i, operand in enumerate(recipes_lib.OPERANDS[role]):
            known = (statistics.HEALTH if any(fp8) else statistics.HEALTH[:1]) + (
                statistics.DISTRIBUTION if operand in ("g", "do") else ()
            )
            known += statistics.WEIGHTS
            rows = {name: token[:, i, statistics.REPORT.index(name)] for name in known}
            health[f"{role}.{operand}"] = statistics.choose(rows, pooled=pooled)
    return amaxes, health


def weight_health(
    weights: Mapping[str, jax.Array], quantised: list[dict[str, Quantised]], recipes: ModelRecipes
) -> Taps:
    """Return the health of the weights' casts, in the form of `read_reports`.

    Args:
        weights: role → weight stacked over layers.
        quantised: from `quantise_weights`.
        recipes: recipes of the model.
    """

    def one(role: str, first: int, last: int, recipe: GemmRecipe, q: Quantised) -> jax.Array:
        stacked = weights[role][first:last]
        if not recipe.fp8 or recipe.scaling == "blockwise":
            cast = q if recipe.fp8 else Quantised(q.data, None)
            return jax.vmap(lambda w, q: statistics.health(_matrix(role, w), q))(stacked, cast)
        # They are cast again, layer by layer: the GEMMs' operands lie transposed, and XLA for GPUs
        # also writes the weight in float32 and integers in that order: 52 bytes per element, where
        # here it is 10 (counted in a program for an H100).
        return jax.lax.map(
            lambda given: again(_matrix(role, given[0]), given[1], q.data.dtype, recipe),
            (stacked, q.scale),
        )

    def again(w: jax.Array, scale: jax.Array, dtype: jnp.dtype, recipe: GemmRecipe) -> jax.Array:
        return statistics.health(w, formats.quantise(w, scale, dtype, emulated=recipe.emulated))

    out = {}
    for role in weights:
        rows = [
            one(role, first, last, segment[role], q[role])
            for (first, last, segment), q in zip(recipes.segments(), quantised, strict=True)
        ]
        known = len(statistics.HEALTH) if any(layer[role].fp8 for layer in recipes.blocks) else 1
        out[f"{role}.w"] = _by_name(jnp.concatenate(rows)[:, :known])
    return out


def head_health(weight: jax.Array, quantised: Quantised, recipes: ModelRecipes) -> Taps:
    """Return the health of the head's weight; {} if it is not in FP8."""
    return (
        {f"{HEAD}.w": _by_name(statistics.health(weight, quantised)[None])}
        if recipes.head.fp8
        else {}
    )


def _by_name(rows: jax.Array) -> dict[str, jax.Array]:
    """Turn [layers, statistics] into statistic → [layers]."""
    return {name: rows[:, i] for i, name in enumerate(statistics.HEALTH[: rows.shape[1]])}


def quantise_weights(
    weights: Mapping[str, jax.Array],
    recipes: ModelRecipes,
    dtype: Any,
    scales: Mapping[str, jax.Array],
    *,
    looped: bool = True,
) -> list[dict[str, Quantised]]:
    """Quantise every GEMM weight once, one dictionary per segment of equal layers.

    Args:
        weights: role → weight stacked over layers. The quantised ones are matrices, as `Dense`
            takes them.
        recipes: recipes of the model.
        dtype: dtype of activations, for roles that are not in FP8.
        scales: scales of the scaling state; those of weights are used if their scaling is delayed.
        looped: whether layers run in a loop; if not, each layer's weight is an array of its own to
            the compiler, and so is not copied out of the stack of all.
    """
    over_layers = jax.vmap if looped else _one_by_one

    def one(role: str, first: int, last: int, recipe: GemmRecipe) -> Quantised:
        scale = (
            scales[scaling_lib.weight_entry(role)][first:last, 0] if recipe.delayed_weight else None
        )
        with jax.named_scope(f"quantise_weight.{role}"):
            return over_layers(
                lambda w, scale: quantise_weight(_matrix(role, w), recipe, dtype, scale)
            )(weights[role][first:last], scale)

    return [
        {role: one(role, first, last, segment[role]) for role in weights}
        for first, last, segment in recipes.segments()
    ]


def _one_by_one(function: Callable[..., Quantised]) -> Callable[..., Quantised]:
    """Return the function of arrays stacked over layers, as `jax.vmap` does, without a batched
    operation.
    """

    def stacked(*arrays: jax.Array | None) -> Quantised:
        count = jax.tree.leaves(arrays)[0].shape[0]
        each = [function(*jax.tree.map(lambda x, i=i: x[i], arrays)) for i in range(count)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *each)

    return stacked


def quantise_head(
    weight: jax.Array, recipes: ModelRecipes, dtype: Any, scales: Mapping[str, jax.Array]
) -> Quantised:
    """Quantise the head's weight, [vocab, embed]."""
    scale = scales[scaling_lib.weight_entry(HEAD)][0, 0] if recipes.head.delayed_weight else None
    return quantise_weight(weight, recipes.head, dtype, scale)


def weight_amaxes(weights: Mapping[str, jax.Array], recipes: ModelRecipes) -> scaling_lib.Tokens:
    """Return the amaxes of the weights whose scaling is delayed, by entry of the scaling state.

    Args:
        weights: role → weight stacked over layers; the head has one layer.
        recipes: recipes of the model; if calibration has replaced `delayed`, amaxes are taken all
            the same.

    Returns:
        'qkv.w' → float32 [layers, 1], 0 in layers that are not in FP8.
    """
    out = {}
    for role, w in weights.items():
        layers = recipes.of_role(role)
        if not any(recipe.measured and recipe.weight_scaling == "delayed" for recipe in layers):
            continue
        largest = jax.vmap(functools.partial(formats.amax, emulated=layers[0].emulated))(w)
        measured = jnp.asarray([recipe.measured for recipe in layers])
        out[scaling_lib.weight_entry(role)] = jnp.where(measured, largest, 0.0)[:, None]
    return out


def _matrix(role: str, w: jax.Array) -> jax.Array:
    """Return a weight as [inputs, outputs]: only the first dimension is inputs, for attention_out
    all but the last.
    """
    return w.reshape(-1, w.shape[-1]) if role == "attention_out" else w.reshape(w.shape[0], -1)


def layers_of(tree: Any, first: int, last: int) -> Any:
    """Slice the leading axis of every array."""
    return jax.tree.map(lambda a: a[first:last], tree)
