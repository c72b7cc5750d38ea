"""The state of a run between two steps."""

import dataclasses

from fp8jax.config import Config
from fp8jax.monitor.warning_actions import Reaction
from fp8jax.training.resume import Position
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram


@dataclasses.dataclass
class Run:
    """A run between two steps.

    Attributes:
        program: the program of the next step.
        state: the state after step `step`.
        step: steps taken.
        position: the run's position besides the step.
        warning: its early warning.
        held_out_loss: held-out loss of this state; None if it was not evaluated.
        bad_in_a_row: bad steps up to this one; 0 if the step was not logged.
        stopping: True once all processes know that one of them is asked to stop.
    """

    program: TrainProgram
    state: TrainState
    step: int
    position: Position
    warning: Reaction
    held_out_loss: float | None = None
    bad_in_a_row: int = 0
    stopping: bool = False

    @property
    def config(self) -> Config:
        """Return the configuration of the run."""
        return self.program.config

    @property
    def batch(self) -> int:
        """Return the number of the next batch."""
        return self.step + self.position.skipped_batches

    def is_last(self) -> bool:
        """Return True if the run has all its steps."""
        return self.step == self.config.training.steps

    def where(self) -> Position:
        """Return the position as a checkpoint stores it."""
        return self.position._replace(losses=self.warning.losses())
