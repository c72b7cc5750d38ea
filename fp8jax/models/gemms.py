"""How the model's GEMMs get their recipes, quantised weights, scales and tokens.

`layer_recipes(config)` gives each layer a mapping role → GemmRecipe; `GemmInputs` is what a step prepares once for the
whole model (stacked over layers); `Gemms` is one layer's share, handed to the modules.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fp8jax.config import Config, ConfigError, head_dim
from fp8jax.numerics import formats, statistics
from fp8jax.numerics import recipes as recipes_lib
from fp8jax.numerics import scaling as scaling_lib
from fp8jax.numerics.attention import definition as attention_lib
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.gemm import quantise_weight
from fp8jax.numerics.recipes import GemmRecipe

HEAD = "lm_head"
Recipes = dict[str, GemmRecipe]
Health = dict[str, dict[str, jax.Array]]


class GemmInputs(NamedTuple):
    """What the GEMMs need besides activations and parameters; arrays have a leading axis of layers.

    weights: role → quantised weight; scales: role → float32 [layers, operands]; tokens: the same shapes, zeros.
    """

    weights: dict[str, Quantised]
    scales: dict[str, jax.Array]
    tokens: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Gemms:
    """One layer's GEMMs: static recipes, this layer's slices of GemmInputs, the backend of attention.

    counted: bool [b, t]: the tokens that statistics are of; None: all, or there are none.
    """

    recipes: Mapping[str, GemmRecipe]
    inputs: GemmInputs
    attention_backend: str
    counted: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ModelRecipes:
    """Recipes of the blocks, layer by layer, and of the head; and which backend computes attention in each layer.

    attention_backends: of every layer; layers with the same recipes have the same. Empty: `emulated` everywhere.
    """

    blocks: tuple[Recipes, ...]
    head: GemmRecipe
    attention_backends: tuple[str, ...] = ()

    def backend_of(self, layer: int) -> str:
        """Backend of one layer's attention."""
        return self.attention_backends[layer] if self.attention_backends else "emulated"

    @property
    def attention_backend(self) -> str:
        """Backend of attention in FP8, or, where no layer has it, of all attention."""
        in_fp8 = (
            i
            for i, layer in enumerate(self.blocks)
            if any(layer[role].fp8 for role in recipes_lib.ATTENTION_ROLES)
        )
        return self.backend_of(next(in_fp8, 0))

    def segments(self) -> list[tuple[int, int, Recipes]]:
        """Runs of equal layers: (first, one past the last, recipes)."""
        out: list[tuple[int, int, Recipes]] = []
        for layer, recipes in enumerate(self.blocks):
            if out and out[-1][2] == recipes:
                out[-1] = (out[-1][0], layer + 1, recipes)
            else:
                out.append((layer, layer + 1, recipes))
        return out

    def by_role(self) -> dict[str, tuple[int, GemmRecipe]]:
        """Role → (layers, recipe that governs its state): delayed if any layer is, else FP8 if any layer is."""
        order = {"delayed": 0, "bf16": 2}
        out = {}
        for role in self.blocks[0]:
            out[role] = (
                len(self.blocks),
                min((layer[role] for layer in self.blocks), key=lambda r: order.get(r.scaling, 1)),
            )
        return {**out, HEAD: (1, self.head)}

    def scaled_by(self, scaling: str) -> "ModelRecipes":
        """The same roles in FP8, with another scaling in place of `delayed`: no other needs scales from before."""

        def change(recipe: GemmRecipe) -> GemmRecipe:
            return (
                dataclasses.replace(recipe, scaling=scaling)
                if recipe.scaling == "delayed"
                else recipe
            )

        blocks = tuple({role: change(r) for role, r in layer.items()} for layer in self.blocks)
        return ModelRecipes(blocks, change(self.head), self.attention_backends)


def model_recipes(
    config: Config,
    *,
    gated: bool,
    emulated: bool,
    fused: bool = False,
    cudnn: bool = False,
    recipe: str | None = None,
) -> ModelRecipes:
    """Recipes as `config.fp8` asks for them.

    Args:
        config: the run's configuration.
        gated: whether the FFN has a gate GEMM.
        emulated: no FP8 units on the device.
        fused: the device runs our attention kernels, so that `auto` may choose them.
        cudnn: the device runs cuDNN's attention, so that `auto` may choose it for layers whose attention is not in FP8.
        recipe: instead of config.fp8.recipe; evaluation runs in `bf16`.

    Raises:
        ConfigError: the attention backend, or a device with FP8 units, cannot do what is asked of it.
    """
    fp8 = config.fp8
    recipe = recipe or fp8.recipe
    if "blockwise" in fp8.scaling + fp8.overrides and recipe != "bf16" and not emulated:
        raise ConfigError(
            "config.fp8.scaling: blockwise has no FP8 kernel on this device; use current or delayed, or "
            "config.fp8.backend=emulated to study it in BF16 GEMMs"
        )
    tokens = config.training.batch_size * config.data.sequence_length
    weight_scale = fp8.static_weight_scale or config.model.init_std or 1.0
    gradient_scale = fp8.static_gradient_scale or 1 / tokens
    scaling = "bf16" if recipe == "bf16" else fp8.scaling
    base = GemmRecipe(
        scaling=scaling,
        weight_scaling=fp8.weight_scaling,
        history_length=fp8.history_length,
        history_reduction=fp8.history_reduction,
        margin=fp8.margin,
        power_of_two=fp8.power_of_two,
        gradient_format=fp8.gradient_format,
        emulated=emulated,
        fast_accumulation=fp8.fast_accumulation,
        static_weight_scale=weight_scale,
        static_gradient_scale=gradient_scale,
    )
    plain = dataclasses.replace(base, scaling="bf16")
    linear = [
        role for role in recipes_lib.LINEAR_ROLES if role != HEAD and (gated or role != "mlp_gate")
    ]
    default = dict.fromkeys(linear, base)  # with recipe bf16, base is plain
    default |= {
        role: base if recipe == "fp8_dpa" else plain for role in recipes_lib.ATTENTION_ROLES
    }
    layers = [dict(default) for _ in range(config.model.layers)]
    head = base if fp8.head else plain
    if recipe != "bf16":
        for override in recipes_lib.parse_overrides(fp8.overrides, layers=config.model.layers):
            changed = dataclasses.replace(base, scaling=override.scaling)
            _check_applies(override, layers, head)
            head = changed if override.role == HEAD else head
            for layer in layers[override.first : override.last + 1]:
                layer |= {override.role: changed} if override.role in layer else {}
        _check_blockwise(layers)
        if head.scaling == "blockwise" and config.training.loss_chunk:
            raise ConfigError(
                f"config.training.loss_chunk: {config.training.loss_chunk} with a blockwise FP8 head: there is no such loss; set "
                f"it to 0, or config.fp8.overrides='{HEAD}=current'"
            )
    first = (attention_lib.CUDNN,) * cudnn + ("pallas",) * fused
    backends = _Backends(
        _asked_backend(config, recipe, cudnn=cudnn),
        (*first, "composed", "emulated"),
        head_dim(config.model),
    )
    return ModelRecipes(tuple(layers), head, tuple(backends.choose(layer) for layer in layers))


def _asked_backend(config: Config, recipe: str, *, cudnn: bool) -> str:
    """What the config asks for, `auto` where that is about FP8 attention and there is none."""
    asked = config.fp8.attention_backend
    if recipe == "bf16":
        return asked if cudnn and asked == attention_lib.CUDNN else "auto"
    overrides = recipes_lib.parse_overrides(config.fp8.overrides, layers=config.model.layers)
    wanted = recipe == "fp8_dpa" or any(
        o.role in recipes_lib.ATTENTION_ROLES and o.scaling != "bf16" for o in overrides
    )
    if asked == "pallas" and not wanted:
        raise ConfigError(
            "config.fp8.attention_backend: pallas has no role in BF16, and no attention is in FP8; use auto, or "
            "config.fp8.recipe=fp8_dpa"
        )
    return asked


def _check_applies(override: recipes_lib.Override, layers: list[Recipes], head: GemmRecipe) -> None:
    """An override that would change nothing is a mistake, not a wish."""
    if override.role == HEAD and not head.fp8 and override.scaling != "bf16":
        raise ConfigError(
            f"config.fp8.overrides: {HEAD}={override.scaling} needs config.fp8.head=True: the head is in BF16"
        )
    if override.role == HEAD and (override.first, override.last) != (0, len(layers) - 1):
        raise ConfigError(
            f"config.fp8.overrides: {HEAD} has no layers; write {HEAD}={override.scaling}"
        )
    if override.role == "mlp_gate" and "mlp_gate" not in layers[0]:
        raise ConfigError(
            "config.fp8.overrides: mlp_gate: the FFN has no gate; only swiglu and smooth_swiglu have one"
        )


def _check_blockwise(layers: list[Recipes]) -> None:
    for role in recipes_lib.ATTENTION_ROLES:
        if any(layer[role].scaling == "blockwise" for layer in layers):
            raise ConfigError(
                f"config.fp8.scaling: {role} has no blockwise scaling, only {', '.join(attention_lib.SCALINGS)}; set "
                "config.fp8.overrides='attention_scores=current,attention_values=current', or config.fp8.recipe=fp8"
            )


class _Backends(NamedTuple):
    """Which backend computes a layer's attention.

    asked: by the config; `auto`: the first in `order`, by what memory they take, that can.
    """

    asked: str
    order: tuple[str, ...]
    features: int

    def choose(self, layer: Recipes) -> str:
        """The backend asked for; kernels for FP8 alone leave a layer whose attention is not all in FP8 to the best of the others."""
        in_fp8 = all(layer[role].fp8 for role in recipes_lib.ATTENTION_ROLES)
        automatic = self.asked == "auto" or (self.asked == "pallas" and not in_fp8)
        problems = []
        for backend in self.order if automatic else (self.asked,):
            try:
                attention_lib.check_backend(backend, layer, self.features)
                return backend
            except ValueError as error:
                problems.append(str(error))
        raise ConfigError(f"config.fp8.attention_backend: {'; '.join(problems)}")


def init_scaling(recipes: ModelRecipes) -> scaling_lib.Scaling:
    """Empty scaling state for a model; see numerics/scaling.py."""
    out: scaling_lib.Scaling = {}
    for role, (layers, recipe) in recipes.by_role().items():
        out |= scaling_lib.init({role: recipe}, layers)
    return out


def update_scaling(
    scaling: scaling_lib.Scaling, amaxes: scaling_lib.Tokens, recipes: ModelRecipes
) -> scaling_lib.Scaling:
    """State after a step with these amaxes."""
    return scaling_lib.update(
        scaling, amaxes, {role: recipe for role, (_, recipe) in recipes.by_role().items()}
    )


def zero_tokens(recipes: ModelRecipes, *, by_device: bool = False) -> scaling_lib.Tokens:
    """One token a GEMM call site in FP8, stacked over layers.

    With `by_device`, the blocks' tokens of delayed scaling, which waits for no amax, have a dimension for each mesh axis: no device asks
    another for its amaxes before `over_devices`, once a step.
    """
    out: scaling_lib.Tokens = {}
    for role, (layers, recipe) in recipes.by_role().items():
        out |= scaling_lib.zero_tokens({role: recipe}, layers)
    mesh = jax.sharding.get_abstract_mesh()
    if not by_device or mesh.empty or mesh.size == 1:
        return out
    delayed = {
        role
        for role, (_, recipe) in recipes.by_role().items()
        if recipe.scaling == "delayed" and role != HEAD
    }
    spec = PartitionSpec(None, None, *mesh.axis_names)
    return {
        role: jax.lax.with_sharding_constraint(jnp.zeros((*token.shape, *mesh.axis_sizes)), spec)
        if role in delayed
        else token
        for role, token in out.items()
    }


def over_devices(amaxes: scaling_lib.Tokens) -> scaling_lib.Tokens:
    """Amaxes of whole tensors, [layers, operands], from those of all devices; infinite where one is not a number, which a maximum may lose."""
    known = {role: jnp.where(jnp.isnan(amax), jnp.inf, amax) for role, amax in amaxes.items()}
    return {role: jnp.max(amax, axis=tuple(range(2, amax.ndim))) for role, amax in known.items()}


def zero_reports(recipes: ModelRecipes) -> scaling_lib.Tokens:
    """Tokens with room for `statistics.REPORT`: of every role of the blocks, in FP8 or not, and of an FP8 head."""
    width = len(statistics.REPORT)
    return {
        role: jnp.zeros((layers, len(recipes_lib.OPERANDS[role]), width))
        for role, (layers, recipe) in recipes.by_role().items()
        if recipe.fp8 or role != HEAD
    }


def read_reports(
    found: scaling_lib.Tokens, recipes: ModelRecipes, *, pooled: bool
) -> tuple[scaling_lib.Tokens, Health]:
    """What tokens from `zero_reports` brought back: raw amaxes as those of `zero_tokens`, and statistics by operand.

    Returns:
        Role → amaxes, 0 in layers that are not in FP8; 'mlp_up.g' → statistic → float32 [layers], of casts 0 where there is none.
    """
    amaxes, health = {}, {}
    for role, token in found.items():
        fp8 = [
            recipe.fp8
            for recipe in (
                (recipes.head,) if role == HEAD else (layer[role] for layer in recipes.blocks)
            )
        ]
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
) -> Health:
    """Health of the weights' casts, as from `read_reports`.

    Args:
        weights: role → weight stacked over layers.
        quantised: from `quantise_weights`.
        recipes: of the model.
    """

    def one(role: str, first: int, last: int, recipe: GemmRecipe, q: Quantised) -> jax.Array:
        stacked = weights[role][first:last]
        if not recipe.fp8 or recipe.scaling == "blockwise":
            cast = q if recipe.fp8 else Quantised(q.data, None)
            return jax.vmap(lambda w, q: statistics.health(_matrix(role, w), q))(stacked, cast)
        # Layer by layer and cast again: what the GEMMs take lies transposed, and beside it XLA for GPUs writes the weight in float32
        # and integers in that order, too: 52 bytes an element where here it is 10 (counted in a program for an H100).
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


def head_health(weight: jax.Array, quantised: Quantised, recipes: ModelRecipes) -> Health:
    """The same of the head's weight; nothing if it is not in FP8."""
    return (
        {f"{HEAD}.w": _by_name(statistics.health(weight, quantised)[None])}
        if recipes.head.fp8
        else {}
    )


def _by_name(rows: jax.Array) -> dict[str, jax.Array]:
    """[layers, statistics] to statistic → [layers]."""
    return {name: rows[:, i] for i, name in enumerate(statistics.HEALTH[: rows.shape[1]])}


def quantise_weights(
    weights: Mapping[str, jax.Array],
    recipes: ModelRecipes,
    dtype: Any,
    scales: Mapping[str, jax.Array],
) -> list[dict[str, Quantised]]:
    """Quantises every GEMM weight once, one dictionary a segment of equal layers.

    Args:
        weights: role → weight stacked over layers. The quantised ones are matrices, as `Dense` takes them.
        recipes: of the model.
        dtype: of activations, for roles that are not in FP8.
        scales: of the scaling state; those of weights are used where their scaling is delayed.
    """

    def one(role: str, first: int, last: int, recipe: GemmRecipe) -> Quantised:
        scale = (
            scales[scaling_lib.weight_entry(role)][first:last, 0] if recipe.delayed_weight else None
        )
        with jax.named_scope(f"quantise_weight.{role}"):
            return jax.vmap(
                lambda w, scale: quantise_weight(_matrix(role, w), recipe, dtype, scale)
            )(weights[role][first:last], scale)

    return [
        {role: one(role, first, last, segment[role]) for role in weights}
        for first, last, segment in recipes.segments()
    ]


def quantise_head(
    weight: jax.Array, recipes: ModelRecipes, dtype: Any, scales: Mapping[str, jax.Array]
) -> Quantised:
    """The same of the head's weight, [vocab, embed]."""
    scale = scales[scaling_lib.weight_entry(HEAD)][0, 0] if recipes.head.delayed_weight else None
    return quantise_weight(weight, recipes.head, dtype, scale)


def weight_amaxes(weights: Mapping[str, jax.Array], recipes: ModelRecipes) -> scaling_lib.Tokens:
    """Amaxes of the weights whose scaling is delayed, by entry of the scaling state.

    Args:
        weights: role → weight stacked over layers; of the head, one layer.
        recipes: of the model; where calibration has replaced `delayed`, amaxes are taken all the same.

    Returns:
        'qkv.w' → float32 [layers, 1], 0 in layers that are not in FP8.
    """
    out = {}
    for role, w in weights.items():
        layers = [recipes.head] if role == HEAD else [layer[role] for layer in recipes.blocks]
        if not any(recipe.measured and recipe.weight_scaling == "delayed" for recipe in layers):
            continue
        largest = jax.vmap(functools.partial(formats.amax, emulated=layers[0].emulated))(w)
        measured = jnp.asarray([recipe.measured for recipe in layers])
        out[scaling_lib.weight_entry(role)] = jnp.where(measured, largest, 0.0)[:, None]
    return out


def _matrix(role: str, w: jax.Array) -> jax.Array:
    """[inputs, outputs]: all but the last dimension of attention_out are inputs, else only the first is."""
    return w.reshape(-1, w.shape[-1]) if role == "attention_out" else w.reshape(w.shape[0], -1)


def layers_of(tree: Any, first: int, last: int) -> Any:
    """Slices the leading axis of every array."""
    return jax.tree.map(lambda a: a[first:last], tree)
