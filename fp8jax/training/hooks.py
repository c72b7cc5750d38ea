"""Decide when the side jobs of the loop are due, each every `every` steps.

    hooks = Hooks.of(run, evaluator)
    if hooks.statistics.is_due(step):
        ...

side_jobs.py does them. Saving has a policy of its own (save_policy.py), the profile a window
(profiling.py).
"""

import dataclasses

from fp8jax.training.evaluation import Evaluator
from fp8jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Hook:
    """The schedule of a side job.

    Attributes:
        every: steps between; 0 for never.
        also: one more step at which it is due.
    """

    every: int
    also: int | None = None

    def is_due(self, step: int) -> bool:
        """Return True if the job is due after this step, counted from 1."""
        return step == self.also or (self.every > 0 and step % self.every == 0)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The schedules of a run's side jobs.

    Attributes:
        log: a line of metrics.jsonl; also due if another of these is.
        statistics: outlier statistics, in the step itself.
        evaluation: the held-out loss.
        probe: what FP8 does to the gradients of a step, measured before it; never without FP8.
    """

    log: Hook
    statistics: Hook
    evaluation: Hook
    probe: Hook

    @staticmethod
    def of(run: Run, evaluator: Evaluator) -> "Hooks":
        """Return the hooks of a run; it is evaluated at its end, too, if there is text for it."""
        config = run.config
        evaluation = Hook(0)
        if evaluator.sequences:
            evaluation = Hook(config.evaluation.every, also=config.training.steps)
        in_fp8 = any(recipe.fp8 for _, recipe in run.program.recipes.by_role().values())
        probe = Hook(config.monitor.probe_every if in_fp8 else 0)
        return Hooks(Hook(config.log.every), Hook(config.monitor.every), evaluation, probe)
