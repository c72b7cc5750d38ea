"""Gather what a log holds up to a byte: lines and tables, and what could not be read."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fp8jax.monitor import layered
from fp8jax.monitor.log_series import Line, Table
from fp8jax.monitor.logs import MetricsError, ended_lines

LINES = (
    "loss",
    "held_out/loss",
    "held_out/bits_per_byte",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "step_seconds",
    "fp8/saturated_fraction",
    "fp8/underflow_fraction",
    "tokens",
)
# Statistic → whether a small value is the bad one. Others (mean, zero, ...) are in the log only.
MAPS = {
    "kurtosis": False,
    "max_logit": False,
    "entropy": True,
    "amax": False,
    "scale": False,
    "overflow": False,
    "underflow": False,
    "snr": True,
    "rms": False,
}
# The most layers of all tensors and statistics, twice those of a model of 126 layers; and the
# largest step, up to which JavaScript counts exactly.
ROWS, STEPS = 100_000, 2**53


class Damage:
    """The lines of a log that cannot be read: how many, and the first of them."""

    def __init__(self):
        self._count, self._first = 0, ""

    def add(self, error: Callable[[], MetricsError]) -> None:
        """Count a line; only for the first one is the error made."""
        self._first = self._first or str(error())
        self._count += 1

    def lines(self) -> list[str]:
        """Return the problems to report."""
        if not self._count:
            return []
        more = f", and {self._count - 1:,} more" if self._count > 1 else ""
        return [f"{self._first}{more}: left out"]


class Gathered:
    """The content of a log up to a byte.

    Attributes:
        end: the byte.
        series: lines by name.
        maps: tables by statistic and tensor.
        problems: what was left out, a line each.
    """

    def __init__(self):
        self.end, self._rows = 0, 0
        self.problems: set[str] = set()
        self.series: dict[str, Line] = {}
        self.maps: dict[str, dict[str, Table]] = {name: {} for name in MAPS}

    def read(self, path: pathlib.Path) -> None:
        """Read from `end` to the end of the log.

        Raises:
            MetricsError: there is no log.
        """
        damage = Damage()
        for end, record in ended_lines(path, self.end, damage.add):
            if end > self.end:  # otherwise a last line that is still being written
                self._add(record)
            self.end = end
        self.problems.update(damage.lines())

    def restored(self, end: int, problems: list[str]) -> None:
        """Restore what was gathered up to a byte, besides lines and tables."""
        self.end, self.problems = end, set(problems)
        self._rows = sum(table.layers for tables in self.maps.values() for table in tables.values())

    def _add(self, record: dict[str, Any]) -> None:
        if not 0 <= record["step"] < STEPS:
            self.problems.add("metrics.jsonl has steps that are none: their lines are left out")
            return
        for name in LINES:
            if name in record:
                self.line(name).add(record["step"], _number(record[name]))
        for name, value in layered.pack(record).items():
            statistic, _, tensor = name.removesuffix(layered.SUFFIX).partition("/")
            if (
                isinstance(value, list)
                and 0 < len(value) <= layered.LAYERS
                and tensor
                and statistic in MAPS
            ):
                self._add_layers(statistic, tensor, record["step"], value)

    def _add_layers(self, statistic: str, tensor: str, step: int, values: list[Any]) -> None:
        """Add values of layers; beyond ROWS layers of all tensors, only those that came first."""
        layers, found = _layers(values)
        known = self.maps[statistic].get(tensor)
        more = len(values) - (known.layers if known else 0)
        if not len(layers):
            return
        if more > 0 and self._rows + more > ROWS:
            self.problems.add(
                f"metrics.jsonl has statistics of more than {ROWS:,} layers, of all tensors: "
                f"those that came first are shown"
            )
            return
        self._rows += max(more, 0)
        self.table(statistic, tensor).add(step, layers, found)

    def line(self, name: str) -> Line:
        """Return a line, a new one if there is none."""
        return self.series.get(name) or self.series.setdefault(name, Line())

    def table(self, statistic: str, tensor: str) -> Table:
        """Return a table, a new one if there is none."""
        return self.maps[statistic].get(tensor) or self.maps[statistic].setdefault(tensor, Table())


def _layers(values: list[float | str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the layers that have a value, and the values; "inf" and "-inf" become NaN."""
    try:
        found = np.asarray(values, np.float64)
        if found.ndim == 1:
            return np.arange(len(values)), found
    except (TypeError, ValueError, OverflowError):
        pass
    known = [layer for layer, value in enumerate(values) if value is not None]
    numbers = [_number(value) for value in values if value is not None]
    return np.asarray(known, int), np.asarray(numbers, np.float64)


def _number(value: Any) -> float:
    """Return the value as a float; NaN if it is none."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan
