"""Where a run continues: which checkpoint, which data, and whether the config is still that of the run.

Call `check_continues` first, which refuses what would make it another run, then `resume`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fp8jax.config import Config, ConfigError
from fp8jax.training import manifest, precision
from fp8jax.training.checkpoint import CheckpointError, Checkpoints, load_config
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram

# Changing one of these on a continued run would make it another run.
_FIXED = {"model": None, "data": ("sequence_length", "source", "tokenizer", "document_masks"),
          "training": ("batch_size", "seed"), "optimizer": ("name",)}


class Position(NamedTuple):
    """Where a run stands beyond the step: batches passed over by rollbacks, how many of those, what fell back, as `fp8.overrides`."""

    skipped_batches: int = 0
    rollbacks: int = 0
    fallback: str = ""


class Resumed(NamedTuple):
    """A program and a state to go on with; `calibrate`: whether its scales are still unknown."""

    program: TrainProgram
    state: TrainState
    step: int
    position: Position
    calibrate: bool


def resume(program: TrainProgram, checkpoints: Checkpoints, tell: Callable[[str], None], *, recalibrate: bool = False) -> Resumed:
    """The newest checkpoint whose files are what was written; a fresh state where there is none.

    Args:
        program: of this run, without what has fallen back to BF16.
        checkpoints: of its directory. Damaged ones newer than the chosen one are set aside, under another name.
        tell: receives a line for each that is passed over.
        recalibrate: the config's FP8 settings differ from those that saved: scales start anew.

    Raises:
        CheckpointError: there are only damaged checkpoints.
    """
    step, passed = checkpoints.newest()
    if step is None and any(not reason.startswith(manifest.NAME) for reason in passed.values()):
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in passed.items())
        raise CheckpointError(f"{checkpoints.directory}: no checkpoint is undamaged ({reasons}); to train anew choose another --workdir")
    for number, reason in passed.items():
        tell(f"checkpoint of step {number} passed over: {reason}; now in {checkpoints.set_aside(number)}")
    if step is None:
        return Resumed(program, program.init(), 0, Position(), True)
    program = program.fallen_back(checkpoints.data_state(step).get("fallback", ""))
    optimizer = program.config.optimizer
    saved = precision.saved_as(optimizer, checkpoints.dtypes(step))
    items = program.abstract_state_kept_as(saved).items()
    if step == 0:  # Nothing has been trained: weights are all that counts, and all that a converted model has.
        items = {"params": items["params"]}
    left_out = ["scaling"] * recalibrate + ["opt_state"] * (saved.name != optimizer.name)
    items = {name: item for name, item in items.items() if name not in left_out}
    found, data = checkpoints.restore(step, items, partial=True, verify=False)
    position = Position(*(data.get(name, default) for name, default in Position._field_defaults.items()))
    if step == 0:
        return Resumed(program, program.init(found["params"]), step, position, True)
    if recalibrate:
        found["scaling"] = program.init().scaling
    if saved.name != optimizer.name:
        tell(f"optimizer {saved.name} in the checkpoint, {optimizer.name} from here on: its moments start anew")
        fresh = program.init(found["params"])
        found |= {"params": fresh.params, "opt_state": fresh.opt_state}
        return Resumed(program, TrainState.from_items(found), step, position, recalibrate)
    state = TrainState.from_items(found)
    if saved != optimizer:
        tell(f"optimizer state kept as {precision.describe(saved)} in the checkpoint, as {precision.describe(optimizer)} from here on")
        state = program.keep_as_configured(state)
    return Resumed(program, state, step, position, recalibrate)


def check_continues(config: Config, workdir: pathlib.Path, allowed: Sequence[str] = ()) -> bool:
    """Whether the FP8 settings differ from those of the run in this directory.

    Args:
        config: of the run that is about to start.
        workdir: its directory, which may hold a run already.
        allowed: fields, like 'data.source', that may differ though they make it another run.

    Raises:
        ConfigError: another such field differs.
    """
    if not (workdir / "config.json").exists():
        return False
    old = load_config(workdir)
    for section, names in _FIXED.items():
        for field in dataclasses.fields(getattr(config, section)):
            before, now = (getattr(getattr(c, section), field.name) for c in (old, config))
            path = f"{section}.{field.name}"
            if (names is None or field.name in names) and before != now and path not in allowed:
                raise ConfigError(f"config.{path}: {now!r}, but the run in {workdir} has {before!r}; keep it, choose another "
                                  f"--workdir, or say --allow_config_change={path}")
    return dataclasses.replace(old.fp8, backend=config.fp8.backend, attention_backend=config.fp8.attention_backend) != config.fp8
