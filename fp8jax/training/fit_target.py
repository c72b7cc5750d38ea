"""Choose what a run would choose on devices that need not be there, and compile it for them.

found = fit_target(config, target)          # the audit's; compiles as many programs as a run would
found.config, found.compiled, found.rows()
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fp8jax import config as config_lib
from fp8jax.audit import limits, program, targets
from fp8jax.audit.limits import Limit
from fp8jax.audit.roofline import DEVICES, estimate
from fp8jax.config import Config
from fp8jax.data import tokenizer
from fp8jax.models.definition import Definition, define
from fp8jax.models.flops import model_flops
from fp8jax.parallel.mesh import make_mesh
from fp8jax.training import fit
from fp8jax.training.estimates import Formula, Option
from fp8jax.training.fit_advice import nothing_fits
from fp8jax.training.fit_options import Plan, candidates
from fp8jax.training.step import TrainProgram


class Compiled(NamedTuple):
    """A step compiled for a target: the program, its trace, the executable, its text where it has none itself, seconds.

    statistics: the executable of the step with statistics, where it was needed to know what fits.
    """

    step: TrainProgram
    traced: Any
    executable: Any
    text: str | None
    seconds: float
    statistics: Any = None


@dataclasses.dataclass(frozen=True)
class TargetFit:
    """What a run would run with on a target.

    config: nothing is left open in it.
    compiled: its step; None where the compiler refuses it for its size.
    choice: how it was found; None where nothing was compiled.
    limit: what a device has; None where that is not known.
    advice: what to do where nothing fits; empty where it fits.
    options: all there were.
    """

    config: Config
    definition: Definition
    mesh: Mesh
    compiled: Compiled | None
    choice: fit.Choice | None
    limit: Limit | None
    advice: str
    options: list[Option]

    def rows(self) -> list[dict[str, Any]]:
        """Every option as plain values: estimates of all, what was found for those that were compiled; the fastest first."""
        formula = Formula(self.config, self.definition, self.mesh)
        ranking = fit.Ranking(self.config, self.definition, self.mesh, self.options)
        for plan in self.choice.tried:
            ranking.add(plan)
        tried = {plan.option: plan for plan in self.choice.tried}
        rows = []
        for option in self.options:
            plan = tried.get(option)
            compiled = None
            if plan is not None:
                compiled = {"bytes_per_device": plan.needs, "step_seconds": plan.seconds}
            rows.append(
                dataclasses.asdict(option)
                | {
                    "estimated_bytes_per_device": int(ranking.needs(option)),
                    "estimated_seconds": formula.seconds(option),
                    "compiled": compiled,
                    "chosen": option == self.choice.plan.option,
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
        config: of the run.
        target: its devices.
        say: receives a line before each compilation.
        with_statistics: steps with statistics must fit, too, as in a run.

    Raises:
        ConfigError: the mesh does not fit the target or the model.
    """
    definition = define(config.model, tokenizer.vocab_size(config))
    mesh = make_mesh(definition.complete(config), target.devices)
    limit = limits.of_target(target)

    def compiled(option: Option) -> Plan:
        say(f"compiling the step with {option}")
        plan = compile_plan(option.of(config), definition, mesh, target)
        if with_statistics and fit.needs_statistics(config, plan, limit):
            say(f"compiling the step with {option} and statistics")
            return _with_statistics(plan, target)
        return plan

    found = fit.choose(config, definition, mesh, limit, compiled)
    advice = ""
    if limit is not None and not found.fits:
        advice = nothing_fits(config, definition, mesh, limit, found.plan)
    chosen = found.plan.option.of(config)
    options = candidates(config, definition, mesh)
    return TargetFit(chosen, definition, mesh, found.plan.program, found, limit, advice, options)


def compile_plan(
    config: Config, definition: Definition, mesh: Mesh, target: targets.Target
) -> Plan:
    """Compile a step for a target and read what a device needs, and its seconds where the rates are known."""
    training = config_lib.settled(config).training
    option = Option(training.microbatches, training.loss_chunk, training.remat)
    try:
        compiled = compile_step(config, definition, mesh, target)
    except jax.errors.JaxRuntimeError as error:
        if (needs := fit.bytes_of_failure(error)) is None:
            raise
        return Plan(option, needs)
    needs = fit.needed_bytes(compiled.step, program.read_memory(compiled.executable))
    return Plan(option, needs, compiled, roofline_seconds(compiled, target))


def _with_statistics(plan: Plan, target: targets.Target) -> Plan:
    """The plan with what the step with statistics needs, where that is more."""
    compiled = plan.program
    step = compiled.step
    traced = step.jitted_step(collect=True).trace(step.abstract_state, step.abstract_batch)
    try:
        executable, _ = targets.compile_step(traced, target)
    except jax.errors.JaxRuntimeError as error:
        if (needs := fit.bytes_of_failure(error)) is None:
            raise
        return plan._replace(needs=max(plan.needs, needs))
    needs = fit.needed_bytes(step, program.read_memory(executable))
    both = compiled._replace(statistics=executable)
    return plan._replace(needs=max(plan.needs, needs), program=both)


def compile_step(
    config: Config, definition: Definition, mesh: Mesh, target: targets.Target
) -> Compiled:
    """Trace and compile a training step for a target."""
    started = time.perf_counter()
    step = TrainProgram(config, definition, mesh)
    traced = step.jitted_step().trace(step.abstract_state, step.abstract_batch)
    executable, text = targets.compile_step(traced, target)
    return Compiled(step, traced, executable, text, time.perf_counter() - started)


def roofline_seconds(compiled: Compiled, target: targets.Target) -> float | None:
    """Seconds of a step at peak rates; None where they, or the program, are not known."""
    if target.kind not in DEVICES:
        return None
    try:
        reading = program.read(compiled.executable, compiled.step.mesh, compiled.text)
    except program.UnreadableError:
        return None
    config, definition = compiled.step.config, compiled.step.definition
    flops = model_flops(
        definition.config,
        definition.vocab_size,
        sequences=config.training.batch_size,
        sequence_length=config.data.sequence_length,
    ).total
    mesh = compiled.step.mesh
    found = estimate(
        reading,
        DEVICES[target.kind],
        mesh,
        per_node=target.per_node,
        model_flops=flops / mesh.size,
    )
    return found.step_seconds
