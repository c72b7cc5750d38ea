"""What the tests that do damage share."""

import resource

import pytest

from fp8jax.data import pipeline


@pytest.fixture
def at_batch(monkeypatch):
    """at_batch({4: full}) calls full() in the training loop when it asks for batch 4, that of step 5 unless any were passed over."""
    original = pipeline.train_iterator

    def arm(calls):
        def iterate(config, start_step=0, rows=None):
            iterator = original(config, start_step, rows)
            while True:
                if start_step in calls:
                    calls[start_step]()
                start_step += 1
                yield next(iterator)

        monkeypatch.setattr(pipeline, "train_iterator", iterate)

    return arm


@pytest.fixture
def little_memory():
    """At most 1 GB more than before, whatever the cases claim to hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
