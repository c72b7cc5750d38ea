"""Run the early warning on a log, for `python -m fp8jax report --warnings FILE`."""

import pathlib
from collections.abc import Iterator

from fp8jax.config import WARNING_LEVELS, read_json
from fp8jax.monitor.early_warning import EarlyWarning
from fp8jax.monitor.logs import MetricsError, records


def lines(path: pathlib.Path) -> Iterator[str]:
    """Yield a line for each warning, in order, and a last one that counts them.

    Args:
        path: a run's metrics.jsonl, or its directory.

    Raises:
        MetricsError: the file does not exist, has an unreadable line, or has no statistics.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    watch = EarlyWarning(gradient_format=_gradient_format(path.parent))
    counts: dict[str, int] = dict.fromkeys(WARNING_LEVELS, 0)
    step, statistics = 0, False
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
    """Return the gradient format of the run in a directory; the default e5m2 for a log without its
    run.
    """
    path = workdir / "config.json"
    return (
        read_json(path).get("fp8", {}).get("gradient_format", "e5m2") if path.exists() else "e5m2"
    )
