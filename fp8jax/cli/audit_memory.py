"""Run `python -m fp8jax audit --memory`: where a device's bytes are, and what each option would
save.

Every option is compiled alone, beside the given configuration, and then all of them together:
savings do not add up, because the peak moves from one part of the step to another.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fp8jax import config as config_lib
from fp8jax.audit import program, targets
from fp8jax.cli.audit_tables import bytes_text, new_table
from fp8jax.config import Config, ConfigError
from fp8jax.monitor.progress import standard_output
from fp8jax.plan import make_plan
from fp8jax.training.step import TrainProgram

Changes = Mapping[str, Any]
# Fields and the values that save memory; later rows of one field save more.
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("optimizer.gradient_dtype", "bfloat16"),
    ("optimizer.master_dtype", "float16"),
    ("optimizer.first_moment", "fp8"),
    ("optimizer.second_moment", "float16"),
    ("optimizer.second_moment", "fp8"),
    ("training.loss_chunk", 8192),
    ("fp8.head", True),
    ("training.remat", "save_branches"),
    ("training.remat", "save_fp8"),
    ("training.remat", "offload_fp8"),
    ("training.remat", "full"),
)


def traced_step(config: Config, target: targets.Target) -> tuple[TrainProgram, Any]:
    """Trace a config's training step on a target."""
    step = TrainProgram(make_plan(config, target.devices))
    return step, step.jitted_step().trace(step.abstract_state, step.abstract_batch)


def memory_report(config: Config, target: targets.Target) -> dict[str, Any]:
    """Return where the bytes of a device are, and the peak with each option that is not set and
    that the model allows.

    Returns:
        `peak_bytes_per_device`, `arguments`, `largest` (arrays that the program writes: dtype,
        dims, bytes, times, where; not all of them are there at once), `options` (`changes`,
        `peak_bytes_per_device`, `saves`, `host_bytes_per_device`; the last row is all of them).
    """
    _say("the step as it is")
    _, traced = traced_step(config, target)
    compiled, text = targets.compile_step(traced, target)
    base = program.read_memory(compiled)
    rows = [
        _row(config, target, {path: value}, base.peak_bytes)
        for path, value in OPTIONS
        if _applies(config, path, value)
    ]
    together = {path: value for row in rows for path, value in row["changes"].items()}
    if len(rows) > 1:
        rows.append(_row(config, target, together, base.peak_bytes))
    return {
        "peak_bytes_per_device": base.peak_bytes,
        "arguments": dict(base.details),
        "temporaries": base.temporary_bytes,
        "largest": program.largest_arrays(text or compiled.as_text()),
        "options": rows,
    }


def show_memory(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report as three tables."""
    console, peak = (
        console or standard_output(width=150, highlight=False),
        found["peak_bytes_per_device"],
    )
    parts = new_table("Memory of one device", ("",), ("bytes", "of the peak"))
    for name, size in (
        found["arguments"] | {"temporaries": found["temporaries"], "peak": peak}
    ).items():
        parts.add_row(name, bytes_text(size), f"{size / peak:.1%}")
    largest = new_table(
        "Largest arrays that a step writes; not all are there at once",
        ("array", "where"),
        ("bytes", "written by"),
    )
    for row in found["largest"]:
        largest.add_row(
            f"{row['dtype']}[{', '.join(map(str, row['dims']))}]",
            row["where"] or "elsewhere",
            bytes_text(row["bytes"]),
            f"{row['writers']} instructions",
        )
    options = new_table(
        "What each option would save, alone; the last row: all of them",
        ("option",),
        ("peak", "saves", "of the peak", "on the host"),
    )
    for row in found["options"]:
        changes = " ".join(f"--config.{path}={value}" for path, value in row["changes"].items())
        saves = ("-" if row["saves"] < 0 else "") + bytes_text(abs(row["saves"]))
        options.add_row(
            changes,
            bytes_text(row["peak_bytes_per_device"]),
            saves,
            f"{row['saves'] / peak:.1%}",
            bytes_text(row["host_bytes_per_device"]),
        )
    for each in (parts, largest, options):
        console.print(each)


def _applies(config: Config, path: str, value: Any) -> bool:
    section, field = path.split(".")
    if getattr(getattr(config, section), field) == value:
        return False
    try:
        _with(config, {path: value})
    except ConfigError:
        return False
    return True


def _row(config: Config, target: targets.Target, changes: Changes, before: int) -> dict[str, Any]:
    _say(", ".join(f"{path}={value}" for path, value in changes.items()))
    _, traced = traced_step(_with(config, changes), target)
    found = program.read_memory(targets.compile_step(traced, target)[0])
    return {
        "changes": dict(changes),
        "peak_bytes_per_device": found.peak_bytes,
        "saves": before - found.peak_bytes,
        "host_bytes_per_device": found.host_bytes,
    }


def _with(config: Config, changes: Changes) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, field = path.split(".")
        sections.setdefault(section, {})[field] = value
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    config = dataclasses.replace(config, **changed)
    config_lib.check(config)
    return config


def _say(what: str) -> None:
    print(f"compiling {what} ...", file=sys.stderr, flush=True)
