"""In which dtypes gradients are written, reduced over devices, and summed over microbatches (`optimizer.gradient_dtype`).

    view = gradient_view(params, config)              # differentiate with respect to this
    sums = GradientSums(config.optimizer, step)
    total = sums.add(sums.zeros(params), sums.narrow(grads), microbatch)

Only matrices ever have less than float32. A sum in bfloat16 is rounded stochastically: of many microbatches each adds less
than the sum's last place, and rounding to nearest would lose the last ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.config import Config, OptimizerConfig
from fp8jax.models.definition import STACKED, Params
from fp8jax.numerics import low_bit_state
from fp8jax.training.optimizer import MATRIX


def gradient_view(params: Params, config: Config) -> Params:
    """The parameters in the dtypes in which gradients with respect to them are written and reduced.

    The matrices of the blocks and of an untied head reach their GEMMs quantised, so of them this view only sets the dtype in
    which wgrad writes; the other parameters are computed with, in float32.
    """
    asked = config.optimizer.gradient_dtype
    narrow = jnp.dtype(config.model.dtype if asked == "mixed" else asked)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(
            narrow if _is_matrix(path) and path[0].key in (STACKED, "head") else jnp.float32
        )

    return jax.tree_util.tree_map_with_path(one, params)


@dataclasses.dataclass(frozen=True)
class GradientSums:
    """Sums gradients over the microbatches of a step, whose number, int32, seeds the rounding."""

    config: OptimizerConfig
    step: jax.Array

    def narrow(self, grads: Params) -> Params:
        """One microbatch's gradients, in bfloat16 where the sum is."""

        def one(path: Any, g: jax.Array) -> jax.Array:
            return g.astype(jnp.bfloat16) if self._in_bfloat16(path) else g

        return jax.tree_util.tree_map_with_path(one, grads)

    def zeros(self, params: Params) -> Params:
        """Sums of nothing."""

        def one(path: Any, p: jax.Array) -> jax.Array:
            return jnp.zeros(p.shape, jnp.bfloat16 if self._in_bfloat16(path) else jnp.float32)

        return jax.tree_util.tree_map_with_path(one, params)

    def add(self, total: Params, grads: Params, microbatch: jax.Array) -> Params:
        """The sums with the gradients of the microbatch of this number, int32."""
        leaves = jax.tree_util.tree_leaves_with_path(total)
        added = [
            self._add(
                path, a, b, (1 << 20) + microbatch * len(leaves) + i
            )  # precision.py's numbers are below
            for i, ((path, a), b) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True))
        ]
        return jax.tree.structure(total).unflatten(added)

    def _add(self, path: Any, total: jax.Array, grad: jax.Array, number: jax.Array) -> jax.Array:
        summed = total.astype(jnp.float32) + grad.astype(jnp.float32)
        if not self._in_bfloat16(path):
            return summed
        bits = low_bit_state.random_bits(total.shape, low_bit_state.seed_of(self.step, number))
        return low_bit_state.round_stochastic(summed, jnp.bfloat16, bits)

    def _in_bfloat16(self, path: Any) -> bool:
        return self.config.gradient_dtype == "bfloat16" and _is_matrix(path)


def _is_matrix(path: Any) -> bool:
    return path[-1].key == MATRIX
