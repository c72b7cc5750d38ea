"""Gather the entries of a log in a bounded number of buckets, however long the log is."""

from collections.abc import Callable
from typing import Any

import numpy as np


def _last_known(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the last known value of each bucket, NaN where none is."""
    places = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(len(values))))
    ends = places[np.append(starts[1:], len(values)) - 1]
    return np.where(ends >= starts, values[ends], np.nan)


def _first(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return values[starts]


def _last(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return values[np.append(starts[1:], len(values)) - 1]


# How the entries of a bucket that begins at each of `starts` become one; NaN is an unknown value.
FIRST, LAST, LAST_KNOWN = _first, _last, _last_known
LEAST, MOST, ANY, SUM = (
    np.fmin.reduceat,
    np.fmax.reduceat,
    np.logical_or.reduceat,
    np.add.reduceat,
)


class Buckets:
    """Entries in buckets of equal size: when there are too many buckets, neighbours become one.

    Args:
        kinds: for each column, how entries of a bucket become one.
        most: the number of buckets that are kept; even.

    Attributes:
        count: entries so far.
    """

    def __init__(self, kinds: dict[str, Callable[..., np.ndarray]], most: int):
        self.count, self._kinds, self._most, self._each = 0, kinds, most, 1
        self._whole: dict[str, np.ndarray] = {}  # buckets of _each entries
        self._rest: dict[str, np.ndarray] = {}  # fewer entries than make a bucket

    def add(self, entries: dict[str, np.ndarray]) -> None:
        """Add entries: columns [entries] or [entries, layers]."""
        self.count += len(entries["from"])
        rest = {name: _joined([self._rest.get(name), values]) for name, values in entries.items()}
        while (room := min(len(rest["from"]) // self._each, self._most - self._size())) > 0:
            used = room * self._each
            found = self._merged(
                {name: values[:used] for name, values in rest.items()},
                np.arange(0, used, self._each),
            )
            rest = {name: values[used:] for name, values in rest.items()}
            self._whole = {
                name: _joined([self._whole.get(name), values]) for name, values in found.items()
            }
            if self._size() == self._most:
                self._whole, self._each = (
                    self._merged(self._whole, np.arange(0, self._most, 2)),
                    2 * self._each,
                )
        self._rest = rest

    def _size(self) -> int:
        return len(self._whole["from"]) if self._whole else 0

    def _merged(self, columns: dict[str, np.ndarray], starts: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self._kinds[name](values, starts) for name, values in columns.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the whole content, for `restore`."""
        parts = {"whole": self._whole, "rest": self._rest}
        columns = {
            f"{part} {name}": values
            for part, found in parts.items()
            for name, values in found.items()
        }
        return {"counts": np.asarray([self.count, self._each]), **columns}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` returned."""
        self.count, self._each = map(int, arrays["counts"])
        parts = [
            {name: arrays[f"{part} {name}"] for name in self._kinds if f"{part} {name}" in arrays}
            for part in ("whole", "rest")
        ]
        self._whole, self._rest = parts

    def reduced(self, points: int) -> dict[str, np.ndarray]:
        """Return at most `points` buckets, of as equal size as the kept ones allow."""
        rest = len(self._rest["from"])
        last = self._merged(self._rest, np.zeros(1, int)) if rest else self._rest
        columns = {name: _joined([self._whole.get(name), values]) for name, values in last.items()}
        ends = np.append(self._each * np.arange(1, self._size() + 1), [self.count] * bool(rest))
        wanted = np.arange(min(points, len(ends))) * self.count // min(points, len(ends))
        return self._merged(columns, np.unique(np.searchsorted(ends, wanted, side="right")))


def _joined(parts: list[np.ndarray | None]) -> np.ndarray:
    """Concatenate rows of several arrays, as wide as the widest."""
    there = [part for part in parts if part is not None]
    if there[-1].ndim == 1:
        return np.concatenate(there)
    width = max(part.shape[1] for part in there)
    return np.concatenate(
        [wider(part, width, np.nan if part.dtype.kind == "f" else False) for part in there]
    )


def wider(values: np.ndarray, width: int, fill: Any) -> np.ndarray:
    """Return an array widened to `width` columns, new ones filled with `fill`."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, missing, constant_values=fill) if width > values.shape[-1] else values
