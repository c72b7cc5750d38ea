"""List what an early warning can take out of FP8 in a run."""

from fp8jax.config import WarningConfig
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.monitor.early_warning import advised_fallbacks
from fp8jax.numerics.recipes import in_bf16


def fallbacks(config: WarningConfig, recipes: ModelRecipes) -> list[str]:
    """Return what a warning can take out of FP8, each as `config.fp8.overrides`; several can follow
    one another.

    Args:
        config: the run's section; only the action `fallback` takes roles out.
        recipes: recipes of the run.
    """
    if config.action != "fallback":
        return []
    if config.fallback:
        return [in_bf16(config.fallback)]
    in_fp8 = [role for role, (_, recipe) in recipes.by_role().items() if recipe.fp8]
    return [in_bf16(roles) for roles in advised_fallbacks(in_fp8)] if in_fp8 else []
