"""The early warning on a log, for `python -m fp8jax report --warnings FILE`: what it would have said, and when."""

import pathlib
from collections.abc import Iterator

from fp8jax.config import WARNING_LEVELS
from fp8jax.monitor.early_warning import EarlyWarning
from fp8jax.monitor.writers import MetricsError, read_metrics


def lines(path: pathlib.Path) -> Iterator[str]:
    """A line for each warning, in order, and a last one that counts them.

    Args:
        path: a run's metrics.jsonl, or its directory.

    Raises:
        MetricsError: no such file, an unreadable line, or a log without statistics.
    """
    log = read_metrics(path / "metrics.jsonl" if path.is_dir() else path)
    if not any(name.startswith("kurtosis/") for entry in log for name in entry):
        raise MetricsError(f"{path}: no statistics in the log; train with config.monitor.every above 0")
    watch = EarlyWarning()
    alarms = [alarm for entry in log for alarm in watch.observe(entry)]
    yield from (alarm.text() for alarm in alarms)
    counts = ", ".join(f"{sum(alarm.level == level for alarm in alarms)} {level}" for level in WARNING_LEVELS)
    yield f"{log[-1]['step']:,} steps: {counts}"
