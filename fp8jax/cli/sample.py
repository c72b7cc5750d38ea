"""Run `python -m fp8jax sample`, which continues a prompt with the model of a run."""

import argparse
import sys
from collections.abc import Sequence

from fp8jax.cli import checks
from fp8jax.cli.errors import Parser, local_path, run_command
from fp8jax.config import ConfigError
from fp8jax.interop import sampling
from fp8jax.monitor.stages import Stages


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    options = _parser().parse_args(argv)
    return run_command(lambda: _sample(options))


def _sample(options: argparse.Namespace) -> None:
    _check(options)
    stage = Stages(sys.stderr.isatty(), sys.stderr)  # standard output is the text
    with stage("loading JAX"):
        import jax

        from fp8jax.interop.generation import stream
        from fp8jax.interop.inference import Inference
        from fp8jax.training.evaluation import load_run
    # One device: generation reads all weights for every token, and sharded ones would travel each time.
    model, _ = load_run(options.workdir, options.step, jax.devices()[:1], stage=stage)
    pieces = stream(
        Inference(model),
        options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    shown = options.prompt
    try:
        for piece in pieces:
            print(_shown(shown + piece), end="", flush=True)
            shown = ""
    except KeyboardInterrupt:
        print()
        raise
    print()


def _check(options: argparse.Namespace) -> None:
    """Check the options that can be checked before JAX and the generation are loaded."""
    checks.run(options.workdir)
    checks.checkpoint(options.workdir, options.step)
    if options.tokens < 1:
        raise ConfigError(f"--tokens={options.tokens}: is below 1")
    if found := sampling.fault(options.temperature, options.top_p, options.seed):
        raise ConfigError(f"--{found.name}={found.value}: {found.reason}")


def _shown(text: str) -> str:
    """Return the text, on a terminal without control characters, which would act on it."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax sample",
        description="Continues a prompt with the model of a run, in BF16.",
        epilog="example: python -m fp8jax sample --workdir=runs/fp8_base-tiny --prompt='Anne "
        "Elliot' --temperature=0.8",
    )
    parser.add_argument("--workdir", type=local_path, required=True, help="directory of the run")
    parser.add_argument("--prompt", required=True, help="text to continue; '' begins a document")
    parser.add_argument(
        "--tokens", type=int, default=200, help="the most new tokens (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: always the likeliest token (default); 1: the model's own probabilities",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this total probability (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="equal seeds give equal texts (default: 0)"
    )
    parser.add_argument(
        "--step", type=int, default=None, help="checkpoint to use (default: the newest)"
    )
    return parser
