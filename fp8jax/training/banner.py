"""Report before a run's first step what will run, in what formats, and whether this device computes
it correctly.
"""

import dataclasses
import functools
import math
import os
import pathlib
import time
from typing import Any

import jax

import fp8jax
from fp8jax.audit import program as audit
from fp8jax.audit.roofline import device_of
from fp8jax.config import ConfigError
from fp8jax.data import pipeline
from fp8jax.monitor.stages import Stages
from fp8jax.numerics import recipes as recipes_lib
from fp8jax.numerics.attention.definition import SCORES, VALUES
from fp8jax.numerics.attention.self_check import self_check
from fp8jax.numerics.roles import BLOCK_ROLES
from fp8jax.parallel import mesh as mesh_lib
from fp8jax.plan import Plan
from fp8jax.training.fallbacks import fallbacks
from fp8jax.training.step import TrainProgram

UNROLLED = (
    4  # where layers would be looped over, more than these, each compiled by itself, give a warning
)


def introduce(program: TrainProgram, stage: Stages) -> list[str]:
    """Return lines on what will run, and on attention's agreement with its definition here;
    announce slow parts.
    """
    with stage("tracing the training step"):
        _traced(program)
    lines = describe(program)
    with stage("checking attention on this device"):
        return lines + check_attention(program.plan)


def describe(program: TrainProgram) -> list[str]:
    """Return lines on the run: model, FP8 share counted from the traced step, mesh, batch, data."""
    config, device = program.config, program.plan.device
    tokens = config.training.batch_size * config.data.sequence_length
    share = audit.fp8_share(_traced(program), BLOCK_ROLES)
    how = (
        f"emulated: {device.device_kind} has no FP8 units"
        if program.plan.emulated
        else f"native on {device.device_kind}"
    )
    model = program.definition.config
    lines = [
        f"model    {model.architecture}, {program.definition.parameter_count():,} parameters, "
        f"{model.layers} layers of width {model.width}",
        f"fp8      recipe {config.fp8.recipe}, {share:.0%} of the block's GEMM FLOPs in FP8, {how}",
        f"mesh     {mesh_lib.describe(program.mesh)}",
        f"batch    {tokens:,} tokens per step, {config.training.steps} steps",
    ]
    if not model.scan_layers and model.layers > UNROLLED and _would_loop(program.plan):
        lines.append(
            f"warning  config.model.scan_layers=False compiles each of the {model.layers} "
            f"layers by itself, which takes the longer "
            "the more there are; True compiles one"
        )
    own = (
        "; set config.data.source to train on your own" if config.data.source == "embedded" else ""
    )
    return lines + [f"data     {line}{own}" for line in pipeline.describe(config)]


def _would_loop(plan: Plan) -> bool:
    """Return whether layers would run in a loop if the config left that open."""
    model = dataclasses.replace(plan.config.model, scan_layers=None)
    config = dataclasses.replace(plan.config, model=model)
    return mesh_lib.loops_over_layers(config, list(plan.mesh.devices.flat))


def check_attention(plan: Plan) -> list[str]:
    """Compare the attention backend with `emulated` on the device at hand, before any step relies
    on it.

    Returns:
        Lines on the backend and its largest error; none if attention is not in FP8.

    Raises:
        ConfigError: the backend computes something different here.
    """
    by_backend: dict[str, list[Any]] = {}
    for layer, recipes in enumerate(plan.recipes.blocks):
        pair, pairs = (
            {role: recipes[role] for role in (SCORES, VALUES)},
            by_backend.setdefault(plan.recipes.backend_of(layer), []),
        )
        if pair not in pairs and any(recipe.fp8 for recipe in pair.values()):
            pairs.append(pair)
    return [_check_backend(plan, backend, pairs) for backend, pairs in by_backend.items() if pairs]


def _check_backend(plan: Plan, backend: str, pairs: list[Any]) -> str:
    """Return a line about one backend, for all recipes of the two roles that it computes."""
    line = f"         attention in FP8 by backend {backend}"
    if backend == "emulated":
        return line
    # Only `pallas` has kernels of their own for steps with statistics.
    kinds = (False, True) if backend == "pallas" and plan.config.monitor.every else (False,)
    try:
        errors = [
            max(
                self_check(
                    backend, pair, head_dim=plan.model.head_dim, statistics=statistics
                ).values()
            )
            for pair in pairs
            for statistics in kinds
        ]
    except ValueError as error:
        raise ConfigError(f"config.fp8.attention_backend: {error}") from None
    return f"{line}, within {max(errors):.1g} of the definition on this device"


def check_fallbacks(plan: Plan) -> None:
    """Raise ConfigError at the start if a fallback that a warning can ask for is impossible."""
    warning = plan.config.warning
    for overrides in fallbacks(warning, plan.recipes) or [recipes_lib.in_bf16(warning.fallback)]:
        plan.with_overrides(overrides)


def describe_compiled(program: TrainProgram) -> list[str]:
    """Return lines on the compiled step: memory of a device, and, if FP8 is native, GEMMs that lost
    it.
    """
    try:
        found = audit.read(program.compiled_step(), program.mesh)
    except audit.UnreadableError as error:
        return [f"memory   unknown: {error}"]
    memory = found.memory
    parts = [f"{name} {_mib(size)}" for name, size in memory.arguments.items() if size >= 2**20]
    parts.append(f"temporaries {_mib(memory.temporary_bytes)}")
    lines = [f"memory   {_mib(memory.peak_bytes)} a device: {', '.join(parts)}"]
    if program.plan.emulated:
        return lines
    lost = audit.fallbacks(_traced(program), found.gemms)
    return lines + [f"warning  not compiled to an FP8 GEMM: {line}" for line in lost]


_IMPORTED = time.monotonic()


def process_seconds() -> float:
    """Return the seconds since this process began, or, if unknown, since this module was imported."""
    try:
        ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED


def facts(program: TrainProgram) -> dict[str, Any]:
    """Return the content of WORKDIR/run.json, for the report; compile the step, if it is not
    compiled yet.
    """
    device, memory = program.plan.device, program.compiled_step().memory_analysis()
    model = program.definition.config
    return {
        "model": f"{model.architecture}, {model.layers} layers of width {model.width}",
        "parameters": program.definition.parameter_count(),
        "fp8_share": audit.fp8_share(_traced(program), BLOCK_ROLES),
        "gemms": "emulated" if program.plan.emulated else "native",
        "mesh": mesh_lib.describe(program.mesh),
        "devices": program.mesh.size,
        "device": device.device_kind,
        "memory_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "model_flops": program.plan.flops().total,
        "seconds_at_peak": seconds_at_peak(program),
        "versions": f"fp8jax {fp8jax.__version__}, jax {jax.__version__}",
    }


def seconds_at_peak(program: TrainProgram) -> float | None:
    """Return the time of a step's model FLOPs at all devices' BF16 peak, for the MFU; None if the
    peak is unknown.
    """
    device = device_of(program.plan.device.device_kind)
    return device and program.plan.flops().total / (device.bf16 * program.mesh.size)


@functools.lru_cache(maxsize=2)
def _traced(program: TrainProgram) -> list[audit.Gemm]:
    with jax.set_mesh(program.mesh):
        return audit.traced_gemms(
            program.jitted_step().trace(program.abstract_state, program.abstract_batch).jaxpr
        )


def _mib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20):,} MiB"
