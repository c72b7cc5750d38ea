"""Read what the report shows of a run, reduced to plain numbers and strings, ready for JSON.

    run = read_run("runs/mine", cells=1_500_000)
    run["series"]["loss"]["last"], run["maps"]["kurtosis"]["qkv"]["cells"]

Steps are gathered in buckets of equally many logged steps while the log is read, so memory does not
grow with it. A line keeps the smallest, the largest and the last value of each bucket; a cell of a
layer x step map keeps the worst: the largest, but for the signal-to-noise ratio the smallest.
Values that are not finite are counted, never hidden. Only JSON is read; neither JAX nor the run's
device is used.
"""

import collections
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from fp8jax import files
from fp8jax.monitor import report_cache
from fp8jax.monitor.gathered import MAPS, STEPS, Damage, Gathered
from fp8jax.monitor.log_series import MAP_POINTS, POINTS
from fp8jax.monitor.logs import MetricsError, ended_lines

EVENTS = 400


def read_run(workdir: str | pathlib.Path, *, cells: int, remember: bool = False) -> dict[str, Any]:
    """Read the run in a directory.

    Args:
        workdir: the run's directory, which must hold a `metrics.jsonl`.
        cells: the most cells that its maps may have in all.
        remember: keep what was gathered in WORKDIR/report.npz, and read only what was logged since
            it was kept.

    Raises:
        MetricsError: there is no log. Lines that cannot be read are left out, and named in
            `problems`.
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


def _shown(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events to list: neighbours equal but for the step become one with a count, and the
    oldest are cut.
    """
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
    """Yield events that have a kind and a step; faults of others are added to `problems` at the
    end.
    """
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
    """Return the value with numbers that are not finite as text, as in logs, and integers that
    JavaScript has.
    """
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value)[:20] if type(value) is int and abs(value) >= STEPS else value


def _state(events: list[dict[str, Any]]) -> str:
    """Return the run's state as its last events show it: running, finished, stopped, ended by bad
    numbers.
    """
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
    """Read a JSON object without non-finite values; {} if there is no file, and a problem if it
    holds something else.
    """
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
