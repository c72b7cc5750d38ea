"""Find where a run continues: which checkpoint, which data, and whether the config is still that of
the run.

Call `check_continues` first, which refuses changes that would make it another run, then `resume`.
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
    """A run's position besides the step.

    It has the batches that rollbacks skipped, how many rollbacks there were, what fell back, as
    `fp8.overrides`, sequences that could not be read, and the early warning's record of the losses
    (monitor/trend.py).
    """

    skipped_batches: int = 0
    rollbacks: int = 0
    fallback: str = ""
    unread_sequences: int = 0
    losses: dict[str, Any] | None = None


class Resumed(NamedTuple):
    """A program and a state to continue with; `calibrate` names roles whose scales are still
    unknown.
    """

    program: TrainProgram
    state: TrainState
    step: int
    position: Position
    calibrate: tuple[str, ...]


def finished_step(config: Config, checkpoints: Checkpoints, stage: Stages) -> int | None:
    """Return the step of a run that has all its steps and an intact checkpoint of the last; None if
    steps are left.
    """
    latest = distributed.from_first(-1 if (step := checkpoints.latest_step()) is None else step)
    if latest < config.training.steps:
        return None
    with stage(f"checking the checkpoint of step {latest}"):
        step, _ = checkpoints.newest()
    return step if step is not None and step >= config.training.steps else None


def restore(program: TrainProgram, checkpoints: Checkpoints, stage: Stages) -> Resumed:
    """Resume, and report what is done and where the run continues."""
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
    """Resume from the newest checkpoint with intact files, or from a fresh state if there is none.

    Args:
        program: this run's program, without fallbacks to BF16.
        checkpoints: checkpoints of its directory. Damaged ones newer than the chosen one are
            renamed.
        tell: receives a line for each skipped checkpoint, and for parts of the state that do not
            fit the configuration.

    Raises:
        CheckpointError: there are only damaged checkpoints.
    """
    step = _choose(checkpoints, tell)
    if step < 0:
        return Resumed(
            program, program.init(), 0, Position(), tuple(program.abstract_state.scaling)
        )
    return resume_from(program, checkpoints, step, tell)


def resume_from(
    program: TrainProgram,
    checkpoints: Checkpoints,
    step: int,
    tell: Callable[[str], None],
    *,
    verify: bool = False,
) -> Resumed:
    """Resume from the checkpoint of a step, and change nothing in the directory.

    Args:
        program: this run's program, without fallbacks to BF16.
        checkpoints: checkpoints of its directory.
        step: step of a checkpoint that is there.
        tell: as in `resume`.
        verify: whether its files are checked first.
    """
    data = checkpoints.data_state(step)
    position = Position(
        *(data.get(name, default) for name, default in Position._field_defaults.items())
    )
    program = program.fallen_back(position.fallback)
    optimizer = program.config.optimizer
    saved = state_formats.saved_as(optimizer, checkpoints.dtypes(step))
    items = abstract_state_kept_as(program, saved).items()
    if step == 0:  # At step 0 only the weights count, and a converted model has only those.
        found, _ = checkpoints.restore(
            step, {"params": items["params"]}, partial=True, verify=verify
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
    found, _ = checkpoints.restore(step, items, partial=True, verify=verify)
    kept, why = scaling_state.choose(program.recipes, found["scaling"], data.get("scaling"))
    if why:
        tell(scaling_state.tell(kept, why))
    found["scaling"] = fresh_scaling(program) | kept if why else kept
    if saved.name != optimizer.name:
        tell(
            f"optimizer {saved.name} in the checkpoint, {optimizer.name} from here on: its "
            f"moments start anew"
        )
        fresh = program.init(found["params"])
        found |= {"params": fresh.params, "opt_state": fresh.opt_state}
        return Resumed(program, TrainState.from_items(found), step, position, tuple(why))
    state = TrainState.from_items(found)
    if saved != optimizer:
        tell(
            f"optimizer state kept as {state_formats.describe(saved)} in the checkpoint, as "
            f"{state_formats.describe(optimizer)} from here on"
        )
        state = kept_as_configured(program, state)
    return Resumed(program, state, step, position, tuple(why))


def _choose(checkpoints: Checkpoints, tell: Callable[[str], None]) -> int:
    """Return the newest undamaged checkpoint's step, after renaming damaged newer ones; -1 if there
    is none.
    """
    step, passed = checkpoints.newest()
    if step is None and any(not reason.startswith(manifest.NAME) for reason in passed.values()):
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in passed.items())
        raise CheckpointError(
            f"{checkpoints.directory}: no checkpoint is undamaged ({reasons}); to train anew "
            f"choose another --workdir"
        )
    for number, reason in passed.items() if distributed.is_first() else ():
        tell(
            f"checkpoint of step {number} passed over: {reason}; now in "
            f"{checkpoints.set_aside(number)}"
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
        config: configuration of the run that is about to start.
        workdir: its directory, which may hold a run already.
        allowed: fields, like 'data.source', that may differ although they make it another run.
        tell: receives a line for each field that differs.

    Raises:
        ConfigError: other such fields differ, all of which are named; or an allowed field does not
            exist.
    """
    now = _flat(config)
    for path in allowed:
        if path not in now:
            raise ConfigError(
                f"--allow_config_change={path}: no such "
                f"field{config_lib.did_you_mean(path, now) or '; as in data.source'}"
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
            f"config.{path}: {changed[path][1]!r}, but the run in {workdir} has "
            f"{changed[path][0]!r}"
            for path in refused
        )
        raise ConfigError(
            f"{listed}; keep it, choose another --workdir, or say "
            f"--allow_config_change={','.join(refused)}"
        )
    for path, (before, after) in changed.items():
        what = ", the same by content" if path in same else ""
        tell(f"config.{path} is {after!r}, was {before!r}{what}")


class _Saved:
    """The facts on the newest checkpoint of a run; None for those that its manifest lacks."""

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
    """Return which of the tokenizer and the sources equal, by content, those of the run, so that
    their names may change.

    Args:
        config: configuration of the run that is about to start.
        saved: facts on what the run was trained with.
        changed: fields that differ; one that differs by name is refused by name.
        allowed: fields that may differ.
        tell: receives a line if held-out text has changed.

    Raises:
        ConfigError: a file holds another tokenizer, or a source other data, than when the run was
            saved.
    """
    same = set()
    if saved.tokenizer is not None and "data.tokenizer" not in allowed:
        found = tokenizer.of(config.data).fingerprint
        if saved.tokenizer != found:
            raise ConfigError(
                f"config.data.tokenizer: is {found}, but the run in {saved.workdir} was trained "
                f"with {saved.tokenizer}; "
                "restore that file, choose another --workdir, or say "
                "--allow_config_change=data.tokenizer"
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
            f"config.data.source: {names} holds other data than the run in {saved.workdir} was "
            f"trained with; "
            "restore it, choose another --workdir, or say --allow_config_change=data.source"
        )
    if other := fingerprints.changed(found["held_out"], saved.data.get("held_out")):
        tell(
            f"held-out text of {', '.join(other)} is another than before: held-out losses do "
            f"not compare"
        )
    return same


def _flat(config: Config) -> dict[str, object]:
    return {
        f"{section}.{name}": value
        for section, values in config_lib.to_dict(config).items()
        for name, value in values.items()
    }


def _is_fitted(path: str, value: object) -> bool:
    """Return True for open fields that a run chooses by itself (fit.py), and for its note of the
    choice.
    """
    section, name = path.split(".")
    return section == "training" and (name == "fitted" or name in OPEN and value == OPEN[name])
