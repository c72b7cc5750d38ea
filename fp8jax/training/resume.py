"""Where a run continues: which checkpoint, which data, and whether the config is still that of the run.

Call `check_continues` first, which refuses what would make it another run, then `resume`.
"""

import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from fp8jax import config as config_lib
from fp8jax.config import Config, ConfigError
from fp8jax.data import fingerprints, tokenizer
from fp8jax.monitor.stages import Stages
from fp8jax.parallel import distributed
from fp8jax.training import manifest, scaling_state, state_formats
from fp8jax.training.calibration import fresh_scaling
from fp8jax.training.checkpoint import CheckpointError, Checkpoints, load_config
from fp8jax.training.conversion import abstract_state_kept_as, kept_as_configured
from fp8jax.training.fit_options import OPEN
from fp8jax.training.fixed_fields import is_fixed
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram


class Position(NamedTuple):
    """Where a run stands beyond the step.

    Batches passed over by rollbacks, how many of those, what fell back, as `fp8.overrides`, sequences that could not be read, and
    what the early warning knows of the losses (monitor/trend.py).
    """

    skipped_batches: int = 0
    rollbacks: int = 0
    fallback: str = ""
    unread_sequences: int = 0
    losses: dict[str, Any] | None = None


class Resumed(NamedTuple):
    """A program and a state to go on with; `calibrate`: roles whose scales are still unknown."""

    program: TrainProgram
    state: TrainState
    step: int
    position: Position
    calibrate: tuple[str, ...]


def finished_step(config: Config, checkpoints: Checkpoints, stage: Stages) -> int | None:
    """The step of a run that has all its steps and a sound checkpoint of the last; None where there is something left to do."""
    latest = distributed.from_first(-1 if (step := checkpoints.latest_step()) is None else step)
    if latest < config.training.steps:
        return None
    with stage(f"checking the checkpoint of step {latest}"):
        step, _ = checkpoints.newest()
    return step if step is not None and step >= config.training.steps else None


def restore(program: TrainProgram, checkpoints: Checkpoints, stage: Stages) -> Resumed:
    """As `resume`, with words on what is done and where the run goes on."""
    latest, lines = (
        distributed.from_first(-1 if (step := checkpoints.latest_step()) is None else step),
        [],
    )
    with stage(
        "initialising the weights" if latest < 0 else f"restoring the checkpoint of step {latest}"
    ):
        resumed = resume(program, checkpoints, lines.append)
    if latest >= 0:
        lines.append(f"continuing from step {resumed.step} of {program.config.training.steps}")
    for line in lines:
        stage.message(line)
    return resumed


def resume(program: TrainProgram, checkpoints: Checkpoints, tell: Callable[[str], None]) -> Resumed:
    """The newest checkpoint whose files are what was written; a fresh state where there is none.

    Args:
        program: of this run, without what has fallen back to BF16.
        checkpoints: of its directory. Damaged ones newer than the chosen one are set aside, under another name.
        tell: receives a line for each that is passed over, and for what of the state does not fit the configuration.

    Raises:
        CheckpointError: there are only damaged checkpoints.
    """
    step = _choose(checkpoints, tell)
    if step < 0:
        return Resumed(
            program, program.init(), 0, Position(), tuple(program.abstract_state.scaling)
        )
    data = checkpoints.data_state(step)
    position = Position(
        *(data.get(name, default) for name, default in Position._field_defaults.items())
    )
    program = program.fallen_back(position.fallback)
    optimizer = program.config.optimizer
    saved = state_formats.saved_as(optimizer, checkpoints.dtypes(step))
    items = abstract_state_kept_as(program, saved).items()
    if (
        step == 0
    ):  # Nothing has been trained: weights are all that counts, and all that a converted model has.
        found, _ = checkpoints.restore(
            step, {"params": items["params"]}, partial=True, verify=False
        )
        return Resumed(
            program,
            program.init(found["params"]),
            step,
            position,
            tuple(program.abstract_state.scaling),
        )
    items["scaling"] = checkpoints.abstract_item(step, "scaling", program.replicated)
    if saved.name != optimizer.name:
        del items["opt_state"]
    found, _ = checkpoints.restore(step, items, partial=True, verify=False)
    kept, why = scaling_state.choose(program.recipes, found["scaling"], data.get("scaling"))
    if why:
        tell(scaling_state.tell(kept, why))
    found["scaling"] = fresh_scaling(program) | kept if why else kept
    if saved.name != optimizer.name:
        tell(
            f"optimizer {saved.name} in the checkpoint, {optimizer.name} from here on: its moments start anew"
        )
        fresh = program.init(found["params"])
        found |= {"params": fresh.params, "opt_state": fresh.opt_state}
        return Resumed(program, TrainState.from_items(found), step, position, tuple(why))
    state = TrainState.from_items(found)
    if saved != optimizer:
        tell(
            f"optimizer state kept as {state_formats.describe(saved)} in the checkpoint, as {state_formats.describe(optimizer)} from here on"
        )
        state = kept_as_configured(program, state)
    return Resumed(program, state, step, position, tuple(why))


def _choose(checkpoints: Checkpoints, tell: Callable[[str], None]) -> int:
    """Return the newest undamaged checkpoint's step, damaged newer ones set aside; -1 where there is none."""
    step, passed = checkpoints.newest()
    if step is None and any(not reason.startswith(manifest.NAME) for reason in passed.values()):
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in passed.items())
        raise CheckpointError(
            f"{checkpoints.directory}: no checkpoint is undamaged ({reasons}); to train anew choose another --workdir"
        )
    for number, reason in passed.items() if distributed.is_first() else ():
        tell(
            f"checkpoint of step {number} passed over: {reason}; now in {checkpoints.set_aside(number)}"
        )
    return -1 if step is None else step


def check_continues(
    config: Config,
    workdir: pathlib.Path,
    allowed: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Refuse a configuration that would make the run in a directory another one.

    Args:
        config: of the run that is about to start.
        workdir: its directory, which may hold a run already.
        allowed: fields, like 'data.source', that may differ though they make it another run.
        tell: receives a line for each field that differs.

    Raises:
        ConfigError: other such fields differ, all of which are named; or a field that there is not is allowed.
    """
    now = _flat(config)
    for path in allowed:
        if path not in now:
            raise ConfigError(
                f"--allow_config_change={path}: no such field{config_lib.did_you_mean(path, now) or '; as in data.source'}"
            )
    if not (workdir / "config.json").exists():
        return
    old, saved = load_config(workdir), _Saved(workdir)
    changed = {
        path: (before, now[path])
        for path, before in _flat(old).items()
        if before != now[path] and not _is_fitted(path, now[path])
    }
    same = _same_content(config, saved, changed, allowed, tell)
    refused = [
        path
        for path in changed
        if is_fixed(*path.split(".")) and path not in allowed and path not in same
    ]
    if refused:
        listed = ", ".join(
            f"config.{path}: {changed[path][1]!r}, but the run in {workdir} has {changed[path][0]!r}"
            for path in refused
        )
        raise ConfigError(
            f"{listed}; keep it, choose another --workdir, or say --allow_config_change={','.join(refused)}"
        )
    for path, (before, after) in changed.items():
        what = ", the same by content" if path in same else ""
        tell(f"config.{path} is {after!r}, was {before!r}{what}")


class _Saved:
    """What the newest checkpoint of a run was trained with; None of what its manifest does not say."""

    def __init__(self, workdir: pathlib.Path):
        directory = Checkpoints(workdir)
        path = directory.directory / str(directory.latest_step())
        data = manifest.fact(path, "data")
        self.workdir, self.tokenizer = workdir, manifest.fact(path, "tokenizer")
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}


def _same_content(
    config: Config,
    saved: _Saved,
    changed: Collection[str],
    allowed: Sequence[str],
    tell: Callable[[str], None],
) -> set[str]:
    """Return which of the tokenizer and the sources are, by content, those of the run: their names may change then.

    Args:
        config: of the run that is about to start.
        saved: what the run was trained with.
        changed: fields that differ; what differs by name is refused by name.
        allowed: fields that may differ.
        tell: receives a line where held-out text is another.

    Raises:
        ConfigError: a file holds another tokenizer, or a source other data, than when the run was saved.
    """
    same = set()
    if saved.tokenizer is not None and "data.tokenizer" not in allowed:
        found = tokenizer.of(config.data).fingerprint
        if saved.tokenizer != found:
            raise ConfigError(
                f"config.data.tokenizer: is {found}, but the run in {saved.workdir} was trained with {saved.tokenizer}; "
                "restore that file, choose another --workdir, or say --allow_config_change=data.tokenizer"
            )
        same.add("data.tokenizer")
    if not saved.data or "data.source" in allowed:
        return same
    found = fingerprints.of(config.data)
    if fingerprints.same(found["train"], saved.data.get("train")):
        same.add("data.source")
    elif "data.source" not in changed:
        names = (
            ", ".join(fingerprints.changed(found["train"], saved.data.get("train")))
            or config.data.source
        )
        raise ConfigError(
            f"config.data.source: {names} holds other data than the run in {saved.workdir} was trained with; "
            "restore it, choose another --workdir, or say --allow_config_change=data.source"
        )
    if other := fingerprints.changed(found["held_out"], saved.data.get("held_out")):
        tell(
            f"held-out text of {', '.join(other)} is another than before: held-out losses do not compare"
        )
    return same


def _flat(config: Config) -> dict[str, object]:
    return {
        f"{section}.{name}": value
        for section, values in config_lib.to_dict(config).items()
        for name, value in values.items()
    }


def _is_fitted(path: str, value: object) -> bool:
    """True for what a run chooses by itself (fit.py), left open, and for its note of the choice."""
    section, name = path.split(".")
    return section == "training" and (name == "fitted" or name in OPEN and value == OPEN[name])
