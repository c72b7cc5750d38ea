"""List every program that a run executes, by name, to trace, compile or measure it before the run
begins.

    for name, program in programs(plan).items():
        traced = program.trace()                  # allocates nothing
        compiled = traced.lower().compile()

The devices may be compile-only ones. A program is built when it is traced, so that one which cannot
be built raises there. Small helpers that run for milliseconds (such as searching a state for NaN)
are not listed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.config import Config, settled
from fp8jax.interop import generation
from fp8jax.interop.inference import Inference
from fp8jax.plan import LoadedModel, Plan
from fp8jax.training.calibration import jitted_calibration
from fp8jax.training.evaluation import Evaluator
from fp8jax.training.fallbacks import fallbacks
from fp8jax.training.probe import Probe
from fp8jax.training.step import TrainProgram

Call = tuple[Any, tuple[Any, ...]]  # a jitted function, and its arguments as jax.ShapeDtypeStruct


class Program(NamedTuple):
    """A program that is built when it is traced."""

    build: Callable[[], Call]

    def trace(self) -> Any:
        """Return the program as a jax.stages.Traced.

        Raises:
            ConfigError: the program cannot run with this configuration.
        """
        function, arguments = self.build()
        return function.trace(*arguments)


def programs(plan: Plan) -> dict[str, Program]:
    """Return the programs of a run and the commands after it: training, fallbacks if they are on,
    evaluation, sampling.

    Args:
        plan: the run's plan; its devices are at hand or not.

    Returns:
        `init`, `calibration` (with delayed scaling), `step`, `statistics` (a step with them),
        `probe` and `probe, reference` if they are ever taken, for
        each fallback that a warning can ask for `fallback OVERRIDES` and
        `fallback OVERRIDES, statistics`, `evaluation`, `sampling weights`, `sampling prompt`,
        `sampling`.
    """
    config = settled(plan.config)
    run = TrainProgram(plan.change(config))
    found = {"init": Program(lambda: (run.jitted_init(), (None,)))}
    if run.abstract_state.scaling:
        found["calibration"] = Program(
            lambda: (jitted_calibration(run), (run.abstract_state, run.abstract_batch))
        )
    found |= _steps(config, "step", "statistics", lambda: run)
    if config.monitor.probe_every:
        found |= _probe(run)
    for overrides in fallbacks(config.warning, run.recipes):
        name = f"fallback {overrides}"
        found |= _steps(
            config,
            name,
            f"{name}, statistics",
            lambda overrides=overrides: run.fallen_back(overrides),
        )
    found["evaluation"] = Program(lambda: _evaluation(run))
    return found | _sampling(run)


def _steps(
    config: Config, plain: str, with_statistics: str, run: Callable[[], TrainProgram]
) -> dict[str, Program]:
    """Return the step, and the one with statistics if they are ever taken."""

    def build(collect: bool) -> Call:
        program = run()
        return program.jitted_step(collect=collect), (
            program.abstract_state,
            program.abstract_batch,
        )

    found = {plain: Program(lambda: build(False))}
    if config.monitor.every:
        found[with_statistics] = Program(lambda: build(True))
    return found


def _probe(run: TrainProgram) -> dict[str, Program]:
    arguments = run.abstract_state, run.abstract_batch
    return {
        name: Program(lambda function=function: (function, arguments))
        for name, function in Probe(run).jitted().items()
    }


def _evaluation(run: TrainProgram) -> Call:
    evaluator = Evaluator(run.plan)
    return evaluator.total_loss, (run.abstract_state.params, evaluator.abstract_batch)


def _sampling(run: TrainProgram) -> dict[str, Program]:
    def model() -> Inference:
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding),
            run.abstract_state.params,
        )
        return Inference(LoadedModel(run.plan, params))

    names = {"sampling weights": "weights", "sampling prompt": "prompt", "sampling": "decode"}
    return {
        name: Program(lambda kind=kind: generation.abstract_calls(model())[kind])
        for name, kind in names.items()
    }
