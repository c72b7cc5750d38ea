"""Derive from `config.fp8` the recipes and the backend of attention of every layer of a model.

recipes = model_recipes(config, gated=True, emulated=False)
recipes.blocks[3]["qkv"], recipes.head, recipes.backend_of(3)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fp8jax.config import Config, ConfigError, head_dim
from fp8jax.numerics import recipes as recipes_lib
from fp8jax.numerics.attention import definition as attention_lib
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.roles import HEAD

Recipes = dict[str, GemmRecipe]


class LayerRecipes(dict[str, GemmRecipe]):
    """Role → recipe of one layer; it is never changed, so it is hashable, and static in a compiled
    function.
    """

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))


class Segment(NamedTuple):
    """A run of equal layers: the first, one past the last, their recipes."""

    first: int
    last: int
    recipes: LayerRecipes


@dataclasses.dataclass(frozen=True)
class ModelRecipes:
    """The recipes of the blocks, layer by layer, and of the head; and the backend of attention in
    each layer.

    Attributes:
        attention_backends: backends of all layers; layers with the same recipes have the same.
            Empty means `emulated` in all.
    """

    blocks: tuple[Mapping[str, GemmRecipe], ...]
    head: GemmRecipe
    attention_backends: tuple[str, ...] = ()

    def __hash__(self) -> int:
        layers = tuple(LayerRecipes(layer) for layer in self.blocks)
        return hash((layers, self.head, self.attention_backends))

    def of_role(self, role: str) -> list[GemmRecipe]:
        """Return the role's recipe in every layer; the head's, which has no layers, once."""
        return [self.head] if role == HEAD else [layer[role] for layer in self.blocks]

    def backend_of(self, layer: int) -> str:
        """Return the backend of one layer's attention."""
        return self.attention_backends[layer] if self.attention_backends else "emulated"

    @property
    def attention_backend(self) -> str:
        """Return the backend of attention in FP8, or, if no layer has it, of all attention."""
        in_fp8 = (
            i
            for i, layer in enumerate(self.blocks)
            if any(layer[role].fp8 for role in recipes_lib.ATTENTION_ROLES)
        )
        return self.backend_of(next(in_fp8, 0))

    def segments(self) -> list["Segment"]:
        """Return the runs of equal layers."""
        out: list[Segment] = []
        for layer, recipes in enumerate(self.blocks):
            if out and out[-1].recipes == recipes:
                out[-1] = out[-1]._replace(last=layer + 1)
            else:
                out.append(Segment(layer, layer + 1, LayerRecipes(recipes)))
        return out

    def by_role(self) -> dict[str, tuple[int, GemmRecipe]]:
        """Return role → (layers, recipe of its state): delayed if any layer is, otherwise FP8 if
        any layer is.
        """
        order = {"delayed": 0, "bf16": 2}
        out = {}
        for role in self.blocks[0]:
            out[role] = (
                len(self.blocks),
                min((layer[role] for layer in self.blocks), key=lambda r: order.get(r.scaling, 1)),
            )
        return {**out, HEAD: (1, self.head)}

    def scaled_by(self, scaling: str) -> "ModelRecipes":
        """Return the same roles in FP8, with another scaling in place of `delayed`, the only one
        with earlier scales.
        """

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
    """Return the recipes that `config.fp8` describes.

    Args:
        config: the run's configuration.
        gated: whether the FFN has a gate GEMM.
        emulated: whether the device has no FP8 units.
        fused: whether the device runs our attention kernels, so that `auto` may choose them.
        cudnn: whether the device runs cuDNN's attention, so that `auto` may choose it for layers
            without FP8 attention.
        recipe: overrides config.fp8.recipe; evaluation runs in `bf16`.

    Raises:
        ConfigError: the attention backend, or a device with FP8 units, does not support the
            configuration.
    """
    recipe = recipe or config.fp8.recipe
    _check_blockwise_device(config, recipe, emulated=emulated)
    base = _base_recipe(config, recipe, emulated=emulated)
    layers, head = _by_default(config, recipe, base, gated=gated)
    if recipe != "bf16":
        head = _override(config, base, layers, head)
        _check_blockwise_attention(layers)
        _check_blockwise_loss(config, head)
    first = (attention_lib.CUDNN,) * cudnn + ("pallas",) * fused
    backends = _Backends(
        _asked_backend(config, recipe, cudnn=cudnn),
        (*first, "composed", "emulated"),
        head_dim(config.model),
    )
    blocks = tuple(LayerRecipes(layer) for layer in layers)
    return ModelRecipes(blocks, head, tuple(backends.choose(layer) for layer in layers))


# The fields that a recipe takes unchanged from the section `fp8` of a config.
_FROM_SECTION = (
    "weight_scaling",
    "history_length",
    "history_reduction",
    "margin",
    "power_of_two",
    "gradient_format",
    "fast_accumulation",
)


def _base_recipe(config: Config, recipe: str, *, emulated: bool) -> GemmRecipe:
    """Return the recipe of every role in FP8 without override; with recipe `bf16` no role is in
    FP8.
    """
    fp8 = config.fp8
    tokens = config.training.batch_size * config.data.sequence_length
    section: dict[str, Any] = {name: getattr(fp8, name) for name in _FROM_SECTION}
    return GemmRecipe(
        scaling="bf16" if recipe == "bf16" else fp8.scaling,
        emulated=emulated,
        static_weight_scale=fp8.static_weight_scale or config.model.init_std or 1.0,
        static_gradient_scale=fp8.static_gradient_scale or 1 / tokens,
        **section,
    )


def _by_default(
    config: Config, recipe: str, base: GemmRecipe, *, gated: bool
) -> tuple[list[Recipes], GemmRecipe]:
    """Return the recipes of every layer and of the head, before overrides."""
    plain = dataclasses.replace(base, scaling="bf16")
    layer: Recipes = {}
    for role in recipes_lib.LINEAR_ROLES:
        if role != HEAD and (gated or role != "mlp_gate"):
            layer[role] = base
    for role in recipes_lib.ATTENTION_ROLES:
        layer[role] = base if recipe == "fp8_dpa" else plain
    layers = [dict(layer) for _ in range(config.model.layers)]
    return layers, base if config.fp8.head else plain


def _override(
    config: Config, base: GemmRecipe, layers: list[Recipes], head: GemmRecipe
) -> GemmRecipe:
    """Apply `config.fp8.overrides` to the layers, in place, and return the head's recipe."""
    overrides = recipes_lib.parse_overrides(config.fp8.overrides, layers=config.model.layers)
    for override in overrides:
        _check_applies(override, layers, head)
        changed = dataclasses.replace(base, scaling=override.scaling)
        if override.role == HEAD:
            head = changed
        for layer in layers[override.first : override.last + 1]:
            if override.role in layer:
                layer[override.role] = changed
    return head


def _check_blockwise_device(config: Config, recipe: str, *, emulated: bool) -> None:
    fp8 = config.fp8
    if "blockwise" in fp8.scaling + fp8.overrides and recipe != "bf16" and not emulated:
        raise ConfigError(
            "config.fp8.scaling: blockwise has no FP8 kernel on this device; use current or "
            "delayed, or "
            "config.fp8.backend=emulated to study it in BF16 GEMMs"
        )


def _check_blockwise_loss(config: Config, head: GemmRecipe) -> None:
    if head.scaling == "blockwise" and config.training.loss_chunk:
        raise ConfigError(
            f"config.training.loss_chunk: {config.training.loss_chunk} with a blockwise FP8 "
            f"head: there is no such loss; set "
            f"it to 0, or config.fp8.overrides='{HEAD}=current'"
        )


def _asked_backend(config: Config, recipe: str, *, cudnn: bool) -> str:
    """Return the configured backend, or `auto` if it is for FP8 attention and there is none."""
    asked = config.fp8.attention_backend
    if recipe == "bf16":
        return asked if cudnn and asked == attention_lib.CUDNN else "auto"
    overrides = recipes_lib.parse_overrides(config.fp8.overrides, layers=config.model.layers)
    wanted = recipe == "fp8_dpa" or any(
        o.role in recipes_lib.ATTENTION_ROLES and o.scaling != "bf16" for o in overrides
    )
    if asked == "pallas" and not wanted:
        raise ConfigError(
            "config.fp8.attention_backend: pallas has no role in BF16, and no attention is in "
            "FP8; use auto, or "
            "config.fp8.recipe=fp8_dpa"
        )
    return asked


def _check_applies(override: recipes_lib.Override, layers: list[Recipes], head: GemmRecipe) -> None:
    """Raise ConfigError for an override that would change nothing, which is a mistake."""
    if override.role == HEAD and not head.fp8 and override.scaling != "bf16":
        raise ConfigError(
            f"config.fp8.overrides: {HEAD}={override.scaling} needs config.fp8.head=True: the "
            f"head is in BF16"
        )
    if override.role == HEAD and (override.first, override.last) != (0, len(layers) - 1):
        raise ConfigError(
            f"config.fp8.overrides: {HEAD} has no layers; write {HEAD}={override.scaling}"
        )
    if override.role == "mlp_gate" and "mlp_gate" not in layers[0]:
        raise ConfigError(
            "config.fp8.overrides: mlp_gate: the FFN has no gate; only swiglu and smooth_swiglu have one"
        )


def _check_blockwise_attention(layers: list[Recipes]) -> None:
    for role in recipes_lib.ATTENTION_ROLES:
        if any(layer[role].scaling == "blockwise" for layer in layers):
            raise ConfigError(
                f"config.fp8.scaling: {role} has no blockwise scaling, only "
                f"{', '.join(attention_lib.SCALINGS)}; set "
                "config.fp8.overrides='attention_scores=current,attention_values=current', or "
                "config.fp8.recipe=fp8"
            )


class _Backends(NamedTuple):
    """The choice of the backend for a layer's attention.

    Attributes:
        asked: the configured one; `auto` takes the first in `order`, which is by memory, that
            supports the layer.
    """

    asked: str
    order: tuple[str, ...]
    features: int

    def choose(self, layer: Recipes) -> str:
        """Return the configured backend, or the best other one for a layer whose attention is not
        all FP8.
        """
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
