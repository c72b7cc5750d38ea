"""The tools of a run while it steps."""

import dataclasses
import pathlib

from fp8jax.monitor.run_log import RunLog
from fp8jax.monitor.writers import Silent
from fp8jax.parallel import distributed
from fp8jax.training.checkpoint import Checkpoints
from fp8jax.training.evaluation import Evaluator
from fp8jax.training.guards import Guards
from fp8jax.training.hooks import Hooks
from fp8jax.training.profiling import ProfileWindow
from fp8jax.training.run import Run
from fp8jax.training.save_policy import Saver
from fp8jax.training.step_clock import Feed, StepClock


@dataclasses.dataclass
class Tools:
    """The tools of a run while it steps.

    Attributes:
        workdir: directory of the run.
        guards: signals and limits of time.
        log: files and terminal.
        hooks: when side jobs are due.
        evaluator: evaluator of the held-out text.
        profile: the window that is traced.
        saver: saver of checkpoints.
        agreement: agreement of all processes on whether to stop, to save, and whether a save is
            running.
        clock: clock of steps, with the batches; that of `starting.start` once the data is open.
    """

    workdir: pathlib.Path
    guards: Guards
    log: RunLog
    hooks: Hooks
    evaluator: Evaluator
    profile: ProfileWindow | Silent
    saver: Saver
    agreement: distributed.Agreement
    clock: StepClock

    @staticmethod
    def of(
        run: Run,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        log: RunLog,
        guards: Guards,
    ) -> "Tools":
        """Make the tools of a run."""
        config = run.config
        evaluator = Evaluator(run.program.plan)
        profile = Silent()
        if distributed.is_first():
            profile = ProfileWindow(config.profile, workdir / "profile")
        return Tools(
            workdir,
            guards,
            log,
            Hooks.of(run, evaluator),
            evaluator,
            profile,
            Saver(config.checkpoint, checkpoints, log, guards.watchdog),
            distributed.Agreement(3),
            StepClock(Feed(iter(()))),
        )
