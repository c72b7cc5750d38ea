"""Run `python -m fp8jax probe`: what FP8 does to a run's gradients, where, and which roles do it."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8jax import config as config_lib
from fp8jax import files
from fp8jax.cli import checks
from fp8jax.cli.config_files import find_config, read_config
from fp8jax.cli.errors import Parser, local_path, run_command
from fp8jax.cli.flags import split
from fp8jax.config import Config, ConfigError
from fp8jax.monitor.stages import Stages

if TYPE_CHECKING:
    from fp8jax.training.probing import Subject

_MOST_BATCHES = 1000


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    changes, rest = split("config", list(argv))
    options = _parser().parse_args(rest)
    return run_command(lambda: _probe(options, changes))


def _probe(options: argparse.Namespace, changes: Sequence[str]) -> None:
    config = _check(options, changes)
    stage = Stages(True, sys.stderr)  # standard output is the result
    with stage("loading JAX"):
        from fp8jax.training import probing
    subject = _subject(options, config, stage)
    question = probing.Question(options.batches, options.against, options.by)
    found = probing.examine(subject, question, stage)
    _show(found)
    if options.json:
        text = json.dumps(files.strict(found), indent=2, allow_nan=False)
        options.json.write_text(text + "\n")


def _subject(options: argparse.Namespace, config: Config | None, stage: Stages) -> "Subject":
    from fp8jax.training import probing

    if config is None:
        return probing.subject_of_run(options.workdir, options.step, stage)
    return probing.subject_of_config(config, stage)


def _check(options: argparse.Namespace, changes: Sequence[str]) -> Config | None:
    """Check what can be checked before JAX is loaded; return the configuration, None for a run's
    directory.
    """
    if not 1 <= options.batches <= _MOST_BATCHES:
        raise ConfigError(f"--batches={options.batches}: is not from 1 to {_MOST_BATCHES}")
    if options.json:
        checks.new_file("--json", options.json)
    if bool(options.workdir) == bool(options.config):
        raise ConfigError("give the WORKDIR of a run, or --config=FILE:SIZE for its initial state")
    if options.workdir:
        if changes:
            raise ConfigError(f"{changes[0]}: needs --config=FILE:SIZE; a run has its own config")
        checks.run(options.workdir, "WORKDIR")
        checks.checkpoint(options.workdir, options.step)
        return None
    if options.step is not None:
        raise ConfigError(f"--step={options.step}: needs the WORKDIR of a run")
    if not find_config("config", options.config)[1]:
        raise ConfigError(
            f"--config={options.config}: has no size; for example {options.config}:tiny"
        )
    return config_lib.from_dict(read_config("config", options.config, changes))


def _show(found: dict[str, Any]) -> None:
    """Print the tables, the verdict, and the line to paste."""
    from fp8jax.monitor.progress import standard_output

    console = standard_output(width=150, highlight=False)
    console.print(_places(found))
    if found["groups"]:
        console.print(_tests(found))
    console.print(
        f"step {found['step']}: error {found['error']:.3f} ({found['worst']:.3f} in the worst "
        f"place)  cosine {found['cosine']:.4f}  "
        f"ratio of norms {found['norm_ratio']:.3f}"
    )
    if found["batch_noise"] is not None:
        console.print(
            f"batch noise {found['batch_noise']:.3f} of the gradient; FP8's error is "
            f"{found['error_over_batch_noise']:.3f} of it"
        )
    console.print(found["verdict"])
    if found["config"]:
        console.print(found["config"], soft_wrap=True)


def _places(found: dict[str, Any]) -> Any:
    from fp8jax.cli.audit_tables import new_table

    matrices = found["matrices"]
    table = new_table(
        f"Error of the gradients against {found['against']}", ("layer",), (*matrices, "share")
    )
    for layer in range(len(next(iter(matrices.values()))["error"])):
        errors = [f"{matrix['error'][layer]:.3f}" for matrix in matrices.values()]
        share = sum(matrix["share"][layer] for matrix in matrices.values())
        table.add_row(str(layer), *errors, f"{share:.1%}")
    return table


def _tests(found: dict[str, Any]) -> Any:
    from fp8jax.cli.audit_tables import new_table

    table = new_table("Error without a group in FP8", ("group", "roles"), ("error", "worst place"))
    for name, test in found["groups"].items():
        table.add_row(name, ", ".join(test["roles"]), *_errors(test))
    if found["current"] is not None:
        table.add_row("with current scaling", "", *_errors(found["current"]))
    return table


def _errors(test: dict[str, Any]) -> tuple[str, str]:
    return f"{test['error']:.3f}", f"{test['worst']:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax probe",
        description="Measures what FP8 does to a run's gradients: on the same state and batches "
        "in the run's recipe and in a\n"
        "reference, by matrix and layer; then which roles must leave FP8 for the error to go. "
        "Changes nothing.",
        epilog="examples:\n  python -m fp8jax probe runs/fp8_base-tiny\n"
        "  python -m fp8jax probe runs/fp8_base-tiny --step=400 --batches=4 --by=role "
        "--json=probe.json\n"
        "  python -m fp8jax probe --config=configs/llama3.py:tiny",
    )
    parser.fields = True
    parser.add_argument(
        "workdir", nargs="?", type=local_path, metavar="WORKDIR", help="directory of a run"
    )
    parser.add_argument(
        "--config",
        metavar="FILE:SIZE",
        help="instead: a configuration's initial state; --config.section.field=value changes a field",
    )
    parser.add_argument("--step", type=int, help="checkpoint to probe (default: the newest)")
    parser.add_argument(
        "--batches",
        type=int,
        default=1,
        help="the run's next batches to measure on; two or more also give the noise of batches "
        "(default: 1)",
    )
    parser.add_argument(
        "--by",
        choices=("group", "role"),
        default="group",
        help="what leaves FP8 together in the tests (default: group)",
    )
    parser.add_argument(
        "--against",
        choices=("bf16", "float32"),
        default="bf16",
        help="the reference; float32 where BF16 itself may be off (default: bf16)",
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="write everything found as JSON"
    )
    return parser
