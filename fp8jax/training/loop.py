"""The training loop: start or continue a run in a directory, step, log, evaluate, save, stop cleanly.

    exit_code = train(config, workdir)

The directory holds everything: config.json, checkpoints/, metrics.jsonl, events.jsonl, tensorboard/, eval.json. Running
again with the same directory continues from the newest checkpoint; SIGINT, SIGTERM and SIGUSR1 finish the step under way,
save and return 4. What a step computes is in step.py.
"""

import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import fp8jax
from fp8jax import config as config_lib
from fp8jax.config import Config
from fp8jax.data import pipeline, tokenizer
from fp8jax.models.definition import define
from fp8jax.monitor import outliers
from fp8jax.monitor.progress import Progress
from fp8jax.monitor.report import Refresher
from fp8jax.monitor.wandb_sink import open_sink
from fp8jax.monitor.writers import MetricsWriter
from fp8jax.numerics.recipes import in_bf16
from fp8jax.parallel import mesh as mesh_lib
from fp8jax.training.checkpoint import CheckpointError, Checkpoints, save_config
from fp8jax.training.evaluation import Evaluator, write_json
from fp8jax.training.feed import Feed
from fp8jax.training.lock import exclusive
from fp8jax.training.profiling import ProfileWindow
from fp8jax.training.reaction import Decision, Reaction
from fp8jax.training.resume import Position, Resumed, check_continues, resume
from fp8jax.training.start_up import check_attention, describe, describe_compiled, facts, seconds_at_peak
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram
from fp8jax.training.watchdog import Watchdog

FINISHED, BAD_NUMBERS, STOPPED = 0, 3, 4
# A save that failed, on a full disk say, is tried again after so many seconds.
RETRY_SECONDS = 60.0


def train(config: Config, workdir: str | pathlib.Path, devices: Sequence[jax.Device] | None = None, *,
          allow_config_change: Sequence[str] = ()) -> int:
    """Trains to `config.training.steps`; returns the process's exit code.

    0: finished; 3: stopped by bad numbers or the early warning, after saving; 4: stopped by a signal, after saving.

    Args:
        config: validated configuration.
        workdir: directory of the run; made if missing, continued if it holds a run.
        devices: what the mesh is made of; None: all.
        allow_config_change: fields such as 'data.source' that may differ from those of the run in the directory.

    Raises:
        ConfigError: the data, mesh or directory does not fit the config.
    """
    workdir, began = pathlib.Path(workdir), time.monotonic()
    mesh = mesh_lib.make_mesh(config, devices)
    definition = define(config.model, tokenizer.vocab_size(config))
    program = TrainProgram(config, definition, mesh)
    program.fallen_back(in_bf16(config.warning.fallback))  # what cannot fall back is found now, not when it must
    origin = {"config": config_lib.digest(config), "fp8jax": fp8jax.__version__, "jax": jax.__version__}
    with exclusive(workdir), Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every,
                                         facts=origin) as checkpoints, _stop_signals() as stop, \
            Watchdog(config.training.hang_limit) as watchdog:
        recalibrate = check_continues(config, workdir, allow_config_change)
        lines: list[str] = []
        resumed = resume(program, checkpoints, lines.append, recalibrate=recalibrate)
        save_config(workdir, config)
        lines += [*describe(resumed.program), *check_attention(resumed.program)]
        while True:
            sink = open_sink(config.log, workdir, config_lib.to_dict(config))
            followers = [Refresher(workdir, config.log.report_minutes)] + ([sink] if sink else [])
            with MetricsWriter(workdir, resumed.step, followers) as writer, \
                    Progress(config.training.steps, resumed.step, seconds_at_peak=seconds_at_peak(program)) as progress:
                for line in lines:
                    progress.message(line)
                run = _Run(config, workdir, resumed, checkpoints, writer, progress, stop, watchdog)
                code, failed_at = run(resumed, began)
            if code is not None:
                return code
            resumed, lines = _roll_back(program, checkpoints, run.position, failed_at)


def _roll_back(program: TrainProgram, checkpoints: Checkpoints, position: Position, failed_at: int) -> tuple[Resumed, list[str]]:
    """The newest checkpoint, with the data behind the batches that could not be digested; and what to tell."""
    lines: list[str] = []
    resumed = resume(program, checkpoints, lines.append)
    skipped = failed_at + position.skipped_batches - resumed.step
    lines.append(f"back to the checkpoint of step {resumed.step}; batches {resumed.step + 1} to {failed_at} are passed over")
    # The checkpoint may be older than a fallback, which stays.
    later = ",".join(part for part in position.fallback.split(",") if part not in resumed.position.fallback.split(","))
    program = resumed.program.fallen_back(later)
    position = position._replace(skipped_batches=skipped, rollbacks=position.rollbacks + 1)
    return resumed._replace(program=program, state=program.carry(resumed.state), position=position), lines


class _Run:
    """What the loop holds while it runs."""

    def __init__(self, config: Config, workdir: pathlib.Path, resumed: Resumed, checkpoints: Checkpoints,
                 writer: MetricsWriter, progress: Progress, stop: list[int], watchdog: Watchdog):
        self.config, self.workdir, self.program, self.checkpoints = config, workdir, resumed.program, checkpoints
        self.writer, self.progress, self.stop, self.watchdog = writer, progress, stop, watchdog
        self.reaction = Reaction(config.warning, workdir, resumed.step, resumed.position.fallback)
        self.decision: Decision | None = None
        self.evaluator = Evaluator(config, self.program.definition, self.program.mesh)
        self.profile = ProfileWindow(config.profile, workdir / "profile")
        self.clock, self.timed = time.perf_counter(), 0
        self.saved_at, self.save_again_at = time.monotonic(), math.inf

    def __call__(self, resumed: Resumed, began: float) -> tuple[int | None, int]:
        """Exit code, None where the run must go back to a checkpoint; and the step at which it ended."""
        config, program = self.config, self.program
        state, step, self.position = resumed.state, resumed.step, resumed.position
        if resumed.calibrate:
            first = pipeline.train_batches(config)[step + self.position.skipped_batches]
            state = program.calibrate(state, program.put(first))
            self.writer.event("calibrated", step)
        iterator = self.feed = Feed(pipeline.train_iterator(config, start_step=step + self.position.skipped_batches))
        for line in describe_compiled(program):
            self.progress.message(line)
        write_json(self.workdir / "run.json", facts(program))
        self.writer.event("started", step, seconds=round(time.monotonic() - began, 1))
        self._restart_clock()
        bad, self.ended = 0, ""
        while step < config.training.steps and not self.stop and not self.ended and bad < config.training.bad_steps:
            step += 1
            state, bad = self._step(step, state, iterator)
        self._tell(self.profile.close())
        wants_back = bad >= config.training.bad_steps or self.ended == "rollback"
        if wants_back and not self.stop and self._may_roll_back(step, bad):
            return None, step
        self.watchdog.expect(f"saving step {step}")
        self._save(step, state, final=True)
        return self._finish(step, bad), step

    def _step(self, step: int, state: TrainState, iterator: Any) -> tuple[TrainState, int]:
        """One step and what is due after it; the new state, and bad steps in a row as far as they are known."""
        config = self.config
        self.watchdog.expect(f"step {step} (batch {step + self.position.skipped_batches})")
        collect = _due(step, config.monitor.every)
        if collect:
            jax.block_until_ready(state.step)
        self.profile.before(step)
        with self._untimed(collect):
            batch = self.program.put(next(iterator))
            state, metrics, taps = self.program.step(state, batch, collect=collect)
            self.feed.running = metrics["loss"]
            if collect:
                jax.block_until_ready(metrics)
        self._tell(self.profile.after(step, metrics))
        last, bad = step == config.training.steps, 0
        evaluate = _due(step, config.evaluation.every) or last
        if _due(step, config.log.every) or collect or evaluate:
            bad = self._log(step, metrics, taps, self._evaluate(step, state) if evaluate else {})
        state = self._react(step, state)
        if self._save_is_due(step) and not last and self.ended != "rollback":  # which goes to a checkpoint from before the warning
            self._save(step, state)
        return state, bad

    def _react(self, step: int, state: TrainState) -> TrainState:
        """Does what the early warning asks for; the state to go on with."""
        decision, self.decision = self.decision, None
        if decision is None:
            return state
        if decision.action == "checkpoint":
            self._save(step, state)
        elif decision.action == "fallback":
            return self._fall_back(state, decision.overrides)
        else:
            self.ended = decision.action
        return state

    def _fall_back(self, state: TrainState, overrides: str) -> TrainState:
        """Goes on with another program; every scale that is still in use stays."""
        self.progress.message(f"from the next step on: {overrides}; compiling")
        self.watchdog.expect(f"compiling the step with {overrides}")
        together = ",".join(part for part in (self.position.fallback, overrides) if part)
        self.position, self.program = self.position._replace(fallback=together), self.program.fallen_back(overrides)
        self.program.compiled_step()
        self._restart_clock()
        return self.program.carry(state)

    def _may_roll_back(self, step: int, bad: int) -> bool:
        """Whether a run that cannot digest its data may go back to a checkpoint."""
        self.checkpoints.wait()
        limit, latest = self.config.training.rollbacks, self.checkpoints.latest_step()
        allowed = self.position.rollbacks < limit and latest is not None
        self.writer.event("rollback" if allowed else "bad_numbers", step, bad_steps_in_a_row=bad, rollbacks=self.position.rollbacks)
        if not allowed:
            why = "there is no checkpoint to go back to" if latest is None else f"config.training.rollbacks={limit} are used up"
            reason = f"{bad} bad steps in a row" if bad else "the early warning asks to go back"
            self.progress.message(f"{reason} up to step {step}, and {why}: stopping")
        return allowed

    def _finish(self, step: int, bad: int) -> int:
        if step == self.config.training.steps and not self.stop:
            self.writer.event("finished", step)
            return FINISHED
        if not self.stop:
            if self.ended == "stop":
                self.writer.event("stopped", step, by="early warning")
                self.progress.message(f"stopped by the early warning after step {step}; saved")
            return BAD_NUMBERS
        name = signal.Signals(self.stop[0]).name
        self.writer.event("stopped", step, signal=name)
        self.progress.message(f"stopped on {name} after step {step}; saved. Run again to continue.")
        return STOPPED

    def _log(self, step: int, metrics: dict[str, jax.Array], taps: Any, held_out: dict[str, float]) -> int:
        """Writes and shows a step; returns how many in a row were bad."""
        metrics, taps = jax.device_get((metrics, taps))
        tokens = self.config.training.batch_size * self.config.data.sequence_length
        entry: dict[str, Any] = {name: value.item() for name, value in metrics.items()} | {"tokens": step * tokens}
        first, in_a_row = self.program.bad_names[entry.pop("first_bad")], entry.pop("bad_steps_in_a_row")
        if self.timed:
            seconds, waited = (time.perf_counter() - self.clock) / self.timed, self.feed.waited / self.timed
            entry |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "data_wait_seconds": waited}
            self._tell(self.feed.warning(seconds, waited))
        entry |= held_out | outliers.flatten(jax.tree.map(np.asarray, taps))
        self.writer.write(step, entry)
        self.progress.update(step, entry)
        self.decision = self.reaction({"step": step, **entry}, self.writer, self.progress)
        if entry["bad_step"]:
            self.writer.event("bad_step", step, first=first, in_a_row=in_a_row)
            self.progress.message(f"step {step} is bad, first in {first}; the update was skipped ({in_a_row} in a row)")
        self._restart_clock()
        return in_a_row

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        jax.block_until_ready(state.step)
        with self._untimed(skip=True):
            found = self.evaluator(state.params)
        self.progress.message(f"step {step}  held-out loss {found['loss']:.4f}  bits per byte {found['bits_per_byte']:.4f}")
        write_json(self.workdir / "eval.json", {"step": step, **found})
        return {f"held_out/{name}": found[name] for name in ("loss", "perplexity", "bits_per_byte")}

    def _save_is_due(self, step: int) -> bool:
        if failure := self.checkpoints.failure():
            self._save_failed(step, failure)
        now, minutes = time.monotonic(), self.config.checkpoint.minutes
        late = now > self.save_again_at or (minutes > 0 and now - self.saved_at > 60 * minutes)
        return _due(step, self.config.checkpoint.every) or late

    def _save(self, step: int, state: TrainState, *, final: bool = False) -> None:
        """Saves in the background; the last one waits for its end, and must succeed."""
        self.saved_at, self.save_again_at = time.monotonic(), math.inf
        try:
            self.checkpoints.save(step, state.items(), {"step": step, **self.position._asdict()})
            if final:
                self.checkpoints.wait()
        except CheckpointError as error:
            if final:
                raise
            self._save_failed(step, str(error))
        self._restart_clock()

    def _save_failed(self, step: int, reason: str) -> None:
        self.save_again_at = time.monotonic() + RETRY_SECONDS
        self.writer.event("save_failed", step, reason=reason)
        self.progress.message(f"step {step}: {reason}; training goes on, the next try is in {RETRY_SECONDS:.0f} s")

    def _tell(self, line: str | None) -> None:
        if line:
            self.progress.message(line)

    def _restart_clock(self) -> None:
        self.clock, self.timed = time.perf_counter(), 0
        self.feed.lap()

    @contextlib.contextmanager
    def _untimed(self, skip: bool) -> Iterator[None]:
        """Leaves steps with statistics, and what they compile, out of the timing of ordinary ones."""
        before, waited = time.perf_counter(), self.feed.waited
        yield
        if skip:
            self.clock, self.feed.waited = self.clock + time.perf_counter() - before, waited
        else:
            self.timed += 1


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list to which SIGINT, SIGTERM and SIGUSR1 (a scheduler's notice) are appended; the loop stops at the end of the step.

    A second SIGINT interrupts.
    """
    caught: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
