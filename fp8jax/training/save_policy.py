"""When a run saves, and what it does where it cannot: training goes on, and the last good checkpoint stays.

    saver = Saver(config, program, checkpoints, writer, progress, watchdog)
    if saver.is_due(step) or saver.is_late(step):
        sound = saver.save(step, state, position, held_out_loss, busy=False)     # in the background; False: must not be saved
    saver.save_last(step, state, position, held_out_loss)            # waits; raises if it fails again and again

A save is postponed while the one before is still under way (slow storage), and in the middle of bad steps: a checkpoint
should be one from which going on will do. What is not finite is never saved. Files are `checkpoint.py`'s.
"""

import math
import time

import jax

from fp8jax.config import Config
from fp8jax.monitor.progress import Progress
from fp8jax.monitor.writers import MetricsWriter, Silent
from fp8jax.training import scaling_state
from fp8jax.training.checkpoint import CheckpointError, Checkpoints
from fp8jax.training.resume import Position
from fp8jax.training.soundness import first_unsound
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram
from fp8jax.training.watchdog import Watchdog

# A save that failed, on a full disk say, is tried again after so many seconds; the last one of a run so many times.
RETRY_SECONDS, LAST_TRIES = 60.0, 10


class Saver:
    """Saves the states of a run, and tells what became of it."""

    def __init__(
        self,
        config: Config,
        program: TrainProgram,
        checkpoints: Checkpoints,
        writer: MetricsWriter | Silent,
        progress: Progress | Silent,
        watchdog: Watchdog,
    ):
        self.config, self.program, self.checkpoints = config.checkpoint, program, checkpoints
        self.writer, self.progress, self.watchdog = writer, progress, watchdog
        self._saved_at, self._again_at, self._postponed = time.monotonic(), math.inf, False

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step by its number, or because one was postponed; the same on all processes."""
        every = self.config.every
        return (every > 0 and step % every == 0) or self._postponed

    def is_late(self, step: int) -> bool:
        """Whether one is due by this process's clock, or because an earlier one failed here: processes must agree on it."""
        if failure := self.checkpoints.failure():
            self._failed(step, failure)
        if not self.checkpoints.busy():
            self.watchdog.end("save")
        now, minutes = time.monotonic(), self.config.minutes
        return now > self._again_at or (minutes > 0 and now - self._saved_at > 60 * minutes)

    def save(
        self,
        step: int,
        state: TrainState,
        position: Position,
        held_out_loss: float | None,
        *,
        busy: bool,
    ) -> bool:
        """Begins to save, or leaves it for a later step; False if the state must not be saved at all.

        busy: whether an earlier save is still under way, on any process.
        """
        if busy:
            if not self._postponed:
                self.writer.event("save_postponed", step)
                self.progress.message(
                    f"step {step}: the save before is still under way; this one is postponed, training goes on"
                )
            self._postponed = True
            return True
        if self.unsound(step, state):
            return False
        self._postponed = int(jax.device_get(state.health.in_a_row)) > 0
        if not self._postponed:
            try:
                self._begin(step, state, position, held_out_loss)
            except CheckpointError as error:
                self._failed(step, str(error))
        return True

    def save_last(
        self, step: int, state: TrainState, position: Position, held_out_loss: float | None
    ) -> None:
        """Saves and waits for the end of it.

        Raises:
            CheckpointError: it failed LAST_TRIES times.
        """
        for tries in range(LAST_TRIES, 0, -1):
            try:
                self._begin(step, state, position, held_out_loss)
                return self.checkpoints.wait()
            except CheckpointError as error:
                if tries == 1:
                    raise
                self._failed(step, str(error))
                time.sleep(RETRY_SECONDS)

    def unsound(self, step: int, state: TrainState) -> bool:
        """Whether a state has come to hold what is not finite, as after a fault of memory; tells which array."""
        name = first_unsound(state, self.program.replicated)
        if name:
            self.writer.event("unsound_state", step, first=name)
            self.progress.message(f"step {step}: {name} is not finite; this state is not saved")
        return name is not None

    def _begin(
        self, step: int, state: TrainState, position: Position, held_out_loss: float | None
    ) -> None:
        self._saved_at, self._again_at = time.monotonic(), math.inf
        self.watchdog.begin("save", f"saving step {step}")
        data_state = {
            "step": step,
            **position._asdict(),
            "scaling": scaling_state.record(self.program.recipes),
        }
        self.checkpoints.save(step, state.items(), data_state, held_out_loss=held_out_loss)

    def _failed(self, step: int, reason: str) -> None:
        self._again_at = time.monotonic() + RETRY_SECONDS
        self.writer.event("save_failed", step, reason=reason)
        self.progress.message(
            f"step {step}: {reason}; training goes on, the next try is in {RETRY_SECONDS:.0f} s"
        )
