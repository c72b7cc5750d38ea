"""The command line of eval.py."""

import pathlib
from collections.abc import Sequence

from absl import flags

from fp8jax.cli.flags import run
from fp8jax.training import evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run")
_STEP = flags.DEFINE_integer("step", None, "checkpoint to evaluate; default: the newest", lower_bound=0)


def main(argv: Sequence[str]) -> int:
    """Runs eval.py; returns the exit code."""
    flags.mark_flag_as_required("workdir")
    return run(argv, _evaluate)


def _evaluate() -> int:
    found = evaluation.evaluate_run(pathlib.Path(_WORKDIR.value), _STEP.value)
    print(f"step {found['step']}: loss {found['loss']:.4f}  perplexity {found['perplexity']:.4f}  "
          f"bits per byte {found['bits_per_byte']:.4f}  ({found['tokens']:,} tokens, {found['bytes']:,} bytes)")
    return 0
