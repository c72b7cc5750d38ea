"""Compute the gradients of a batch over its microbatches, and set the dtypes in which they are
written, reduced and summed.

    found = gradients(state, batch, config, definition, recipes)      # loss, grads, amaxes, taps

Weights are quantised once, before the loop over microbatches. Losses and gradients are summed over
it; the tokens' cotangents, raw amaxes, are combined by maximum. Dtypes are those of
`optimizer.gradient_dtype`: only matrices have less than float32. A sum in bfloat16 is rounded
stochastically: of many microbatches each adds less than the sum's last place, and rounding to
nearest would lose the last ones.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.config import Config, OptimizerConfig, settled
from fp8jax.models import gemms as gemms_lib
from fp8jax.models.definition import STACKED, Definition, Params
from fp8jax.models.gemms import Gemms
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.models.taps import Taps
from fp8jax.models.transformer import ForwardOptions
from fp8jax.numerics import low_bit_state, statistics
from fp8jax.numerics.tokens import AMAX, AMAX_BY_DEVICE, FULL, Token
from fp8jax.training.losses import Batch, batch_losses, sum_of_rows
from fp8jax.training.optimizer import MATRIX
from fp8jax.training.state import TrainState

Amaxes = dict[str, jax.Array]


class BatchGradients(NamedTuple):
    """The results of a forward and backward pass.

    Attributes:
        loss: mean loss in nats per token, float32, without the z-loss.
        grads: like the parameters, in the dtypes of `optimizer.gradient_dtype`.
        amaxes: role → raw amaxes, float32 [layers, operands].
        taps: statistics, empty unless collected.
    """

    loss: jax.Array
    grads: Params
    amaxes: Amaxes
    taps: Taps


def gradients(
    state: TrainState,
    batch: Batch,
    config: Config,
    definition: Definition,
    recipes: ModelRecipes,
    *,
    collect: bool = False,
) -> BatchGradients:
    """Return loss, gradients, raw amaxes and statistics of a batch, over all its microbatches.

    Args:
        state: parameters, scaling state and step.
        batch: arrays [microbatches, b, t].
        config: the run's configuration.
        definition: definition of the model.
        recipes: recipes of every layer and the head.
        collect: whether statistics are taken.
    """
    config = settled(config)
    scales = {role: entry["scale"] for role, entry in state.scaling.items()}
    model = definition.bind(state.params)
    gemms = model.prepare(recipes, scales)
    total = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
    microbatch = _Microbatch(config, definition, gemms, total, collect)
    view = gradient_view(state.params, config)
    sums = GradientSums(config.optimizer, state.step)
    of_weights = model.weight_health(gemms) if collect else {}
    if config.training.microbatches == 1:
        found = microbatch.gradients(view, jax.tree.map(lambda a: a[0], batch), sums)
    else:
        found = _accumulated(microbatch, view, batch, sums)
    amaxes = gemms_lib.over_devices(found.amaxes) | model.weight_amaxes(recipes)
    return found._replace(amaxes=amaxes, taps=found.taps | of_weights)


@dataclasses.dataclass(frozen=True)
class _Microbatch:
    """The pass over one microbatch, whose loss is divided by the targets of the whole batch,
    `total`.
    """

    config: Config
    definition: Definition
    gemms: Gemms
    total: jax.Array
    collect: bool

    @property
    def options(self) -> ForwardOptions:
        pooled = self.config.monitor.kurtosis == "pooled"
        return ForwardOptions(self.config.training.remat, self.collect, pooled)

    def gradients(self, view: Params, batch: Batch, sums: "GradientSums") -> BatchGradients:
        """Return gradients with respect to the parameters, and the tokens' cotangents."""
        differentiate = jax.value_and_grad(self.loss, (0, 1), has_aux=True)
        recipes = self.gemms.recipes
        tokens = gemms_lib.zero_tokens(recipes, FULL if self.collect else AMAX_BY_DEVICE)
        (_, (loss, taps)), (grads, d_tokens) = differentiate(view, tokens, batch)
        found = {role: token.values for role, token in d_tokens.items()}
        health: Taps = {}
        if self.collect:
            pooled = self.options.pooled_kurtosis
            found, health = gemms_lib.read_reports(found, recipes, pooled=pooled)
        return BatchGradients(loss, sums.narrow(grads), found, taps | health)

    def loss(
        self, params: Params, tokens: dict[str, Token], batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, Taps]]:
        """Return the loss to differentiate, and with it the loss to log, and taps."""
        nll, lse, taps = batch_losses(
            self.definition.bind(params),
            batch,
            self.gemms.with_tokens(tokens),
            self.options,
            chunk=self.config.training.loss_chunk,
        )
        z_loss = self.config.optimizer.z_loss
        with jax.named_scope("loss"):
            loss = sum_of_rows(nll * batch["mask"]) / self.total
            if not z_loss:
                return loss, (loss, taps)
            penalty = z_loss * sum_of_rows(lse**2 * batch["mask"]) / self.total
            return loss + penalty, (loss, taps)


def _accumulated(
    microbatch: _Microbatch, view: Params, batch: Batch, sums: "GradientSums"
) -> BatchGradients:
    """Return the sums over all microbatches, one after another."""

    def accumulate(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, Taps]:
        number, part = numbered
        loss, grads, amaxes = total
        found = microbatch.gradients(view, part, sums)
        loss = loss + found.loss
        grads = sums.add(grads, found.grads, number)
        return (loss, grads, jax.tree.map(jnp.maximum, amaxes, found.amaxes)), found.taps

    brings = AMAX if microbatch.collect else AMAX_BY_DEVICE
    nothing = jnp.zeros((), jnp.float32), sums.zeros(view)
    zeros = (*nothing, gemms_lib.zero_amaxes(microbatch.gemms.recipes, brings))
    numbers = jnp.arange(microbatch.config.training.microbatches)
    (loss, grads, amaxes), taps = jax.lax.scan(accumulate, zeros, (numbers, batch))
    return BatchGradients(loss, grads, amaxes, statistics.combine(taps))


def gradient_view(params: Params, config: Config) -> Params:
    """Return the parameters in the dtypes in which gradients with respect to them are written and
    reduced.

    The matrices of the blocks and of an untied head reach their GEMMs quantised, so for them this
    view only sets the dtype in which wgrad writes; the other parameters are used in float32.
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
    """The sums of gradients over the microbatches of a step, whose number, int32, seeds the
    rounding.
    """

    config: OptimizerConfig
    step: jax.Array

    def narrow(self, grads: Params) -> Params:
        """Return one microbatch's gradients, in bfloat16 if the sum is."""

        def one(path: Any, g: jax.Array) -> jax.Array:
            return g.astype(jnp.bfloat16) if self._in_bfloat16(path) else g

        return jax.tree_util.tree_map_with_path(one, grads)

    def zeros(self, params: Params) -> Params:
        """Return sums of zero."""

        def one(path: Any, p: jax.Array) -> jax.Array:
            return jnp.zeros(p.shape, jnp.bfloat16 if self._in_bfloat16(path) else jnp.float32)

        return jax.tree_util.tree_map_with_path(one, params)

    def add(self, total: Params, grads: Params, microbatch: jax.Array) -> Params:
        """Return the sums with the gradients of the microbatch of this number, int32."""
        leaves = jax.tree_util.tree_leaves_with_path(total)
        added = [
            self._add(
                path, a, b, (1 << 20) + microbatch * len(leaves) + i
            )  # state_formats.py's numbers are below
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
