"""Reuse the scaling state of a checkpoint in a run with other FP8 settings: roles that still fit
keep it.

    checkpoints.save(step, state.items(), {"scaling": record(program.recipes)})
    kept, why = choose(program.recipes, saved_arrays, saved_record)
    kept["qkv"]["history"], why["mlp_down"]      # arrays that fit; why a role must be calibrated again

Amaxes do not depend on their use, so a role's state fits if its scales mean the same: formats,
margin and rounding, a history of the same length, and every layer that needs it was measured
before.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.roles import HEAD
from fp8jax.numerics.scaling import Scaling, entries, operands, role_of, scales_of

Record = dict[str, Any]  # settings of one role; plain JSON values


def record(recipes: ModelRecipes) -> dict[str, Record]:
    """Return the settings that make the scaling state of a run with these recipes, by entry, as
    JSON values.
    """
    by_role = {role: recipe for role, (_, recipe) in recipes.by_role().items()}
    return {entry: _record(entry, by_role[role_of(entry)], recipes) for entry in entries(by_role)}


def _record(entry: str, recipe: GemmRecipe, recipes: ModelRecipes) -> Record:
    role = role_of(entry)
    layers = [recipes.head] if role == HEAD else [layer[role] for layer in recipes.blocks]
    return {
        "formats": {operand: recipe.format(operand).name for operand in operands(entry)},
        "margin": recipe.margin,
        "power_of_two": recipe.power_of_two,
        "history_length": recipe.history_length,
        "scalings": [layer.scaling for layer in layers],
    }


def choose(
    recipes: ModelRecipes, saved: Scaling, saved_with: Mapping[str, Record] | None
) -> tuple[Scaling, dict[str, str]]:
    """Return the state of the roles that a checkpoint's state fits, and for the others why it does
    not.

    Args:
        recipes: recipes of the continued run.
        saved: state in the checkpoint: role → `history`, `scale`.
        saved_with: from `record`; None for an older checkpoint without it, which is judged by its
            scales.
    """
    kept: Scaling = {}
    why: dict[str, str] = {}
    for role, wanted in record(recipes).items():
        recipe = recipes.by_role()[role_of(role)][1]
        if role not in saved:
            why[role] = "not in the checkpoint"
        elif saved_with is not None and (change := _change(saved_with.get(role), wanted)):
            why[role] = change
        elif saved_with is None and not _made_with(saved[role], recipe, role, wanted["scalings"]):
            why[role] = "other settings"
        else:
            kept[role] = saved[role]
    return kept, why


def _change(before: Record | None, now: Record) -> str:
    """Return the first thing that makes a role's state unfit, as 'margin was 0'; empty if it fits."""
    if before is None:
        return "not in the checkpoint"
    for name in ("formats", "margin", "power_of_two", "history_length"):
        if before[name] != now[name]:
            return f"{name} {_difference(before[name], now[name])}"
    for layer, (old, new) in enumerate(zip(before["scalings"], now["scalings"], strict=True)):
        if new == "delayed" and old in ("bf16", "static"):
            return f"was {old} in layer {layer}"
    return ""


def _difference(before: Any, now: Any) -> str:
    """Describe the difference, such as 'were e5m2, are e4m3'."""
    if not isinstance(before, dict):
        return f"was {before}, is {now}"
    changed = next(name for name in now if before.get(name) != now[name])
    return f"of {changed} was {before.get(changed)}, is {now[changed]}"


def _made_with(
    state: Mapping[str, jax.Array], recipe: GemmRecipe, role: str, scalings: list[str]
) -> bool:
    """Return whether this recipe makes these scales of the history, and all layers that need one
    have it.
    """
    found = jax.device_get(state)
    if found["history"].shape[-1] != recipe.history_length:
        return False
    expected, largest = jax.device_get(scales_of(jnp.asarray(found["history"]), recipe, role))
    needed = np.asarray(scalings) == "delayed"
    return bool(
        np.all(largest[needed] > 0) and np.all((largest == 0) | (expected == found["scale"]))
    )


def tell(kept: Scaling, why: Mapping[str, str]) -> str:
    """Return one line about roles that are calibrated again."""
    reasons: dict[str, list[str]] = {}
    for role, reason in why.items():
        reasons.setdefault(reason, []).append(role)
    anew = "; ".join(f"{', '.join(roles)} ({reason})" for reason, roles in reasons.items())
    return f"fp8 scales are calibrated anew: {anew}" + (
        f"; kept: {', '.join(kept)}" if kept else ""
    )
