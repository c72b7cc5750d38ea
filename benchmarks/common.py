"""Share code between the benchmarks: interleaved timing, versions, results files, tables.

    seconds = interleaved({"bf16": step_a, "fp8": step_b}, rounds=10)     # name -> median seconds of one call
    save("train_step", rows)                                              # benchmarks/results/train_step-DEVICE.json

Candidates take turns in one process, so that other load of the machine falls on all of them: ratios
hold where times do not. A benchmark imports this file before any module of fp8jax.
"""

import importlib.metadata
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python benchmarks/X.py` works without installing fp8jax

from fp8jax.audit.roofline import Device, device_of

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "qwix",
    "torch",
    "torchao",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of a call, each candidate once per round, after one call that is not counted.

    Args:
        calls: name → function that starts the work and returns its arrays.
        rounds: calls of each that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def surviving(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, tell: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """Return `interleaved` of the candidates whose first call succeeds, and the errors of others: a failure is a result.

    With `tell`, print for each when its first call is over.
    """
    working, failed = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            jax.block_until_ready(call())
            working[name] = call
        except Exception as error:  # noqa: BLE001  compilers and devices raise many kinds
            failed[name] = one_line(error)
        if tell:
            print(
                f"{name}: {failed.get(name, 'ready')} after {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return interleaved(working, rounds), failed


def peak() -> Device | None:
    """Return the peak rates of the device at hand; None if unknown."""
    return device_of(jax.devices()[0].device_kind)


def on_gpu() -> bool:
    """Return whether the default device is a GPU."""
    return jax.default_backend() == "gpu"


def save(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    folder: pathlib.Path = RESULTS,
    *,
    show: bool = True,
    **more: Any,
) -> pathlib.Path:
    """Write rows with device, versions and command as JSON, print them if `show`, and return the file."""
    device = jax.devices()[0].device_kind
    record = {
        "device": device,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        **more,
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device.replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    if show:
        print_table(rows)
        print(f"\n{device}; written to {path}", flush=True)
    return path


def one_line(error: Exception) -> str:
    """Return an error as a cell of a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def versions() -> dict[str, str]:
    """Return the versions of installed packages that matter to a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as Markdown, columns in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
