"""Advise if no option fits: what each change of the config would save, and how many devices would
be enough.

Closed formulas (estimates.py) give the figures; no program is compiled.
"""

import dataclasses
from typing import Any

from fp8jax.audit.limits import Limit
from fp8jax.config import Config, ConfigError
from fp8jax.plan import Plan
from fp8jax.training.estimates import Formula, state_bytes
from fp8jax.training.fit_options import OPEN, Compiled, candidates, gigabytes
from fp8jax.training.step import TrainProgram

_SMALLER = {"master_dtype": "float16", "first_moment": "fp8", "second_moment": "float16"}


def nothing_fits(plan: Plan, limit: Limit, least: Compiled) -> str:
    """Return one line: the need, what each option would save, and the number of devices that would
    be enough.
    """
    there = f"there are {gigabytes(limit.usable)} ({limit.source})"
    what = f"{least.option} needs {gigabytes(least.needs)} a device, and {there}"
    saved = savings(plan, least)
    advice = [
        f"{flag} saves {gigabytes(size)}" for flag, size in saved if size > 0.01 * least.needs
    ]
    count = devices_that_do(plan, limit, least)
    if count:
        advice.append(f"{count} such devices would do")
    return (
        f"config.training: the run does not fit: {what}; "
        f"{', '.join(advice) or 'use a smaller model'}"
    )


def savings(plan: Plan, least: Compiled) -> list[tuple[str, float]]:
    """Return flags and the bytes of a device that they save, by closed formula, the largest first."""
    config = plan.config
    before = state_bytes(TrainProgram(plan).abstract_state)
    rows = []
    for name, value in _SMALLER.items():
        if getattr(config.optimizer, name) == "float32":
            changed = _with(config, "optimizer", name, value)
            after = state_bytes(TrainProgram(plan.change(changed)).abstract_state)
            rows.append((f"--config.optimizer.{name}={value}", before - after))
    formula = Formula(plan)
    now = formula.temporary_bytes(least.option)
    opened = dataclasses.replace(config, training=dataclasses.replace(config.training, **OPEN))
    options = candidates(plan.change(opened))
    for name in OPEN:
        others = [
            dataclasses.replace(least.option, **{name: getattr(option, name)}) for option in options
        ]
        best = min(others, key=formula.temporary_bytes)
        saved = now - formula.temporary_bytes(best)
        rows.append((f"--config.training.{name}={getattr(best, name)}", saved))
    length = max(config.data.sequence_length // 2, 1)
    shorter = Formula(plan.change(_with(config, "data", "sequence_length", length)))
    saved = now - shorter.temporary_bytes(least.option)
    rows.append((f"--config.data.sequence_length={length}", saved))
    return sorted(rows, key=lambda row: -row[1])


def devices_that_do(plan: Plan, limit: Limit, least: Compiled) -> int | None:
    """Return the least multiple of the devices, a power of two, over which the sharded part would
    fit; None if none would.
    """
    formula = Formula(plan)
    state = state_bytes(TrainProgram(plan).abstract_state)
    sharded = min(state + formula.fixed_bytes(), least.needs)
    batch_size, devices = plan.config.training.batch_size, plan.mesh.size
    rows = batch_size // plan.replicas // least.option.microbatches
    for doublings in range(1, 11):
        times = 2**doublings
        activations = (least.needs - sharded) / min(times, rows)
        if sharded / times + activations <= limit.usable and batch_size % (devices * times) == 0:
            return devices * times
    return None


def out_of_memory(error: Exception, config: Config, step: int, saved: str) -> ConfigError:
    """Return the line with which a run ends that runs out of memory nevertheless.

    Args:
        error: the device's error.
        config: the run's configuration.
        step: the last finished step.
        saved: text on what there is to continue from.
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
