"""Decide when a run saves; if it cannot, training continues, and the last good checkpoint stays.

    saver = Saver(config.checkpoint, checkpoints, log, watchdog)
    if saver.is_due(step) or saver.is_late(step):
        sound = saver.save(run, busy=False)      # in the background; False if it must not be saved
    saver.save_last(run)                         # waits; raises if it fails again and again

A save is postponed while the one before is still running (slow storage), and in the middle of bad
steps: a run should be able to continue from every checkpoint. A state that is not finite is never
saved. checkpoint.py writes the files.
"""

import math
import time

import jax

from fp8jax.config import CheckpointConfig
from fp8jax.monitor.run_log import RunLog
from fp8jax.training import scaling_state
from fp8jax.training.checkpoint import CheckpointError, Checkpoints
from fp8jax.training.run import Run
from fp8jax.training.soundness import first_unsound
from fp8jax.training.watchdog import Watchdog

# A failed save, such as on a full disk, is tried again after RETRY_SECONDS; the last one of a run
# LAST_TRIES times.
RETRY_SECONDS, LAST_TRIES = 60.0, 10


class Saver:
    """A saver of a run's states that reports the outcome."""

    def __init__(
        self,
        config: CheckpointConfig,
        checkpoints: Checkpoints,
        log: RunLog,
        watchdog: Watchdog,
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.log = log
        self.watchdog = watchdog
        self._saved_at = time.monotonic()
        self._again_at = math.inf
        self._postponed = False

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step by number, or was postponed; the same
        on all processes.
        """
        every = self.config.every
        return (every > 0 and step % every == 0) or self._postponed

    def is_late(self, step: int) -> bool:
        """Return whether one is due by this process's clock, or after a failure here; processes
        must agree on it.
        """
        if failure := self.checkpoints.failure():
            self._failed(step, failure)
        if not self.checkpoints.busy():
            self.watchdog.end("save")
        now, minutes = time.monotonic(), self.config.minutes
        return now > self._again_at or (minutes > 0 and now - self._saved_at > 60 * minutes)

    def save(self, run: Run, *, busy: bool) -> bool:
        """Begin to save, or postpone it to a later step; return False if the state must not be
        saved.

        Args:
            run: the run whose state is to be saved.
            busy: True if an earlier save is still running, on any process.
        """
        if busy:
            if not self._postponed:
                self.log.event(
                    "save_postponed",
                    run.step,
                    f"step {run.step}: the save before is still under way; this one is postponed, "
                    "training goes on",
                )
            self._postponed = True
            return True
        if self.unsound(run):
            return False
        self._postponed = int(jax.device_get(run.state.health.in_a_row)) > 0
        if not self._postponed:
            try:
                self._begin(run)
            except CheckpointError as error:
                self._failed(run.step, str(error))
        return True

    def save_last(self, run: Run) -> None:
        """Save, and wait until it is complete.

        Raises:
            CheckpointError: it failed LAST_TRIES times.
        """
        for tries in range(LAST_TRIES, 0, -1):
            try:
                self._begin(run)
                return self.checkpoints.wait()
            except CheckpointError as error:
                if tries == 1:
                    raise
                self._failed(run.step, str(error))
                time.sleep(RETRY_SECONDS)

    def unsound(self, run: Run) -> bool:
        """Return True if the state holds numbers that are not finite, as after a fault of memory;
        log the array.
        """
        name = first_unsound(run.state, run.program.replicated)
        if name:
            self.log.event(
                "unsound_state",
                run.step,
                f"step {run.step}: {name} is not finite; this state is not saved",
                first=name,
            )
        return name is not None

    def _begin(self, run: Run) -> None:
        self._saved_at = time.monotonic()
        self._again_at = math.inf
        self.watchdog.begin("save", f"saving step {run.step}")
        data_state = {
            "step": run.step,
            **run.where()._asdict(),
            "scaling": scaling_state.record(run.program.recipes),
        }
        self.checkpoints.save(
            run.step, run.state.items(), data_state, held_out_loss=run.held_out_loss
        )

    def _failed(self, step: int, reason: str) -> None:
        self._again_at = time.monotonic() + RETRY_SECONDS
        self.log.event(
            "save_failed",
            step,
            f"step {step}: {reason}; training goes on, the next try is in {RETRY_SECONDS:.0f} s",
            reason=reason,
        )
