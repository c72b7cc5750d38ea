"""Whether a loss still goes where it was going: a power law of the run's recent past, and how far above it the loss has come.

A tensor that has left FP8's range does not always hurt: many a run trains on with logits off by nats, or weights that have lost
bits. It hurts where the loss leaves its own way. That shows long before the loss rises above all that it was, when a loss
that should fall by a tenth stays where it is.
"""

from collections.abc import Sequence

import numpy as np

PAST, RECENT = 64, 12  # entries that the law is fitted to, and those after them that are compared with it
LEAST = 24  # of the former before anything is said
ABOVE = 4.0  # standard errors above the law: more than batches that are harder than others explain
IMPROVES = -1.0  # standard errors of a slope: above it a loss has not fallen over PAST entries


def excess(steps: Sequence[float], losses: Sequence[float]) -> float:
    """How far the last RECENT losses lie above a power law of the steps, fitted to the PAST before them, in standard errors.

    The noise is that of single losses about the law, robust. A past that rises counts as constant: that is nothing to go on with.

    Args:
        steps: one an entry, oldest first, above 0.
        losses: one a step; those that are not finite count as infinite.

    Returns:
        0 where there are too few; inf where a recent loss is not finite.
    """
    x, y = (np.log(np.maximum(np.asarray(values, float)[-(PAST + RECENT):], 1e-9)) for values in (steps, losses))
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


def stands_still(losses: Sequence[float]) -> bool:
    """Whether the last PAST losses have not fallen, as far as their noise lets one tell."""
    y = np.asarray(losses, float)[-PAST:]
    if len(y) < PAST:
        return False
    if not np.isfinite(y).all():
        return True
    slope, spread, variance = _line(np.arange(len(y), dtype=float), y)
    return bool(slope * np.sqrt(variance) / spread >= IMPROVES)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, robust standard deviation about the line, sum of squares of x about its mean."""
    centred = x - x.mean()
    variance = float((centred**2).sum())
    slope = float((centred * y).sum()) / variance
    residuals = y - y.mean() - slope * centred
    return slope, 1.4826 * float(np.median(np.abs(residuals))) + 1e-4, variance
