"""Guard a run from outside: one process per directory, signals that ask to stop, limits of time,
out of memory.

with guarded(config, workdir) as guards:
    guards.watchdog.begin("step", "step 17 (batch 16)")
    if guards.stop:                                   # a signal has come
        ...
"""

import contextlib
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from fp8jax.config import Config
from fp8jax.monitor.stages import Stages
from fp8jax.parallel import distributed
from fp8jax.training.fit import bytes_of_failure
from fp8jax.training.fit_advice import out_of_memory
from fp8jax.training.lock import exclusive
from fp8jax.training.signals import stop_signals
from fp8jax.training.watchdog import Watchdog


class Guards(NamedTuple):
    """The guards of a run.

    Attributes:
        stop: numbers of the signals that have asked this process to stop.
        watchdog: ends the process if a part takes too long.
    """

    stop: list[int]
    watchdog: Watchdog

    def stop_alone(self) -> bool:
        """Return True if a signal ends the run at once; one of several processes must not leave the
        others waiting.
        """
        return bool(self.stop) and jax.process_count() == 1

    def stop_before_the_first_step(self, stage: Stages) -> bool:
        """Return True, and report it, if a signal ends a run that has not begun yet."""
        if not self.stop_alone():
            return False
        stage.message(
            f"stopped on {self.stop_name()} before the first step; there is nothing new to save. "
            "Run again to continue."
        )
        return True

    def stop_name(self) -> str:
        """Return the name of the signal that stops the run."""
        return signal.Signals(self.stop[0]).name if self.stop else "a signal to another process"


@contextlib.contextmanager
def guarded(config: Config, workdir: pathlib.Path) -> Iterator[Guards]:
    """Guard the run in a directory.

    Raises:
        ConfigError: another process trains in the directory, or it cannot be written.
    """
    training = config.training
    limits = {
        "start": training.start_limit,
        "step": training.step_limit,
        "save": training.save_limit,
        "evaluation": training.evaluation_limit,
    }
    alone = exclusive(workdir) if distributed.is_first() else contextlib.nullcontext()
    with alone, stop_signals() as stop, Watchdog(limits) as watchdog:
        yield Guards(stop, watchdog)


@contextlib.contextmanager
def one_line_without_memory(config: Config, done: Callable[[], tuple[int, str]]) -> Iterator[None]:
    """End with one line if a device runs out of memory.

    Args:
        config: the run's configuration.
        done: returns the last finished step, and what there is to continue from.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if bytes_of_failure(error) is None:
            raise
        raise out_of_memory(error, config, *done()) from None
