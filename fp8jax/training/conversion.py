"""Read and convert states whose parameters and moments are kept in other formats than the run's."""

import dataclasses
from typing import Any

import jax

from fp8jax.config import OptimizerConfig
from fp8jax.models.definition import Params
from fp8jax.training import state_formats
from fp8jax.training.state import TrainState, abstract_state
from fp8jax.training.step import TrainProgram


def abstract_state_kept_as(program: TrainProgram, optimizer: OptimizerConfig) -> TrainState:
    """Return the abstract state with parameters and moments in the formats of another config."""
    config = dataclasses.replace(program.config, optimizer=optimizer)
    return abstract_state(program.definition, program.recipes, config, program.mesh)


def kept_as_configured(program: TrainProgram, state: TrainState) -> TrainState:
    """Return a state whose parameters and moments are in other formats, in those of the program's
    config.
    """

    def convert(params: Params, opt_state: Any, step: jax.Array) -> tuple[Params, Any]:
        unpacked = state_formats.unpack(params, opt_state)
        return state_formats.pack(program.config.optimizer, *unpacked, step)

    shardings = program.state_shardings.params, program.state_shardings.opt_state
    params, opt_state = jax.jit(convert, out_shardings=shardings)(
        state.params, state.opt_state, state.step
    )
    return dataclasses.replace(state, params=params, opt_state=opt_state)
