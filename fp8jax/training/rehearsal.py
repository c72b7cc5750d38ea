"""Rehearse a run: compile every program that it will execute, read its first data, check what its
start checks.

    found = rehearse(config, target)            # does not train or write, and allocates only the first batches
    found.ok, found.programs, found.checks

A rehearsal finds what would end a run hours after its start. A fault is a row, not an exception, so
that the others are checked as well. `compiling=False` only traces, which finds wrong shapes and
fallbacks at every size in seconds.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fp8jax.audit import program, targets
from fp8jax.audit.gemms import fp8_share
from fp8jax.audit.limits import Limit
from fp8jax.audit.roofline import DEVICES
from fp8jax.config import Config, DataConfig, MeshConfig, settled
from fp8jax.data import pipeline, tokenizer
from fp8jax.numerics.roles import BLOCK_ROLES
from fp8jax.plan import make_plan
from fp8jax.training.banner import check_attention, check_fallbacks
from fp8jax.training.estimates import Option, state_bytes
from fp8jax.training.fit import UNKNOWN, Choice
from fp8jax.training.fit_options import Compiled, gigabytes
from fp8jax.training.fit_target import TargetFit, fit_target
from fp8jax.training.programs import programs
from fp8jax.training.step import TrainProgram

_ALONE = ("init", "sampling")  # programs that run without a training state beside them
_FORWARD = 1 / 3  # part of the model's FLOPs


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """One program, or one check.

    Attributes:
        name: as in programs.py.
        ok: whether the run would get past it.
        error: one line; empty if it is ok.
        peak_bytes_per_device: peak with all that is in a device's memory meanwhile; None if not
            compiled.
        fp8_share: FP8 part of the block's GEMM FLOPs, traced; None without such GEMMs.
        seconds: seconds that tracing and compiling took.
    """

    name: str
    ok: bool
    error: str = ""
    peak_bytes_per_device: int | None = None
    fp8_share: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """The results of a rehearsal; `config` has no open fields, if one was found."""

    config: Config
    programs: list[Rehearsed]
    checks: list[Rehearsed]
    limit: Limit | None = None

    @property
    def ok(self) -> bool:
        """Return True if nothing would fail."""
        return all(row.ok for row in (*self.programs, *self.checks))


def rehearse(
    config: Config,
    target: targets.Target,
    *,
    compiling: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Rehearsal:
    """Rehearse a run on a target.

    Args:
        config: the run's configuration.
        target: its devices, at hand or not.
        compiling: with False, only trace.
        say: receives a line before each slow part.
    """
    say("reading the first batches")
    checks = [_check("data", lambda: _read_data(config))]
    found: list[TargetFit] = []

    def fitted() -> None:
        if compiling:
            found.append(fit_target(config, target, say, with_statistics=True))
        else:
            found.append(_traced(config, target))

    mesh = _check("mesh", fitted)
    if mesh.error != checks[0].error or mesh.ok:  # without data there is no vocabulary either
        checks.append(mesh)
    if not found:
        return _without(config, target, checks, say)
    chosen = found[0]
    if compiling:
        checks.append(Rehearsed("memory", not chosen.advice, chosen.advice))
    checks.append(_check("fallback", lambda: check_fallbacks(chosen.plan)))
    if target.kind == "local":
        checks.append(_check("attention", lambda: check_attention(chosen.plan)))
    rows = list(_programs(chosen, target, compiling, say))
    if compiling:
        checks += _limits(chosen, target, {row.name: row for row in rows})
    return Rehearsal(chosen.plan.config, rows, checks, chosen.limit)


def _without(
    config: Config,
    target: targets.Target,
    checks: list[Rehearsed],
    say: Callable[[str], None],
) -> Rehearsal:
    """Check what can be checked if the data or the mesh is wrong: all programs, traced, with valid
    ones in their place.
    """
    data = dataclasses.replace(DataConfig(), sequence_length=config.data.sequence_length)
    sound = dataclasses.replace(config, data=data, mesh=MeshConfig())
    found: list[TargetFit] = []
    one = dataclasses.replace(target, devices=target.devices[:1])
    model = _check("model", lambda: found.append(_traced(sound, one)))
    if not found:
        return Rehearsal(config, [], [*checks, model])
    say("memory and limits are not checked; programs are traced on one device, with other data")
    checks.append(_check("fallback", lambda: check_fallbacks(found[0].plan)))
    return Rehearsal(config, list(_programs(found[0], one, False, say)), checks)


def _traced(config: Config, target: targets.Target) -> TargetFit:
    """Return the simplest option, which has the largest arrays, not compiled."""
    plan = make_plan(settled(config), target.devices)
    training = plan.config.training
    option = Option(training.microbatches, training.loss_chunk, training.remat)
    untried = Choice(Compiled(option, UNKNOWN), [], True)
    return TargetFit(plan, None, untried, None, "", [])


def _program(found: TargetFit) -> TrainProgram:
    return TrainProgram(found.plan)


def _programs(
    found: TargetFit, target: targets.Target, compiling: bool, say: Callable[[str], None]
) -> Iterator[Rehearsed]:
    """Yield every program of the run; the step is not compiled twice."""
    state = state_bytes(_program(found).abstract_state)
    for name, each in programs(found.plan).items():
        say(f"{'compiling' if compiling else 'tracing'} {name}")
        started, share, peak = time.perf_counter(), None, None
        try:
            traced = each.trace()
            share = _share(traced)
            if compiling:
                executable = _executable(found, name, traced, target)
                memory = program.read_memory(executable)
                peak = _peak(name, memory, state, target)
            error = _too_large(peak, found.limit)
        except (
            Exception
        ) as failure:  # any reason why a program cannot be made: the others are checked as well
            error = one_line(failure)
        seconds = round(time.perf_counter() - started, 2)
        yield Rehearsed(name, not error, error, peak, share, seconds)


def _executable(found: TargetFit, name: str, traced: Any, target: targets.Target) -> Any:
    ready = found.compiled and {
        "step": found.compiled.executable,
        "statistics": found.compiled.statistics,
    }
    if ready and ready.get(name) is not None:
        return ready[name]
    return targets.compile_step(traced, target)[0]


def _peak(name: str, memory: program.Memory, state: int, target: targets.Target) -> int:
    """Return the bytes of a device while a program runs; a run's state is there even if the program
    does not use it.
    """
    if name.startswith(_ALONE):
        return memory.peak_bytes
    taken = sum(
        memory.arguments.get(part, 0) for part in ("params", "scaling", "optimizer", "counters")
    )
    copy = state if target.platform == "cpu" else 0
    return memory.peak_bytes + max(state - taken, 0) + copy


def _share(traced: Any) -> float | None:
    gemms = program.traced_gemms(traced.jaxpr)
    if not any(gemm.role in BLOCK_ROLES for gemm in gemms):
        return None
    return fp8_share(gemms, BLOCK_ROLES)


def _too_large(peak: int | None, limit: Limit | None) -> str:
    if peak is None or limit is None or peak <= limit.bytes:
        return ""
    return (
        f"needs {gigabytes(peak)} a device, and there are {gigabytes(limit.bytes)} ({limit.source})"
    )


def _read_data(config: Config) -> None:
    """Read the first two batches, the held-out split and the tokenizer."""
    tokenizer.vocab_size(config)
    batches = pipeline.train_batches(config)
    for step in (0, 1):
        batches[step]
    for stream in pipeline.held_out_streams(config).values():
        next(iter(pipeline.held_out_batches(config, 1, sequences=1, stream=stream)))


def _limits(
    found: TargetFit, target: targets.Target, rows: dict[str, Rehearsed]
) -> Iterator[Rehearsed]:
    """Compare times with the limits after which a run ends itself: seconds of compiling here, and
    times at peak rates.
    """
    training, evaluation = found.plan.config.training, rows.get("evaluation")
    steps = [row for row in rows.values() if "sampling" not in row.name]
    start = sum(row.seconds or 0 for row in steps if row.name in ("init", "calibration", "step"))
    slowest = max((row.seconds or 0 for row in steps if row.name != "step"), default=0)
    step = _seconds(found, target, found.plan.config.training.batch_size)
    parts = found.plan.config.training.batch_size // found.plan.config.training.microbatches
    batch = _seconds(found, target, parts) * _FORWARD
    yield _within("start", "training.start_limit", training.start_limit, start, "compiling")
    yield _within("step", "training.step_limit", training.step_limit, step + slowest, "a step")
    seconds = batch + (evaluation.seconds or 0 if evaluation else 0)
    what = "a batch of an evaluation"
    yield _within(
        "evaluation", "training.evaluation_limit", training.evaluation_limit, seconds, what
    )


def _within(name: str, field: str, limit: int, seconds: float, what: str) -> Rehearsed:
    error = ""
    if limit and seconds > limit:
        error = f"config.{field}: {limit} s, and {what} takes at least {seconds:,.0f} s: raise it"
    return Rehearsed(f"{name} limit", not error, error, seconds=round(seconds, 2))


def _seconds(found: TargetFit, target: targets.Target, sequences: int) -> float:
    """Return the seconds of training on `sequences`, at peak rates of the device, or as measured on
    this machine.
    """
    flops = found.plan.flops(sequences).total
    device = DEVICES.get(target.kind)
    rate = device.fp8 * found.plan.mesh.size if device else _measured_rate()
    return flops / rate


def _measured_rate(width: int = 1024) -> float:
    """Return the FLOP/s of a matrix product on this machine's processors, all together."""
    a = np.ones((width, width), np.float32)
    np.matmul(a, a)
    started = time.perf_counter()
    np.matmul(a, a)
    return 2 * width**3 / (time.perf_counter() - started)


def _check(name: str, work: Callable[[], Any]) -> Rehearsed:
    started = time.perf_counter()
    try:
        work()
    except Exception as failure:  # any error would end the run's start
        return Rehearsed(name, False, one_line(failure))
    return Rehearsed(name, True, seconds=round(time.perf_counter() - started, 2))


def one_line(failure: Exception) -> str:
    """Return an exception's message, with its kind if the message is not meant for users."""
    text = " ".join(str(failure).split())[:500]
    if isinstance(failure, (ValueError, OSError)) and text:
        return text
    return f"{type(failure).__name__}: {text}"
