"""FP8 for models in Flax Linen, in the way flax has for it: `dot_general_cls`.

    dense = nn.Dense(512, dot_general_cls=functools.partial(fp8jax.linen.DotGeneral, recipe=recipe))
    loss, grads = fp8jax.linen.value_and_grad(loss_fn)(variables, batch)
    state = state.apply_gradients(grads=grads)      # flax's TrainState, over params and scaling state

Delayed scaling keeps its histories in flax's collection `_overwrite_with_gradient`: the "gradient"
of a variable there is its next value, which flax's TrainState puts in its place. `value_and_grad`
is `jax.value_and_grad`, with the maximum of amaxes where a layer is called more than once, as in
weight tying and loops; `combine` does so for microbatches. With `jax.grad` alone JAX would add the
two histories. A count tells, and then the next loss is NaN.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from fp8jax.library.functions import dot_general
from fp8jax.library.recipe import Recipe
from fp8jax.nnx.amax_tokens import as_float32, as_maximum
from fp8jax.nnx.einsum import einsum
from fp8jax.numerics import scaling as scaling_lib

__all__ = ["DotGeneral", "Einsum", "combine", "value_and_grad"]


class DotGeneral(nn.Module):
    """A `dot_general` with FP8 operands, for `dot_general_cls` of nn.Dense, nn.DenseGeneral and
    others.

    Attributes:
        recipe: a `fp8jax.Recipe`; None computes `lax.dot_general`.
        role: any name; profiles and programs show it.
    """

    recipe: Recipe | None = None
    role: str = "linear"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        w: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """Compute `lax.dot_general`; precision is the recipe's."""
        scales = token = None
        if self.recipe is not None and self.recipe.has_state:
            scales, token = self._scaling_state(self.recipe, x)
        return dot_general(
            x,
            w,
            dimension_numbers,
            self.recipe,
            scales=scales,
            token=token,
            role=self.role,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def _scaling_state(self, recipe: Recipe, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the scales and the token of one call."""
        shapes = {"history": (2, recipe.history_length), "scale": (2,), "uses": ()}
        given = []
        for name, shape in shapes.items():
            variable = self.variable(OVERWRITE_WITH_GRADIENT, name, jnp.zeros, shape, jnp.float32)
            given.append(as_float32(variable.value, x))
        history, scale, uses = given
        return _scales_and_token(recipe, history, scale, uses)


class Einsum(nn.Module):
    """An einsum of inputs and a weight with FP8 operands, in place of `jnp.einsum` in one's own
    modules.

    Attributes:
        recipe: a `fp8jax.Recipe`; None computes `lax.dot_general`.
        role: any name; profiles and programs show it.
    """

    recipe: Recipe | None = None
    role: str = "linear"

    @nn.compact
    def __call__(self, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Compute `jnp.einsum(equation, x, w)`; see `fp8jax.nnx.Einsum`."""
        return einsum(equation, x, w, DotGeneral(self.recipe, self.role))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scales_and_token(
    recipe: Recipe, history: jax.Array, scale: jax.Array, uses: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jnp.where(uses > 1, jnp.nan, scale), jnp.zeros(2, jnp.float32)


def _forward(
    recipe: Recipe, history: jax.Array, scale: jax.Array, uses: jax.Array
) -> tuple[Any, Any]:
    return _scales_and_token(recipe, history, scale, uses), (history, scale, uses)


def _backward(recipe: Recipe, saved: Any, g: Any) -> tuple[jax.Array, ...]:
    """Return the next history and scale, and a count of 1, as cotangents."""
    history, scale, uses = saved
    _, amax = g
    amax = jnp.where(jnp.isfinite(amax), amax, 0.0)
    state = {"linear": {"history": history, "scale": scale}}
    after = scaling_lib.update(state, {"linear": amax}, {"linear": recipe.gemm()})["linear"]
    # A state that was added up stays known as one.
    return after["history"], after["scale"], jnp.maximum(uses, 1.0)


_scales_and_token.defvjp(_forward, _backward)


def value_and_grad(f: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Return `jax.value_and_grad(f)` for a first argument that holds the collection
    `_overwrite_with_gradient`.

    Where a layer is called more than once, the newest amaxes are the maximum over its calls; inside
    `jax.jit`, as JAX has no such maximum outside.

    Args:
        f: loss of variables {"params": ..., "_overwrite_with_gradient": ...} and other arguments.
        has_aux: whether f returns (loss, aux).

    Raises:
        ValueError: a layer is called twice outside jit.
    """

    @functools.wraps(f)
    def traced(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        state = variables.get(OVERWRITE_WITH_GRADIENT, {})
        marked = {OVERWRITE_WITH_GRADIENT: jax.tree.map(as_maximum, state)} if state else {}
        return f({**variables, **marked}, *args, **kwargs)

    differentiate = jax.value_and_grad(traced, has_aux=has_aux)

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return differentiate(*args, **kwargs)
        except KeyError as error:
            if "EArray" not in str(error):
                raise
            raise ValueError(
                "fp8jax.linen.value_and_grad: a layer is called more than once; call this "
                "inside jax.jit"
            ) from error

    return wrapped


def combine(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gradients of two microbatches together: sums, and of scaling state the maximum.

    Both are taken with the same scaling state, as microbatches of one step are.
    """
    out = {}
    for name in one:
        how = jnp.maximum if name == OVERWRITE_WITH_GRADIENT else jnp.add
        out[name] = jax.tree.map(how, one[name], other[name])
    return out
