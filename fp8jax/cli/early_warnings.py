"""The early warning on a log, for `python -m fp8jax report --warnings FILE`: what it would have said, and when."""

import pathlib
from collections.abc import Iterator

from fp8jax.config import WARNING_LEVELS, read_json
from fp8jax.monitor.early_warning import EarlyWarning
from fp8jax.monitor.logs import MetricsError, records


def lines(path: pathlib.Path) -> Iterator[str]:
    """A line for each warning, in order, and a last one that counts them.

    Args:
        path: a run's metrics.jsonl, or its directory.

    Raises:
        MetricsError: no such file, an unreadable line, or a log without statistics.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    watch, counts, step, statistics = (
        EarlyWarning(gradient_format=_gradient_format(path.parent)),
        dict.fromkeys(WARNING_LEVELS, 0),
        0,
        False,
    )
    for entry in records(path):
        step, statistics = (
            entry["step"],
            statistics or any(name.startswith("kurtosis/") for name in entry),
        )
        for alarm in watch.observe(entry):
            counts[alarm.level] += 1
            yield alarm.text()
    if not statistics:
        raise MetricsError(
            f"{path}: no statistics in the log; train with config.monitor.every above 0"
        )
    yield f"{step:,} steps: {', '.join(f'{count} {level}' for level, count in counts.items())}"


def _gradient_format(workdir: pathlib.Path) -> str:
    """Return that of the run whose directory it is; e5m2, the default, of a log that was taken elsewhere."""
    path = workdir / "config.json"
    return (
        read_json(path).get("fp8", {}).get("gradient_format", "e5m2") if path.exists() else "e5m2"
    )
