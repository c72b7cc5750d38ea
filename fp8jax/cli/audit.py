"""`python -m fp8jax audit`: what a run's training step becomes on devices that need not be there.

Compiles the step that train.py runs, for the target's mesh, and reads the optimized program. Nothing is allocated or run.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from fp8jax import config as config_lib
from fp8jax.audit import program, targets
from fp8jax.audit.report import Step, report
from fp8jax.cli import audit_tables
from fp8jax.cli.audit_memory import memory_report, show_memory, traced_step
from fp8jax.cli.errors import complain
from fp8jax.cli.flags import read_config
from fp8jax.config import Config
from fp8jax.models.flops import model_flops
from fp8jax.numerics.recipes import ATTENTION_ROLES, ROLES

BLOCK_ROLES = [role for role in ROLES if role != "lm_head"]


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        options, overrides = _options(argv)
        if options.target != "local":
            jax.config.update("jax_platforms", "cpu")
        target = targets.resolve(options.target)
        if options.memory:
            return _memory(options, overrides["config"], target)
        found = [_audit_file(flag, getattr(options, flag), overrides[flag], target)
                 for flag in ("config", "compare") if getattr(options, flag)]
        audit_tables.show(found)
        if options.json:
            options.json.write_text(json.dumps(found[0] if len(found) == 1 else found[0] | {"compare": found[1]}, indent=1) + "\n")
            print(f"written to {options.json}")
    except (ValueError, OSError) as error:  # ConfigError and TargetError are ValueErrors
        return complain(str(error))
    return 0


def audit(config: Config, target: targets.Target) -> dict[str, Any]:
    """The audit of a config's training step on a target, as audit/report.py describes it.

    Raises:
        ConfigError: the mesh does not fit the target or the model.
    """
    started = time.perf_counter()
    step, traced = traced_step(config, target)
    mesh, vocab_size = step.mesh, step.definition.vocab_size
    compiled, text = targets.compile_step(traced, target)
    seconds = time.perf_counter() - started
    sequences, length = config.training.batch_size, config.data.sequence_length
    flops = model_flops(step.definition.config, vocab_size, sequences=sequences, sequence_length=length)
    asked = program.traced_gemms(traced.jaxpr)
    told = Step(mesh, asked, BLOCK_ROLES, ATTENTION_ROLES, dataclasses.asdict(flops), sequences * length, step.emulated)
    reading = program.read(compiled, mesh, text)
    if target.platform == "cpu":  # whose compiler drops the names of batched dots, and has no FP8 kernels to tell apart
        reading = dataclasses.replace(reading, gemms=[dataclasses.replace(gemm, flops=gemm.flops // mesh.size) for gemm in asked])
    return {"config": config_lib.to_dict(config)} | report(told, target, reading, seconds)


def _memory(options: argparse.Namespace, overrides: Sequence[str], target: targets.Target) -> int:
    if options.compare:
        raise ValueError("--memory compares options of one configuration; leave out --compare")
    found = memory_report(config_lib.from_dict(read_config("config", options.config, overrides)), target)
    show_memory(found)
    if options.json:
        options.json.write_text(json.dumps({"config": options.config, "overrides": list(overrides), "target": options.target} | found,
                                           indent=1) + "\n")
        print(f"written to {options.json}")
    return 0


def _audit_file(flag: str, file: str, overrides: Sequence[str], target: targets.Target) -> dict[str, Any]:
    config = config_lib.from_dict(read_config(flag, file, overrides))
    count = len(target.devices)
    print(f"compiling {file} for {target.name} ({count} device{'s' if count > 1 else ''}) ...", file=sys.stderr)
    found = audit(config, target)
    return {"config": {"file": file, "overrides": list(overrides), "resolved": found.pop("config")}, **found}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python -m fp8jax audit --help shows an example")


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Options, and the overrides of each config."""
    parser = _Parser(
        prog="python -m fp8jax audit", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compiles a run's training step for devices that need not be there, and tells which GEMMs are FP8, what memory it\n"
                    "takes, which collectives it runs, and a roofline estimate of its speed. Nothing is run.",
        epilog="examples:\n  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8 --config.training.microbatches=16\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:64x8 --json=audit.json\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8 --config.training.microbatches=64 --memory\n"
               "  python -m fp8jax audit --config=configs/fp8_base.py:1p5b --compare=configs/llama3.py:1p5b --target=h100:8")
    parser.add_argument("--config", required=True, metavar="FILE:SIZE", help="configuration; --config.section.field=value changes a field")
    parser.add_argument("--target", required=True, help=f"devices: {', '.join(targets.FORMS)}")
    parser.add_argument("--compare", metavar="FILE:SIZE", help="a second configuration, shown beside the first; --compare.section.field=value")
    parser.add_argument("--memory", action="store_true", help="instead: where a device's bytes are, and what each option would save")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything found as JSON")
    options, rest = parser.parse_known_args(list(argv))
    overrides = {flag: [word for word in rest if word.startswith(f"--{flag}.")] for flag in ("config", "compare")}
    unknown = [word for word in rest if not any(word in words for words in overrides.values())]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; fields are set as --config.section.field=value")
    return options, overrides
