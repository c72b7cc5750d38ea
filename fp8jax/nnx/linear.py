"""Linear, LinearGeneral and Einsum of flax.nnx with FP8 GEMMs: the same arguments, and `recipe`.

    layer = Linear(256, 1024, recipe=Recipe("delayed"), rngs=rngs)

Everything but the product is flax's own code, and recipe None has its product, too: the same
numbers, bit for bit. Constructor and call otherwise know what flax's know; `precision` does not
matter to FP8 GEMMs, whose recipe says how they accumulate.
"""

from typing import Any

import jax
from flax import nnx

from fp8jax.library.functions import dot_general
from fp8jax.library.recipe import Recipe, check_recipe
from fp8jax.nnx.einsum import einsum
from fp8jax.nnx.scaling import RoleScaling


class Product:
    """What an FP8 layer has beside flax's: `recipe`, `role` and the state of delayed scaling."""

    recipe: Recipe | None
    role: str
    scaling: RoleScaling | None

    def set_recipe(self, recipe: Recipe | None, role: str, leading: tuple[int, ...] = ()) -> None:
        """Set the recipe, with new scaling state.

        Args:
            recipe: how the product is computed.
            role: any name; profiles show it.
            leading: shape of the layers stacked in this module.
        """
        check_recipe(recipe, f"fp8jax.nnx.{type(self).__name__}")
        self.recipe = recipe
        self.role = role
        self.scaling = nnx.data(None)
        if recipe is not None and recipe.has_state:
            self.scaling = RoleScaling(recipe, role, leading)

    def product(
        self,
        x: jax.Array,
        w: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Compute `lax.dot_general` with the layer's recipe."""
        state = self.scaling
        y = dot_general(
            x,
            w,
            dimension_numbers,
            self.recipe,
            scales=None if state is None else state.scales(),
            token=None if state is None else state.token(x),
            role=self.role,
            precision=precision,
            preferred_element_type=preferred_element_type,
            known=state is not None and state.known,
        )
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


class _DotGeneral(Product):
    """A layer of flax that multiplies with `self.dot_general`: flax sets it, and an FP8 recipe
    stands before it.
    """

    @property
    def dot_general(self) -> Any:
        """Return the product: the recipe's, or with recipe None what flax was given."""
        return self.plain_product if self.recipe is None else self.product

    @dot_general.setter
    def dot_general(self, given: Any) -> None:
        self.plain_product = given


class Linear(_DotGeneral, nnx.Linear):
    """`flax.nnx.Linear` with FP8 GEMMs.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        recipe: a `fp8jax.Recipe`; None is flax's layer.
        role: any name; profiles and programs show it.
        **kwargs: the other arguments of `flax.nnx.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: Recipe | None = None,
        role: str = "linear",
        **kwargs: Any,
    ):
        self.set_recipe(recipe, role)
        super().__init__(in_features, out_features, **kwargs)


class LinearGeneral(_DotGeneral, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with FP8 GEMMs.

    Args:
        in_features: number of input features, or several.
        out_features: number of output features, or several.
        recipe: a `fp8jax.Recipe`; None is flax's layer.
        role: any name; profiles and programs show it.
        **kwargs: the other arguments of `flax.nnx.LinearGeneral`.
    """

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        *,
        recipe: Recipe | None = None,
        role: str = "linear",
        **kwargs: Any,
    ):
        self.set_recipe(recipe, role)
        super().__init__(in_features, out_features, **kwargs)


class Einsum(Product, nnx.Einsum):
    """`flax.nnx.Einsum` with FP8 GEMMs.

    Args:
        einsum_str: the equation, inputs first, then the kernel.
        kernel_shape: shape of the kernel.
        bias_shape: shape of the bias; None means no bias.
        recipe: a `fp8jax.Recipe`; None is flax's layer.
        role: any name; profiles and programs show it.
        **kwargs: the other arguments of `flax.nnx.Einsum`.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Any,
        bias_shape: Any = None,
        *,
        recipe: Recipe | None = None,
        role: str = "linear",
        **kwargs: Any,
    ):
        self.set_recipe(recipe, role)
        super().__init__(einsum_str, kernel_shape, bias_shape, **kwargs)

    @property
    def einsum_op(self) -> Any:
        """Return the product: the recipe's, or with recipe None what flax was given."""
        return self.plain_product if self.recipe is None else self._einsum

    @einsum_op.setter
    def einsum_op(self, given: Any) -> None:
        self.plain_product = given

    def _einsum(
        self, equation: str, x: jax.Array, w: jax.Array, out_sharding: Any = None, **options: Any
    ) -> jax.Array:
        y = einsum(equation, x, w, lambda *args: self.product(*args, **options))
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
