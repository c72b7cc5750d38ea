"""Measure what saving costs a run: steps with a checkpoint every 50 and steps without, in turns; and a restart's time.

    python benchmarks/checkpointing.py                      # tiny, a checkpoint every 50 steps
    python benchmarks/checkpointing.py --every=10 --rounds=2

A round is `every` steps after which a save begins, with its files written in the background while
the next round's steps run, and as many steps of another state without saves. `blocks_ms` is how
long a save delays the next step.
"""

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np
from train_step import VOCABULARY, make_program

from fp8jax.training.calibration import calibrate
from fp8jax.training.checkpoint import Checkpoints
from fp8jax.training.step import TrainProgram


class Run:
    """A calibrated run in memory that repeats one batch; a call is a step."""

    def __init__(self, program: TrainProgram):
        config = program.config
        shape = config.training.batch_size, config.data.sequence_length
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)
        self._program, self._step = program, program.compiled_step()
        self._batch = program.put(
            {
                "inputs": tokens,
                "targets": np.roll(tokens, -1, 1),
                "mask": np.ones(shape, np.float32),
            }
        )
        self.state = calibrate(program, program.init(), self._batch)

    def __call__(self) -> Any:
        """Take a step and return its metrics."""
        self.state, metrics, _ = self._step(self.state, self._batch)
        return metrics


def timed(call: Any) -> float:
    """Return the seconds of a call until its arrays are ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(
    run: Run, plain: Run, checkpoints: Checkpoints, every: int, rounds: int
) -> dict[str, Any]:
    """Measure step by step in turns, so that other load of the machine falls on both."""
    with_saves, without, blocks, unready = [], [], [], 0
    for step in range(1, every * rounds + 1):
        with_saves.append(timed(run))
        without.append(timed(plain))
        if step % every == 0:
            unready += checkpoints.busy()
            start = time.perf_counter()
            checkpoints.save(step, run.state.items(), {"step": step})
            blocks.append(time.perf_counter() - start)
    checkpoints.wait()
    a, b = (
        statistics.median(seconds[every:]) for seconds in (with_saves, without)
    )  # from the first save on
    return {
        "every": every,
        "with_ms": a * 1e3,
        "without_ms": b * 1e3,
        "slower": a / b - 1,
        "blocks_ms": statistics.median(blocks) * 1e3,
        "blocks_steps": statistics.median(blocks) / b,
        "saves_still_under_way": unready,
    }


def restart(size: str, workdir: pathlib.Path, starts: int = 3) -> list[float]:
    """Return the seconds from process start to the end of the first step of continued runs; the first fills the cache."""
    found = []
    for start in range(1, starts + 1):
        command = [
            sys.executable,
            "train.py",
            f"--config=configs/fp8_base.py:{size}",
            f"--workdir={workdir}",
            f"--config.training.steps={2 * start}",
            "--config.optimizer.warmup_steps=1",
            "--config.evaluation.batches=1",
            "--config.evaluation.every=0",
        ]
        told = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            cwd=pathlib.Path(__file__).parents[1],
        ).stdout
        found.append(float(re.search(r"first step was done ([\d.]+) s", told)[1]))  # pyright: ignore[reportOptionalSubscript]
    return found


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--model", default="fog_max:fp8_dpa", help="architecture:recipe")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    program = make_program(
        args.model, None, size=args.size, batch=args.batch, length=None, remat="none"
    )
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=2) as checkpoints:
        row = measure(Run(program), Run(program), checkpoints, args.every, args.rounds)
        row |= {"restart_seconds": min(restart(args.size, pathlib.Path(folder) / "run")[1:])}
    return common.save(f"checkpointing-{args.size}", [{"model": args.model} | row], args.results)


if __name__ == "__main__":
    main()
