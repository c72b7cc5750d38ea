"""Choose microbatches, chunked loss and rematerialisation, if the config leaves them open, so that
a run fits its devices.

    fitted = fit(plan, workdir)     # before the first step; compiles, allocates nothing
    fitted.config, fitted.program, fitted.lines

A closed formula (estimates.py) ranks the options by their time at peak rates, and predicts which
fit; compiled plans decide. Usually the first compiled program is the one that trains. A choice is
written into the run's config.json as `training.fitted`; the run continues with it on the same
devices, bit for bit, and finds another one elsewhere.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from fp8jax import config as config_lib
from fp8jax.audit import limits, program
from fp8jax.audit.limits import Limit
from fp8jax.config import Config, ConfigError
from fp8jax.parallel import distributed
from fp8jax.plan import Plan
from fp8jax.training.checkpoint import load_config
from fp8jax.training.estimates import Formula, Option, state_bytes
from fp8jax.training.fit_advice import nothing_fits
from fp8jax.training.fit_options import OPEN, Compiled, candidates, gigabytes, open_fields
from fp8jax.training.step import TrainProgram

UNKNOWN = 1 << 50
_MOST = 8  # the most programs that are compiled to find one
_WORTH = 0.97  # another program is compiled if it should take less than this part of the time
_TIGHT = 0.8  # part of the limit from which on the step with statistics is compiled as well, before the run


class Choice(NamedTuple):
    """The option to run with, all compiled ones in order, and whether it fits."""

    best: Compiled
    tried: list[Compiled]
    fits: bool


class Fitted(NamedTuple):
    """A config without open fields, its compiled program, and lines for the log."""

    config: Config
    program: TrainProgram
    lines: list[str]


def fit(plan: Plan, workdir: pathlib.Path | None = None) -> Fitted:
    """Find what fits the devices at hand.

    Args:
        plan: the run's plan; the fields that its config sets are kept. Devices are at hand, those
            of all processes, which all call this and get the same.
        workdir: directory of a run, whose choice is kept if it was made for such devices.

    Raises:
        ConfigError: no option fits; the message says what would.
    """
    lines: list[str] = []
    limit = _agreed(limits.of_devices(list(plan.mesh.devices.flat)))
    hardware = f"{plan.mesh.size} x {plan.device.device_kind}"
    config, earlier = _reopened(plan.config, workdir if distributed.is_first() else None)
    first = _from_first(_earlier_option(config, earlier, hardware, lines.append))

    opened = plan.change(config)

    def compiled(option: Option) -> Compiled:
        return compile_option(opened.change(option.of(config)), limit)

    found = choose(opened, limit, compiled, first)
    if not found.fits and limit is not None:
        raise ConfigError(nothing_fits(opened, limit, found.best))
    if found.tried[0].option == first and found.best.option != first:
        lines.append(f"fit      {first}, with which the run began, does not fit here any more")
    if open_fields(config):
        lines.append(describe(found, limit))
    return Fitted(_recorded(config, found.best.option, hardware), found.best.program, lines)


def choose(
    plan: Plan,
    limit: Limit | None,
    compiled: Callable[[Option], Compiled],
    first: Option | None = None,
) -> Choice:
    """Choose the fastest option that fits, by the formula's ranking and compiled plans.

    Args:
        plan: the run's plan.
        limit: memory of one device; with None, unknown, the first is taken.
        compiled: compiles an option.
        first: an option that is taken if it fits, before all others.
    """
    options = candidates(plan)
    ranking = Ranking(plan, options)
    usable = _usable(limit, options)
    if first in options:
        ranking.add(compiled(first))
        if ranking.tried[-1].needs <= usable:
            return Choice(ranking.tried[-1], ranking.tried, True)
    while len(ranking.tried) < min(_MOST, len(options)):
        option = ranking.next(usable)
        if option is None:
            break
        ranking.add(compiled(option))
    best = ranking.best(usable)
    if best is None:
        return Choice(min(ranking.tried, key=lambda tried: tried.needs), ranking.tried, False)
    return Choice(best, ranking.tried, True)


class Ranking:
    """The options by estimated time; estimates of memory follow the needs of compiled programs."""

    def __init__(self, plan: Plan, options: Sequence[Option]):
        formula = Formula(plan)
        self._seconds = {option: formula.seconds(option) for option in options}
        self._temporaries = {option: formula.temporary_bytes(option) for option in options}
        self._state = state_bytes(TrainProgram(plan).abstract_state)
        self._host = self._state if plan.device.platform == "cpu" else 0
        self._factors: dict[tuple, float] = {}
        self.tried: list[Compiled] = []

    def add(self, compiled: Compiled) -> None:
        """Record the needs of a compiled option."""
        self.tried.append(compiled)
        if compiled.needs == UNKNOWN:
            return
        factor = (compiled.needs - self._state - self._host) / self._temporaries[compiled.option]
        self._factors[_kind(compiled.option)] = self._factors[()] = max(factor, 0.01)

    def needs(self, option: Option) -> float:
        """Return the estimated bytes of a device."""
        factor = self._factors.get(_kind(option), self._factors.get((), 1.0))
        return self._state + self._host + factor * self._temporaries[option]

    def next(self, usable: float) -> Option | None:
        """Return the option to compile next, the fastest that should fit; None if none is worth it."""
        best = self.best(usable)
        compiled = {tried.option for tried in self.tried}
        left = [
            option
            for option in self._seconds
            if option not in compiled and not self._hopeless(option, usable)
        ]
        if best is not None:
            left = [
                option
                for option in left
                if self._seconds[option] < _WORTH * self._seconds[best.option]
            ]
        fitting = [option for option in left if self.needs(option) <= usable]
        if fitting:
            return min(fitting, key=lambda option: (self._seconds[option], option.microbatches))
        least = min(self._seconds, key=self.needs)
        if best is not None or least not in left:
            return None
        return least

    def best(self, usable: float) -> Compiled | None:
        """Return the fastest compiled option that fits."""
        fitting = [tried for tried in self.tried if tried.needs <= usable]
        return min(fitting, key=lambda tried: self._seconds[tried.option], default=None)

    def _hopeless(self, option: Option, usable: float) -> bool:
        """Return True if the same option with smaller microbatches was compiled and did not fit."""
        return any(
            tried.needs > usable
            and _kind(tried.option) == _kind(option)
            and tried.option.microbatches >= option.microbatches
            for tried in self.tried
        )


def compile_option(plan: Plan, limit: Limit | None) -> Compiled:
    """Compile a run's step for the devices at hand and read what one of them needs."""
    step, training = TrainProgram(plan), plan.config.training
    option = Option(training.microbatches, training.loss_chunk, training.remat)
    try:
        needs = _most(_needed(step, collect=False))
        if needs_statistics(plan.config, needs, limit):
            needs = max(needs, _most(_needed(step, collect=True)))
    except jax.errors.JaxRuntimeError as error:
        if (needs := bytes_of_failure(error)) is None:
            raise
    return Compiled(option, needs, step)


def _needed(step: TrainProgram, *, collect: bool) -> int:
    return needed_bytes(step, program.read_memory(step.compiled_step(collect=collect)))


def needed_bytes(step: TrainProgram, memory: program.Memory) -> int:
    """Return the bytes of one device for a step, on a CPU with the copy that saving makes of the
    state.
    """
    on_cpu = step.plan.device.platform == "cpu"
    return memory.peak_bytes + (state_bytes(step.abstract_state) if on_cpu else 0)


def needs_statistics(config: Config, needs: int, limit: Limit | None) -> bool:
    """Return whether the step with statistics might not fit although a step with these needs does."""
    collects = 0 < config.monitor.every <= config.training.steps
    return collects and limit is not None and _TIGHT * limit.usable < needs <= limit.usable


def bytes_of_failure(error: Exception) -> int | None:
    """Return the bytes that a program needs which a compiler refuses for its size; None for other
    errors.

    Compilers for TPUs raise such errors; without a number the result is UNKNOWN, more than any
    device has.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
        return None
    found = re.search(r"(?:Used|allocate|allocating) ([\d.]+) ?([KMGT]?)i?B?", text)
    if not found:
        return UNKNOWN
    return int(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " "))


def describe(found: Choice, limit: Limit | None) -> str:
    """Return the line about a choice."""
    needs = f"needs {gigabytes(found.best.needs)} a device"
    there = "what there is is not known"
    if limit is not None:
        there = f"there are {gigabytes(limit.usable)} ({limit.source})"
    others = f"; {len(found.tried)} programs compiled" if len(found.tried) > 1 else ""
    return f"fit      {found.best.option}: {needs}, {there}{others}"


def _kind(option: Option) -> tuple:
    return option.remat, option.loss_chunk


def _usable(limit: Limit | None, options: Sequence[Option]) -> float:
    """Return the bytes that a plan may need; with no option open it may take all there is."""
    if limit is None:
        return float("inf")
    return limit.usable if len(options) > 1 else limit.bytes


def _agreed(limit: Limit | None) -> Limit | None:
    """Return the limit of the process whose devices have the least memory."""
    if jax.process_count() == 1:
        return limit
    mine = Limit(-1, -1, "") if limit is None else limit
    size, usable = (distributed.least(size >> 20) for size in (mine.bytes, mine.usable))
    return None if size < 0 else Limit(size << 20, usable << 20, mine.source)


def _most(needs: int) -> int:
    """Return the largest need of all processes, because compilers on several machines may plan
    differently.
    """
    return needs if jax.process_count() == 1 else -distributed.least(-(needs >> 20)) << 20


def _reopened(config: Config, workdir: pathlib.Path | None) -> tuple[Config, Config | None]:
    """Return the config with an earlier run's choices open again, and that run's config."""
    earlier = (
        load_config(workdir) if workdir is not None and (workdir / "config.json").exists() else None
    )
    recorded, _ = _read(config)
    again = {
        name: OPEN[name]
        for name, value in recorded.items()
        if str(getattr(config.training, name)) == value
    }
    if not again:
        return config, earlier
    opened = dataclasses.replace(
        config, training=dataclasses.replace(config.training, fitted="", **again)
    )
    return opened, earlier or config


def _earlier_option(
    config: Config, earlier: Config | None, hardware: str, tell: Callable[[str], None]
) -> Option | None:
    """Return the option that the run in the directory has used, if that was on such devices."""
    if earlier is None or not open_fields(config):
        return None
    recorded, devices = _read(earlier)
    if recorded and devices != hardware:
        tell(
            f"fit      the run's choice was made for {devices}; here are {hardware}: it is made anew"
        )
        return None
    kept = {
        name: getattr(config_lib.settled(earlier).training, name) for name in open_fields(config)
    }
    now = config_lib.settled(config).training
    return Option(**{name: kept.get(name, getattr(now, name)) for name in OPEN})


def _from_first(option: Option | None) -> Option | None:
    """Return process 0's option, on every process."""
    if jax.process_count() == 1:
        return option
    policies = config_lib.REMAT_POLICIES
    mine = (
        (-1, 0, 0)
        if option is None
        else (option.microbatches, option.loss_chunk, policies.index(option.remat))
    )
    microbatches, chunk, remat = (distributed.from_first(value) for value in mine)
    return None if microbatches < 0 else Option(microbatches, chunk, policies[remat])


def _recorded(config: Config, option: Option, hardware: str) -> Config:
    """Return the config with the option, and a note of which values were chosen and for which
    devices.
    """
    chosen = " ".join(f"{name}={getattr(option, name)}" for name in open_fields(config))
    fields = dataclasses.asdict(option) | {"fitted": f"{chosen} on {hardware}" if chosen else ""}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **fields))


def _read(config: Config) -> tuple[Mapping[str, str], str]:
    """Return the values and the devices in a note of `_recorded`."""
    chosen, _, hardware = config.training.fitted.partition(" on ")
    pairs = (word.partition("=") for word in chosen.split())
    return {name: value for name, _, value in pairs if name in OPEN}, hardware
