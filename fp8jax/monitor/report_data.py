"""What the report shows of a run, read from its directory and made small: plain numbers and strings, ready for JSON.

    run = read_run("runs/mine", cells=1_500_000)
    run["series"]["loss"]["last"], run["maps"]["kurtosis"]["qkv"]["cells"]

Steps are gathered in buckets of as many logged steps each. A line keeps the smallest, the largest and the last value of each
bucket; a cell of a layer x step map the worst of them: the largest, but for the signal-to-noise ratio the smallest. What is not
finite is counted, never hidden. Reads JSON and nothing else; neither JAX nor the run's device is touched.
"""

import base64
import collections
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from fp8jax.monitor.writers import MetricsError, read_metrics, records

LINES = ("loss", "held_out/loss", "held_out/bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds",
         "fp8/saturated_fraction", "fp8/underflow_fraction", "tokens")
# Statistic → whether a small value is the bad one. Others (mean, zero, ...) are in the log only.
MAPS = {"kurtosis": False, "max_logit": False, "entropy": True, "amax": False, "scale": False, "overflow": False, "underflow": False,
        "snr": True, "rms": False}
POINTS, MAP_POINTS = 600, 240
EVENTS = 400
MISSING, NON_FINITE, FIRST_CODE, LAST_CODE = 0, 1, 2, 65535
_LAYER = re.compile(r"([a-z_]+)/(.+)_layer(\d+)")


def read_run(workdir: str | pathlib.Path, *, cells: int) -> dict[str, Any]:
    """The run in a directory.

    Args:
        workdir: it must hold a `metrics.jsonl`.
        cells: how many cells its maps may have in all.

    Raises:
        MetricsError: there is no log, or it cannot be read.
    """
    workdir = pathlib.Path(workdir)
    lines, maps = _gather(workdir / "metrics.jsonl")
    events = read_metrics(workdir / "events.jsonl") if (workdir / "events.jsonl").exists() else []
    height = sum(table.layers for tables in maps.values() for table in tables.values())
    points = max(20, min(MAP_POINTS, cells // max(height, 1)))
    return {
        "name": workdir.resolve().name, "workdir": str(workdir), "config": _json(workdir / "config.json"),
        "facts": _json(workdir / "run.json"),
        "evaluation": _json(workdir / "eval.json"), "series": {name: line.reduced(POINTS) for name, line in lines.items()},
        "maps": {name: {tensor: table.reduced(points, smallest=MAPS[name]) for tensor, table in sorted(tables.items())}
                 for name, tables in maps.items()},
        "events": _shown(events), "state": _state(events), "seconds": lines["step_seconds"].total() if "step_seconds" in lines else None,
    }


class _Line:
    """One number a logged step."""

    def __init__(self):
        self.steps, self.values = [], []

    def total(self) -> float:
        """Sum over all steps, those between logged ones too."""
        steps, values = np.diff(self.steps, prepend=0), np.asarray(self.values)
        return float(np.sum((steps * values)[np.isfinite(values)]))

    def reduced(self, points: int) -> dict[str, list]:
        """Of each bucket: first and last step; smallest, largest and last finite value; how many were not finite."""
        values = np.asarray(self.values, np.float64)
        out: dict[str, list] = {name: [] for name in ("from", "to", "min", "max", "last", "bad")}
        for start, end in _buckets(len(values), points):
            some = values[start:end]
            finite = some[np.isfinite(some)]
            known = [finite.min(), finite.max(), finite[-1]] if finite.size else [None] * 3
            row = self.steps[start], self.steps[end - 1], *map(_short, known), int(some.size - finite.size)
            for name, value in zip(out, row, strict=True):
                out[name].append(value)
        return out


class _Table:
    """A value a layer, of each logged step that has them."""

    def __init__(self):
        self.steps, self.rows, self.layers = [], [], 0

    def add(self, step: int, layers: np.ndarray, values: np.ndarray) -> None:
        """Values of some layers, in one step."""
        self.steps.append(step)
        self.rows.append((layers, values))
        self.layers = max(self.layers, int(layers.max()) + 1)

    def reduced(self, points: int, *, smallest: bool) -> dict[str, Any]:
        """Buckets' steps; `cells`: layers x buckets of 16-bit codes, base64, between `low` and `high`, of logarithms if `log`."""
        values, known = np.full((len(self.rows), self.layers), np.nan), np.zeros((len(self.rows), self.layers), bool)
        for row, seen, (layers, found) in zip(values, known, self.rows, strict=True):
            row[layers], seen[layers] = found, True
        finite = np.isfinite(values)
        # "nan" at every step says that a layer does not have the statistic.
        bad = known & ~finite & finite.any(0)
        reach = np.where(finite, values, np.inf if smallest else -np.inf)
        spans = list(_buckets(len(self.rows), points))
        worst = np.stack([(reach[a:b].min(0) if smallest else reach[a:b].max(0)) for a, b in spans], axis=1)
        lost = np.stack([bad[a:b].any(0) for a, b in spans], axis=1)
        return {"from": [self.steps[a] for a, _ in spans], "to": [self.steps[b - 1] for _, b in spans], "layers": self.layers,
                "each": -(-len(self.rows) // len(spans)), **_coded(worst, lost)}


def _coded(values: np.ndarray, bad: np.ndarray) -> dict[str, Any]:
    """Values in 16 bits: MISSING, NON_FINITE, or from FIRST_CODE up between low and high; of logarithms where all are positive."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    log = bool(positive.size) and bool((finite >= 0).all())
    low, high = (float(reduce(positive if log else finite)) if finite.size else 0.0 for reduce in (np.min, np.max))
    codes = np.full(values.shape, MISSING, np.uint16)
    seen = np.isfinite(values)
    if finite.size:
        bottom, top = (math.log(low), math.log(high)) if log else (low, high)
        known = np.log(np.maximum(values[seen], low)) if log else values[seen]
        codes[seen] = FIRST_CODE + np.round((known - bottom) / (top - bottom or 1.0) * (LAST_CODE - FIRST_CODE)).astype(np.uint16)
        zero = log and bool((finite == 0).any())
        if zero:  # the code of the smallest stands for 0: below everything that is not
            codes[seen] = np.where(values[seen] == 0, FIRST_CODE, np.maximum(codes[seen], FIRST_CODE + 1))
    else:
        zero = False
    codes[bad] = NON_FINITE
    return {"low": low, "high": high, "log": log, "zero": zero, "cells": base64.b64encode(codes.astype("<u2").tobytes()).decode()}


def _gather(path: pathlib.Path) -> tuple[dict[str, _Line], dict[str, dict[str, _Table]]]:
    lines: dict[str, _Line] = {}
    maps: dict[str, dict[str, _Table]] = {name: {} for name in MAPS}
    layouts: dict[tuple[str, ...], _Layout] = {}
    for record in records(path):
        names = tuple(record)
        if names not in layouts:
            layouts[names] = _Layout(names)
        values = np.asarray([value if isinstance(value, int | float) else math.nan for value in record.values()], np.float64)
        for name, place in layouts[names].lines:
            line = lines.setdefault(name, _Line())
            line.steps.append(record["step"])
            line.values.append(values[place])
        for (statistic, tensor), layers, places in layouts[names].tables:
            maps[statistic].setdefault(tensor, _Table()).add(record["step"], layers, values[places])
    return lines, {name: tables for name, tables in maps.items() if tables}


class _Layout:
    """Where a log entry with these names holds what the report shows; the entries of a run have few different ones.

    lines: name and index. tables: (statistic, tensor), layers, indices.
    """

    def __init__(self, names: tuple[str, ...]):
        self.lines = [(name, i) for i, name in enumerate(names) if name in LINES]
        found: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for i, name in enumerate(names):
            match = _LAYER.fullmatch(name)
            if match and match[1] in MAPS:
                found.setdefault((match[1], match[2]), []).append((int(match[3]), i))
        self.tables = [(key, *np.asarray(pairs).T) for key, pairs in found.items()]


def _buckets(count: int, points: int) -> Iterator[tuple[int, int]]:
    """Equal parts of `count` entries: at most `points` of them."""
    points = min(count, points)
    for i in range(points):
        yield i * count // points, (i + 1) * count // points


def _short(value: float | None) -> float | None:
    """Six digits: what a chart can show, in half the bytes."""
    return None if value is None else float(f"{value:.6g}")


def _shown(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events as the report lists them: neighbours alike but for the step are one with a count, and the oldest of too many are left out."""
    out: list[dict[str, Any]] = []
    for event in events:
        event = {name: _plain(value) for name, value in event.items()}
        alike = ("kind", "level", "tensor", "layer", "first")
        if out and event["kind"] in ("bad_step", "early_warning") and all(out[-1].get(key) == event.get(key) for key in alike):
            out[-1] = out[-1] | {"last_step": event["step"], "count": out[-1].get("count", 1) + 1}
        else:
            out.append(event)
    return out[-EVENTS:]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _state(events: list[dict[str, Any]]) -> str:
    """What the run is doing, as far as its events say: running, finished, stopped, ended by bad numbers."""
    kinds = collections.deque((event["kind"] for event in events), maxlen=50)
    names = {"finished": "finished", "stopped": "stopped", "bad_numbers": "ended by bad numbers", "started": "running"}
    return next((names[kind] for kind in reversed(kinds) if kind in names), "unknown")


def _json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file, or half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


__all__ = ["MAPS", "MetricsError", "read_run"]
