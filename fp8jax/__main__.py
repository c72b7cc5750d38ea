"""`python -m fp8jax COMMAND`: everything beside training and evaluation."""

import importlib
import sys
from collections.abc import Sequence

from fp8jax.cli.errors import complain

# Command → what it does. Each is the module fp8jax.cli.COMMAND, whose main(argv) returns the exit code.
COMMANDS: dict[str, str] = {
    "audit": "what a run will execute on devices that you need not have: FP8 share, memory, collectives",
    "convert": "Hugging Face model directories in and out, and logits to check a conversion with",
    "data": "data show: the text that a step of a run has seen, or will see",
    "prepare": "text files to token shards, for config.data.source; prepare inspect DIR shows them",
    "report": "a page, self-contained HTML, that shows one run or several side by side",
    "sample": "continue a prompt with the model of a run",
}


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m fp8jax COMMAND ...\n\ncommands:")
        print("\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items()))
        print("\npython -m fp8jax COMMAND --help tells more, with an example. To train and evaluate: train.py, eval.py.")
        return 0
    if name not in COMMANDS:
        return complain(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    return importlib.import_module(f"fp8jax.cli.{name}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
