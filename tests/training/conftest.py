"""What tests of training share."""

import signal

import pytest

from fp8jax.data import pipeline


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the process receive a signal while the loop asks for the batch of a step."""
    original = pipeline.train_iterator

    def arm(at: int, number: int):
        class Stopping:
            def __init__(self, iterator, count):
                self.iterator, self.count = iterator, count

            def __next__(self):
                if self.count == at:
                    signal.raise_signal(number)
                self.count += 1
                return next(self.iterator)

            def get_state(self):
                return self.iterator.get_state()

        def stopping(config, start_step, rows):
            return Stopping(original(config, start_step, rows), start_step)

        monkeypatch.setattr(pipeline, "train_iterator", stopping)

    yield arm
    monkeypatch.setattr(pipeline, "train_iterator", original)
