"""What the report shows of a run, read from its directory and made small: plain numbers and strings, ready for JSON.

    run = read_run("runs/mine", cells=1_500_000)
    run["series"]["loss"]["last"], run["maps"]["kurtosis"]["qkv"]["cells"]

Steps are gathered in buckets of as many logged steps each, while the log is read: memory does not grow with it. A line keeps
the smallest, the largest and the last value of each bucket; a cell of a layer x step map the worst of them: the largest, but for
the signal-to-noise ratio the smallest. What is not finite is counted, never hidden. Reads JSON and nothing else; neither JAX nor
the run's device is touched.
"""

import base64
import collections
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fp8jax import files
from fp8jax.monitor import layered, report_cache
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
POINTS, MAP_POINTS = 600, 240
# Buckets kept while a log is read, from which at last so many are made; entries that wait to be put into them.
FINE, FINE_MAP = 8 * POINTS, 2 * MAP_POINTS
_WAITING, _WAITING_ROWS = 1024, 32
EVENTS = 400
# Layers of all tensors and statistics, twice as many as a model of 126 layers has; and a bound of steps: what JavaScript counts exactly.
ROWS, STEPS = 100_000, 2**53
MISSING, NON_FINITE, FIRST_CODE, LAST_CODE = 0, 1, 2, 65535


def read_run(workdir: str | pathlib.Path, *, cells: int, remember: bool = False) -> dict[str, Any]:
    """The run in a directory.

    Args:
        workdir: it must hold a `metrics.jsonl`.
        cells: how many cells its maps may have in all.
        remember: keep what was gathered in WORKDIR/report.npz, and read only what was logged since it was kept.

    Raises:
        MetricsError: there is no log. What of it cannot be read is left out, and named in `problems`.
    """
    workdir = pathlib.Path(workdir)
    gathered = Gathered()
    if remember:
        report_cache.load(workdir, gathered)
    gathered.read(workdir / "metrics.jsonl")
    if remember:
        report_cache.save(workdir, gathered)
    series, maps = (
        gathered.series,
        {name: tables for name, tables in gathered.maps.items() if tables},
    )
    problems = sorted(gathered.problems)
    events = _shown(_events(workdir / "events.jsonl", problems))
    files_of_run = {
        name: _json(workdir / f"{file}.json", problems)
        for name, file in (("config", "config"), ("facts", "run"), ("evaluation", "eval"))
    }
    height = sum(table.layers for tables in maps.values() for table in tables.values())
    points = max(20, min(MAP_POINTS, cells // max(height, 1)))
    return {
        "name": workdir.resolve().name,
        "workdir": str(workdir),
        **files_of_run,
        "problems": problems,
        "series": {name: line.reduced(POINTS) for name, line in series.items()},
        "maps": {
            name: {
                tensor: table.reduced(points, smallest=MAPS[name])
                for tensor, table in sorted(tables.items())
            }
            for name, tables in maps.items()
        },
        "events": events,
        "state": _state(events),
        "seconds": series["step_seconds"].total() if "step_seconds" in series else None,
    }


class _Line:
    """One number a logged step, in bounded memory."""

    def __init__(self):
        self._steps, self._values, self._total, self._last = [], [], 0.0, 0
        self._buckets = _Buckets(
            {
                "from": _FIRST,
                "to": _LAST,
                "min": _LEAST,
                "max": _MOST,
                "last": _LAST_KNOWN,
                "bad": _SUM,
            },
            FINE,
        )

    def add(self, step: int, value: float) -> None:
        """Take a logged step's value."""
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
        """Return all that it holds, for `restore`."""
        self._flush()
        return {"sums": np.asarray([self._total, self._last]), **self._buckets.arrays()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` returned."""
        self._total, self._last = float(arrays["sums"][0]), int(arrays["sums"][1])
        self._buckets.restore(arrays)

    def total(self) -> float | None:
        """Sum over all steps, those between logged ones too; None where it has become none."""
        self._flush()
        return self._total if math.isfinite(self._total) else None

    def reduced(self, points: int) -> dict[str, list]:
        """Of each bucket: first and last step; smallest, largest and last finite value; how many were not finite."""
        self._flush()
        found = self._buckets.reduced(points)
        out: dict[str, list] = {name: found[name].tolist() for name in ("from", "to")}
        out |= {
            name: [_short(value) for value in found[name].tolist()]
            for name in ("min", "max", "last")
        }
        return out | {"bad": found["bad"].tolist()}


class _Table:
    """A value a layer, of each logged step that has them, in bounded memory."""

    def __init__(self):
        self.layers, self._steps, self._rows = 0, [], []
        self._ever_finite = np.zeros(0, bool)
        self._buckets = _Buckets(
            {"from": _FIRST, "to": _LAST, "min": _LEAST, "max": _MOST, "lost": _ANY}, FINE_MAP
        )

    def add(self, step: int, layers: np.ndarray, values: np.ndarray) -> None:
        """Take values of some layers, in one step."""
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
        self._ever_finite = _wider(self._ever_finite, self.layers, False) | finite.any(0)
        reach = np.where(finite, small, np.float32(np.nan))
        self._buckets.add(
            {"from": steps, "to": steps, "min": reach, "max": reach, "lost": known & ~finite}
        )
        self._steps, self._rows = [], []

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that it holds, for `restore`."""
        self._flush()
        return {"finite": self._ever_finite, **self._buckets.arrays()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` returned."""
        self._ever_finite, self.layers = arrays["finite"], len(arrays["finite"])
        self._buckets.restore(arrays)

    def reduced(self, points: int, *, smallest: bool) -> dict[str, Any]:
        """Buckets' steps; `cells`: layers x buckets of 16-bit codes, base64, between `low` and `high`, of logarithms if `log`."""
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


def _last_known(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The last value of each bucket that is known, NaN where none is."""
    places = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(len(values))))
    ends = places[np.append(starts[1:], len(values)) - 1]
    return np.where(ends >= starts, values[ends], np.nan)


def _first(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return values[starts]


def _last(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return values[np.append(starts[1:], len(values)) - 1]


# How the entries of a bucket that begins at each of `starts` become one; NaN is a value that is not known.
_FIRST, _LAST, _LAST_KNOWN = _first, _last, _last_known
_LEAST, _MOST, _ANY, _SUM = (
    np.fmin.reduceat,
    np.fmax.reduceat,
    np.logical_or.reduceat,
    np.add.reduceat,
)


class _Buckets:
    """Entries in buckets of equally many: when there are too many buckets, neighbours become one.

    Args:
        kinds: of each column, how entries of a bucket become one.
        most: buckets that are kept; even.

    Attributes:
        count: entries so far.
    """

    def __init__(self, kinds: dict[str, Callable[..., np.ndarray]], most: int):
        self.count, self._kinds, self._most, self._each = 0, kinds, most, 1
        self._whole: dict[str, np.ndarray] = {}  # buckets of _each entries
        self._rest: dict[str, np.ndarray] = {}  # fewer entries than make a bucket

    def add(self, entries: dict[str, np.ndarray]) -> None:
        """Take entries: columns [entries] or [entries, layers]."""
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
        """Return all that they hold, for `restore`."""
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
        """At most `points` buckets, of equally many entries as nearly as those that are kept allow."""
        rest = len(self._rest["from"])
        last = self._merged(self._rest, np.zeros(1, int)) if rest else self._rest
        columns = {name: _joined([self._whole.get(name), values]) for name, values in last.items()}
        ends = np.append(self._each * np.arange(1, self._size() + 1), [self.count] * bool(rest))
        wanted = np.arange(min(points, len(ends))) * self.count // min(points, len(ends))
        return self._merged(columns, np.unique(np.searchsorted(ends, wanted, side="right")))


def _joined(parts: list[np.ndarray | None]) -> np.ndarray:
    """Rows of two arrays, one after another, as wide as the wider one."""
    there = [part for part in parts if part is not None]
    if there[-1].ndim == 1:
        return np.concatenate(there)
    width = max(part.shape[1] for part in there)
    return np.concatenate(
        [_wider(part, width, np.nan if part.dtype.kind == "f" else False) for part in there]
    )


def _wider(values: np.ndarray, width: int, fill: Any) -> np.ndarray:
    """An array with so many columns, new ones filled."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, missing, constant_values=fill) if width > values.shape[-1] else values


def _coded(values: np.ndarray, bad: np.ndarray) -> dict[str, Any]:
    """Values in 16 bits: MISSING, NON_FINITE, or from FIRST_CODE up between low and high; of logarithms where all are positive."""
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
        if zero:  # the code of the smallest stands for 0: below everything that is not
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


class Damage:
    """Lines of a log that cannot be read: how many, and the first of them."""

    def __init__(self):
        self._count, self._first = 0, ""

    def add(self, error: Callable[[], MetricsError]) -> None:
        """Count a line; the first error is made."""
        self._first = self._first or str(error())
        self._count += 1

    def lines(self) -> list[str]:
        """What to say of them."""
        if not self._count:
            return []
        more = f", and {self._count - 1:,} more" if self._count > 1 else ""
        return [f"{self._first}{more}: left out"]


class Gathered:
    """What a log says up to a byte.

    Attributes:
        end: the byte.
        series: lines by name.
        maps: tables by statistic and tensor.
        problems: what was left out, a line each.
    """

    def __init__(self):
        self.end, self._rows = 0, 0
        self.problems: set[str] = set()
        self.series: dict[str, _Line] = {}
        self.maps: dict[str, dict[str, _Table]] = {name: {} for name in MAPS}

    def read(self, path: pathlib.Path) -> None:
        """Go on from `end` to the end of the log.

        Raises:
            MetricsError: there is no log.
        """
        damage = Damage()
        for end, record in ended_lines(path, self.end, damage.add):
            if end > self.end:  # else a last line that is still being written
                self._add(record)
            self.end = end
        self.problems.update(damage.lines())

    def restored(self, end: int, problems: list[str]) -> None:
        """Take what was gathered up to a byte, beside lines and tables."""
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
        """Take values of layers; of more layers and tensors than any model has, the first ones."""
        layers, found = _layers(values)
        known = self.maps[statistic].get(tensor)
        more = len(values) - (known.layers if known else 0)
        if not len(layers):
            return
        if more > 0 and self._rows + more > ROWS:
            self.problems.add(
                f"metrics.jsonl has statistics of more than {ROWS:,} layers, of all tensors: those that came first are shown"
            )
            return
        self._rows += max(more, 0)
        self.table(statistic, tensor).add(step, layers, found)

    def line(self, name: str) -> _Line:
        """Return a line, a new one where there is none."""
        return self.series.get(name) or self.series.setdefault(name, _Line())

    def table(self, statistic: str, tensor: str) -> _Table:
        """Return a table, a new one where there is none."""
        return self.maps[statistic].get(tensor) or self.maps[statistic].setdefault(tensor, _Table())


def _layers(values: list[float | str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Layers that have a value, and the values; "inf" and "-inf" are NaN as well."""
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
    """A float; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _short(value: float) -> float | None:
    """Six digits: what a chart can show, in half the bytes; None where nothing is known."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def _shown(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events as the report lists them: neighbours alike but for the step are one with a count, and the oldest of too many are left out."""
    out: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS)
    for event in events:
        alike = ("kind", "level", "tensor", "layer", "first")
        if (
            out
            and event["kind"] in ("bad_step", "early_warning")
            and all(out[-1].get(key) == event.get(key) for key in alike)
        ):
            out[-1] = out[-1] | {"last_step": event["step"], "count": out[-1].get("count", 1) + 1}
        else:
            out.append(event)
    return list(out)


def _events(path: pathlib.Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Events that have a kind and a step; what is wrong with others is added to `problems` at the end."""
    if not path.exists():
        return
    damage, nameless = Damage(), 0
    for _, event in ended_lines(path, 0, damage.add):
        if isinstance(event.get("kind"), str) and 0 <= event["step"] < STEPS:
            yield _plain(event)
        else:
            nameless += 1
    problems += damage.lines()
    if nameless:
        problems.append(
            f"{path.name}: {nameless:,} lines have no kind, or no step that is one: left out"
        )


def _plain(value: Any) -> Any:
    """The same with numbers that are not finite as text, as in logs, and integers that JavaScript has."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value)[:20] if type(value) is int and abs(value) >= STEPS else value


def _state(events: list[dict[str, Any]]) -> str:
    """What the run is doing, as far as its last events say: running, finished, stopped, ended by bad numbers."""
    names = {
        "finished": "finished",
        "stopped": "stopped",
        "bad_numbers": "ended by bad numbers",
        "started": "running",
    }
    return next(
        (names[event["kind"]] for event in reversed(events[-50:]) if event["kind"] in names),
        "unknown",
    )


def _json(path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, and a problem where there is something else. Values that are not finite are left out."""
    try:
        found = files.read_json(path)
        if not isinstance(found, dict):
            raise ValueError("is not an object")
        plain = _plain(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: cannot be read: {str(error)[:200]}")
        return {}
    lost = [name for name, value in found.items() if plain[name] in ("nan", "inf", "-inf")]
    problems += [f"{path.name}: {name} is {plain[name]}" for name in lost]
    return {name: value for name, value in plain.items() if name not in lost}


__all__ = ["MAPS", "MetricsError", "read_run"]
