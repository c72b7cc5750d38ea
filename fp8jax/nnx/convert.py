"""Turn one layer of flax.nnx into ours, and back: variables stay the same objects."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from fp8jax.library.recipe import Recipe
from fp8jax.nnx.linear import Einsum, Linear, LinearGeneral

OURS: dict[type, type] = {
    nnx.Linear: Linear,
    nnx.LinearGeneral: LinearGeneral,
    nnx.Einsum: Einsum,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
# The attribute of flax's layer that a property of ours stands before, and its usual values.
_PRODUCT = {
    nnx.Linear: ("dot_general", (lax.dot_general,)),
    nnx.LinearGeneral: ("dot_general", (None, lax.dot_general)),
    nnx.Einsum: ("einsum_op", (jnp.einsum,)),
}


def why_not(layer: Any) -> str:
    """Return why a layer of flax cannot be converted; '' if it can."""
    attribute, usual = _PRODUCT[type(layer)]
    given = getattr(layer, attribute)
    if given not in usual or getattr(layer, "dot_general_cls", None) is not None:
        return f"it has a {attribute} of its own"
    try:
        leading(layer)
    except ValueError as error:
        return str(error)
    return ""


def leading(layer: Any) -> tuple[int, ...]:
    """Return the shape of the layers that are stacked in one, () for one layer.

    Raises:
        ValueError: they are stacked along another dimension than the first ones.
    """
    if isinstance(layer, nnx.Linear):
        one = (layer.in_features, layer.out_features)
    elif isinstance(layer, nnx.Einsum):
        one = tuple(layer.kernel_shape)
    else:
        one = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    shape = tuple(layer.kernel.get_value().shape)
    count = len(shape) - len(one)
    if shape[count:] != one:
        raise ValueError(f"its kernel {shape} is not {one} stacked along the first dimensions")
    return shape[:count]


def convert_layer(layer: Any, recipe: Recipe, role: str) -> Any:
    """Return flax's layer as ours."""
    attribute, _ = _PRODUCT[type(layer)]
    stacked = leading(layer)
    new = with_class(layer, OURS[type(layer)], {attribute: "plain_product"})
    new.set_recipe(recipe, role, stacked)
    return new


def restore_layer(layer: Any) -> Any:
    """Return our layer as flax's."""
    theirs = THEIRS[type(layer)]
    attribute, _ = _PRODUCT[theirs]
    return with_class(
        layer,
        theirs,
        {"plain_product": attribute, "recipe": None, "role": None, "scaling": None},
    )


def with_class(module: Any, cls: type, names: dict[str, str | None]) -> Any:
    """Return a module of another class with the same attributes, variables the same objects.

    Args:
        module: the module, not used any more afterwards.
        cls: the class.
        names: new names of attributes; None leaves one out. What NNX remembers of attributes
            follows, so that there and back gives an equal definition.
    """
    new = object.__new__(cls)
    for name, value in vars(module).items():
        kept = names.get(name, name)
        if name == "_pytree__nodes":
            nodes = {names.get(key, key): is_data for key, is_data in value.items()}
            value = type(value)({key: is_data for key, is_data in nodes.items() if key})
        if kept is not None:
            object.__setattr__(new, kept, value)
    return new
