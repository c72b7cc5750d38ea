"""The training loop: start or continue a run in a directory, step, log, evaluate, save, stop cleanly.

    exit_code = train(config, workdir)

The directory holds everything: config.json, checkpoints/, metrics.jsonl, events.jsonl, tensorboard/, eval.json. Running
again with the same directory continues from the newest checkpoint; SIGINT, SIGTERM, SIGHUP and SIGUSR1 finish the step under
way, save and return 4. What a step computes is in step.py.
"""

import contextlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

import fp8jax
from fp8jax import config as config_lib
from fp8jax.config import Config, DataError
from fp8jax.data import fingerprints, pipeline, run_tokenizer, tokenizer
from fp8jax.exit_codes import BAD_NUMBERS, FINISHED, STOPPED
from fp8jax.monitor import layered, outliers
from fp8jax.monitor.progress import Progress
from fp8jax.monitor.report import Refresher
from fp8jax.monitor.stages import Stages
from fp8jax.monitor.wandb_sink import open_sink
from fp8jax.monitor.writers import MetricsWriter, Silent
from fp8jax.parallel import distributed
from fp8jax.plan import make_plan
from fp8jax.training.banner import (
    check_fallbacks,
    describe_compiled,
    facts,
    introduce,
    process_seconds,
    seconds_at_peak,
)
from fp8jax.training.calibration import calibrate, has_targets, without_fallen
from fp8jax.training.checkpoint import CheckpointError, Checkpoints, save_config
from fp8jax.training.evaluation import Evaluator, write_json
from fp8jax.training.farewell import how_to_go_on, what_next
from fp8jax.training.fit import bytes_of_failure, fit
from fp8jax.training.fit_advice import out_of_memory
from fp8jax.training.lock import exclusive
from fp8jax.training.profiling import ProfileWindow
from fp8jax.training.resume import (
    Position,
    Resumed,
    check_continues,
    finished_step,
    restore,
    resume,
)
from fp8jax.training.save_policy import Saver
from fp8jax.training.signals import stop_signals
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram
from fp8jax.training.step_clock import Feed
from fp8jax.training.warning_actions import Decision, Reaction
from fp8jax.training.watchdog import Watchdog

CALIBRATION_BATCHES = 1000  # looked at for one that has targets


def train(
    config: Config,
    workdir: str | pathlib.Path,
    devices: Sequence[jax.Device] | None = None,
    *,
    allow_config_change: Sequence[str] = (),
) -> int:
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
    workdir, first, stage = pathlib.Path(workdir), True, Stages(distributed.is_first())
    config = run_tokenizer.found(config, workdir)
    plan = make_plan(config, devices)
    check_fallbacks(plan)
    origin = {
        "config": config_lib.digest(config),
        "tokenizer": tokenizer.of(config.data).fingerprint,
        "data": fingerprints.of(config.data),
        "fp8jax": fp8jax.__version__,
        "jax": jax.__version__,
    }
    keep, alone = (
        config.checkpoint,
        exclusive(workdir) if distributed.is_first() else contextlib.nullcontext(),
    )
    with (
        alone,
        stop_signals() as stop,
        _watchdog(config) as watchdog,
        Checkpoints(
            workdir,
            keep=keep.keep,
            keep_every=keep.keep_every,
            keep_best=keep.keep_best,
            facts=origin,
        ) as checkpoints,
    ):
        watchdog.begin("start", "start-up")
        if distributed.is_first():
            check_continues(config, workdir, allow_config_change, stage.message)
        if (step := finished_step(config, checkpoints, stage)) is not None:
            stage.message(how_to_go_on(workdir, step, config.training.steps))
            return FINISHED
        with stage("compiling the training step, finding what fits"):
            config, program, lines = fit(plan, workdir)
        for line in lines:
            stage.message(line)
        if _must_stop(stop, stage):
            return STOPPED
        with _one_line_without_memory(config, lambda: (0, "nothing is lost")):
            resumed = restore(program, checkpoints, stage)
        if distributed.is_first():
            save_config(workdir, config)
            run_tokenizer.keep(workdir, tokenizer.of(config.data))
        lines = [] if stop else introduce(resumed.program, stage)
        if _must_stop(stop, stage):
            return STOPPED
        while True:
            with _writers(program, workdir, resumed.step) as (writer, progress):
                for line in lines:
                    progress.message(line)
                run = _Run(config, workdir, resumed, checkpoints, writer, progress, stop, watchdog)
                code = run(resumed, first=first)
            if code is not None:
                return code
            resumed, lines = _roll_back(program, checkpoints, run.position, run.step)
            first = False


def _must_stop(stop: Sequence[int], stage: Stages) -> bool:
    """Whether a signal ends a run that has not begun yet; one of several processes must not leave the others waiting."""
    if not stop or jax.process_count() > 1:
        return False
    stage.message(
        f"stopped on {signal.Signals(stop[0]).name} before the first step; there is nothing new to save. Run again to continue."
    )
    return True


@contextlib.contextmanager
def _one_line_without_memory(config: Config, done: Callable[[], tuple[int, str]]) -> Iterator[None]:
    """End in one line where a device has no more memory; `done`: the last step that got done, and what there is to continue from."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if bytes_of_failure(error) is None:
            raise
        raise out_of_memory(error, config, *done()) from None


@contextlib.contextmanager
def _writers(
    program: TrainProgram, workdir: pathlib.Path, step: int
) -> Iterator[tuple[MetricsWriter | Silent, Progress | Silent]]:
    """What writes logs and shows progress: on process 0 alone."""
    if not distributed.is_first():
        yield Silent(), Silent()
        return
    config = program.config
    sink = open_sink(config.log, workdir, config_lib.to_dict(config))
    followers = [Refresher(workdir, config.log.report_minutes)] + ([sink] if sink else [])
    with (
        MetricsWriter(workdir, step, followers) as writer,
        Progress(config.training.steps, step, seconds_at_peak=seconds_at_peak(program)) as progress,
    ):
        yield writer, progress


def _roll_back(
    program: TrainProgram, checkpoints: Checkpoints, position: Position, failed_at: int
) -> tuple[Resumed, list[str]]:
    """The newest checkpoint, with the data behind the batches that could not be digested; and what to tell."""
    lines: list[str] = []
    resumed = resume(program, checkpoints, lines.append)
    skipped = failed_at + position.skipped_batches - resumed.step
    lines.append(
        f"back to the checkpoint of step {resumed.step}; batches {resumed.step + 1} to {failed_at} are passed over"
    )
    # The checkpoint may be older than a fallback, which stays.
    later = ",".join(
        part
        for part in position.fallback.split(",")
        if part not in resumed.position.fallback.split(",")
    )
    program = resumed.program.fallen_back(later)
    position = position._replace(skipped_batches=skipped, rollbacks=position.rollbacks + 1)
    state = without_fallen(program, resumed.state)
    calibrate = tuple(role for role in resumed.calibrate if role in state.scaling)
    return resumed._replace(
        program=program, state=state, position=position, calibrate=calibrate
    ), lines


class _Run:
    """What the loop holds while it runs; `state` is that after step `step`."""

    state: TrainState
    step: int
    position: Position

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        resumed: Resumed,
        checkpoints: Checkpoints,
        writer: MetricsWriter | Silent,
        progress: Progress | Silent,
        stop: list[int],
        watchdog: Watchdog,
    ):
        self.config, self.workdir, self.program, self.checkpoints = (
            config,
            workdir,
            resumed.program,
            checkpoints,
        )
        self.writer, self.progress, self.stop, self.watchdog = writer, progress, stop, watchdog
        self.reaction = Reaction(
            config.warning,
            workdir,
            resumed.step,
            resumed.position.fallback,
            losses=resumed.position.losses,
            gradient_format=config.fp8.gradient_format,
        )
        self.decision: Decision | None = None
        self.evaluator = Evaluator(self.program.plan)
        self.profile = (
            ProfileWindow(config.profile, workdir / "profile")
            if distributed.is_first()
            else Silent()
        )
        self.agreement, self.stopping, self.busy = distributed.Agreement(3), False, False
        self.clock, self.timed = time.perf_counter(), 0
        self.saver = Saver(config, self.program, checkpoints, writer, progress, watchdog)
        self.held_out_loss: tuple[int, float] | None = None  # of a step
        self.waiting: str | None = None

    def __call__(self, resumed: Resumed, *, first: bool) -> int | None:
        """Exit code, None where the run must go back to a checkpoint; `first`: of this process."""
        self.state, self.step, self.position = resumed.state, resumed.step, resumed.position
        with _one_line_without_memory(self.config, lambda: (self.step, self._save_after_failure())):
            self._start(resumed, first=first)
            return self._end(self._steps(first=first))

    def _start(self, resumed: Resumed, *, first: bool) -> None:
        """Have ready what steps need: scales, data, programs."""
        config, program, stage = self.config, self.program, Stages(distributed.is_first())
        if resumed.calibrate:
            self._calibrate(resumed.calibrate, stage)
        with stage("reading data"):
            ahead = pipeline.train_iterator(
                config,
                start_step=self.step + self.position.skipped_batches,
                rows=program.rows.numbers,
            )
        self.feed = Feed(ahead)
        if not program.is_compiled():  # after a fall back
            with stage("compiling the training step"):
                program.compiled_step()
        for line in [*describe_compiled(program), *([self.evaluator.describe()] if first else [])]:
            self.progress.message(line)
        write_json(self.workdir / "run.json", facts(program))
        self.writer.event("started", self.step, skipped_batches=self.position.skipped_batches)
        self._restart_clock()
        self.watchdog.end("start")

    def _steps(self, *, first: bool) -> int:
        """Step until the run is over or must stop; returns bad steps in a row."""
        training, bad, self.ended = self.config.training, 0, ""
        self.stopping = (
            bool(self.stop) and jax.process_count() == 1
        )  # several agree on it after their first step
        try:
            while (
                self.step < training.steps
                and not (self.stopping or self.ended)
                and bad < training.bad_steps
            ):
                bad = self._step(self.feed)
                if first:
                    first = self._tell_first_step()
        except DataError as fault:
            self.writer.event("data_fault", self.step, fault=str(fault))
            if not self.saver.unsound(self.step, self.state):
                self._save_last()
            raise
        return bad

    def _calibrate(self, roles: tuple[str, ...], stage: Stages = Stages(False)) -> None:
        """Find the scales of these roles on the first batch to come that has targets: from another the gradients' stay unknown."""
        batches, first = (
            pipeline.train_batches(self.config, self.program.rows.numbers),
            self.step + self.position.skipped_batches,
        )
        for number in range(first, first + CALIBRATION_BATCHES):
            batch = self.program.put(batches[number])
            if has_targets(self.program, batch):
                break
        else:
            raise DataError(
                f"config.data.source: the first {CALIBRATION_BATCHES} batches from step {self.step + 1} on have no token to "
                "predict; check the data's masks"
            )
        with stage("calibrating scales"):
            self.state = calibrate(self.program, self.state, batch, roles)
        self.writer.event("calibrated", self.step, roles=list(roles))
        self.progress.message(
            f"fp8      scales calibrated on the batch of step {self.step + 1 + number - first}"
        )

    def _save_after_failure(self) -> str:
        """Save the state if it is still there; return what there is to continue from."""
        latest = self.checkpoints.latest_step()
        before = (
            "nothing is saved" if latest is None else f"the newest checkpoint is of step {latest}"
        )
        if not self.step or self.step == latest:
            return before
        if jax.process_count() > 1 or any(
            leaf.is_deleted() for leaf in jax.tree.leaves(self.state)
        ):
            return before
        try:
            if self.saver.unsound(self.step, self.state):
                return before
            self._save_last()
        except (jax.errors.JaxRuntimeError, CheckpointError):
            return before
        return f"step {self.step} is saved"

    def _step(self, iterator: Any) -> int:
        """One step and what is due after it; returns bad steps in a row as far as they are known."""
        config, step = self.config, self.step + 1
        self.watchdog.begin("step", f"step {step} (batch {step + self.position.skipped_batches})")
        collect = _due(step, config.monitor.every)
        if collect:
            self._compile_statistics()
        self.profile.before(step)
        with self._untimed(collect):
            batch = next(iterator)
            self._tell_faults(step, batch.get("faults", []))
            self.state, metrics, taps = self.program.step(
                self.state, self.program.put(batch), collect=collect
            )
            self.step = step
            self.feed.running = metrics["loss"]
            if collect:
                jax.block_until_ready(metrics)
        self._tell(self.profile.after(step, metrics))
        last, bad = step == config.training.steps, 0
        evaluate = bool(self.evaluator.sequences) and (_due(step, config.evaluation.every) or last)
        if _due(step, config.log.every) or collect or evaluate:
            bad = self._log(step, metrics, taps, self._evaluate() if evaluate else {})
        self.stopping, late, self.busy = self.agreement(
            (bool(self.stop), self.saver.is_late(step), self.checkpoints.busy())
        )
        self._react()
        # A rollback goes to a checkpoint from before the warning.
        if (late or self.saver.is_due(step)) and not last and self.ended != "rollback":
            self.agreement.forget()
            jax.block_until_ready(self.state.step)
            with self._untimed(skip=True):
                if not self.saver.save(
                    step, self.state, self._where(), self._loss_here(), busy=self.busy
                ):
                    bad = config.training.bad_steps
        return bad

    def _compile_statistics(self) -> None:
        """Has the step with statistics ready, and the time that this takes left out of the timing of ordinary steps."""
        jax.block_until_ready(self.state.step)
        if self.program.is_compiled(collect=True):
            return
        self.progress.message(
            "compiling the step with statistics, once; not counted in tok/s and ETA"
        )
        with self._untimed(skip=True):
            began = time.perf_counter()
            self.program.compiled_step(collect=True)
        self.progress.message(f"compiled in {time.perf_counter() - began:.1f} s")

    def _react(self) -> None:
        """Does what the early warning asks for."""
        decision, self.decision = self.decision, None
        if decision is None:
            return
        if decision.action == "checkpoint":
            self.saver.save(self.step, self.state, self._where(), self._loss_here(), busy=self.busy)
        elif decision.action == "fallback":
            self._fall_back(decision.overrides)
        else:
            self.ended = decision.action

    def _fall_back(self, overrides: str) -> None:
        """Goes on with another program; every scale that is still in use stays."""
        self.progress.message(f"from the next step on: {overrides}; compiling")
        self.watchdog.begin("step", f"compiling the step with {overrides}")
        together = ",".join(part for part in (self.position.fallback, overrides) if part)
        self.position, self.program = (
            self.position._replace(fallback=together),
            self.program.fallen_back(overrides),
        )
        self.program.compiled_step()
        self._restart_clock()
        self.state, self.saver.program = without_fallen(self.program, self.state), self.program

    def _end(self, bad: int) -> int | None:
        """Goes back, or saves and stops: the exit code, None for going back."""
        self.watchdog.end("step")
        self._tell(self.profile.close())
        unsound = self.saver.unsound(self.step, self.state)
        bad_end = bad >= self.config.training.bad_steps or unsound
        if (bad_end or self.ended == "rollback") and not self.stopping and self._may_roll_back(bad):
            return None
        if not unsound:
            self._save_last()
        return self._finish(bad_end, "not saved" if unsound else "saved")

    def _where(self) -> Position:
        """As a checkpoint stores it."""
        return self.position._replace(losses=self.reaction.losses())

    def _save_last(self) -> None:
        self.saver.save_last(self.step, self.state, self._where(), self._loss_here())

    def _loss_here(self) -> float | None:
        """The held-out loss of the present state, where it was evaluated."""
        step, loss = self.held_out_loss or (None, None)
        return loss if step == self.step else None

    def _may_roll_back(self, bad: int) -> bool:
        """Whether a run that cannot digest its data may go back to a checkpoint."""
        with contextlib.suppress(CheckpointError):  # then an older one is the newest
            self.checkpoints.wait()
        limit, latest = self.config.training.rollbacks, self.checkpoints.latest_step()
        allowed = bool(
            distributed.from_first(self.position.rollbacks < limit and latest is not None)
        )
        self.writer.event(
            "rollback" if allowed else "bad_numbers",
            self.step,
            bad_steps_in_a_row=bad,
            rollbacks=self.position.rollbacks,
        )
        if not allowed:
            why = (
                "there is no checkpoint to go back to"
                if latest is None
                else f"config.training.rollbacks={limit} are used up"
            )
            reason = f"{bad} bad steps in a row" if bad else "the early warning asks to go back"
            self.progress.message(f"{reason} up to step {self.step}, and {why}: stopping")
        return allowed

    def _finish(self, bad_end: bool, saved: str) -> int:
        step = self.step
        if (
            step == self.config.training.steps and not bad_end
        ):  # whatever signal came in the last step
            self.writer.event("finished", step)
            for line in what_next(
                self.workdir,
                step,
                report=self.config.log.report_minutes > 0,
                held_out=bool(self.evaluator.sequences),
            ):
                self.progress.message(line)
            return FINISHED
        if not self.stopping:
            if self.ended == "stop":
                self.writer.event("stopped", step, by="early warning")
                self.progress.message(f"stopped by the early warning after step {step}; {saved}")
            return BAD_NUMBERS
        name = signal.Signals(self.stop[0]).name if self.stop else "a signal to another process"
        self.writer.event("stopped", step, signal=name)
        self.progress.message(
            f"stopped on {name} after step {step} of {self.config.training.steps}; {saved}. Run again to continue."
        )
        return STOPPED

    def _log(
        self, step: int, metrics: dict[str, jax.Array], taps: Any, held_out: dict[str, float]
    ) -> int:
        """Writes and shows a step; returns how many in a row were bad."""
        metrics = jax.device_get(metrics)
        tokens = self.config.training.batch_size * self.config.data.sequence_length
        entry: dict[str, Any] = {name: value.item() for name, value in metrics.items()} | {
            "tokens": step * tokens
        }
        first, in_a_row = (
            self.program.bad_names[entry.pop("first_bad")],
            entry.pop("bad_steps_in_a_row"),
        )
        if self.timed:
            seconds, waited = (
                (time.perf_counter() - self.clock) / self.timed,
                self.feed.waited / self.timed,
            )
            entry |= {
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds,
                "data_wait_seconds": waited,
            }
            self._tell(self.feed.warning(seconds, waited))
        entry |= held_out | layered.rounded(outliers.flatten(taps))
        self.writer.write(step, entry)
        self.decision = self.reaction({"step": step, **entry}, self.writer, self.progress)
        self.progress.update(step, entry)
        if (waiting := self.writer.waiting()) != self.waiting:
            self.waiting = waiting
            self.progress.message(
                f"logs wait in memory: {waiting}; training goes on"
                if waiting
                else "logs are written again"
            )
        if entry["bad_step"]:
            self.writer.event("bad_step", step, first=first, in_a_row=in_a_row)
            self.progress.message(
                f"step {step} is bad, first in {first}; the update was skipped ({in_a_row} in a row)"
            )
        self._restart_clock()
        return in_a_row

    def _evaluate(self) -> dict[str, float]:
        jax.block_until_ready(self.state.step)
        self.watchdog.end("step")
        with self._untimed(skip=True):
            found = self.evaluator(self.state.params, self._evaluating)
        self.watchdog.end("evaluation")
        self.watchdog.begin("step", f"what follows the evaluation of step {self.step}")
        self.held_out_loss = self.step, found["loss"]
        self.progress.message(
            f"step {self.step}  held-out loss {found['loss']:.4f}  bits per byte {found['bits_per_byte']:.4f}"
            f"  ({self.evaluator.part()})"
        )
        try:
            write_json(self.workdir / "eval.json", {"step": self.step, **found})
        except OSError as error:
            self.progress.message(
                f"{self.workdir / 'eval.json'} is not written: {error.strerror}; training goes on"
            )
        texts = {"held_out": found} | {
            f"held_out/{name}": values for name, values in found.get("texts", {}).items()
        }
        return {
            f"{text}/{name}": values[name]
            for text, values in texts.items()
            for name in ("loss", "perplexity", "bits_per_byte", "tokens")
        }

    def _evaluating(self, done: int, batches: int) -> None:
        self.watchdog.begin(
            "evaluation", f"evaluation of step {self.step}, batch {done + 1} of {batches}"
        )

    def _tell_faults(self, step: int, faults: list[str]) -> None:
        if faults:
            count = self.position.unread_sequences + len(faults)
            self.position = self.position._replace(unread_sequences=count)
            self.writer.event(
                "data_fault", step, fault=faults[0], sequences=len(faults), in_all=count
            )
            self.progress.message(
                f"step {step}: {len(faults)} of its sequences skipped ({count} in all): {faults[0]}"
            )

    def _tell_first_step(self) -> bool:
        """How long the process took to get through its first step; returns False, for there is only one."""
        jax.block_until_ready(self.state.step)
        seconds = process_seconds()
        self.writer.event("first_step", self.step, seconds=round(seconds, 2))
        self.progress.message(
            f"start    the first step was done {seconds:.1f} s after the process began"
        )
        self._restart_clock()
        return False

    def _tell(self, line: str | None) -> None:
        if line:
            self.progress.message(line)

    def _restart_clock(self) -> None:
        self.clock, self.timed = time.perf_counter(), 0
        self.feed.lap()

    @contextlib.contextmanager
    def _untimed(self, skip: bool) -> Iterator[None]:
        """Counts an ordinary step; leaves anything else (`skip`) out of the timing of those."""
        before, waited = time.perf_counter(), self.feed.waited
        yield
        if skip:
            self.clock, self.feed.waited = self.clock + time.perf_counter() - before, waited
        else:
            self.timed += 1


def _watchdog(config: Config) -> Watchdog:
    training = config.training
    return Watchdog(
        {
            "start": training.start_limit,
            "step": training.step_limit,
            "save": training.save_limit,
            "evaluation": training.evaluation_limit,
        }
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
