"""Train: start or continue a run in a directory, step, log, evaluate, save, stop cleanly.

    exit_code = train(config, workdir)

The directory holds all files: config.json, checkpoints/, metrics.jsonl, events.jsonl, tensorboard/,
eval.json. Running again with the same directory continues from the newest checkpoint; SIGINT,
SIGTERM, SIGHUP and SIGUSR1 finish the running step, save and return 4. step.py defines a step.

Read `train`, then `_train_from` and `_step`: they follow the order in which things happen.
starting.py prepares the first step, hooks.py and side_jobs.py do what is due after a step,
ending.py the end.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

import fp8jax
from fp8jax import config as config_lib
from fp8jax.config import Config, DataError
from fp8jax.data import fingerprints, run_tokenizer, tokenizer
from fp8jax.exit_codes import BAD_NUMBERS, FINISHED, STOPPED
from fp8jax.monitor.stages import Stages
from fp8jax.monitor.warning_actions import Reaction
from fp8jax.parallel import distributed
from fp8jax.plan import make_plan
from fp8jax.training.banner import check_fallbacks, introduce
from fp8jax.training.checkpoint import Checkpoints, save_config
from fp8jax.training.ending import End, end_after_step, finish, go_back, save_after_failure
from fp8jax.training.farewell import how_to_go_on
from fp8jax.training.fit import fit
from fp8jax.training.guards import guarded, one_line_without_memory
from fp8jax.training.resume import Resumed, check_continues, finished_step, restore
from fp8jax.training.run import Run
from fp8jax.training.side_jobs import (
    compile_statistics,
    evaluate,
    log_faults,
    log_step,
    probe,
    react,
)
from fp8jax.training.starting import find_scales, log_first_step, open_log, start
from fp8jax.training.tools import Tools

__all__ = ["BAD_NUMBERS", "FINISHED", "STOPPED", "train"]


def train(
    config: Config,
    workdir: str | pathlib.Path,
    devices: Sequence[jax.Device] | None = None,
    *,
    allow_config_change: Sequence[str] = (),
) -> int:
    """Train to `config.training.steps`, and return the process's exit code.

    The code is 0 if finished, 3 if stopped by bad numbers or the early warning, 4 if stopped by a
    signal, both after saving.

    Args:
        config: validated configuration.
        workdir: directory of the run; created if missing, continued if it holds a run.
        devices: devices of the mesh; None for all.
        allow_config_change: fields such as 'data.source' that may differ from those of the run in
            the directory.

    Raises:
        ConfigError: the data, mesh or directory does not fit the config.
    """
    workdir = pathlib.Path(workdir)
    stage = Stages(distributed.is_first())
    config = run_tokenizer.found(config, workdir)
    plan = make_plan(config, devices)
    check_fallbacks(plan)
    with guarded(config, workdir) as guards, _open_checkpoints(config, workdir) as checkpoints:
        guards.watchdog.begin("start", "start-up")
        if distributed.is_first():
            check_continues(config, workdir, allow_config_change, stage.message)
        step = finished_step(config, checkpoints, stage)
        if step is not None:
            stage.message(how_to_go_on(workdir, step, config.training.steps))
            return FINISHED
        with stage("compiling the training step, finding what fits"):
            config, program, lines = fit(plan, workdir)
        for line in lines:
            stage.message(line)
        if guards.stop_before_the_first_step(stage):
            return STOPPED
        with one_line_without_memory(config, lambda: (0, "nothing is lost")):
            resumed = restore(program, checkpoints, stage)
        if distributed.is_first():
            save_config(workdir, config)
            run_tokenizer.keep(workdir, tokenizer.of(config.data))
        lines = [] if guards.stop else introduce(resumed.program, stage)
        if guards.stop_before_the_first_step(stage):
            return STOPPED
        first = True
        while True:
            with open_log(program, workdir, resumed.step) as log:
                for line in lines:
                    log.message(line)
                run = _run_from(resumed, workdir)
                tools = Tools.of(run, workdir, checkpoints, log, guards)
                code = _train_from(run, tools, resumed.calibrate, first=first)
            if code is not None:
                return code
            resumed, lines = go_back(program, checkpoints, run)
            first = False


def _train_from(run: Run, tools: Tools, calibrate: tuple[str, ...], *, first: bool) -> int | None:
    """Train from a run's position to its end; return the exit code, None if it goes back to a
    checkpoint.

    Args:
        run: the run, with a state that is fresh or from a checkpoint.
        tools: tools of the run.
        calibrate: roles whose scales are still unknown.
        first: True the first time in this process.
    """

    def done() -> tuple[int, str]:
        return run.step, save_after_failure(run, tools.saver)

    with one_line_without_memory(run.config, done):
        stage = Stages(distributed.is_first())
        find_scales(run, calibrate, tools.log, stage)
        note = tools.evaluator.describe() if first else None
        tools.clock = start(run, tools.workdir, tools.log, stage, note=note)
        tools.guards.watchdog.end("start")
        run.stopping = tools.guards.stop_alone()  # several agree on it after their first step
        end = End.FINISHED if run.is_last() else None
        if run.stopping and end is None:
            end = End.SIGNAL
        try:
            while end is None:
                end = _step(run, tools)
                if first:
                    log_first_step(run, tools.log, tools.clock)
                    first = False
        except DataError as fault:
            tools.log.event("data_fault", run.step, fault=str(fault))
            if not tools.saver.unsound(run):
                tools.saver.save_last(run)
            raise
        return finish(run, tools, end)


def _step(run: Run, tools: Tools) -> End | None:
    """Take one step and do what is due after it; return how the run ends, None if it continues."""
    step = run.step + 1
    hooks, log, guards, saver = tools.hooks, tools.log, tools.guards, tools.saver
    guards.watchdog.begin("step", f"step {step} (batch {run.batch + 1})")
    with_statistics = hooks.statistics.is_due(step)
    if with_statistics:
        compile_statistics(run, tools)
    tools.profile.before(step)
    metrics, taps, found = _advance(run, tools, with_statistics=with_statistics)
    log.message(tools.profile.after(step, metrics))

    if hooks.evaluation.is_due(step):
        found |= evaluate(run, tools)
    decision = None
    if hooks.log.is_due(step) or with_statistics or found:
        decision = log_step(run, tools, metrics, taps, found)

    flags = bool(guards.stop), saver.is_late(step), saver.checkpoints.busy()
    run.stopping, late, busy = tools.agreement(flags)
    asked = react(run, tools, decision, busy=busy)
    sound = True
    # A rollback goes to a checkpoint from before the warning.
    if (late or saver.is_due(step)) and not run.is_last() and asked is not End.WARNING_ROLLBACK:
        tools.agreement.forget()
        jax.block_until_ready(run.state.step)
        with tools.clock.left_out():
            sound = saver.save(run, busy=busy)
    return end_after_step(run, sound=sound, asked=asked)


def _advance(
    run: Run, tools: Tools, *, with_statistics: bool
) -> tuple[dict[str, jax.Array], Any, dict[str, float]]:
    """Read a batch and take the step; return its metrics and statistics, on the devices, and what a
    probe found.
    """
    clock, step = tools.clock, run.step + 1
    with clock.left_out() if with_statistics else contextlib.nullcontext():
        batch = next(clock.feed)
        log_faults(run, tools, step, batch.get("faults", []))
        on_devices = run.program.put(batch)
        found = probe(run, tools, on_devices) if tools.hooks.probe.is_due(step) else {}
        run.state, metrics, taps = run.program.step(run.state, on_devices, collect=with_statistics)
        run.step = step
        run.held_out_loss = None
        run.bad_in_a_row = 0
        clock.feed.running = metrics["loss"]
        if with_statistics:
            jax.block_until_ready(metrics)
        else:
            clock.count()
    return metrics, taps, found


def _open_checkpoints(config: Config, workdir: pathlib.Path) -> Checkpoints:
    """Open the checkpoints of a run, with the facts for their manifests."""
    keep = config.checkpoint
    facts = {
        "config": config_lib.digest(config),
        "tokenizer": tokenizer.of(config.data).fingerprint,
        "data": fingerprints.of(config.data),
        "fp8jax": fp8jax.__version__,
        "jax": jax.__version__,
    }
    return Checkpoints(
        workdir, keep=keep.keep, keep_every=keep.keep_every, keep_best=keep.keep_best, facts=facts
    )


def _run_from(resumed: Resumed, workdir: pathlib.Path) -> Run:
    """Return the run that continues from a checkpoint or from fresh weights."""
    config, position = resumed.program.config, resumed.position
    warning = Reaction(
        config.warning,
        workdir,
        resumed.step,
        position.fallback,
        losses=position.losses,
        gradient_format=config.fp8.gradient_format,
    )
    return Run(resumed.program, resumed.state, resumed.step, position, warning)
