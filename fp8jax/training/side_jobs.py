"""Do the loop's work besides steps: statistics, the held-out loss, the log, and the early warning's
actions.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax

from fp8jax.monitor import layered, outliers
from fp8jax.monitor.warning_actions import Decision
from fp8jax.training.calibration import without_fallen
from fp8jax.training.ending import End
from fp8jax.training.evaluation import write_json
from fp8jax.training.losses import Batch
from fp8jax.training.probe import Probe
from fp8jax.training.run import Run
from fp8jax.training.step import TrainProgram
from fp8jax.training.tools import Tools

_SHOWN = ("loss", "perplexity", "bits_per_byte", "tokens")


def compile_statistics(run: Run, tools: Tools) -> None:
    """Compile the step with statistics, and leave the time out of the timing of ordinary steps."""
    jax.block_until_ready(run.state.step)
    if run.program.is_compiled(collect=True):
        return
    tools.log.message("compiling the step with statistics, once; not counted in tok/s and ETA")
    with tools.clock.left_out():
        began = time.perf_counter()
        run.program.compiled_step(collect=True)
        seconds = time.perf_counter() - began
    tools.log.message(f"compiled in {seconds:.1f} s")


def probe(run: Run, tools: Tools, batch: Batch) -> dict[str, float]:
    """Measure what FP8 does to the gradients of the next step, and change nothing; return numbers
    for the log.
    """
    with tools.clock.left_out():
        jax.block_until_ready(run.state.step)
        return _probe_of(run.program).harm(run.state, batch).entries()


@functools.lru_cache(maxsize=1)
def _probe_of(program: TrainProgram) -> Probe:
    return Probe(program)


def evaluate(run: Run, tools: Tools) -> dict[str, float]:
    """Take the held-out loss of the present state; return the numbers for the step's line of the
    log.
    """
    watchdog, evaluator = tools.guards.watchdog, tools.evaluator
    jax.block_until_ready(run.state.step)
    watchdog.end("step")

    def begin_batch(done: int, batches: int) -> None:
        what = f"evaluation of step {run.step}, batch {done + 1} of {batches}"
        watchdog.begin("evaluation", what)

    with tools.clock.left_out():
        found = evaluator(run.state.params, begin_batch)
    watchdog.end("evaluation")
    watchdog.begin("step", f"what follows the evaluation of step {run.step}")
    run.held_out_loss = found["loss"]
    tools.log.message(
        f"step {run.step}  held-out loss {found['loss']:.4f}  "
        f"bits per byte {found['bits_per_byte']:.4f}  ({evaluator.part()})"
    )
    path = tools.workdir / "eval.json"
    try:
        write_json(path, {"step": run.step, **found})
    except OSError as error:
        tools.log.message(f"{path} is not written: {error.strerror}; training goes on")
    return _entries(found)


def _entries(found: dict[str, Any]) -> dict[str, float]:
    """Name the numbers of an evaluation as the log does: held_out/loss, held_out/TEXT/loss."""
    entries = {f"held_out/{name}": found[name] for name in _SHOWN}
    for text, values in found.get("texts", {}).items():
        entries |= {f"held_out/{text}/{name}": values[name] for name in _SHOWN}
    return entries


def log_faults(run: Run, tools: Tools, step: int, faults: Sequence[str]) -> None:
    """Log the sequences of this step's batch that could not be read, and count them."""
    if not faults:
        return
    count = run.position.unread_sequences + len(faults)
    run.position = run.position._replace(unread_sequences=count)
    tools.log.event(
        "data_fault",
        step,
        f"step {step}: {len(faults)} of its sequences skipped ({count} in all): {faults[0]}",
        fault=faults[0],
        sequences=len(faults),
        in_all=count,
    )


def log_step(
    run: Run, tools: Tools, metrics: dict[str, jax.Array], taps: Any, found: dict[str, float]
) -> Decision | None:
    """Write and show a step; return the early warning's decision, if any.

    Args:
        run: the run after the step; its bad steps in a row are updated.
        tools: tools of the run.
        metrics: scalars of the step, on the devices.
        taps: outlier statistics of the step, empty without them.
        found: numbers of a probe before the step and of an evaluation after it.
    """
    step, log = run.step, tools.log
    entry = {name: value.item() for name, value in jax.device_get(metrics).items()}
    first = run.program.bad_names[entry.pop("first_bad")]
    run.bad_in_a_row = entry.pop("bad_steps_in_a_row")
    tokens = run.config.training.batch_size * run.config.data.sequence_length
    entry["tokens"] = step * tokens
    times = tools.clock.times()
    if times:
        seconds, waited = times
        entry["tokens_per_second"] = tokens / seconds
        entry["step_seconds"] = seconds
        entry["data_wait_seconds"] = waited
        log.message(tools.clock.feed.warning(seconds, waited))
    entry |= found | layered.rounded(outliers.flatten(taps))
    log.write(step, entry)
    decision = run.warning({"step": step, **entry}, log)
    log.show(step, entry)
    if entry["bad_step"]:
        log.event(
            "bad_step",
            step,
            f"step {step} is bad, first in {first}; the update was skipped "
            f"({run.bad_in_a_row} in a row)",
            first=first,
            in_a_row=run.bad_in_a_row,
        )
    tools.clock.restart()
    return decision


def react(run: Run, tools: Tools, decision: Decision | None, *, busy: bool) -> End | None:
    """Do what the early warning asks for; return how the run ends by it, if it does.

    Args:
        run: the run after a step.
        tools: tools of the run.
        decision: the early warning's decision, if any.
        busy: True if a save is running, on any process.
    """
    if decision is None:
        return None
    if decision.action == "rollback":
        return End.WARNING_ROLLBACK
    if decision.action == "stop":
        return End.WARNING_STOP
    if decision.action == "checkpoint":
        tools.saver.save(run, busy=busy)
    else:
        _fall_back(run, tools, decision.overrides)
    return None


def _fall_back(run: Run, tools: Tools, overrides: str) -> None:
    """Continue with another program; every scale that is still in use stays."""
    tools.log.message(f"from the next step on: {overrides}; compiling")
    tools.guards.watchdog.begin("step", f"compiling the step with {overrides}")
    together = ",".join(part for part in (run.position.fallback, overrides) if part)
    run.position = run.position._replace(fallback=together)
    run.program = run.program.fallen_back(overrides)
    run.program.compiled_step()
    tools.clock.restart()
    run.state = without_fallen(run.program, run.state)
