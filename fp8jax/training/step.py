"""One training step as a pure function of (state, batch), and the calibration pass before the first.

    program = TrainProgram(plan)                             # of plan.make_plan(config, devices)
    state = program.init()                                   # sharded
    state = program.calibrate(state, batch)                  # fills empty amax histories; no update
    state, metrics, taps = program.step(state, batch)        # jitted, donates the state

Weights are quantised once, before the microbatch loop. Gradients are summed over microbatches (gradients.py); the tokens'
cotangents, raw amaxes, are combined by maximum. The scaling state is updated once, at the end. A step in which a loss, a
gradient or an amax is not finite changes nothing but the counters.

A batch is a dictionary of arrays [microbatches, batch, t]: inputs, targets, mask, and with document masks segment_ids and
positions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.config import Config, OptimizerConfig, settled
from fp8jax.models import gemms
from fp8jax.models.definition import Definition, Params
from fp8jax.models.gemms import ModelRecipes
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
        plan: of the run. What its config leaves to be fitted is taken to be the plainest (config.settled). Where its devices are
            compile-only, only `lower_step` is of use.
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
        self._options = compiler_options(plan.device.platform)
        self._compiled: dict[bool, Any] = {}
        self._is_finite: Any = None

    def _abstract_batch(self) -> Batch:
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
        """Fresh, sharded state; around these parameters, if there are any, whatever their dtypes."""
        return self.jitted_init()(params)

    def jitted_init(self) -> Any:
        """The jitted `init`, for tracing."""

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

    def fresh_scaling(self) -> dict[str, Any]:
        """Scaling state that is not calibrated yet."""
        return jax.jit(
            lambda: gemms.init_scaling(self.recipes), out_shardings=self.state_shardings.scaling
        )()

    def abstract_state_kept_as(self, optimizer: OptimizerConfig) -> TrainState:
        """The abstract state with parameters and moments in the formats of another config."""
        config = dataclasses.replace(self.config, optimizer=optimizer)
        return abstract_state(self.definition, self.recipes, config, self.mesh)

    def keep_as_configured(self, state: TrainState) -> TrainState:
        """A state whose parameters and moments are in other formats, in those of this program's config."""

        def convert(params: Params, opt_state: Any, step: jax.Array) -> tuple[Params, Any]:
            return state_formats.pack(
                self.config.optimizer, *state_formats.unpack(params, opt_state), step
            )

        shardings = self.state_shardings.params, self.state_shardings.opt_state
        params, opt_state = jax.jit(convert, out_shardings=shardings)(
            state.params, state.opt_state, state.step
        )
        return dataclasses.replace(state, params=params, opt_state=opt_state)

    def fallen_back(self, overrides: str) -> "TrainProgram":
        """The program of the same run with more exceptions, written as `config.fp8.overrides`; itself if there are none."""
        return type(self)(self.plan.change(self._with(overrides))) if overrides else self

    def check_fallback(self, overrides: str) -> None:
        """Raise ConfigError if the program with these exceptions cannot be built."""
        self.plan.change(self._with(overrides))

    def _with(self, overrides: str) -> Config:
        together = ",".join(part for part in (self.config.fp8.overrides, overrides) if part)
        return dataclasses.replace(
            self.config, fp8=dataclasses.replace(self.config.fp8, overrides=together)
        )

    def carry(self, state: TrainState) -> TrainState:
        """A state of the program that this one has fallen back from: without the scaling state of roles that left FP8."""
        return dataclasses.replace(
            state, scaling={role: state.scaling[role] for role in self.abstract_state.scaling}
        )

    def put(self, batch: dict[str, Any]) -> Batch:
        """Moves a host batch, this process's `rows` of [batch, t], to the devices, split into microbatches."""
        return {name: self.rows.put(batch[name]) for name in self.abstract_batch}

    @functools.cached_property
    def rows(self) -> Rows:
        """The rows of a batch that this process loads."""
        return Rows(self.abstract_batch["inputs"].shape, self.batch_sharding)

    def lower_step(self, *, collect: bool = False) -> Any:
        """The step, traced and lowered but not compiled; `.compile()` it."""
        return self.jitted_step(collect=collect).lower(self.abstract_state, self.abstract_batch)

    def jitted_step(self, *, collect: bool = False) -> Any:
        """The jitted step, for tracing."""

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
            compiler_options=self._options,
        )

    def compiled_step(self, *, collect: bool = False) -> Any:
        """The step's executable, compiled at the first request: one without statistics, one with."""
        if collect not in self._compiled:
            self._compiled[collect] = self.lower_step(collect=collect).compile()
        return self._compiled[collect]

    def is_compiled(self, *, collect: bool = False) -> bool:
        """Whether `compiled_step` has its executable already."""
        return collect in self._compiled

    def step(
        self, state: TrainState, batch: Batch, *, collect: bool = False
    ) -> tuple[TrainState, dict[str, jax.Array], Taps]:
        """One update. Donates `state`. With `collect`, waits until it is done.

        Returns:
            New state; metrics (float32 scalars `loss`, `grad_norm`, `learning_rate`; int32 `bad_step`, `bad_steps_in_a_row`
            and `first_bad`, an index into `bad_names` that means something in a bad step only); taps, empty unless
            `collect`: name → statistic → NumPy float32 [layers].
        """
        state, metrics, packed = self.compiled_step(collect=collect)(state, batch)
        return state, metrics, jax.device_get(packed).unpack() if collect else {}

    def unsound(self, state: TrainState) -> str | None:
        """The first array of a state, of those that every step builds on, that is not finite; None where all are."""
        items = {
            "parameter": state.params,
            "scaling": state.scaling,
            "optimizer state": state.opt_state,
        }
        leaves = [
            (path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(items)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        if self._is_finite is None:
            self._is_finite = jax.jit(
                lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]),
                out_shardings=self.replicated,
            )
        finite = jax.device_get(self._is_finite([leaf for _, leaf in leaves]))
        names = (
            f"{path[0].key} {jax.tree_util.keystr(path[1:], simple=True, separator='.')}"
            for path, _ in leaves
        )
        return next((name for name, fine in zip(names, finite, strict=True) if not fine), None)

    def calibrate(
        self, state: TrainState, batch: Batch, roles: Sequence[str] | None = None
    ) -> TrainState:
        """Fill empty amax histories from one forward and backward pass with `current` scaling; update nothing else.

        Args:
            state: of this program.
            batch: one that has targets, or gradients stay at their scale of 1.
            roles: whose histories to fill; None: all.

        Raises:
            FloatingPointError: an amax of the batch is not finite.
        """
        chosen = tuple(state.scaling) if roles is None else tuple(roles)
        if not chosen:
            return state
        found = self.jitted_calibration()(state, batch)
        bad = [role for role, amax in jax.device_get(found).items() if not np.isfinite(amax).all()]
        if bad:
            raise FloatingPointError(
                f"calibration: amax of {', '.join(bad)} is not finite on the first batch; check the initial "
                "weights or the checkpoint for NaN"
            )
        update = jax.jit(
            lambda scaling, found: gemms.update_scaling(scaling, found, self.recipes),
            out_shardings=self.replicated,
        )
        filled = update({role: state.scaling[role] for role in chosen}, found)
        return dataclasses.replace(state, scaling=state.scaling | filled)

    def has_targets(self, batch: Batch) -> bool:
        """Whether any token of a batch counts in the loss."""
        return bool(jax.device_get(self._any_target(batch["mask"])))

    @functools.cached_property
    def _any_target(self) -> Any:
        return jax.jit(lambda mask: jnp.any(mask > 0), out_shardings=self.replicated)

    def jitted_calibration(self) -> Any:
        """The jitted pass of `calibrate`, for tracing: (state, batch) to role → amaxes."""
        current = self.recipes.scaled_by("current")

        def amaxes(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return gradients(state, batch, self.config, self.definition, current)[2]

        return jax.jit(amaxes, out_shardings=self.replicated, compiler_options=self._options)


def _after(grads: Params, params: Params, opt_state: Any) -> tuple[Params, Any]:
    """The state, tied to the gradients: unpacked before they are there, it would lie in memory in float32 during the backward pass."""
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
    """The whole step; see TrainProgram.step."""
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
