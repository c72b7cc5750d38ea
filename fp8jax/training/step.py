"""Define one training step as a pure function of (state, batch), compiled for the devices of a
plan.

    program = TrainProgram(plan)                             # of plan.make_plan(config, devices)
    state = calibrate(program, program.init(), batch)        # calibration.py: fills empty amax histories
    state, metrics, taps = program.step(state, batch)        # jitted, donates the state

Weights are quantised once, before the microbatch loop. Gradients are summed over microbatches
(gradients.py); the tokens' cotangents, raw amaxes, are combined by maximum. The scaling state is
updated once, at the end. A step in which a loss, a gradient or an amax is not finite changes
nothing but the counters.

A batch is a dictionary of arrays [microbatches, batch, t]: inputs, targets, mask, and with document
masks segment_ids and positions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.config import Config, settled
from fp8jax.models import gemms
from fp8jax.models.definition import Definition, Params
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.models.taps import Packed, Taps, pack
from fp8jax.numerics.compiling import compiler_options
from fp8jax.parallel.rows import Rows
from fp8jax.parallel.sharding import RULES
from fp8jax.plan import Plan
from fp8jax.training import bad_steps, state_formats
from fp8jax.training.gradients import gradients
from fp8jax.training.losses import Batch
from fp8jax.training.optimizer import learning_rate, make_transform
from fp8jax.training.state import TrainState, abstract_state, initial_state, state_of
from fp8jax.training.state_statistics import state_statistics


class TrainProgram:
    """The jitted functions of a run: init, calibrate, step, step with statistics.

    Args:
        plan: the run's plan. Open fields of its config are taken at their simplest
            (config.settled). With compile-only devices, only `lower_step` can be used.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.config = settled(plan.config)
        self.definition, self.mesh, self.recipes = plan.definition, plan.mesh, plan.recipes
        self.abstract_state = abstract_state(self.definition, self.recipes, self.config, self.mesh)
        self.batch_sharding = NamedSharding(
            self.mesh, PartitionSpec(None, RULES["batch"], RULES["sequence"])
        )
        self.abstract_batch = self._abstract_batch()
        self.state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.bad_names = bad_steps.names(
            jax.eval_shape(lambda: gemms.zero_amaxes(self.recipes)), self.definition.shapes
        )
        self.compiler_options = compiler_options(plan.device.platform)
        self._compiled: dict[bool, Any] = {}

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        training, data = self.config.training, self.config.data
        shape = (
            training.microbatches,
            training.batch_size // training.microbatches,
            data.sequence_length,
        )
        names = ["inputs", "targets", "mask"] + (
            ["segment_ids", "positions"] if data.document_masks else []
        )
        dtypes = {"mask": jnp.float32}
        return {
            name: jax.ShapeDtypeStruct(
                shape, dtypes.get(name, jnp.int32), sharding=self.batch_sharding
            )
            for name in names
        }

    def init(self, params: Params | None = None) -> TrainState:
        """Return a fresh, sharded state, with these parameters of any dtypes, if given."""
        return self.jitted_init()(params)

    def jitted_init(self) -> Any:
        """Return the jitted `init`, for tracing."""

        def make(params: Params | None) -> TrainState:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                if params is None:
                    return initial_state(self.definition, self.recipes, self.config)
                return state_of(
                    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
                    self.recipes,
                    self.config,
                )

        return jax.jit(make, out_shardings=self.state_shardings)

    def fallen_back(self, overrides: str) -> "TrainProgram":
        """Return the program of the same run with more exceptions, as `config.fp8.overrides`;
        itself if there are none.
        """
        return type(self)(self.plan.with_overrides(overrides)) if overrides else self

    def put(self, batch: dict[str, Any]) -> Batch:
        """Move a host batch, this process's `rows` of [batch, t], to the devices, split into
        microbatches.
        """
        return {name: self.rows.put(batch[name]) for name in self.abstract_batch}

    @functools.cached_property
    def rows(self) -> Rows:
        """Return the rows of a batch that this process loads."""
        return Rows(self.abstract_batch["inputs"].shape, self.batch_sharding)

    def lower_step(self, *, collect: bool = False) -> Any:
        """Return the step, traced and lowered but not compiled; `.compile()` it."""
        return self.jitted_step(collect=collect).lower(self.abstract_state, self.abstract_batch)

    def jitted_step(self, *, collect: bool = False) -> Any:
        """Return the jitted step, for tracing."""

        def step(
            state: TrainState, batch: Batch
        ) -> tuple[TrainState, dict[str, jax.Array], Packed | None]:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                new, metrics, taps = train_step(
                    state, batch, self.config, self.definition, self.recipes, collect=collect
                )
                return new, metrics, pack(taps) if collect else None

        whole = self.replicated  # every process logs, or knows, all metrics
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.state_shardings, whole, whole),
            compiler_options=self.compiler_options,
        )

    def compiled_step(self, *, collect: bool = False) -> Any:
        """Return the step's executable, without or with statistics, compiled at the first request."""
        if collect not in self._compiled:
            self._compiled[collect] = self.lower_step(collect=collect).compile()
        return self._compiled[collect]

    def is_compiled(self, *, collect: bool = False) -> bool:
        """Return whether `compiled_step` has its executable already."""
        return collect in self._compiled

    def step(
        self, state: TrainState, batch: Batch, *, collect: bool = False
    ) -> tuple[TrainState, dict[str, jax.Array], Taps]:
        """Make one update, donating `state`; with `collect`, wait until it is done.

        Returns:
            The new state; metrics (float32 scalars `loss`, `grad_norm`, `learning_rate`; int32
            `bad_step`, `bad_steps_in_a_row` and `first_bad`, an index into `bad_names` that is
            valid in a bad step only); taps, empty unless `collect`: name → statistic → NumPy
            float32 [layers].
        """
        state, metrics, packed = self.compiled_step(collect=collect)(state, batch)
        return state, metrics, jax.device_get(packed).unpack() if collect else {}


def _after(grads: Params, params: Params, opt_state: Any) -> tuple[Params, Any]:
    """Tie the state to the gradients: unpacked earlier, it would take memory in float32 during the
    backward pass.
    """
    if not jax.tree.leaves(opt_state.scales):
        return params, opt_state
    return jax.lax.optimization_barrier((params, opt_state, grads))[:2]


def train_step(
    state: TrainState,
    batch: Batch,
    config: Config,
    definition: Definition,
    recipes: ModelRecipes,
    *,
    collect: bool = False,
) -> tuple[TrainState, dict[str, jax.Array], Taps]:
    """Take the whole step; see TrainProgram.step."""
    loss, grads, amaxes, taps = gradients(
        state, batch, config, definition, recipes, collect=collect
    )
    with (
        jax.named_scope("optimizer"),
        jax.numpy_dtype_promotion("standard"),
    ):  # optax mixes dtypes freely
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        squares = bad_steps.squares(grads)
        grad_norm = jnp.sqrt(sum(jnp.sum(square) for square in squares))
        params, moments = state_formats.unpack(*_after(grads, state.params, state.opt_state))
        update, moments = make_transform(config.optimizer).update(grads, moments, params)
        rate = learning_rate(config, state.step)
        params = jax.tree.map(lambda p, u: p - rate * u, params, update)
        params, opt_state = state_formats.pack(config.optimizer, params, moments, state.step)
    scaling = gemms.update_scaling(state.scaling, amaxes, recipes)
    values, threshold = jnp.stack([loss, grad_norm]), config.training.skip_spikes
    spike = state.health.is_spike(values, threshold) if threshold else jnp.zeros((), bool)
    flags = bad_steps.flags(loss, amaxes, squares, spike)
    bad = flags.any()
    new = TrainState(state.step, params, scaling, opt_state, state.health)
    kept = jax.tree.map(lambda a, b: jnp.where(bad, b, a), new, state)
    kept = dataclasses.replace(kept, step=state.step + 1, health=state.health.after(bad, values))
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "bad_step": bad.astype(jnp.int32),
        "bad_steps_in_a_row": kept.health.in_a_row,
        "first_bad": jnp.argmax(flags).astype(jnp.int32),
    }
    if collect and config.monitor.parameters:
        taps = taps | state_statistics(kept)
    return kept, metrics, taps
