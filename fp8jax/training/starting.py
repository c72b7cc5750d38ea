"""Prepare a run's first step: scales, data, compiled programs; and report when it is done."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from fp8jax import config as config_lib
from fp8jax.config import DataError
from fp8jax.data import pipeline
from fp8jax.monitor.progress import Progress
from fp8jax.monitor.report import Refresher
from fp8jax.monitor.run_log import RunLog
from fp8jax.monitor.stages import Stages
from fp8jax.monitor.wandb_sink import open_sink
from fp8jax.monitor.writers import MetricsWriter
from fp8jax.parallel import distributed
from fp8jax.training.banner import describe_compiled, facts, process_seconds, seconds_at_peak
from fp8jax.training.calibration import calibrate, has_targets
from fp8jax.training.evaluation import write_json
from fp8jax.training.run import Run
from fp8jax.training.step import TrainProgram
from fp8jax.training.step_clock import Feed, StepClock

CALIBRATION_BATCHES = 1000  # batches that are searched for one with targets


@contextlib.contextmanager
def open_log(program: TrainProgram, workdir: pathlib.Path, step: int) -> Iterator[RunLog]:
    """Open the log of a run that continues after `step`; only process 0 writes and shows."""
    if not distributed.is_first():
        yield RunLog.silent()
        return
    config = program.config
    sink = open_sink(config.log, workdir, config_lib.to_dict(config))
    followers = [Refresher(workdir, config.log.report_minutes)] + ([sink] if sink else [])
    with (
        MetricsWriter(workdir, step, followers) as writer,
        Progress(config.training.steps, step, seconds_at_peak=seconds_at_peak(program)) as progress,
    ):
        yield RunLog(writer, progress)


def find_scales(run: Run, roles: tuple[str, ...], log: RunLog, stage: Stages) -> None:
    """Find the scales of these roles on the next batch with targets; without targets those of
    gradients stay unknown.
    """
    if not roles:
        return
    program = run.program
    batches: Any = pipeline.train_batches(run.config, program.rows.numbers)
    for passed in range(CALIBRATION_BATCHES):
        batch = program.put(batches[run.batch + passed])
        if has_targets(program, batch):
            break
    else:
        raise DataError(
            f"config.data.source: the first {CALIBRATION_BATCHES} batches from step {run.step + 1} "
            "on have no token to predict; check the data's masks"
        )
    with stage("calibrating scales"):
        run.state = calibrate(program, run.state, batch, roles)
    log.event(
        "calibrated",
        run.step,
        f"fp8      scales calibrated on the batch of step {run.step + 1 + passed}",
        roles=list(roles),
    )


def start(
    run: Run, workdir: pathlib.Path, log: RunLog, stage: Stages, *, note: str | None
) -> StepClock:
    """Open the data and compile, report what runs, and start the clock.

    Args:
        run: the run that is about to take its next step.
        workdir: its directory.
        log: log of the run.
        stage: announces slow parts.
        note: a line that follows those about the compiled step.
    """
    program = run.program
    with stage("reading data"):
        batches = pipeline.train_iterator(
            run.config, start_step=run.batch, rows=program.rows.numbers
        )
    if not program.is_compiled():  # after a fallback
        with stage("compiling the training step"):
            program.compiled_step()
    for line in describe_compiled(program):
        log.message(line)
    log.message(note)
    write_json(workdir / "run.json", facts(program))
    log.event("started", run.step, skipped_batches=run.position.skipped_batches)
    return StepClock(Feed(batches))


def log_first_step(run: Run, log: RunLog, clock: StepClock) -> None:
    """Log how long the process took for its first step."""
    jax.block_until_ready(run.state.step)
    seconds = process_seconds()
    log.event(
        "first_step",
        run.step,
        f"start    the first step was done {seconds:.1f} s after the process began",
        seconds=round(seconds, 2),
    )
    clock.restart()
