"""Keep the state of delayed scaling: amax histories and the scales taken from them, a plain pytree
beside the parameters.

    scaling = init({"qkv": recipe, ...}, layers=16)      # {"qkv": {"history": [16, 2, H], "scale": [16, 2]}, ...}
    tokens = zero_tokens(recipes, layers=16)             # {"qkv": [16, 2], ...}: cotangents become raw amaxes
    scaling = update(scaling, amaxes, recipes)           # once, at the end of a step

Amaxes of microbatches are combined with `jnp.maximum`, never summed. The operands' order within a
role is `recipes.OPERANDS`; a weight under delayed scaling has an entry of its own, `qkv.w`, with
one operand. Only roles with delayed scaling have state; every FP8 role has tokens, because amaxes
are also logged.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fp8jax.numerics.recipes import ATTENTION_ROLES, OPERANDS, GemmRecipe
from fp8jax.numerics.roles import LINEAR_OPERANDS

Scaling = dict[str, dict[str, jax.Array]]
Tokens = dict[str, jax.Array]

_WEIGHT = ".w"


def weight_entry(role: str) -> str:
    """Return the name of the entry of a role's weight, such as 'qkv.w'."""
    return role + _WEIGHT


def role_of(entry: str) -> str:
    """Return the role that an entry belongs to."""
    return entry.removesuffix(_WEIGHT)


def operands(entry: str) -> tuple[str, ...]:
    """Return the operands of an entry, in the order in which its arrays hold them.

    A role of any name but attention's two is that of a linear layer.
    """
    return ("w",) if entry.endswith(_WEIGHT) else OPERANDS.get(entry, LINEAR_OPERANDS)


def operand_scale(
    scales: jax.Array | None, operand: str, role: str | None = None
) -> jax.Array | None:
    """Return the scale of one operand, float32 scalar, from all of a role's; None from None.

    Args:
        scales: float32 [operands].
        operand: name of the operand, such as "x" or "ds".
        role: role of attention; None for any linear layer.
    """
    if scales is None:
        return None
    names = LINEAR_OPERANDS if role is None else operands(role)
    return scales[names.index(operand)]


def entries(recipes: Mapping[str, GemmRecipe]) -> list[str]:
    """Return the entries with state: roles with delayed scaling, and their weights if those are
    delayed, too.
    """
    roles = [role for role, recipe in recipes.items() if recipe.scaling == "delayed"]
    return roles + [
        weight_entry(role)
        for role in roles
        if recipes[role].delayed_weight and role not in ATTENTION_ROLES
    ]


def init(recipes: Mapping[str, GemmRecipe], layers: int) -> Scaling:
    """Return empty histories (zeros) and scales of 1 for the roles with delayed scaling; calibrate
    before the first step.
    """
    return {
        entry: _empty(layers, len(operands(entry)), recipes[role_of(entry)].history_length)
        for entry in entries(recipes)
    }


def _empty(layers: int, count: int, history_length: int) -> dict[str, jax.Array]:
    return {
        "history": jnp.zeros((layers, count, history_length), jnp.float32),
        "scale": jnp.ones((layers, count), jnp.float32),
    }


def zero_tokens(recipes: Mapping[str, GemmRecipe], layers: int) -> Tokens:
    """Return zeros, one float32 [layers, operands] per role in FP8."""
    return {
        role: jnp.zeros((layers, len(operands(role))), jnp.float32)
        for role, recipe in recipes.items()
        if recipe.fp8
    }


def update(scaling: Scaling, amaxes: Tokens, recipes: Mapping[str, GemmRecipe]) -> Scaling:
    """Push this step's amaxes into the histories and take new scales from them.

    An amax that is zero throughout the history leaves its scale unchanged.

    Args:
        scaling: state from `init`; the layers may be any number of leading dimensions, or none.
        amaxes: entry → float32 [layers, operands], finite.
        recipes: role → recipe, for history reduction, formats and rounding.
    """
    return {
        entry: _update_entry(state, amaxes[entry], recipes[role_of(entry)], entry)
        for entry, state in scaling.items()
    }


def _update_entry(
    state: dict[str, jax.Array], amax: jax.Array, recipe: GemmRecipe, entry: str
) -> dict[str, jax.Array]:
    history = jnp.concatenate([amax[..., None], state["history"][..., :-1]], axis=-1)
    scale, largest = scales_of(history, recipe, entry)
    return {"history": history, "scale": jnp.where(largest > 0, scale, state["scale"])}


def scales_of(history: jax.Array, recipe: GemmRecipe, entry: str) -> tuple[jax.Array, jax.Array]:
    """Return the scales that a history gives, and the amaxes that they are for; where one is 0, its
    scale has no meaning.

    Args:
        history: float32 [layers, operands, steps], the newest step first.
        recipe: recipe of its role.
        entry: entry of the operands.
    """
    largest = jnp.max(history, axis=-1) if recipe.history_reduction == "max" else history[..., 0]
    scales = [
        recipe.scale(largest[..., i], recipe.format(name)) for i, name in enumerate(operands(entry))
    ]
    return jnp.stack(scales, axis=-1), largest
