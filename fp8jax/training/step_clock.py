"""The batches of a run, and how long the devices had nothing to do but wait for them.

    feed = Feed(pipeline.train_iterator(config))
    state, metrics, _ = program.step(state, program.put(next(feed)))
    feed.running = metrics["loss"]
    feed.waited                         # seconds, until feed.lap()

Neither `put` nor `step` waits for the devices: while a step runs, the batch of the next one is read, by threads that read ahead,
and sent. So the time that `next` takes costs nothing as long as a step is running at its end; where none is, it counts as waiting.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax

# Of the time of a step: above this, data is the bottleneck.
LIMIT = 0.1


class Feed:
    """Batches on the host.

    Attributes:
        running: a result of the newest step.
        waited: seconds in which the devices waited for `next`.
    """

    def __init__(self, batches: Iterator[Any]):
        self._batches, self._told = batches, False
        self.running: jax.Array | None = None
        self.waited = 0.0

    def __next__(self) -> Any:
        """The next batch."""
        began = time.perf_counter()
        batch = next(self._batches)
        if self.running is None or self.running.is_ready():
            self.waited += time.perf_counter() - began
        return batch

    def lap(self) -> None:
        """Counts anew."""
        self.waited = 0.0

    def warning(self, step_seconds: float, waited: float) -> str | None:
        """A line if data is the bottleneck, the first time; both arguments in seconds a step."""
        if self._told or waited <= LIMIT * step_seconds:
            return None
        self._told = True
        return (
            f"warning  data is the bottleneck: the devices wait for it {waited / step_seconds:.0%} of the time; raise "
            "config.data.read_threads, or put the data on a faster disk"
        )
