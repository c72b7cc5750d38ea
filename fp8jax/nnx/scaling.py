"""The scaling state of a layer, and its update after a gradient.

    loss, grads = value_and_grad(loss_fn)(model, batch)      # nnx.Param's gradients; updates the state

    for each microbatch:                                     # or, to push amaxes once a step:
        value_and_grad(loss_fn, update=False)(model, part)
    update_scaling(model)

Variables of class `Scaling` hold the histories and scales, and go where parameters go: through
nnx.jit, scan, vmap, remat, meshes and checkpoints. An `Amax`, which is one as well, is the token
whose cotangent brings the amaxes of a gradient (amax_tokens.py), and holds those of microbatches
until they are pushed. A scale of 0 stands for an empty history: the GEMM then takes the amax of the
moment, so that no step is made on an unknown scale and nothing is compiled twice. The cast waits
for that amax, as with `current` scaling; after `calibrate` it does not.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp8jax.library.recipe import Recipe
from fp8jax.nnx.amax_tokens import as_maximum, gemm_token
from fp8jax.numerics import scaling as scaling_lib


class Scaling(nnx.Variable):
    """State of delayed scaling: no parameter, and not for the optimizer."""


class Amax(Scaling):
    """Amaxes of the gradient being taken, and last a count of uses, float32 [..., operands + 1]."""


class RoleScaling(nnx.Module):
    """The state of one role with delayed scaling.

    Args:
        recipe: its recipe.
        role: any name; of attention, `attention_scores` or `attention_values`.
        leading: shape of layers stacked in one module; () for one layer.

    Attributes:
        history: amaxes of the last steps, newest first, float32 [*leading, operands,
            history_length].
        scale: float32 [*leading, operands].
        amax: an `Amax`.
        known: whether no scale stands for an empty history any more; static, set by `calibrate`.
    """

    def __init__(self, recipe: Recipe, role: str, leading: tuple[int, ...] = ()):
        self.recipe = recipe
        self.role = role
        self.known = False
        operands = len(scaling_lib.operands(role))
        self.history = Scaling(jnp.zeros((*leading, operands, recipe.history_length), jnp.float32))
        self.scale = Scaling(jnp.zeros((*leading, operands), jnp.float32))
        self.amax = Amax(jnp.zeros((*leading, operands + 1), jnp.float32))

    def scales(self) -> jax.Array:
        """Return the scales, float32 [operands]; 0 where unknown."""
        return jax.lax.stop_gradient(self.scale.get_value())

    def token(self, x: jax.Array) -> jax.Array:
        """Return a token for one GEMM, of which x is an operand."""
        return gemm_token(self.amax.get_value(), x)

    def push(self) -> None:
        """Push the amaxes that `amax` holds into the history; one that is not finite counts as 0,
        which changes no scale.
        """
        found = self.amax.get_value()[..., :-1]
        found = jnp.where(jnp.isfinite(found), found, 0.0)
        state = {"history": self.history.get_value(), "scale": self.scale.get_value()}
        recipes = {self.role: self.recipe.gemm()}
        after = scaling_lib.update({self.role: state}, {self.role: found}, recipes)[self.role]
        self.history.set_value(after["history"])
        self.scale.set_value(after["scale"])
        self.amax.set_value(jnp.zeros_like(self.amax.get_value()))


def role_scalings(model: Any) -> Iterator[tuple[tuple[Any, ...], RoleScaling]]:
    """Yield every scaling state in a model with its path, each once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, RoleScaling):
            yield path, node


def value_and_grad(
    f: Callable[..., Any] | None = None,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    update: bool = True,
    **options: Any,
) -> Callable[..., Any]:
    """Return `nnx.value_and_grad(f)`, which also updates the scaling state of the models it
    differentiates.

    The gradients are those of `nnx.Param` (or of the filter in `nnx.DiffState`), without scaling
    state, as an optimizer takes them.

    Args:
        f: loss of a model and other arguments; without it this is a decorator.
        argnums: as in `nnx.value_and_grad`: position, `nnx.DiffState`, or a sequence of these.
        has_aux: whether f returns (loss, aux).
        update: push amaxes into the histories. False keeps their maximum in the model for
            `update_scaling(model)`: for microbatches, which push once a step.
        **options: the other options of `nnx.value_and_grad`.

    Raises:
        ValueError: a layer is called twice outside jit, which JAX has no maximum of cotangents for.
    """
    if f is None:
        return functools.partial(
            value_and_grad, argnums=argnums, has_aux=has_aux, update=update, **options
        )
    several = isinstance(argnums, tuple | list)
    wanted = [_diff_state(given) for given in (argnums if several else (argnums,))]
    widened = tuple(nnx.DiffState(w.argnum, nnx.Any(w.filter, Amax)) for w in wanted)

    @functools.wraps(f)
    def traced(*args: Any) -> Any:
        held = [amax for w in wanted for amax in _amaxes(args[w.argnum])]
        before = [amax.get_value() for amax in held]
        for amax, value in zip(held, before, strict=True):
            amax.set_value(as_maximum(value))
        out = f(*args)
        for amax, value in zip(held, before, strict=True):
            amax.set_value(value)
        return out

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args = _by_position(f, args, kwargs)
        differentiate = nnx.value_and_grad(traced, argnums=widened, has_aux=has_aux, **options)
        try:
            value, grads = differentiate(*args)
        except KeyError as error:
            raise _outside_jit(error) from error
        kept = []
        for w, found in zip(wanted, grads, strict=True):
            kept.append(_take(args[w.argnum], found, w, update))
        return value, tuple(kept) if several else kept[0]

    return wrapped


def _diff_state(given: Any) -> nnx.DiffState:
    return given if isinstance(given, nnx.DiffState) else nnx.DiffState(given, nnx.Param)


def _by_position(
    f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return all arguments by position, as nnx.value_and_grad takes them."""
    if not kwargs:
        return args
    bound = inspect.signature(f).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        names = ", ".join(bound.kwargs)
        raise TypeError(
            f"fp8jax.nnx.value_and_grad: {names} can only be given by keyword; bind it with "
            f"functools.partial"
        )
    return bound.args


def _amaxes(model: Any) -> list[Amax]:
    return [state.amax for _, state in role_scalings(model)]


def _outside_jit(error: KeyError) -> Exception:
    """Return the error to raise: JAX cannot add the cotangents of a token outside jit, and says so
    with the name of a type.
    """
    if "EArray" not in str(error):
        return error
    return ValueError(
        "fp8jax.nnx.value_and_grad: a layer is called more than once; call this inside nnx.jit, "
        "where its amaxes combine"
    )


def _take(model: Any, grads: Any, wanted: nnx.DiffState, update: bool) -> Any:
    """Put the amaxes among the gradients into the model, push them, and return the other gradients."""
    if not _amaxes(model):
        return grads
    collect_amaxes(model, grads)
    if update:
        for _, state in role_scalings(model):
            state.push()
    return _filtered(grads, wanted.filter)


def _filtered(grads: Any, kept: Any) -> Any:
    """Return the gradients that a filter keeps: a State, or a list or dictionary of them."""
    return jax.tree.map(lambda state: nnx.filter_state(state, kept), grads, is_leaf=_is_state)


def _flat(grads: Any) -> dict[tuple[Any, ...], nnx.Variable]:
    """Return gradients by path: of a State, or of a list or dictionary of them."""
    found = {}
    for keys, state in jax.tree.leaves_with_path(grads, is_leaf=_is_state):
        start = tuple(getattr(key, "key", getattr(key, "idx", None)) for key in keys)
        for path, variable in nnx.to_flat_state(state):
            found[*start, *path] = variable
    return found


def _is_state(node: Any) -> bool:
    return isinstance(node, nnx.State)


def collect_amaxes(model: Any, grads: Any) -> None:
    """Take the maximum of the amaxes among gradients and those that the model holds."""
    found = _flat(grads)
    held = dict(nnx.to_flat_state(nnx.state(model, Amax)))
    for path, amax in held.items():
        if path not in found:
            name = ".".join(map(str, path[:-1]))
            raise ValueError(
                f"update_scaling: no amaxes of {name} among the gradients; take them with "
                f"fp8jax.nnx.value_and_grad, "
                "or nnx.value_and_grad with argnums=nnx.DiffState(0, (nnx.Param, "
                "fp8jax.nnx.Scaling))"
            )
        value = found[path].get_value()
        value = jnp.where(jnp.isnan(value), jnp.inf, value)
        held[path] = amax.replace(jnp.maximum(amax.get_value(), value))
    nnx.update(model, nnx.from_flat_state(held))


def update_scaling(model: Any, grads: nnx.State | None = None) -> None:
    """Push amaxes into the histories of a model's FP8 layers and take new scales, in place.

    Args:
        model: the model.
        grads: gradients from `nnx.value_and_grad` with
            `argnums=nnx.DiffState(0, (nnx.Param, fp8jax.nnx.Scaling))`. None pushes what
            `value_and_grad(..., update=False)` has left in the model, the maximum over
            microbatches.

    Raises:
        ValueError: there are no amaxes among the gradients; or, outside jit at once and inside it
            when the step runs, a layer was called more than once: nnx.value_and_grad adds its
            amaxes.
    """
    if grads is not None:
        collect_amaxes(model, grads)
        for path, state in role_scalings(model):
            _check_single_use(".".join(map(str, path)), state)
    for _, state in role_scalings(model):
        state.push()


def _check_single_use(name: str, state: RoleScaling) -> None:
    """Fail if an amax is a sum of several."""
    most = jnp.max(state.amax.get_value()[..., -1])

    def check(uses: Any) -> None:
        if uses > 1:
            raise ValueError(
                f"update_scaling: {name} was called {int(uses)} times for one gradient, and "
                f"nnx.value_and_grad added its amaxes; "
                "use fp8jax.nnx.value_and_grad, which takes their maximum"
            )

    if isinstance(most, jax.core.Tracer):
        jax.debug.callback(check, most)
    else:
        check(float(most))


def calibrate(model: Any, f: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Fill the histories of a model with one gradient of `f(model, *args)`, before the first step;
    parameters do not change.

    Afterwards no cast waits for an amax: what delayed scaling is for. Without it a model trains the
    same, and each cast waits, as with `current` scaling, because its history might be empty.
    Calling it again adds amaxes. It is called outside jit.

    Args:
        model: the model.
        f: loss of the model and other arguments.
        *args: the other arguments, such as the first batch.
        **kwargs: likewise.
    """

    @nnx.jit
    def gradient(model: Any) -> None:
        value_and_grad(f)(model, *args, **kwargs)

    gradient(model)
    for _, state in role_scalings(model):
        state.known = bool(jnp.all(state.scale.get_value() != 0))
