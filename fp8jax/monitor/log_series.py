"""Keep numbers of a log in bounded memory: one per step (Line), or one per layer and step (Table)."""

import base64
import math
from typing import Any

import numpy as np

from fp8jax.monitor.buckets import ANY, FIRST, LAST, LAST_KNOWN, LEAST, MOST, SUM, Buckets, wider

POINTS, MAP_POINTS = 600, 240
# Buckets that are kept while a log is read, buckets that are made from them in the end, and entries
# that wait to be added.
FINE, FINE_MAP = 8 * POINTS, 2 * MAP_POINTS
_WAITING, _WAITING_ROWS = 1024, 32
MISSING, NON_FINITE, FIRST_CODE, LAST_CODE = 0, 1, 2, 65535


class Line:
    """One number per logged step, in bounded memory."""

    def __init__(self):
        self._steps, self._values, self._total, self._last = [], [], 0.0, 0
        self._buckets = Buckets(
            {
                "from": FIRST,
                "to": LAST,
                "min": LEAST,
                "max": MOST,
                "last": LAST_KNOWN,
                "bad": SUM,
            },
            FINE,
        )

    def add(self, step: int, value: float) -> None:
        """Add a logged step's value."""
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) >= _WAITING:
            self._flush()

    def _flush(self) -> None:
        if not self._steps:
            return
        steps, values = np.asarray(self._steps), np.asarray(self._values, np.float64)
        finite = np.isfinite(values)
        between = np.diff(steps, prepend=self._last)
        with np.errstate(over="ignore"):
            self._total += float(np.sum((between * values)[finite]))
        self._last = steps[-1]
        known, bad = np.where(finite, values, np.nan), (~finite).astype(np.int64)
        self._buckets.add(
            {"from": steps, "to": steps, "min": known, "max": known, "last": known, "bad": bad}
        )
        self._steps, self._values = [], []

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the whole content, for `restore`."""
        self._flush()
        return {"sums": np.asarray([self._total, self._last]), **self._buckets.arrays()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` returned."""
        self._total, self._last = float(arrays["sums"][0]), int(arrays["sums"][1])
        self._buckets.restore(arrays)

    def total(self) -> float | None:
        """Return the sum over all steps, those between logged ones too; None if it is not a number."""
        self._flush()
        return self._total if math.isfinite(self._total) else None

    def reduced(self, points: int) -> dict[str, list]:
        """Return for each bucket its first and last step, smallest, largest and last finite value,
        and non-finite count.
        """
        self._flush()
        found = self._buckets.reduced(points)
        out: dict[str, list] = {name: found[name].tolist() for name in ("from", "to")}
        out |= {
            name: [_short(value) for value in found[name].tolist()]
            for name in ("min", "max", "last")
        }
        return out | {"bad": found["bad"].tolist()}


class Table:
    """One value per layer and logged step, in bounded memory."""

    def __init__(self):
        self.layers, self._steps, self._rows = 0, [], []
        self._ever_finite = np.zeros(0, bool)
        self._buckets = Buckets(
            {"from": FIRST, "to": LAST, "min": LEAST, "max": MOST, "lost": ANY}, FINE_MAP
        )

    def add(self, step: int, layers: np.ndarray, values: np.ndarray) -> None:
        """Add one step's values of some layers."""
        self._steps.append(step)
        self._rows.append((layers, values))
        self.layers = max(self.layers, int(layers.max()) + 1)
        if len(self._steps) >= _WAITING_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._steps:
            return
        values, known = (
            np.full((len(self._rows), self.layers), np.nan),
            np.zeros((len(self._rows), self.layers), bool),
        )
        for row, seen, (layers, found) in zip(values, known, self._rows, strict=True):
            row[layers], seen[layers] = found, True
        with np.errstate(over="ignore"):
            small = values.astype(np.float32)  # a cell of the map has 16 bits
        finite, steps = np.isfinite(small), np.asarray(self._steps)
        self._ever_finite = wider(self._ever_finite, self.layers, False) | finite.any(0)
        reach = np.where(finite, small, np.float32(np.nan))
        self._buckets.add(
            {"from": steps, "to": steps, "min": reach, "max": reach, "lost": known & ~finite}
        )
        self._steps, self._rows = [], []

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the whole content, for `restore`."""
        self._flush()
        return {"finite": self._ever_finite, **self._buckets.arrays()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` returned."""
        self._ever_finite, self.layers = arrays["finite"], len(arrays["finite"])
        self._buckets.restore(arrays)

    def reduced(self, points: int, *, smallest: bool) -> dict[str, Any]:
        """Return buckets' steps, and `cells`: layers x buckets of 16-bit codes in base64, `low` to
        `high`, in logs if `log`.
        """
        self._flush()
        found = self._buckets.reduced(points)
        worst = found["min" if smallest else "max"].T
        # "nan" at every step says that a layer does not have the statistic.
        lost = (found["lost"] & self._ever_finite).T
        return {
            "from": found["from"].tolist(),
            "to": found["to"].tolist(),
            "layers": self.layers,
            "each": -(-self._buckets.count // len(found["from"])),
            **_coded(worst, lost),
        }


def _coded(values: np.ndarray, bad: np.ndarray) -> dict[str, Any]:
    """Encode values in 16 bits: MISSING, NON_FINITE, or from FIRST_CODE up, low to high; logarithms
    if all are positive.
    """
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    log = bool(positive.size) and bool((finite >= 0).all())
    low, high = (
        float(reduce(positive if log else finite)) if finite.size else 0.0
        for reduce in (np.min, np.max)
    )
    codes = np.full(values.shape, MISSING, np.uint16)
    seen = np.isfinite(values)
    if finite.size:
        bottom, top = (math.log(low), math.log(high)) if log else (low, high)
        known = np.log(np.maximum(values[seen], low)) if log else values[seen]
        codes[seen] = FIRST_CODE + np.round(
            (known - bottom) / (top - bottom or 1.0) * (LAST_CODE - FIRST_CODE)
        ).astype(np.uint16)
        zero = log and bool((finite == 0).any())
        if zero:  # the code of the smallest stands for 0, below all other values
            codes[seen] = np.where(
                values[seen] == 0, FIRST_CODE, np.maximum(codes[seen], FIRST_CODE + 1)
            )
    else:
        zero = False
    codes[bad] = NON_FINITE
    return {
        "low": low,
        "high": high,
        "log": log,
        "zero": zero,
        "cells": base64.b64encode(codes.astype("<u2").tobytes()).decode(),
    }


def _short(value: float) -> float | None:
    """Round to the six digits that a chart can show, in half the bytes; None if the value is
    unknown.
    """
    return None if math.isnan(value) else float(f"{value:.6g}")
