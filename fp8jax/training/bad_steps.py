"""Find the steps that must not update the model, and where their fault began.

A step is bad if its loss, an amax or a gradient is not finite, or, if the config asks for it, if
its loss or gradient norm is a spike. The step itself finds out, on the devices; the loop reports
it, by `names`.

Flags are in the order of computation: amaxes of the forward pass layer by layer, the loss, amaxes
of the backward pass from the last layer down, the gradients, and last the spike.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.models.definition import STACKED
from fp8jax.numerics.recipes import GRADIENTS, OPERANDS
from fp8jax.numerics.roles import HEAD

# The order in which a block computes them; it is reversed in the backward pass.
_ORDER = (
    "qkv",
    "attention_scores",
    "attention_values",
    "attention_out",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
)
WINDOW = 128
# No loss or norm yet. It is not NaN, because JAX's search for NaN would find it in a healthy run.
NOTHING = -(2.0**100)
# The median absolute deviation of a normal distribution, in standard deviations.
_MAD = 0.6745


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """A run's record of its steps: how many were bad, in all and in a row, and the last finite
    losses and norms.

    Attributes:
        bad_steps, in_a_row: int32.
        recent: float32 [2, WINDOW], losses and gradient norms, NOTHING where there are none yet.
    """

    bad_steps: jax.Array
    in_a_row: jax.Array
    recent: jax.Array

    @staticmethod
    def initial() -> "Health":
        """Return the record of a run that has not begun."""
        return Health(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.full((2, WINDOW), NOTHING, jnp.float32),
        )

    def after(self, bad: jax.Array, values: jax.Array) -> "Health":
        """Return the record after a step: `bad` is bool, `values` float32 [2], its loss and
        gradient norm.

        Finite values are kept even of a skipped step: a new level that lasts is accepted once it
        fills half the window.
        """
        shifted = jnp.concatenate([self.recent[:, 1:], values[:, None]], axis=1)
        recent = jnp.where(jnp.isfinite(values).all(), shifted, self.recent)
        recent = jnp.where(jnp.isnan(recent), NOTHING, recent)  # older checkpoints have NaN there
        return Health(
            self.bad_steps + bad.astype(jnp.int32), jnp.where(bad, self.in_a_row + 1, 0), recent
        )

    def is_spike(self, values: jax.Array, threshold: float) -> jax.Array:
        """Return whether loss or gradient norm lies `threshold` robust standard deviations above
        the median; bool.

        It is False until the window is full, because the beginning of a run is no measure.
        """
        median = jnp.median(self.recent, axis=1)
        spread = jnp.median(jnp.abs(self.recent - median[:, None]), axis=1) / _MAD
        return jnp.all(self.recent > NOTHING) & jnp.any(values > median + threshold * spread)


def flags(
    loss: jax.Array, amaxes: dict[str, jax.Array], squares: list[jax.Array], spike: jax.Array
) -> jax.Array:
    """Return whether each tensor is bad: bool [tensors], in the order of `names`.

    Args:
        loss: float32 scalar.
        amaxes: role → float32 [layers, operands].
        squares: sums of squares of the gradients.
        spike: bool scalar.
    """
    finite = {role: jnp.isfinite(a) for role, a in amaxes.items()}
    gradients = [jnp.isfinite(square) for square in squares]
    parts = [
        _columns(finite, backward=False),
        jnp.isfinite(loss)[None],
        _columns(finite, backward=True),
        *gradients,
        ~spike[None],
    ]
    return ~jnp.concatenate(parts)


def names(amaxes: dict[str, Any], params: Any) -> list[str]:
    """Return the meaning of each flag, from arrays or shapes of amaxes and parameters."""

    def of(backward: bool) -> list[str]:
        layers = range(max((a.shape[0] for role, a in amaxes.items() if role != HEAD), default=0))
        inner = [
            f"amax of {role}.{OPERANDS[role][i]} in layer {layer}"
            for layer in (reversed(layers) if backward else layers)
            for role, i in _operands(amaxes, backward)
        ]
        head = [f"amax of {HEAD}.{'g' if backward else 'x'}"] if HEAD in amaxes else []
        return head + inner if backward else inner + head

    gradients: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"gradient of {'.'.join(str(key.key) for key in path)}"
        gradients += (
            [f"{name} in layer {layer}" for layer in range(leaf.shape[0])]
            if path[0].key == STACKED
            else [name]
        )
    return [*of(False), "loss", *of(True), *gradients, "spike of the loss or gradient norm"]


def squares(grads: Any) -> list[jax.Array]:
    """Return the sum of squares of each gradient, float32 [1], or [layers] for stacked parameters."""

    def one(path: Any, g: jax.Array) -> jax.Array:
        axes = tuple(range(1, g.ndim)) if path[0].key == STACKED else None
        return jnp.atleast_1d(jnp.sum(jnp.square(g), axis=axes))

    return [one(path, g) for path, g in jax.tree_util.tree_leaves_with_path(grads)]


def _operands(amaxes: dict[str, Any], backward: bool) -> list[tuple[str, int]]:
    """Return role and index of every operand of a block that one direction casts, in the order of
    computation.
    """
    return [
        (role, i)
        for role in (reversed(_ORDER) if backward else _ORDER)
        if role in amaxes
        for i, operand in enumerate(OPERANDS[role])
        if (operand in GRADIENTS) == backward
    ]


def _columns(finite: dict[str, jax.Array], *, backward: bool) -> jax.Array:
    """Return flags of the operands of one direction, layer after layer, and of the head where the
    pass reaches it.
    """
    blocks = [finite[role][:, i] for role, i in _operands(finite, backward)]
    by_layer = jnp.stack(blocks, axis=1) if blocks else jnp.ones((0, 0), bool)
    inner = (by_layer[::-1] if backward else by_layer).reshape(-1)
    head = finite[HEAD][:, int(backward)] if HEAD in finite else jnp.ones((0,), bool)
    return jnp.concatenate([head, inner] if backward else [inner, head])
