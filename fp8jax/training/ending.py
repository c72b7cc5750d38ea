"""End a run, or go back to a checkpoint: decide why, save, log, and return the exit code."""

import contextlib
import enum

import jax

from fp8jax.exit_codes import BAD_NUMBERS, FINISHED, STOPPED
from fp8jax.monitor.run_log import RunLog
from fp8jax.parallel import distributed
from fp8jax.training.calibration import without_fallen
from fp8jax.training.checkpoint import CheckpointError, Checkpoints
from fp8jax.training.farewell import what_next
from fp8jax.training.resume import Resumed, resume
from fp8jax.training.run import Run
from fp8jax.training.save_policy import Saver
from fp8jax.training.step import TrainProgram
from fp8jax.training.tools import Tools


class End(enum.Enum):
    """The reason why a run takes no further step."""

    FINISHED = "it has all its steps"
    SIGNAL = "a signal asks it to stop"
    BAD_STEPS = "too many steps in a row were bad"
    UNSOUND = "the state is not finite"
    WARNING_ROLLBACK = "the early warning asks to go back"
    WARNING_STOP = "the early warning asks to stop"

    @property
    def goes_back(self) -> bool:
        """Return True if the run continues from a checkpoint, if it may."""
        return self in (End.BAD_STEPS, End.UNSOUND, End.WARNING_ROLLBACK)


def end_after_step(run: Run, *, sound: bool, asked: End | None) -> End | None:
    """Return how the run ends after this step; None if it continues.

    Args:
        run: the run after the step.
        sound: False if its state must not be saved.
        asked: the end that the early warning asks for, if any.
    """
    training = run.config.training
    end = None
    if not sound:
        end = End.UNSOUND
    elif run.bad_in_a_row >= training.bad_steps:
        end = End.BAD_STEPS
    if run.stopping:  # a run that has its steps is finished, signal or not
        return End.FINISHED if run.is_last() and end is None else End.SIGNAL
    if end is None and run.is_last() and asked is not End.WARNING_ROLLBACK:
        return End.FINISHED
    return end or asked


def finish(run: Run, tools: Tools, end: End) -> int | None:
    """Go back, or save and stop; return the exit code, None for going back.

    Args:
        run: the run after its last step.
        tools: tools of the run.
        end: how it ends.
    """
    log, saver = tools.log, tools.saver
    tools.guards.watchdog.end("step")
    log.message(tools.profile.close())
    sound = not saver.unsound(run)
    if not sound:
        end = End.SIGNAL if run.stopping else End.UNSOUND
    if end.goes_back and _may_go_back(run, end, saver.checkpoints, log):
        return None
    if sound:
        saver.save_last(run)
    if end is End.WARNING_ROLLBACK and run.is_last():
        end = End.FINISHED
    return _say_goodbye(run, tools, end, "saved" if sound else "not saved")


def _say_goodbye(run: Run, tools: Tools, end: End, saved: str) -> int:
    """Log the end of a run; return the exit code."""
    log = tools.log
    if end is End.FINISHED:
        log.event("finished", run.step)
        report = run.config.log.report_minutes > 0
        held_out = bool(tools.evaluator.sequences)
        for line in what_next(tools.workdir, run.step, report=report, held_out=held_out):
            log.message(line)
        return FINISHED
    if end is End.SIGNAL:
        name = tools.guards.stop_name()
        text = (
            f"stopped on {name} after step {run.step} of {run.config.training.steps}; "
            f"{saved}. Run again to continue."
        )
        log.event("stopped", run.step, text, signal=name)
        return STOPPED
    if end is End.WARNING_STOP:
        text = f"stopped by the early warning after step {run.step}; {saved}"
        log.event("stopped", run.step, text, by="early warning")
    return BAD_NUMBERS


def _may_go_back(run: Run, end: End, checkpoints: Checkpoints, log: RunLog) -> bool:
    """Return True, on all processes alike, if the run may go back to a checkpoint; log it."""
    with contextlib.suppress(CheckpointError):  # then an older one is the newest
        checkpoints.wait()
    limit = run.config.training.rollbacks
    latest = checkpoints.latest_step()
    allowed = run.position.rollbacks < limit and latest is not None
    allowed = bool(distributed.from_first(allowed))
    text = None
    if not allowed:
        reason = end.value
        if end is End.BAD_STEPS:
            reason = f"{run.bad_in_a_row} bad steps in a row"
        why = f"config.training.rollbacks={limit} are used up"
        if latest is None:
            why = "there is no checkpoint to go back to"
        text = f"{reason} up to step {run.step}, and {why}: stopping"
    log.event(
        "rollback" if allowed else "bad_numbers",
        run.step,
        text,
        bad_steps_in_a_row=run.bad_in_a_row,
        rollbacks=run.position.rollbacks,
    )
    return allowed


def go_back(program: TrainProgram, checkpoints: Checkpoints, run: Run) -> tuple[Resumed, list[str]]:
    """Return the newest checkpoint, with the data after the batches that made the run go back, and
    lines to report.

    Args:
        program: the run's program, without fallbacks to BF16.
        checkpoints: checkpoints of the run.
        run: the run that goes back.
    """
    lines: list[str] = []
    resumed = resume(program, checkpoints, lines.append)
    lines.append(
        f"back to the checkpoint of step {resumed.step}; "
        f"batches {resumed.step + 1} to {run.step} are passed over"
    )
    # The checkpoint may be older than a fallback, which stays.
    before = resumed.position.fallback.split(",")
    later = ",".join(part for part in run.position.fallback.split(",") if part not in before)
    program = resumed.program.fallen_back(later)
    position = run.position._replace(
        skipped_batches=run.batch - resumed.step, rollbacks=run.position.rollbacks + 1
    )
    state = without_fallen(program, resumed.state)
    calibrate = tuple(role for role in resumed.calibrate if role in state.scaling)
    resumed = resumed._replace(program=program, state=state, position=position, calibrate=calibrate)
    return resumed, lines


def save_after_failure(run: Run, saver: Saver) -> str:
    """Save the state if it is still there; return what there is to continue from."""
    latest = saver.checkpoints.latest_step()
    before = f"the newest checkpoint is of step {latest}"
    if latest is None:
        before = "nothing is saved"
    if not run.step or run.step == latest or jax.process_count() > 1:
        return before
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state)):
        return before
    try:
        if saver.unsound(run):
            return before
        saver.save_last(run)
    except (jax.errors.JaxRuntimeError, CheckpointError):
        return before
    return f"step {run.step} is saved"
