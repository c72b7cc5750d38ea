"""What to do where no option fits: what each change of the config would save, and how many devices would do.

By closed formula (estimates.py); nothing is compiled.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from fp8jax.audit.limits import Limit
from fp8jax.config import Config, ConfigError
from fp8jax.models.definition import Definition
from fp8jax.training.estimates import Formula, state_bytes
from fp8jax.training.fit_options import OPEN, Plan, candidates, gigabytes
from fp8jax.training.step import TrainProgram

_SMALLER = {"master_dtype": "float16", "first_moment": "fp8", "second_moment": "float16"}


def nothing_fits(
    config: Config, definition: Definition, mesh: Mesh, limit: Limit, least: Plan
) -> str:
    """One line: the need, what each option would save, the number of devices that would do."""
    there = f"there are {gigabytes(limit.usable)} ({limit.source})"
    what = f"{least.option} needs {gigabytes(least.needs)} a device, and {there}"
    saved = savings(config, definition, mesh, least)
    advice = [
        f"{flag} saves {gigabytes(size)}" for flag, size in saved if size > 0.01 * least.needs
    ]
    count = devices_that_do(config, definition, mesh, limit, least)
    if count:
        advice.append(f"{count} such devices would do")
    return f"config.training: the run does not fit: {what}; {', '.join(advice) or 'use a smaller model'}"


def savings(
    config: Config, definition: Definition, mesh: Mesh, least: Plan
) -> list[tuple[str, float]]:
    """Flags and the bytes of a device that they save, by closed formula; the largest first."""
    before = state_bytes(TrainProgram(config, definition, mesh).abstract_state)
    rows = []
    for name, value in _SMALLER.items():
        if getattr(config.optimizer, name) == "float32":
            changed = _with(config, "optimizer", name, value)
            after = state_bytes(TrainProgram(changed, definition, mesh).abstract_state)
            rows.append((f"--config.optimizer.{name}={value}", before - after))
    formula = Formula(config, definition, mesh)
    now = formula.temporary_bytes(least.option)
    opened = dataclasses.replace(config, training=dataclasses.replace(config.training, **OPEN))
    options = candidates(opened, definition, mesh)
    for name in OPEN:
        others = [
            dataclasses.replace(least.option, **{name: getattr(option, name)}) for option in options
        ]
        best = min(others, key=formula.temporary_bytes)
        saved = now - formula.temporary_bytes(best)
        rows.append((f"--config.training.{name}={getattr(best, name)}", saved))
    length = max(config.data.sequence_length // 2, 1)
    shorter = Formula(_with(config, "data", "sequence_length", length), definition, mesh)
    saved = now - shorter.temporary_bytes(least.option)
    rows.append((f"--config.data.sequence_length={length}", saved))
    return sorted(rows, key=lambda row: -row[1])


def devices_that_do(
    config: Config, definition: Definition, mesh: Mesh, limit: Limit, least: Plan
) -> int | None:
    """The least multiple of the devices, a power of two, over which the sharded part would fit; None if no number would."""
    formula = Formula(config, definition, mesh)
    state = state_bytes(TrainProgram(config, definition, mesh).abstract_state)
    sharded = min(state + formula.fixed_bytes(), least.needs)
    rows = (
        config.training.batch_size
        // (mesh.shape["data"] * mesh.shape["fsdp"])
        // least.option.microbatches
    )
    for doublings in range(1, 11):
        times = 2**doublings
        activations = (least.needs - sharded) / min(times, rows)
        if (
            sharded / times + activations <= limit.usable
            and config.training.batch_size % (mesh.size * times) == 0
        ):
            return mesh.size * times
    return None


def out_of_memory(error: Exception, config: Config, step: int, saved: str) -> ConfigError:
    """The one line on which a run ends that runs out of memory all the same.

    Args:
        error: the device's.
        config: of the run.
        step: the last that got done.
        saved: what there is to continue from.
    """
    what = str(error).splitlines()[0][:160]
    more = 2 * max(config.training.microbatches, 1)
    when = f"after step {step}" if step else "before the first step"
    return ConfigError(
        f"out of memory {when} ({what}); {saved}; "
        f"--config.training.microbatches={more} needs less, if it divides the batch of a replica"
    )


def _with(config: Config, section: str, name: str, value: Any) -> Config:
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: changed})
