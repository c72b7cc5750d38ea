"""Measure what outlier statistics cost: steps with and without them in turns, and the host's work to log them.

    python benchmarks/statistics_cost.py --size=tiny
    python benchmarks/statistics_cost.py --size=8b --layers=2 --every=50

`slower` is by how much statistics every N steps slow a run down; `slower_cpu` is the same for the
processors' time, which other programs on the machine disturb less.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np
import train_step

from configs import common as configs
from fp8jax.monitor import outliers
from fp8jax.monitor.writers import MetricsWriter
from fp8jax.training.calibration import calibrate


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return seconds of the clock and of this process's processors, and what the call returned."""
    clock, processor = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(call())
    return time.perf_counter() - clock, time.process_time() - processor, found


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: medians over the rounds."""
    program = train_step.make_program(
        model, args.layers, size=args.size, batch=args.batch, length=args.length, remat="none"
    )
    batch = train_step.Run(program).batch
    state, seconds = calibrate(program, program.init(), batch), {False: [], True: []}
    taps: Any = {}
    with tempfile.TemporaryDirectory() as folder, MetricsWriter(folder) as writer:
        log = []
        for turn in range(args.rounds + 1):
            for collect in (False, True):
                *spent, (state, _, found) = timed(
                    lambda state=state, collect=collect: program.step(state, batch, collect=collect)
                )
                seconds[collect] += [spent] * bool(turn)
            taps = found
            log.append(timed(lambda taps=taps, turn=turn: writer.write(turn, entries(taps)))[:2])
    ordinary, collecting, host = (
        np.median(rows, axis=0) for rows in (seconds[False], seconds[True], log)
    )
    slower = (collecting + host - ordinary) / ordinary / args.every
    return {
        "model": model,
        "layers": program.config.model.layers,
        "tokens": args.batch * program.config.data.sequence_length,
        "ms": ordinary[0] * 1e3,
        "ms_with_statistics": collecting[0] * 1e3,
        "ms_to_log": host[0] * 1e3,
        "entries": len(entries(taps)),
        "every": args.every,
        "slower": slower[0],
        "slower_cpu": slower[1],
    }


def entries(taps: Any) -> dict[str, float]:
    """Return what the loop logs."""
    return outliers.flatten(taps)


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES
    )
    parser.add_argument("--models", default="fog_max:fp8_dpa,llama3:bf16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=1 if common.on_gpu() else 16)
    parser.add_argument("--length", type=int)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    return common.save(
        f"statistics_cost-{args.size}",
        [measure(model, args) for model in args.models.split(",")],
        args.results,
    )


if __name__ == "__main__":
    main()
