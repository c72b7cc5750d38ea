"""Choose what a run would choose on devices that need not be there, and compile it for them.

found = fit_target(config, target)          # the audit's; compiles as many programs as a run would
found.plan, found.compiled, found.rows()
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fp8jax import config as config_lib
from fp8jax.audit import limits, program, targets
from fp8jax.audit.limits import Limit
from fp8jax.audit.roofline import DEVICES, estimate
from fp8jax.config import Config
from fp8jax.plan import Plan, make_plan
from fp8jax.training import fit
from fp8jax.training.estimates import Formula, Option
from fp8jax.training.fit_advice import nothing_fits
from fp8jax.training.fit_options import Compiled, candidates
from fp8jax.training.step import TrainProgram


class CompiledStep(NamedTuple):
    """A step compiled for a target: the program, its trace, the executable, its text if it has none
    itself, seconds.

    Attributes:
        statistics: the executable of the step with statistics, if it was needed to find what fits.
    """

    step: TrainProgram
    traced: Any
    executable: Any
    text: str | None
    seconds: float
    statistics: Any = None


@dataclasses.dataclass(frozen=True)
class TargetFit:
    """The options of a run on a target.

    Attributes:
        plan: the plan, without open fields in its config.
        compiled: its step; None if the compiler refuses it for its size.
        choice: how it was found; without trials if no program was compiled.
        limit: a device's memory; None if unknown.
        advice: what to do if no option fits; empty if one fits.
        options: all options.
    """

    plan: Plan
    compiled: CompiledStep | None
    choice: fit.Choice
    limit: Limit | None
    advice: str
    options: list[Option]

    def rows(self) -> list[dict[str, Any]]:
        """Return every option as plain values, the fastest first: estimates of all, figures of the
        compiled ones.
        """
        formula = Formula(self.plan)
        ranking = fit.Ranking(self.plan, self.options)
        for each in self.choice.tried:
            ranking.add(each)
        tried = {each.option: each for each in self.choice.tried}
        rows = []
        for option in self.options:
            found = tried.get(option)
            compiled = None
            if found is not None:
                compiled = {"bytes_per_device": found.needs, "step_seconds": found.seconds}
            rows.append(
                dataclasses.asdict(option)
                | {
                    "estimated_bytes_per_device": int(ranking.needs(option)),
                    "estimated_seconds": formula.seconds(option),
                    "compiled": compiled,
                    "chosen": option == self.choice.best.option,
                }
            )
        return sorted(rows, key=lambda row: row["estimated_seconds"])


def fit_target(
    config: Config,
    target: targets.Target,
    say: Callable[[str], None] = lambda line: None,
    *,
    with_statistics: bool = False,
) -> TargetFit:
    """Choose and compile for a target.

    Args:
        config: the run's configuration.
        target: its devices.
        say: receives a line before each compilation.
        with_statistics: steps with statistics must fit, too, as in a run.

    Raises:
        ConfigError: the mesh does not fit the target or the model.
    """
    plan = make_plan(config, target.devices)
    limit = limits.of_target(target)

    def compiled(option: Option) -> Compiled:
        say(f"compiling the step with {option}")
        found = compile_option(plan.change(option.of(config)), target)
        if with_statistics and fit.needs_statistics(config, found.needs, limit):
            say(f"compiling the step with {option} and statistics")
            return _with_statistics(found, target)
        return found

    choice = fit.choose(plan, limit, compiled)
    advice = ""
    if limit is not None and not choice.fits:
        advice = nothing_fits(plan, limit, choice.best)
    chosen = plan.change(choice.best.option.of(config))
    return TargetFit(chosen, choice.best.program, choice, limit, advice, candidates(plan))


def compile_option(plan: Plan, target: targets.Target) -> Compiled:
    """Compile a step for a target, and read what a device needs, and its seconds if the rates are
    known.
    """
    training = config_lib.settled(plan.config).training
    option = Option(training.microbatches, training.loss_chunk, training.remat)
    try:
        compiled = compile_step(plan, target)
    except jax.errors.JaxRuntimeError as error:
        if (needs := fit.bytes_of_failure(error)) is None:
            raise
        return Compiled(option, needs)
    needs = fit.needed_bytes(compiled.step, program.read_memory(compiled.executable))
    return Compiled(option, needs, compiled, roofline_seconds(compiled, target))


def _with_statistics(found: Compiled, target: targets.Target) -> Compiled:
    """Return an option with the needs of the step with statistics, if those are larger."""
    compiled = found.program
    step = compiled.step
    traced = step.jitted_step(collect=True).trace(step.abstract_state, step.abstract_batch)
    try:
        executable, _ = targets.compile_step(traced, target)
    except jax.errors.JaxRuntimeError as error:
        if (needs := fit.bytes_of_failure(error)) is None:
            raise
        return found._replace(needs=max(found.needs, needs))
    needs = fit.needed_bytes(step, program.read_memory(executable))
    both = compiled._replace(statistics=executable)
    return found._replace(needs=max(found.needs, needs), program=both)


def compile_step(plan: Plan, target: targets.Target) -> CompiledStep:
    """Trace and compile a training step for a target."""
    started = time.perf_counter()
    step = TrainProgram(plan)
    traced = step.jitted_step().trace(step.abstract_state, step.abstract_batch)
    executable, text = targets.compile_step(traced, target)
    return CompiledStep(step, traced, executable, text, time.perf_counter() - started)


def roofline_seconds(compiled: CompiledStep, target: targets.Target) -> float | None:
    """Return the seconds of a step at peak rates; None if they, or the program, are unknown."""
    if target.kind not in DEVICES:
        return None
    try:
        reading = program.read(compiled.executable, compiled.step.mesh, compiled.text)
    except program.UnreadableError:
        return None
    mesh, flops = compiled.step.mesh, compiled.step.plan.flops().total
    found = estimate(
        reading,
        DEVICES[target.kind],
        mesh,
        per_node=target.per_node,
        model_flops=flops / mesh.size,
    )
    return found.step_seconds
