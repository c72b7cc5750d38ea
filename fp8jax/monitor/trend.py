"""Judge whether a loss follows its trend: a power law of the run's recent past, and how far above
it the loss is.

A tensor outside FP8's range does not always hurt: many runs train on with logits off by nats, or
weights that have lost bits. It hurts if the loss leaves its trend. That shows long before the loss
rises above all earlier ones, when a loss that should fall by a tenth does not fall.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Entries that the law is fitted to, and those after them that are compared with it.
PAST, RECENT = 64, 12
LEAST = 24  # the least PAST entries before a judgement
ABOVE = 4.0  # standard errors above the law, at least: more than harder batches explain
BY_CHANCE = 0.01  # probability that a healthy run is ever found above its law, however long it is
FREEDOM = 24  # degrees of freedom of a robust deviation of PAST numbers: its relative variance is 1 / (2 * FREEDOM)
IMPROVES = -1.0  # standard errors of a slope: above it a loss has not fallen
RISES = 4.0  # standard errors of a slope that counts as rising, whatever went before
HALF = 1.8  # a window is half of a run if its last step is this multiple of its first
EXPECTED = 6.0  # standard errors that a loss must be expected to fall in a window to be judged
BUCKETS, FEWEST = 512, 32  # the most buckets of the whole past, and the fewest of a window


def excess(steps: Sequence[float], losses: Sequence[float]) -> float:
    """Return how far the last RECENT losses lie above a power law of the steps, fitted to the PAST
    before.

    The noise is the robust deviation of single losses from the law. A past that rises counts as
    constant: it cannot be extrapolated.

    Args:
        steps: one per entry, oldest first, above 0.
        losses: one per step; those that are not finite count as infinite.

    Returns:
        Standard errors; 0 if there are too few entries, inf if a recent loss is not finite.
    """
    x, y = (
        np.log(np.maximum(np.asarray(values, float)[-(PAST + RECENT) :], 1e-9))
        for values in (steps, losses)
    )
    if not np.isfinite(y[-RECENT:]).all():
        return np.inf
    before = np.isfinite(y[:-RECENT])
    if before.sum() < LEAST:
        return 0.0
    x, y, x_now, y_now = x[:-RECENT][before], y[:-RECENT][before], x[-RECENT:], y[-RECENT:]
    slope, spread, variance = _line(x, y)
    slope = min(slope, 0.0)
    far = x_now.mean() - x.mean()
    error = spread * np.sqrt(1 / RECENT + 1 / len(x) + far**2 / variance)
    return float((y_now.mean() - y.mean() - slope * far) / error)


def above(entries: int) -> float:
    """Return the threshold for `excess` after `entries` entries: many looks make a chance excess
    likely, so it grows.

    The quantile of Student's t at which all looks together reach it with the probability BY_CHANCE,
    by the expansion of Cornish and Fisher: 4.3 after 300 entries, 5.2 after 3,000, 6.5 after
    100,000. Windows overlap, so four entries count as one look: of 300 synthetic runs, 2% of 300
    entries and 1% of 3,000 entries are found above.
    """
    z = statistics.NormalDist().inv_cdf(1 - BY_CHANCE / max(entries / 4, 1))
    wider = (z**3 + z) / (4 * FREEDOM) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * FREEDOM**2)
    return max(ABOVE, z + wider)


class Course:
    """The losses of a whole run in at most BUCKETS numbers, and whether they still fall.

    All buckets are means over equally many entries; when there are too many, pairs of them become
    one. So a window that is a fixed part of the run has as many buckets late as early, and means
    over so many losses that noise does not hide how far they fall. Windows of a fixed number of
    entries are short beside a long run, and a healthy loss does not visibly fall within them.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        """Begin without losses, or with what `saved` returned before."""
        self._each, self._entries, self._bad, self.last = 1, 0, -PAST, 0.0
        self._steps, self._means = [], []
        self._open: list[list[float]] = []  # entries of the unfinished bucket
        for name, value in (saved or {}).items():
            setattr(self, name if name == "last" else f"_{name}", value)

    def saved(self) -> dict[str, Any]:
        """Return the state for JSON: a few thousand numbers at most."""
        return {
            "each": self._each,
            "entries": self._entries,
            "bad": self._bad,
            "last": self.last,
            "steps": list(self._steps),
            "means": list(self._means),
            "open": list(self._open),
        }

    @property
    def entries(self) -> int:
        """Return how many entries were added."""
        return self._entries

    def add(self, step: float, loss: float) -> None:
        """Add the next entry's loss, finite or not; a step that is not new replaces that step and
        all after it.
        """
        if step <= self.last:
            keep = sum(x < np.log(step) for x in self._steps)
            self._steps, self._means, self._open = self._steps[:keep], self._means[:keep], []
        self._entries, self.last = self._entries + 1, step
        if not np.isfinite(loss):
            self._bad = self._entries
            return
        self._open.append([math.log(max(step, 1e-9)), loss])
        if len(self._open) < self._each:
            return
        x, y = np.mean(self._open, axis=0)
        self._open = []
        self._steps.append(float(x))
        self._means.append(float(y))
        if len(self._means) == BUCKETS:
            self._each *= 2
            self._steps, self._means = (
                [float(np.mean(pair)) for pair in zip(part[::2], part[1::2], strict=True)]
                for part in (self._steps, self._means)
            )

    def stands_still(self) -> bool:
        """Return True if the loss has not fallen although it should have, as far as its noise
        shows.

        Over the last half of the run every loss should have fallen. Over a shorter part it should
        have if it fell in the equally long part before so fast that falling on would show: EXPECTED
        standard errors. A rising loss shows in any part. A loss that was not finite within the last
        PAST entries stands still.
        """
        if self._entries - self._bad < PAST:
            return True
        x, y = np.array(self._steps), np.array(self._means)
        sizes = max(len(y) // 2, PAST // self._each), len(y) // 4, len(y) // 8
        return any(
            self._stands(x, y, size)
            for size in sizes
            if size >= FEWEST and PAST <= size * self._each and size <= len(y)
        )

    @staticmethod
    def _stands(x: np.ndarray, y: np.ndarray, size: int) -> bool:
        """Return whether the last `size` buckets stand still."""
        slope, spread, variance = _line(x[-size:], y[-size:])
        error = spread / np.sqrt(variance)
        half = x[-1] - x[-size] >= np.log(HALF)
        if slope > RISES * error or half and slope > IMPROVES * error:
            return True
        if len(y) < 2 * size:
            return False
        before, noise, width = _line(x[-2 * size : -size], y[-2 * size : -size])
        return bool(
            slope > IMPROVES * error and before + noise / np.sqrt(width) < -EXPECTED * error
        )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return the slope, the robust standard deviation about the line, and the sum of squares of x
    about its mean.
    """
    centred = x - x.mean()
    variance = float((centred**2).sum())
    slope = float((centred * y).sum()) / variance
    residuals = y - y.mean() - slope * centred
    return slope, 1.4826 * float(np.median(np.abs(residuals))) + 1e-4, variance
