"""Fit how series grow with tokens (constant, logarithm, power law or exponential), and when they
reach a limit.

    growth = fit(tokens, values)                       # values [k, w]: k positive series observed w times
    reached = growth.reaches(limits)                   # [k] tokens at which each reaches it, inf if never

Healthy kurtosis grows with the logarithm of tokens or slower than linearly (FOG paper, section 4);
in runs that diverge it grows exponentially. The law of a series is chosen by prediction, not by
fit: each law is fitted to the first part of the window and judged by its squared error on the rest,
in logarithms of the values, so that factors count and sizes do not. A law that explains the past
and misses what came next cannot forecast; neighbours in time are alike, which criteria that count
independent errors (AIC, BIC) would take for certainty.
"""

from typing import NamedTuple

import numpy as np

LAWS = ("constant", "logarithmic", "power", "exponential")
TRAINED = 2 / 3  # part of the window that is fitted when laws are compared
FAR = 60.0  # in the coordinates of a law: a forecast beyond this counts as never
SIMPLER = 1.5  # a slower law is taken if its squared error is at most this multiple of the best


class Growth(NamedTuple):
    """Laws of k series, fitted to their whole windows.

    Attributes:
        law: int [k], index into LAWS.
        intercept, slope: float64 [k], in the coordinates of `_coordinates`.
        unit: tokens that count as 1.
        error: float64 [k], root mean squared error of the law's predictions in logarithms; 0.1 is
            10%.
    """

    law: np.ndarray
    intercept: np.ndarray
    slope: np.ndarray
    unit: float
    error: np.ndarray

    def at(self, tokens: float) -> np.ndarray:
        """Return the values that the laws predict at a number of tokens, float64 [k]."""
        x = np.stack([_coordinates(law, np.array(tokens / self.unit)) for law in LAWS])[self.law]
        y = self.intercept + self.slope * x
        with np.errstate(over="ignore"):
            return np.where(self.law == LAWS.index("logarithmic"), y, np.exp(np.minimum(y, 700.0)))

    def reaches(self, limits: np.ndarray) -> np.ndarray:
        """Return the tokens at which each series grows past its limit, float64 [k]; inf for those
        that do not grow.
        """
        y = np.where(self.law == LAWS.index("logarithmic"), limits, np.log(limits))
        x = np.divide(
            y - self.intercept, self.slope, out=np.full(len(y), np.inf), where=self.slope > 1e-300
        )
        times = np.where(self.law == LAWS.index("exponential"), x, np.exp(np.minimum(x, FAR)))
        return np.where(
            (self.law == LAWS.index("constant")) | (x >= FAR), np.inf, self.unit * times
        )


def fit(tokens: np.ndarray, values: np.ndarray) -> Growth:
    """Fit to each series the law that predicts best.

    Args:
        tokens: [w], ascending, above 0; w at least 4.
        values: [k, w], above 0 and finite.
    """
    unit, split = float(tokens[-1]), max(round(TRAINED * len(tokens)), 3)
    t = tokens / unit
    errors = np.stack([_error(law, t, values, split) for law in LAWS])
    best = np.argmax(errors <= SIMPLER * errors.min(axis=0), axis=0)
    lines = np.stack([np.stack(_line(law, t, values)) for law in LAWS])
    series = np.arange(len(values))
    intercept, slope = lines[best, :, series].T
    return Growth(best, intercept, slope, unit, np.sqrt(errors[best, series]))


def _error(law: str, t: np.ndarray, values: np.ndarray, split: int) -> np.ndarray:
    """Return the mean squared error in logarithms on what comes after `split`, [k]."""
    intercept, slope = _line(law, t[:split], values[:, :split])
    y = intercept[:, None] + slope[:, None] * _coordinates(law, t[split:])
    actual = np.log(values[:, split:])
    with np.errstate(divide="ignore", invalid="ignore"):
        predicted = np.log(np.maximum(y, 1e-300)) if law == "logarithmic" else y
    return np.mean((predicted - actual) ** 2, axis=1)


def _coordinates(law: str, t: np.ndarray) -> np.ndarray:
    """Return the coordinate in which a law is linear in the value (`logarithmic`) or in its
    logarithm (others).
    """
    return {
        "constant": np.zeros_like,
        "logarithmic": np.log,
        "power": np.log,
        "exponential": np.asarray,
    }[law](t)


def _line(law: str, t: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intercepts and slopes [k] of least squares, of relative errors for `logarithmic`,
    fitted to values.
    """
    x = np.broadcast_to(_coordinates(law, t), values.shape)
    y, weight = (
        (values, values**-2.0) if law == "logarithmic" else (np.log(values), np.ones_like(values))
    )
    weight = weight / weight.sum(axis=1, keepdims=True)
    x_mean, y_mean = ((weight * a).sum(axis=1, keepdims=True) for a in (x, y))
    variance = (weight * (x - x_mean) ** 2).sum(axis=1)
    covariance = (weight * (x - x_mean) * (y - y_mean)).sum(axis=1)
    slope = np.divide(covariance, variance, out=np.zeros(len(values)), where=variance > 0)
    return y_mean[:, 0] - slope * x_mean[:, 0], slope
