"""Run the commands of fp8jax, `python -m fp8jax COMMAND`, training and evaluation among them."""

import importlib
import sys
from collections.abc import Sequence

from fp8jax.cli.errors import complain, with_underscores
from fp8jax.cli.words import version, warn_of_untested_jax
from fp8jax.config import did_you_mean

# Command → its purpose. Each is the module fp8jax.cli.COMMAND, whose main(argv) returns the exit
# code.
COMMANDS: dict[str, str] = {
    "train": "train a model, or continue a run; the same as train.py",
    "eval": "held-out loss or tasks of a run's checkpoint; the same as eval.py",
    "audit": "what a run will execute on devices that you need not have: FP8 share, memory, "
    "collectives",
    "convert": "Hugging Face model directories in and out, and logits to check a conversion with",
    "data": "data show: the text that a step of a run has seen, or will see",
    "probe": "what FP8 does to a run's gradients, where, and which roles do it",
    "prepare": "text files to token shards, for config.data.source; prepare inspect DIR shows them",
    "report": "a page, self-contained HTML, that shows one run or several side by side",
    "sample": "continue a prompt with the model of a run",
}
_MODULES = {"eval": "evaluate"}
_WITH_PROGRAM = ("train", "eval")  # their main takes the program's name first, as scripts do


def main(argv: Sequence[str]) -> int:
    """Run one command, and return the exit code."""
    warn_of_untested_jax()
    name, rest = (argv[0] if argv else "help"), list(argv[1:])
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print("usage: python -m fp8jax COMMAND ...\n\ncommands:")
        print("\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items()))
        print(
            "\npython -m fp8jax COMMAND --help says more, with an example; python -m fp8jax "
            "--version."
        )
        return 0
    if name in ("--version", "version"):
        print(version())
        return 0
    if name not in COMMANDS:
        nearest = did_you_mean(name, [*COMMANDS, "--help", "--version"])
        return complain(f"unknown command {name!r}{nearest or '; known: ' + ', '.join(COMMANDS)}")
    command = importlib.import_module(f"fp8jax.cli.{_MODULES.get(name, name)}")
    return command.main(
        [f"fp8jax {name}", *rest] if name in _WITH_PROGRAM else with_underscores(rest)
    )


def console() -> int:
    """Run the command that `fp8jax COMMAND ...` names; return the exit code."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
