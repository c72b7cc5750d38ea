"""Run `python -m fp8jax convert`: Hugging Face directories in and out, and logits to check a
conversion with.

JAX is loaded once everything that can be checked without it has been; the work is in converting.py.
"""

import argparse
import re
from collections.abc import Sequence

from fp8jax.cli import checks
from fp8jax.cli.errors import Parser, local_path, run_command
from fp8jax.config import ConfigError
from fp8jax.monitor.stages import Stages

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    options = _parser().parse_args(argv)
    return run_command(lambda: _convert(options))


def _convert(options: argparse.Namespace) -> None:
    options.check(options)
    with Stages()("loading JAX"):
        from fp8jax.cli import converting
    getattr(converting, options.run)(options)


def _check_from_hf(options: argparse.Namespace) -> None:
    checks.empty_directory("--out", options.out)
    if not options.directory.is_dir():
        raise ConfigError(f"{options.directory}: no such directory; nothing is downloaded")


def _check_to_hf(options: argparse.Namespace) -> None:
    checks.empty_directory("--out", options.out)
    checks.run(options.workdir)
    checks.checkpoint(options.workdir, options.step)


def _check_logits(options: argparse.Namespace) -> None:
    checks.new_file("--out", options.out)
    if not options.tokens.is_file():
        raise ConfigError(
            f"--tokens={options.tokens}: no such file; give a .npy file of integers [batch, length]"
        )
    if not (options.directory / "config.json").is_file():
        raise ConfigError(
            f"{options.directory}: no config.json there; give a model directory, or the "
            f"directory of a run"
        )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def _add_ignore_keys(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ignore_keys",
        type=lambda text: text.split(","),
        default=[],
        metavar="KEY,...",
        help="keys of config.json that are not understood and change no number",
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax convert",
        description="Hugging Face model directories (llama, mistral, qwen3, olmo2, olmo3, "
        "apertus, fog; safetensors only) in and out.",
        epilog="example: python -m fp8jax convert from-hf Llama-3.2-1B --out runs/llama && "
        "python eval.py --workdir=runs/llama",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _add_from_hf(commands)
    _add_to_hf(commands)
    _add_logits(commands)
    return parser


def _add_from_hf(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "from-hf",
        help="make a run's directory, to continue with train.py, of a model directory",
        epilog="example: python -m fp8jax convert from-hf Llama-3.2-1B --out runs/llama",
    )
    command.add_argument("directory", type=local_path, help="with config.json and *.safetensors")
    command.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="directory of the new run; must not exist, or be empty",
    )
    _add_ignore_keys(command)
    command.set_defaults(check=_check_from_hf, run="from_hf")


def _add_to_hf(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "to-hf",
        help="make a model directory that transformers loads, of a run's checkpoint",
        epilog="example: python -m fp8jax convert to-hf --workdir runs/llama --out exported "
        "--dtype bfloat16",
    )
    command.add_argument("--workdir", type=local_path, required=True, help="directory of the run")
    command.add_argument(
        "--out", type=local_path, required=True, help="model directory; must not exist, or be empty"
    )
    command.add_argument(
        "--step", type=int, default=None, help="checkpoint to convert (default: the newest)"
    )
    command.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of the tensors (default: float32, as the run has them)",
    )
    command.add_argument(
        "--max_shard_size",
        type=_bytes,
        default="5GB",
        help="largest safetensors file (default: 5GB)",
    )
    command.set_defaults(check=_check_to_hf, run="to_hf")


def _add_logits(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "logits",
        help="float32 logits, loss and gradients of a model directory or a run, to compare with "
        "another implementation's",
        epilog="example: python -m fp8jax convert logits runs/llama --tokens ids.npy --out "
        "found.npz --gradients",
    )
    command.add_argument(
        "directory",
        type=local_path,
        help="model directory, or directory of a run (its newest checkpoint)",
    )
    command.add_argument(
        "--tokens",
        type=local_path,
        required=True,
        help=".npy file: token ids, integers [batch, length]",
    )
    command.add_argument(
        "--out",
        type=local_path,
        required=True,
        help=".npz file: logits [batch, length, vocab], loss, gradients",
    )
    command.add_argument(
        "--gradients",
        action="store_true",
        help="also d loss / d tensor, under each tensor's Hugging Face name",
    )
    _add_ignore_keys(command)
    command.set_defaults(check=_check_logits, run="logits")
