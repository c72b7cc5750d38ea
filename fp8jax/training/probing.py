"""Probe a run, or the initial state of a configuration: how far FP8 is off, where, and which roles
are guilty.

    found = examine(subject_of_run(workdir, step=None, stage=stage), Question(), stage)
    found["error"], found["guilty"], found["config"]

`examine` measures (probe.py) on the state as it is. Then it takes groups of roles out of FP8, one
after another, and, where the error is harmful, halves the layers of the guilty group.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fp8jax.config import Config, settled
from fp8jax.data import pipeline
from fp8jax.models.definition import Params
from fp8jax.monitor.stages import Stages
from fp8jax.numerics.recipes import in_bf16
from fp8jax.plan import make_plan
from fp8jax.training.calibration import calibrate
from fp8jax.training.checkpoint import Checkpoints
from fp8jax.training.evaluation import run_config
from fp8jax.training.losses import Batch
from fp8jax.training.probe import Harm, Probe
from fp8jax.training.resume import resume_from
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram

# An error above this is harmful. It was chosen on six small runs, of which it told the healthy from
# those that FP8 broke: a hypothesis, not a law.
HARMFUL = 0.3
# One matrix in one layer is judged by PLACE times that: its error is noisier, and a fault there may
# hardly show in the whole.
PLACE = 2.0
# A group, or current scaling, explains the error if no more than this part of it is left without.
_EXPLAINED = 0.5
Errors = dict[str, float]
GROUPS = {
    "attention": ("qkv", "attention_scores", "attention_values"),
    "attention_out": ("attention_out",),
    "mlp": ("mlp_gate", "mlp_up", "mlp_down"),
    "head": ("lm_head",),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A state to examine, and the batch that its run takes next."""

    program: TrainProgram
    state: TrainState
    step: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Question:
    """What to measure: batches, the reference, and whether roles leave FP8 by `group` or one `role`
    at a time.
    """

    batches: int = 1
    against: str = "bf16"
    by: str = "group"


def subject_of_run(
    workdir: pathlib.Path,
    step: int | None,
    stage: Stages,
    devices: Sequence[jax.Device] | None = None,
) -> Subject:
    """Restore the whole state of a run from a checkpoint, None for the newest, on these devices or
    all.

    Raises:
        CheckpointError: there is no run, or no such checkpoint.
        ConfigError: the devices do not suit the run.
    """
    program = TrainProgram(make_plan(settled(run_config(workdir)), devices, other_mesh=True))
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.chosen(step)
        with stage(f"restoring the checkpoint of step {step}"):
            found = resume_from(program, checkpoints, step, stage.message, verify=True)
    batch = step + found.position.skipped_batches
    subject = Subject(found.program, found.state, step, batch)
    return _calibrated(subject, found.calibrate, stage)


def subject_of_config(
    config: Config, stage: Stages, devices: Sequence[jax.Device] | None = None
) -> Subject:
    """Make the state that a run of this configuration begins with."""
    program = TrainProgram(make_plan(settled(config), devices, other_mesh=True))
    with stage("initialising the weights"):
        subject = Subject(program, program.init(), 0, 0)
    return _calibrated(subject, tuple(program.abstract_state.scaling), stage)


def _calibrated(subject: Subject, roles: Sequence[str], stage: Stages) -> Subject:
    if not roles:
        return subject
    with stage("calibrating scales"):
        state = calibrate(subject.program, subject.state, next(_batches(subject, 1)), roles)
    return dataclasses.replace(subject, state=state)


def _batches(subject: Subject, count: int) -> Iterator[Batch]:
    """Yield the next batches of the run."""
    program = subject.program
    batches: Any = pipeline.train_batches(program.config, program.rows.numbers)
    for number in range(count):
        yield program.put(batches[subject.batch + number])


def examine(subject: Subject, question: Question, stage: Stages) -> dict[str, Any]:
    """Measure the harm of FP8, and find what does it.

    Returns:
        `error`, `cosine`, `norm_ratio` over all matrices of the blocks, and the `worst` error of
        one; `matrices`: name → measure and `share` of the squared error → by layer; `batch_noise`,
        relative to the gradient, and
        `error_over_batch_noise`, None for one batch; `groups`: name → `roles`, `error` and `worst`
        without them in FP8; `current`: the same with current in place of delayed scaling, or None;
        `guilty`: `group`, `roles`, `layers`, or None; `verdict`; `config`: what to change, or ''.
    """
    probe = Probe(subject.program, question.against)
    with stage(f"measuring on {question.batches} batches") as note:
        harm, noise = _measure(probe, subject, question.batches, note)
    tests = _Tests(probe, subject, stage)
    groups = {
        name: {"roles": list(roles), **tests.without(name, ",".join(roles))}
        for name, roles in _groups(subject.program, question.by).items()
    }
    current = tests.current()
    guilty = _guilty(tests, groups) if _severity(_errors(harm)) > HARMFUL else None
    found = _numbers(harm, noise) | {"groups": groups, "current": current, "guilty": guilty}
    verdict, line = _verdict(found, tests.errors, subject.program.config.fp8.overrides)
    about = {"step": subject.step, "batches": question.batches, "against": question.against}
    return about | found | {"verdict": verdict, "config": line}


def _measure(probe: Probe, subject: Subject, count: int, note: Any) -> tuple[Harm, float | None]:
    """Return the harm over batches, and how far their gradients differ: |g - mean|² of one; None
    for one batch.
    """
    harm, earlier, squares = None, None, []
    for number, batch in enumerate(_batches(subject, count)):
        note(f"batch {number + 1} of {count}")
        reference = probe.reference(subject.state, batch)
        if earlier is not None:  # two gradients differ by twice the noise of one
            squares.append(probe.distance(reference, earlier) / 2)
        earlier = None
        one = probe.harm(subject.state, batch, reference)
        harm, earlier = one if harm is None else harm + one, reference
    assert harm is not None
    return harm, float(np.mean(squares)) if squares else None


def _groups(program: TrainProgram, by: str) -> dict[str, tuple[str, ...]]:
    """Return the roles in FP8, by group, or each by itself."""
    in_fp8 = [role for role, (_, recipe) in program.recipes.by_role().items() if recipe.fp8]
    if by == "role":
        return {role: (role,) for role in in_fp8}
    chosen = {name: tuple(r for r in roles if r in in_fp8) for name, roles in GROUPS.items()}
    return {name: roles for name, roles in chosen.items() if roles}


class _Tests:
    """Errors on the next batch with other recipes; each compiles a program.

    Attributes:
        errors: the errors in the run's own recipe, on this batch.
    """

    def __init__(self, probe: Probe, subject: Subject, stage: Stages):
        self._probe, self._state, self._stage = probe, subject.state, stage
        self.program = subject.program
        self._batch = next(_batches(subject, 1))
        self._reference: Params = probe.reference(self._state, self._batch)
        self.errors = _errors(probe.harm(self._state, self._batch, self._reference))

    def without(self, name: str, targets: str) -> Errors:
        """Return the errors with these roles, as of `config.warning.fallback`, out of FP8."""
        with self._stage(f"without {name} in FP8"):
            overrides = in_bf16(targets)
            return _errors(
                self._probe.without(overrides, self._state, self._batch, self._reference)
            )

    def current(self) -> Errors | None:
        """Return the errors with current in place of delayed scaling; None if there is none."""
        recipes = self.program.recipes.scaled_by("current")
        if recipes == self.program.recipes:
            return None
        with self._stage("with current scaling"):
            harm = self._probe.with_recipes(recipes, self._state, self._batch, self._reference)
        return _errors(harm)


def _errors(harm: Harm) -> Errors:
    return {"error": harm.error, "worst": harm.worst}


def _severity(errors: Mapping[str, float]) -> float:
    """Return the error that counts against HARMFUL: over all, or in one place."""
    return max(errors["error"], errors["worst"] / PLACE)


def _mended(left: Errors | None, before: Errors) -> bool:
    """Return whether a change that leaves these errors explains what there was before."""
    return left is not None and _severity(left) <= _EXPLAINED * _severity(before)


def _guilty(tests: _Tests, groups: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the group without which most of the error is gone, and its fewest layers by halving."""
    name = min(groups, key=lambda group: _severity(groups[group]), default=None)
    if name is None or not _mended(groups[name], tests.errors):
        return None
    roles = groups[name]["roles"]
    first, last = 0, len(tests.program.recipes.blocks) - 1
    while first < last and "lm_head" not in roles:
        middle = (first + last) // 2
        halves = (first, middle), (middle + 1, last)
        left = [tests.without(f"{name} in layers {a}-{b}", _in(roles, a, b)) for a, b in halves]
        best = int(np.argmin([_severity(errors) for errors in left]))
        if not _mended(left[best], tests.errors):
            break
        first, last = halves[best]
    return {"group": name, "roles": roles, "layers": [first, last]}


def _in(roles: Sequence[str], first: int, last: int) -> str:
    """Return roles in these layers, as `config.warning.fallback` names them."""
    return ",".join(f"{role}@{first}-{last}" for role in roles)


def _numbers(harm: Harm, noise: float | None) -> dict[str, Any]:
    measures = ("error", "cosine", "norm_ratio", "share")
    places = {measure: harm.by_place(measure) for measure in measures}
    error2, _, _, reference2 = harm.total
    return {
        **_errors(harm),
        "cosine": harm.cosine,
        "norm_ratio": harm.norm_ratio,
        "matrices": {
            name: {measure: places[measure][name].tolist() for measure in measures}
            for name in harm.sums
        },
        "batch_noise": None if noise is None else _root(noise, reference2 / harm.batches),
        "error_over_batch_noise": None if noise is None else _root(error2 / harm.batches, noise),
    }


def _root(above: float, below: float) -> float:
    return float(np.sqrt(above / below)) if below > 0 else 0.0


def _verdict(found: Mapping[str, Any], before: Errors, overrides: str) -> tuple[str, str]:
    """Return what was found in a sentence, and a line of configuration that would change it."""
    if _severity(found) <= HARMFUL:
        return (
            f"FP8 is not harmful here: no error is above {HARMFUL:g}, or {PLACE * HARMFUL:g} in "
            f"one matrix",
            "",
        )
    guilty, stale = found["guilty"], _mended(found["current"], before)
    if guilty is None and stale:
        return "delayed scales do not fit their tensors", "--config.fp8.scaling=current"
    if guilty is None:
        return "FP8 is harmful, and no group alone is guilty", "--config.fp8.recipe=bf16"
    targets, where = _place(guilty, found["matrices"])
    changed = ",".join(f"{t}=current" for t in targets) if stale else in_bf16(",".join(targets))
    line = ",".join(part for part in (overrides, changed) if part)
    what = "delayed scales do not fit their tensors" if stale else "FP8 is harmful"
    return f"{what} in {guilty['group']}{where}", f"--config.fp8.overrides={line}"


def _place(guilty: Mapping[str, Any], matrices: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the guilty roles, with layers if they are not all, and those layers in words."""
    (first, last), roles = guilty["layers"], guilty["roles"]
    layers = len(next(iter(matrices.values()))["error"])
    if (first, last) == (0, layers - 1):
        return roles, ""
    where = f" in layer {first}" if first == last else f" in layers {first} to {last}"
    return [f"{role}@{first}-{last}" for role in roles], where
