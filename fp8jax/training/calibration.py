"""Calibrate scales of delayed scaling from one batch before the first step.

state = calibrate(program, state, batch)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fp8jax.models import gemms
from fp8jax.training.gradients import gradients
from fp8jax.training.losses import Batch
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram


def calibrate(
    program: TrainProgram, state: TrainState, batch: Batch, roles: Sequence[str] | None = None
) -> TrainState:
    """Fill empty amax histories from one forward and backward pass with `current` scaling; update
    nothing else.

    Args:
        program: the run's program.
        state: a state of this program.
        batch: a batch with targets, or gradients keep their scale of 1.
        roles: roles whose histories to fill; None for all.

    Raises:
        FloatingPointError: an amax of the batch is not finite.
    """
    chosen = tuple(state.scaling) if roles is None else tuple(roles)
    if not chosen:
        return state
    found = jitted_calibration(program)(state, batch)
    bad = [role for role, amax in jax.device_get(found).items() if not np.isfinite(amax).all()]
    if bad:
        raise FloatingPointError(
            f"calibration: amax of {', '.join(bad)} is not finite on the first batch; check the initial "
            "weights or the checkpoint for NaN"
        )
    update = jax.jit(
        lambda scaling, found: gemms.update_scaling(scaling, found, program.recipes),
        out_shardings=program.replicated,
    )
    filled = update({role: state.scaling[role] for role in chosen}, found)
    return dataclasses.replace(state, scaling=state.scaling | filled)


def jitted_calibration(program: TrainProgram) -> Any:
    """Return the jitted pass of `calibrate`, for tracing: (state, batch) to role → amaxes."""
    current = program.recipes.scaled_by("current")

    def amaxes(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            return gradients(state, batch, program.config, program.definition, current).amaxes

    return jax.jit(
        amaxes, out_shardings=program.replicated, compiler_options=program.compiler_options
    )


def fresh_scaling(program: TrainProgram) -> dict[str, Any]:
    """Return scaling state that is not calibrated yet."""
    shardings = program.state_shardings.scaling
    return jax.jit(lambda: gemms.init_scaling(program.recipes), out_shardings=shardings)()


def without_fallen(program: TrainProgram, state: TrainState) -> TrainState:
    """Return a state of the program that this one has fallen back from, without the scaling state
    of roles that left FP8.
    """
    kept = {role: state.scaling[role] for role in program.abstract_state.scaling}
    return dataclasses.replace(state, scaling=kept)


def has_targets(program: TrainProgram, batch: Batch) -> bool:
    """Return whether any token of a batch counts in the loss."""
    return bool(jax.device_get(_any_target(program.replicated)(batch["mask"])))


@functools.lru_cache(maxsize=4)
def _any_target(replicated: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda mask: jnp.any(mask > 0), out_shardings=replicated)
