"""Run `python -m fp8jax data show`: exactly what a step of a run has seen, or will see."""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from fp8jax import config as config_lib
from fp8jax.cli.errors import Parser, local_path, run_command
from fp8jax.data import run_tokenizer, tokenizer
from fp8jax.monitor import logs

END = "<|end of document|>"


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    options = _parser().parse_args(argv)
    return run_command(lambda: _show(options))


def _show(options: argparse.Namespace) -> None:
    for line in show(options.workdir, options.step):
        print(line)


def show(workdir: pathlib.Path, step: int) -> Iterator[str]:
    """Yield a step's batch as text: the run's data, then for every sequence a line on its origin
    and its decoded targets.

    Args:
        workdir: directory of the run.
        step: as in metrics.jsonl; the first is 1.

    Raises:
        ConfigError: there is no run, or its data cannot be read.
    """
    config = _config(workdir)
    if step < 1:
        raise config_lib.ConfigError(f"--step: {step} is below 1, the first step")
    from fp8jax.data import pipeline  # loads Grain, which mistakes need not wait for

    number = step - 1 + _passed_over(workdir, step)
    batch, places = pipeline.train_batches(config)[number], pipeline.train_places(config, number)
    assert batch is not None, "a random-access dataset without filters has every batch"
    loaded, length = tokenizer.of(config.data), config.data.sequence_length
    yield f"step {step}: {len(places)} sequences of {length} tokens" + (
        f", batch {number}" if number != step - 1 else ""
    )
    yield from (f"data     {line}" for line in pipeline.describe(config))
    for row, place in enumerate(places):
        segments = len(np.unique(batch["segment_ids"][row][batch["mask"][row] == 1]))
        masked = f", {segments} documents apart" if config.data.document_masks else ""
        padding = int((batch["mask"][row] == 0).sum())
        yield (
            f"\n--- sequence {row}: window {place.window} of {place.source}, epoch "
            f"{place.epoch + 1}{masked}" + (f", {padding} tokens of padding" if padding else "")
        )
        yield _shown(_text(batch["targets"][row][batch["mask"][row] == 1], loaded))


def _text(ids: np.ndarray, loaded: tokenizer.Tokenizer) -> str:
    """Return the ids as text, with a mark for every end of a document."""
    documents = np.split(ids, np.flatnonzero(ids == loaded.end_of_document) + 1)
    return "".join(
        loaded.decode(part) + END * bool(len(part) and part[-1] == loaded.end_of_document)
        for part in documents
    )


def _shown(text: str) -> str:
    """Return the text, on a terminal without control characters, which would act on it."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _config(workdir: pathlib.Path) -> config_lib.Config:
    """Return the run's config, without loading JAX's checkpoints."""
    try:
        return run_tokenizer.own(run_tokenizer.read_config(workdir), workdir)
    except FileNotFoundError:
        path = workdir / "config.json"
        raise config_lib.ConfigError(
            f"{path}: no such file; --workdir must be the directory of a run started with train.py"
        ) from None


def _passed_over(workdir: pathlib.Path, step: int) -> int:
    """Return how many batches rollbacks had skipped when the step was taken, from the last start
    before it in events.jsonl.
    """
    path = workdir / "events.jsonl"
    if not path.exists():
        return 0
    starts = [
        event
        for event in logs.records(path)
        if event.get("kind") == "started" and event["step"] < step
    ]
    skipped = starts[-1].get("skipped_batches", 0) if starts else 0
    if type(skipped) is not int:
        raise config_lib.ConfigError(
            f"{path}: skipped_batches: {str(skipped)[:60]!r} is not a number of batches; remove "
            f"that line"
        )
    return skipped


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax data",
        description="The data of a run.",
        epilog="example: python -m fp8jax data show --workdir=runs/fp8_base-tiny --step=100",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser(
        "show",
        help="the text of a step's batch",
        description="Decodes exactly what a step saw, or will see.",
        epilog="example: python -m fp8jax data show --workdir=runs/fp8_base-tiny --step=100",
    )
    shown.add_argument("--workdir", type=local_path, required=True, help="directory of the run")
    shown.add_argument(
        "--step", type=int, required=True, help="as in metrics.jsonl; the first is 1"
    )
    return parser
