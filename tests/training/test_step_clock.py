"""Time that the devices wait for data is counted, time that a running step hides is not, and a slow source is told once."""

import time

import pytest

from fp8jax.training.step_clock import Feed


class Result:
    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def slow():
    for number in range(9):
        time.sleep(0.05)
        yield number


@pytest.mark.parametrize(
    ("running", "counts"), [(None, True), (Result(True), True), (Result(False), False)]
)
def test_waiting_counts_where_no_step_runs(running, counts):
    feed = Feed(slow())
    feed.running = running
    assert [next(feed), next(feed)] == [0, 1]
    assert (feed.waited >= 0.1) if counts else (feed.waited == 0)
    feed.lap()
    assert feed.waited == 0


def test_a_bottleneck_is_told_once():
    feed = Feed(iter(()))
    assert feed.warning(step_seconds=1.0, waited=0.09) is None
    assert "the devices wait for it 40% of the time; raise config.data.read_threads" in str(
        feed.warning(step_seconds=1.0, waited=0.4)
    )
    assert feed.warning(step_seconds=1.0, waited=0.9) is None
