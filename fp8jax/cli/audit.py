"""Run `python -m fp8jax audit`: what a run's training step becomes on devices that need not be
there.

JAX is loaded once everything that can be checked without it has been; the work is in audit_step.py.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from fp8jax import config as config_lib
from fp8jax.audit import target_names
from fp8jax.cli import checks, words
from fp8jax.cli.config_files import find_config, read_config
from fp8jax.cli.errors import Parser, local_path, run_command
from fp8jax.cli.flags import split
from fp8jax.config import ConfigError

if TYPE_CHECKING:
    from fp8jax.audit.targets import Target

_INSTEAD = ("memory", "fit", "rehearse")  # these take one configuration


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    return run_command(lambda: _audit(argv))


def _audit(argv: Sequence[str]) -> int:
    options, overrides = _options(argv)
    _check(options, overrides)
    target = _target(options.target)
    from fp8jax.cli import audit_step

    return audit_step.run(options, overrides, target)


def _check(options: argparse.Namespace, overrides: dict[str, list[str]]) -> None:
    kind = options.target.partition(":")[0]
    if kind not in target_names.KINDS:
        nearest = words.closest(kind, target_names.KINDS)
        meant = f"did you mean {nearest!r}? F" if nearest else "f"
        raise ConfigError(
            f"--target={options.target}: unknown; {meant}or example {', '.join(target_names.FORMS)}"
        )
    if options.json:
        checks.new_file("--json", options.json)
    chosen = [name for name in _INSTEAD if getattr(options, name)]
    if chosen and options.compare:
        raise ConfigError(f"--{chosen[0]} is of one configuration; leave out --compare")
    for flag in ("config", "compare"):
        if file := getattr(options, flag):
            _, size = find_config(flag, file)
            read = read_config(flag, file, overrides[flag])
            if size:  # without one, the target's devices decide, which only JAX knows
                config_lib.from_dict(read)
    if overrides["compare"] and not options.compare:
        raise ConfigError(f"{overrides['compare'][0]}: needs --compare=FILE:SIZE")


def _target(name: str) -> "Target":
    import jax

    from fp8jax.audit import targets
    from fp8jax.audit.limits import set_memory_fraction

    if name.partition(":")[0] == "local":
        set_memory_fraction()
    else:
        jax.config.update("jax_platforms", "cpu")
    return targets.resolve(name)


class _Parser(Parser):
    fields = True

    def error(self, message: str) -> NoReturn:
        raise ValueError(self.explain(message))


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Return the options, and the overrides of each config."""
    parser = _Parser(
        prog="python -m fp8jax audit",
        description="Compiles a run's training step for devices that need not be there, and "
        "reports which GEMMs are FP8, what memory it\n"
        "takes, which collectives it runs, and a roofline estimate of its speed. Nothing is run.",
        epilog="examples:\n  python -m fp8jax audit --config=configs/fp8_base.py:8b "
        "--target=h100:8\n"
        "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:64x8 "
        "--json=audit.json\n"
        "  python -m fp8jax audit --config=configs/fp8_base.py:390m --target=h100:1 --fit\n"
        "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8 --rehearse\n"
        "  python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8 --memory\n"
        "  python -m fp8jax audit --config=configs/fp8_base.py:1p5b "
        "--compare=configs/llama3.py:1p5b --target=h100:8",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE:SIZE",
        help="configuration; --config.section.field=value changes a field",
    )
    parser.add_argument("--target", required=True, help=f"devices: {', '.join(target_names.FORMS)}")
    parser.add_argument(
        "--compare",
        metavar="FILE:SIZE",
        help="a second configuration, shown beside the first; --compare.section.field=value",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--memory",
        action="store_true",
        help="instead: where a device's bytes are, and what each option would save",
    )
    instead.add_argument(
        "--fit",
        action="store_true",
        help="instead: what a run would choose so that it fits, and from which options",
    )
    instead.add_argument(
        "--rehearse",
        action="store_true",
        help="instead: trace and compile every program of the run, read its first batches, "
        "check what its start checks; exit code 1 if anything would fail",
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="write everything found as JSON"
    )
    overrides, rest = {}, list(argv)
    for flag in ("config", "compare"):
        overrides[flag], rest = split(flag, rest)
    return parser.parse_args(rest), overrides
