"""Do the work of `python -m fp8jax audit` after audit.py has checked its arguments.

The step that train.py runs is compiled for the target's mesh, and the optimized program is read.
Nothing is allocated or run.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from fp8jax import config as config_lib
from fp8jax import hardware
from fp8jax.audit import program, targets
from fp8jax.audit.report import Step, report
from fp8jax.audit.roofline import DEVICES
from fp8jax.cli import audit_tables
from fp8jax.cli.audit_fit import fit_json, show_fit
from fp8jax.cli.audit_memory import memory_report, show_memory
from fp8jax.cli.audit_rehearsal import rehearsal_json, show_rehearsal
from fp8jax.cli.config_files import read_config
from fp8jax.config import Config, ConfigError
from fp8jax.exit_codes import WOULD_FAIL
from fp8jax.numerics.roles import ATTENTION_ROLES, BLOCK_ROLES
from fp8jax.training.fit_target import CompiledStep, TargetFit, fit_target
from fp8jax.training.rehearsal import rehearse


def run(
    options: argparse.Namespace, overrides: dict[str, list[str]], target: targets.Target
) -> int:
    """Audit what the options, which audit.py has checked, ask for, and return the exit code."""
    _choose_size(options, target)
    with _nothing_kept(target):
        return _audit_target(options, overrides, target)


def _audit_target(
    options: argparse.Namespace, overrides: dict[str, list[str]], target: targets.Target
) -> int:
    for chosen, command in (
        (options.memory, _memory),
        (options.fit, _fit),
        (options.rehearse, _rehearse),
    ):
        if chosen:
            return command(options, overrides["config"], target)
    found = [
        _audit_file(flag, getattr(options, flag), overrides[flag], target)
        for flag in ("config", "compare")
        if getattr(options, flag)
    ]
    audit_tables.show(found)
    _write(options, found[0] if len(found) == 1 else found[0] | {"compare": found[1]})
    return 0


@contextlib.contextmanager
def _nothing_kept(target: targets.Target) -> Iterator[None]:
    """Switch JAX's compilation cache off, because programs for absent devices cannot be read from
    it.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", before and target.kind == "local")
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def audit(config: Config, target: targets.Target) -> dict[str, Any]:
    """Return the audit of a config's training step on a target, as audit/report.py describes it.

    What the config leaves open (microbatches, loss chunk, rematerialisation) is chosen as a run
    would choose it there.

    Raises:
        ConfigError: the mesh does not fit the target or the model, or no option compiles.
    """
    found = fit_target(config, target, _say)
    if found.compiled is None:
        raise ConfigError(found.advice)
    return _report(found, found.compiled, target)


def _report(found: TargetFit, compiled: CompiledStep, target: targets.Target) -> dict[str, Any]:
    config = found.plan.config
    step, traced, mesh = compiled.step, compiled.traced, compiled.step.mesh
    sequences, length = config.training.batch_size, config.data.sequence_length
    flops = step.plan.flops()
    asked = program.traced_gemms(traced.jaxpr)
    told = Step(
        mesh,
        asked,
        BLOCK_ROLES,
        ATTENTION_ROLES,
        dataclasses.asdict(flops),
        sequences * length,
        step.plan.emulated,
    )
    reading = program.read(compiled.executable, mesh, compiled.text)
    if (
        target.platform == "cpu"
    ):  # its compiler drops the names of batched dots, and has no FP8 kernels to distinguish
        reading = dataclasses.replace(
            reading,
            gemms=[dataclasses.replace(gemm, flops=gemm.flops // mesh.size) for gemm in asked],
        )
    fits = None if found.limit is None else found.choice.fits
    read = report(told, target, reading, compiled.seconds, found.limit)
    return {"config": config_lib.to_dict(config)} | read | {"fits": fits, "fit": fit_json(found)}


def _memory(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    config = config_lib.from_dict(read_config("config", options.config, overrides))
    found = memory_report(fit_target(config, target).plan.config, target)
    show_memory(found)
    _write(
        options,
        {"config": options.config, "overrides": list(overrides), "target": options.target} | found,
    )
    return 0


def _fit(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    config = config_lib.from_dict(read_config("config", options.config, overrides))
    found = fit_target(config, target, _say)
    show_fit(found)
    named = {"config": options.config, "overrides": list(overrides), "target": options.target}
    _write(options, named | {"fits": found.choice.fits, "fit": fit_json(found)})
    return 0


def _rehearse(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    config = config_lib.from_dict(read_config("config", options.config, overrides))
    found = rehearse(config, target, say=_say)
    show_rehearsal(found)
    named = {"config": options.config, "overrides": list(overrides), "target": options.target}
    _write(options, named | rehearsal_json(found))
    return 0 if found.ok else WOULD_FAIL


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {options.json}")


def _audit_file(
    flag: str, file: str, overrides: Sequence[str], target: targets.Target
) -> dict[str, Any]:
    config = config_lib.from_dict(read_config(flag, file, overrides))
    count = len(target.devices)
    print(
        f"compiling {file} for {target.name} ({count} device{'s' if count > 1 else ''}) ...",
        file=sys.stderr,
    )
    found = audit(config, target)
    return {
        "config": {"file": file, "overrides": list(overrides), "resolved": found.pop("config")},
        **found,
    }


def _choose_size(options: argparse.Namespace, target: targets.Target) -> None:
    """Give a configuration without a size the one for the target's devices, not for those at hand."""
    hardware.planned = None
    if target.kind in DEVICES:
        device = DEVICES[target.kind]
        hardware.planned = hardware.Accelerator(
            device.name, device.capacity / 1e9, device.fp8 > device.bf16
        )
    for file in (options.config, options.compare):
        if file and ":" not in file:
            size, why = hardware.default_size()
            print(
                f"{file}: size {size} where the file takes one ({why}); {file}:SIZE is another",
                file=sys.stderr,
            )
