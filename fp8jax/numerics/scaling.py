"""State of delayed scaling: amax histories and the scales taken from them, a plain pytree beside the parameters.

    scaling = init({"qkv": recipe, ...}, layers=16)      # {"qkv": {"history": [16, 2, H], "scale": [16, 2]}, ...}
    tokens = zero_tokens(recipes, layers=16)             # {"qkv": [16, 2], ...}: cotangents become raw amaxes
    scaling = update(scaling, amaxes, recipes)           # once, at the end of a step

Amaxes of microbatches are combined with `jnp.maximum`, never summed. The operands' order within a role is
`recipes.OPERANDS`. Only roles with delayed scaling have state; every FP8 role has tokens, because amaxes are watched too.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fp8jax.numerics.recipes import OPERANDS, GemmRecipe

Scaling = dict[str, dict[str, jax.Array]]
Tokens = dict[str, jax.Array]


def init(recipes: Mapping[str, GemmRecipe], layers: int) -> Scaling:
    """Empty histories (zeros) and scales of 1 for the roles with delayed scaling. Calibrate before the first step."""
    return {
        role: {
            "history": jnp.zeros((layers, len(OPERANDS[role]), recipe.history_length), jnp.float32),
            "scale": jnp.ones((layers, len(OPERANDS[role])), jnp.float32),
        }
        for role, recipe in recipes.items()
        if recipe.scaling == "delayed"
    }


def zero_tokens(recipes: Mapping[str, GemmRecipe], layers: int) -> Tokens:
    """Zeros, one float32 [layers, operands] a role in FP8."""
    return {role: jnp.zeros((layers, len(OPERANDS[role])), jnp.float32) for role, recipe in recipes.items() if recipe.fp8}


def update(scaling: Scaling, amaxes: Tokens, recipes: Mapping[str, GemmRecipe]) -> Scaling:
    """Pushes this step's amaxes into the histories and takes new scales from them.

    An amax that is zero throughout the history leaves its scale as it was.

    Args:
        scaling: state, as `init` made it.
        amaxes: role → float32 [layers, operands], finite.
        recipes: role → recipe, for history reduction, formats and rounding.
    """
    return {role: _update_role(state, amaxes[role], recipes[role], role) for role, state in scaling.items()}


def _update_role(state: dict[str, jax.Array], amax: jax.Array, recipe: GemmRecipe, role: str) -> dict[str, jax.Array]:
    history = jnp.concatenate([amax[..., None], state["history"][..., :-1]], axis=-1)
    scale, largest = scales_of(history, recipe, role)
    return {"history": history, "scale": jnp.where(largest > 0, scale, state["scale"])}


def scales_of(history: jax.Array, recipe: GemmRecipe, role: str) -> tuple[jax.Array, jax.Array]:
    """Return the scales that a history gives, and the amaxes that they are for; where one is 0, its scale means nothing.

    Args:
        history: float32 [layers, operands, steps], the newest step first.
        recipe: of the role.
        role: whose operands they are.
    """
    largest = jnp.max(history, axis=-1) if recipe.history_reduction == "max" else history[..., 0]
    scales = [recipe.scale(largest[:, i], recipe.format(name)) for i, name in enumerate(OPERANDS[role])]
    return jnp.stack(scales, axis=-1), largest
