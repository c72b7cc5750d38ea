"""Trace a window of steps by the JAX profiler, for XProf or Perfetto: `config.profile.start` and
`.steps`.

The trace lies in WORKDIR/profile; its operations carry the names of blocks, roles and passes
(`attention_scores.dgrad`).
"""

import pathlib
from typing import Any

import jax

from fp8jax.config import ProfileConfig


class ProfileWindow:
    """A window that starts and stops the profiler around the configured steps, if any.

    Args:
        config: first step, counted from 1 (0 means the first that runs), and number of steps.
        directory: where the trace is written.
    """

    def __init__(self, config: ProfileConfig, directory: pathlib.Path):
        self.config, self.directory, self.end = config, directory, None

    def before(self, step: int) -> None:
        """Start the profiler if the window begins; called before each step, which counts from 1."""
        if self.config.steps and self.end is None and self.config.start in (0, step):
            self.end = step + self.config.steps - 1
            jax.profiler.start_trace(self.directory)

    def after(self, step: int, results: Any) -> str | None:
        """Stop the profiler if the window ends, and return a line on it; called after each step
        with its results.
        """
        if self.end is None or step != self.end:
            return None
        jax.block_until_ready(results)
        return self._stop()

    def close(self) -> str | None:
        """Write a window that the end of the run cut short."""
        return self._stop() if self.end is not None and self.end > 0 else None

    def _stop(self) -> str:
        jax.profiler.stop_trace()
        self.end = 0
        return (
            f"profile of {self.config.steps} steps in {self.directory}: open it with xprof "
            f"or tensorboard"
        )
