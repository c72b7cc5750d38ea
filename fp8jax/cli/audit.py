"""`python -m fp8jax audit`: what a run's training step becomes on devices that need not be there.

Compiles the step that train.py runs, for the target's mesh, and reads the optimized program. Nothing is allocated or run.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax

from fp8jax import config as config_lib
from fp8jax import hardware
from fp8jax.audit import program, targets
from fp8jax.audit.limits import set_memory_fraction
from fp8jax.audit.report import Step, report
from fp8jax.audit.roofline import DEVICES
from fp8jax.cli import audit_tables
from fp8jax.cli.audit_fit import fit_json, show_fit
from fp8jax.cli.audit_memory import memory_report, show_memory
from fp8jax.cli.audit_rehearsal import rehearsal_json, show_rehearsal
from fp8jax.cli.errors import complain
from fp8jax.cli.flags import read_config
from fp8jax.config import Config, ConfigError
from fp8jax.models.flops import model_flops
from fp8jax.numerics.recipes import ATTENTION_ROLES, ROLES
from fp8jax.training.fit_target import TargetFit, fit_target
from fp8jax.training.rehearsal import rehearse

WOULD_FAIL = 1
BLOCK_ROLES = [role for role in ROLES if role != "lm_head"]


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        options, overrides = _options(argv)
        if options.target == "local":
            set_memory_fraction()
        else:
            jax.config.update("jax_platforms", "cpu")
        target = targets.resolve(options.target)
        _choose_size(options, target)
        with _nothing_kept(target):
            return _audit_target(options, overrides, target)
    except (ValueError, OSError) as error:  # ConfigError and TargetError are ValueErrors
        return complain(str(error))


def _audit_target(options: argparse.Namespace, overrides: dict[str, list[str]], target: targets.Target) -> int:
    for chosen, command in ((options.memory, _memory), (options.fit, _fit), (options.rehearse, _rehearse)):
        if chosen:
            return command(options, overrides["config"], target)
    found = [_audit_file(flag, getattr(options, flag), overrides[flag], target)
             for flag in ("config", "compare") if getattr(options, flag)]
    audit_tables.show(found)
    _write(options, found[0] if len(found) == 1 else found[0] | {"compare": found[1]})
    return 0


@contextlib.contextmanager
def _nothing_kept(target: targets.Target) -> Iterator[None]:
    """Without JAX's compilation cache, out of which programs for devices that are not here cannot be read again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", before and target.kind == "local")
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def audit(config: Config, target: targets.Target) -> dict[str, Any]:
    """The audit of a config's training step on a target, as audit/report.py describes it.

    What the config leaves open (microbatches, loss chunk, rematerialisation) is chosen as a run would choose it there.

    Raises:
        ConfigError: the mesh does not fit the target or the model; or no option compiles at all.
    """
    found = fit_target(config, target, _say)
    if found.compiled is None:
        raise ConfigError(found.advice)
    return _report(found, target)


def _report(found: TargetFit, target: targets.Target) -> dict[str, Any]:
    compiled, config = found.compiled, found.config
    step, traced, mesh = compiled.step, compiled.traced, compiled.step.mesh
    sequences, length = config.training.batch_size, config.data.sequence_length
    flops = model_flops(step.definition.config, step.definition.vocab_size, sequences=sequences, sequence_length=length)
    asked = program.traced_gemms(traced.jaxpr)
    told = Step(mesh, asked, BLOCK_ROLES, ATTENTION_ROLES, dataclasses.asdict(flops), sequences * length, step.emulated)
    reading = program.read(compiled.executable, mesh, compiled.text)
    if target.platform == "cpu":  # whose compiler drops the names of batched dots, and has no FP8 kernels to tell apart
        reading = dataclasses.replace(reading, gemms=[dataclasses.replace(gemm, flops=gemm.flops // mesh.size) for gemm in asked])
    fits = None if found.limit is None else found.choice.fits
    read = report(told, target, reading, compiled.seconds, found.limit)
    return {"config": config_lib.to_dict(config)} | read | {"fits": fits, "fit": fit_json(found)}


def _memory(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    if options.compare:
        raise ValueError("--memory compares options of one configuration; leave out --compare")
    config = config_lib.from_dict(read_config("config", options.config, overrides))
    found = memory_report(fit_target(config, target).config, target)
    show_memory(found)
    _write(options, {"config": options.config, "overrides": list(overrides), "target": options.target} | found)
    return 0


def _fit(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    if options.compare:
        raise ValueError("--fit shows the options of one configuration; leave out --compare")
    config = config_lib.from_dict(read_config("config", options.config, overrides))
    found = fit_target(config, target, _say)
    show_fit(found)
    named = {"config": options.config, "overrides": list(overrides), "target": options.target}
    _write(options, named | {"fits": found.choice.fits, "fit": fit_json(found)})
    return 0


def _rehearse(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    if options.compare:
        raise ValueError("--rehearse rehearses one run; leave out --compare")
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


def _audit_file(flag: str, file: str, overrides: Sequence[str], target: targets.Target) -> dict[str, Any]:
    config = config_lib.from_dict(read_config(flag, file, overrides))
    count = len(target.devices)
    print(f"compiling {file} for {target.name} ({count} device{'s' if count > 1 else ''}) ...", file=sys.stderr)
    found = audit(config, target)
    return {"config": {"file": file, "overrides": list(overrides), "resolved": found.pop("config")}, **found}


def _choose_size(options: argparse.Namespace, target: targets.Target) -> None:
    """A configuration without a size takes the one for the target's devices, not for those at hand."""
    hardware.planned = None
    if target.kind in DEVICES:
        device = DEVICES[target.kind]
        hardware.planned = hardware.Accelerator(device.name, device.capacity / 1e9, device.fp8 > device.bf16)
    for file in (options.config, options.compare):
        if file and ":" not in file:
            size, why = hardware.default_size()
            print(f"{file}: size {size} where the file takes one ({why}); {file}:SIZE is another", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python -m fp8jax audit --help shows an example")


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Options, and the overrides of each config."""
    parser = _Parser(
        prog="python -m fp8jax audit", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compiles a run's training step for devices that need not be there, and tells which GEMMs are FP8, what memory it\n"
                    "takes, which collectives it runs, and a roofline estimate of its speed. Nothing is run.",
        epilog="examples:\n  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:64x8 --json=audit.json\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:390m --target=h100:1 --fit\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8 --rehearse\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8 --memory\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:1p5b --compare=configs/llama3.py:1p5b --target=h100:8")
    parser.add_argument("--config", required=True, metavar="FILE:SIZE", help="configuration; --config.section.field=value changes a field")
    parser.add_argument("--target", required=True, help=f"devices: {', '.join(targets.FORMS)}")
    parser.add_argument("--compare", metavar="FILE:SIZE", help="a second configuration, shown beside the first; --compare.section.field=value")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--memory", action="store_true", help="instead: where a device's bytes are, and what each option would save")
    instead.add_argument("--fit", action="store_true", help="instead: what a run would choose so that it fits, and from which options")
    instead.add_argument("--rehearse", action="store_true", help="instead: trace and compile every program of the run, read its first batches, "
                         "check what its start checks; exit code 1 if anything would fail")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything found as JSON")
    options, rest = parser.parse_known_args(list(argv))
    overrides = {flag: [word for word in rest if word.startswith(f"--{flag}.")] for flag in ("config", "compare")}
    unknown = [word for word in rest if not any(word in words for words in overrides.values())]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; fields are set as --config.section.field=value")
    return options, overrides
