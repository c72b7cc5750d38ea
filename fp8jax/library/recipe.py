"""A recipe for the GEMMs of anyone's model, checked when it is made.

    recipe = Recipe(scaling="delayed", history_length=64)
    recipe.gemm()                   # the GemmRecipe of numerics, for the devices at hand

Layers take the amax of the moment for weights, as the trainer does: a weight is there before the
GEMM, and its amax costs little.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import jax

from fp8jax.numerics.formats import FORMATS
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.numerics.roles import FAST_ACCUMULATION, SCALINGS
from fp8jax.parallel.mesh import has_fp8_units

_REDUCTIONS = ("max", "most_recent")
_LONGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Say how GEMMs are computed in FP8; None in its place means: not in FP8.

    A recipe is hashable, and equal to another with the same fields.

    Attributes:
        scaling: where scales come from. `delayed`: from the largest amax of the last steps, kept in
            the model; in the first step, whose history is empty, from the amax of the moment.
            `current`: always from the amax of the moment. `static`: fixed, for tensors of about
            unit variance. `blockwise`: one for each 128 values, for studies: it runs emulated only.
        history_length: steps that `delayed` remembers.
        history_reduction: the `max` of the history, or its `most_recent` amax.
        margin: powers of two left free above the amax.
        power_of_two: round scales up to powers of two, so that scaling is exact.
        gradient_format: format of gradients, e5m2 or e4m3; activations and weights are e4m3.
        fast_accumulation: passes in which Hopper's tensor cores may sum with 14 bits: `fprop`,
            `all` or `none`.
        emulated: compute with the same FP8 values in bfloat16 GEMMs. None does so where JAX's
            default device has no FP8 units.

    Raises:
        ValueError: a value is not allowed; one line names the field, the value and what is.
        TypeError: there is no such field; one line names the nearest.
    """

    scaling: str = "delayed"
    history_length: int = 1024
    history_reduction: str = "max"
    margin: int = 0
    power_of_two: bool = True
    gradient_format: str = "e5m2"
    fast_accumulation: str = "fprop"
    emulated: bool | None = None

    def __new__(cls, *args: Any, **given: Any) -> "Recipe":
        """Refuse unknown fields by name, before dataclasses does without the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"fp8jax.Recipe has no field {name!r}{_hint(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field."""
        self._one_of("scaling", SCALINGS)
        self._one_of("history_reduction", _REDUCTIONS)
        self._one_of("gradient_format", FORMATS)
        self._one_of("fast_accumulation", FAST_ACCUMULATION)
        self._one_of("power_of_two", (True, False))
        self._one_of("emulated", (None, True, False))
        self._within("history_length", 1, _LONGEST)
        self._within("margin", -64, 64)
        if self.scaling == "blockwise" and self.emulated is False:
            raise ValueError("fp8jax.Recipe: emulated=False: blockwise scaling has no FP8 kernel")

    def _one_of(self, field: str, allowed: Iterable[Any]) -> None:
        value = getattr(self, field)
        if isinstance(value, str | bool | None) and value in allowed:
            return
        names = [str(name) for name in allowed]
        raise ValueError(
            f"fp8jax.Recipe: {field}={value!r} is not one of "
            f"{', '.join(names)}{_hint(value, names)}"
        )

    def _within(self, field: str, least: int, most: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(
                f"fp8jax.Recipe: {field}={value!r} is not an integer from {least} to {most}"
            )

    @property
    def has_state(self) -> bool:
        """Return whether layers keep histories."""
        return self.scaling == "delayed"

    def gemm(self, *, known: bool = False, stateless: bool = False) -> GemmRecipe:
        """Return the recipe that numerics take.

        Args:
            known: whether no scale stands for an empty history, so that no cast waits for an amax.
            stateless: whether there is no history: the amax of the moment takes its place.
        """
        fields = dataclasses.asdict(self)
        if stateless and self.scaling == "delayed":
            fields["scaling"] = "current"
        if self.emulated is None:
            fields["emulated"] = self.scaling == "blockwise" or not has_fp8_units(default_device())
        return GemmRecipe(**fields, fill_unknown=not known)


def default_device() -> jax.Device:
    """Return the device that JAX computes on unless told otherwise."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen or jax.devices()[0]


def check_recipe(recipe: Any, name: str) -> None:
    """Raise TypeError, which names `name`, if this is neither a Recipe nor None."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"{name}: recipe={recipe!r} is neither a fp8jax.Recipe nor None")


def _hint(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:200], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
