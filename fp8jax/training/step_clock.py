"""Measure how long steps take, and how long the devices waited for batches.

    clock = StepClock(Feed(pipeline.train_iterator(config)))
    with clock.left_out():              # for all but ordinary steps
        ...
    clock.count()                       # after each ordinary step
    clock.times()                       # seconds per step, and of those waited; since clock.restart()

    feed = Feed(pipeline.train_iterator(config))
    state, metrics, _ = program.step(state, program.put(next(feed)))
    feed.running = metrics["loss"]
    feed.waited                         # seconds, until feed.lap()

Neither `put` nor `step` waits for the devices: while a step runs, the batch of the next one is
read, by threads that read ahead, and sent. So the time of `next` is free if a step is still running
at its end; otherwise it counts as waiting.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

# Above this part of a step's time, data is the bottleneck.
LIMIT = 0.1


class Feed:
    """The batches on the host.

    Attributes:
        running: a result of the newest step.
        waited: seconds in which the devices waited for `next`.
    """

    def __init__(self, batches: Iterator[Any]):
        self._batches, self._told = batches, False
        self.running: jax.Array | None = None
        self.waited = 0.0

    def __next__(self) -> Any:
        """Return the next batch."""
        began = time.perf_counter()
        batch = next(self._batches)
        if self.running is None or self.running.is_ready():
            self.waited += time.perf_counter() - began
        return batch

    def lap(self) -> None:
        """Reset the count."""
        self.waited = 0.0

    def warning(self, step_seconds: float, waited: float) -> str | None:
        """Return a line the first time that data is the bottleneck; both arguments are in seconds
        per step.
        """
        if self._told or waited <= LIMIT * step_seconds:
            return None
        self._told = True
        return (
            f"warning  data is the bottleneck: the devices wait for it "
            f"{waited / step_seconds:.0%} of the time; raise "
            "config.data.read_threads, or put the data on a faster disk"
        )


class StepClock:
    """The time that ordinary steps take, without that of anything between them.

    Attributes:
        feed: the batches of the run.
    """

    def __init__(self, feed: Feed):
        self.feed = feed
        self.restart()

    def restart(self) -> None:
        """Reset the count."""
        self._began = time.perf_counter()
        self._steps = 0
        self.feed.lap()

    def count(self) -> None:
        """Count an ordinary step."""
        self._steps += 1

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave what runs inside out of the time of steps."""
        before = time.perf_counter()
        waited = self.feed.waited
        yield
        self._began += time.perf_counter() - before
        self.feed.waited = waited

    def times(self) -> tuple[float, float] | None:
        """Return the seconds per ordinary step, and those of waiting for data; None if there was no
        such step.
        """
        if not self._steps:
            return None
        seconds = (time.perf_counter() - self._began) / self._steps
        return seconds, self.feed.waited / self._steps
