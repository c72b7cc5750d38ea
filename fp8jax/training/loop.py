"""The training loop: start or continue a run in a directory, step, log, evaluate, save, stop cleanly.

    exit_code = train(config, workdir)

The directory holds everything: config.json, checkpoints/, metrics.jsonl, events.jsonl, tensorboard/, eval.json. Running
again with the same directory continues from the newest checkpoint; SIGINT and SIGTERM finish the step under way, save and
return 4. What a step computes is in step.py.
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fp8jax import config as config_lib
from fp8jax.audit.gemms import fp8_share
from fp8jax.audit.jaxpr import traced_gemms
from fp8jax.config import Config, ConfigError
from fp8jax.data import pipeline, tokenizer
from fp8jax.models.definition import define
from fp8jax.monitor import outliers
from fp8jax.monitor.progress import Progress
from fp8jax.monitor.writers import MetricsWriter
from fp8jax.numerics import recipes as recipes_lib
from fp8jax.numerics.attention import SCORES, VALUES
from fp8jax.numerics.self_check import self_check
from fp8jax.parallel import mesh as mesh_lib
from fp8jax.training.checkpoint import Checkpoints, load_config, save_config
from fp8jax.training.evaluation import Evaluator, write_json
from fp8jax.training.profiling import ProfileWindow
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram

FINISHED, STOPPED = 0, 4
BLOCK_ROLES = [role for role in recipes_lib.ROLES if role != "lm_head"]
# Changing one of these on a continued run would make it another run.
_FIXED = {"model": None, "data": ("sequence_length", "source", "tokenizer", "document_masks"),
          "training": ("batch_size", "seed")}


def train(config: Config, workdir: str | pathlib.Path, devices: Sequence[jax.Device] | None = None) -> int:
    """Trains to `config.training.steps`; returns the process's exit code, 0 (finished) or 4 (stopped, saved).

    Args:
        config: validated configuration.
        workdir: directory of the run; made if missing, continued if it holds a run.
        devices: what the mesh is made of; None: all.

    Raises:
        ConfigError: the data, mesh or directory does not fit the config.
    """
    workdir = pathlib.Path(workdir)
    mesh = mesh_lib.make_mesh(config, devices)
    definition = define(config.model, tokenizer.vocab_size(config))
    program = TrainProgram(config, definition, mesh)
    recalibrate = _check_continues(config, workdir)
    with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints, _stop_signals() as stop:
        state, fresh = _restore_or_init(program, checkpoints, recalibrate)
        start = int(jax.device_get(state.step))
        save_config(workdir, config)
        with MetricsWriter(workdir, start_step=start) as writer, Progress(config.training.steps, start) as progress:
            run = _Run(config, workdir, program, checkpoints, writer, progress, stop)
            for line in [*describe(program), *check_attention(program)]:
                progress.message(line)
            return run(state, start, calibrate=fresh)


def describe(program: TrainProgram) -> list[str]:
    """What is about to run: model, FP8 share counted from the traced step, mesh, batch, data."""
    config, device = program.config, program.mesh.devices.flat[0]
    tokens = config.training.batch_size * config.data.sequence_length
    with jax.set_mesh(program.mesh):
        gemms = traced_gemms(program.jitted_step().trace(program.abstract_state, program.abstract_batch).jaxpr)
    share = fp8_share(gemms, BLOCK_ROLES)
    how = f"emulated: {device.device_kind} has no FP8 units" if program.emulated else f"native on {device.device_kind}"
    model = program.definition.config
    lines = [
        f"model    {model.architecture}, {program.definition.parameter_count():,} parameters, {model.layers} layers of width {model.width}",
        f"fp8      recipe {config.fp8.recipe}, {share:.0%} of the block's GEMM FLOPs in FP8, {how}",
        f"mesh     {mesh_lib.describe(program.mesh)}",
        f"batch    {tokens:,} tokens per step, {config.training.steps} steps",
    ]
    if config.data.source == "embedded":
        lines.append("data     the embedded corpus, five novels by Jane Austen; set config.data.source to train on your own")
    return lines


def check_attention(program: TrainProgram) -> list[str]:
    """Compares the attention backend with `emulated` on the device at hand, before any step relies on it.

    Returns:
        What to tell: the backend and its largest error; nothing where attention is not in FP8.

    Raises:
        ConfigError: the backend computes something else here.
    """
    backend, head_dim = program.recipes.attention_backend, config_lib.head_dim(program.config.model)
    pairs = dict.fromkeys((layer[SCORES], layer[VALUES]) for layer in program.recipes.blocks)
    fp8 = [pair for pair in pairs if any(recipe.fp8 for recipe in pair)]
    if not fp8 or backend == "emulated":
        return [f"         attention in FP8 by backend {backend}"] if fp8 else []
    try:
        errors = [max(self_check(backend, dict(zip((SCORES, VALUES), pair, strict=True)), head_dim=head_dim).values()) for pair in fp8]
    except ValueError as error:
        raise ConfigError(f"config.fp8.attention_backend: {error}") from None
    return [f"         attention in FP8 by backend {backend}, within {max(errors):.1g} of the definition on this device"]


class _Run:
    """What the loop holds while it runs."""

    def __init__(self, config: Config, workdir: pathlib.Path, program: TrainProgram, checkpoints: Checkpoints,
                 writer: MetricsWriter, progress: Progress, stop: list[int]):
        self.config, self.workdir, self.program, self.checkpoints = config, workdir, program, checkpoints
        self.writer, self.progress, self.stop = writer, progress, stop
        self.evaluator = Evaluator(config, program.definition, program.mesh)
        self.profile = ProfileWindow(config.profile, workdir / "profile")
        self.clock, self.timed = time.perf_counter(), 0

    def __call__(self, state: TrainState, start: int, *, calibrate: bool) -> int:
        config, program = self.config, self.program
        iterator = pipeline.train_iterator(config, start_step=start)
        if calibrate:
            state = program.calibrate(state, program.put(pipeline.train_batches(config)[start]))
            self.writer.event("calibrated", start)
        program.compiled_step()
        self._restart_clock()
        step = start
        while step < config.training.steps and not self.stop:
            collect = _due(step + 1, config.monitor.every)
            if collect:
                jax.block_until_ready(state.step)
            self.profile.before(step + 1)
            with self._untimed(collect):
                batch = program.put(next(iterator))
                state, metrics, taps = program.step(state, batch, collect=collect)
                step += 1
                if collect:
                    jax.block_until_ready(metrics)
            self._tell(self.profile.after(step, metrics))
            last = step == config.training.steps
            evaluate = _due(step, config.evaluation.every) or last
            if _due(step, config.log.every) or collect or evaluate:
                self._log(step, metrics, taps, self._evaluate(step, state) if evaluate else {})
            if _due(step, config.checkpoint.every) and not last:
                self._save(step, state, iterator)
        self._tell(self.profile.close())
        self._save(step, state, iterator)
        self.checkpoints.wait()
        return self._finish(step)

    def _finish(self, step: int) -> int:
        if step == self.config.training.steps:
            self.writer.event("finished", step)
            return FINISHED
        self.writer.event("stopped", step, signal=signal.Signals(self.stop[0]).name)
        self.progress.message(f"stopped on {signal.Signals(self.stop[0]).name} after step {step}; saved. Run again to continue.")
        return STOPPED

    def _log(self, step: int, metrics: dict[str, jax.Array], taps: Any, held_out: dict[str, float]) -> None:
        metrics, taps = jax.device_get((metrics, taps))
        tokens = self.config.training.batch_size * self.config.data.sequence_length
        entry: dict[str, Any] = {name: value.item() for name, value in metrics.items()} | {"tokens": step * tokens}
        if self.timed:
            seconds = (time.perf_counter() - self.clock) / self.timed
            entry |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
        entry |= held_out | outliers.flatten(jax.tree.map(np.asarray, taps))
        self.writer.write(step, entry)
        self.progress.update(step, entry)
        if entry["bad_step"]:
            self.writer.event("bad_step", step)
            self.progress.message(f"step {step}: a loss, gradient or amax is not finite; the update was skipped")
        self._restart_clock()

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        jax.block_until_ready(state.step)
        with self._untimed(skip=True):
            found = self.evaluator(state.params)
        self.progress.message(f"step {step}  held-out loss {found['loss']:.4f}  bits per byte {found['bits_per_byte']:.4f}")
        write_json(self.workdir / "eval.json", {"step": step, **found})
        return {f"held_out/{name}": found[name] for name in ("loss", "perplexity", "bits_per_byte")}

    def _save(self, step: int, state: TrainState, iterator: Any) -> None:
        self.checkpoints.save(step, state.items(), {"step": step, "iterator": iterator.get_state()})
        self._restart_clock()

    def _tell(self, line: str | None) -> None:
        if line:
            self.progress.message(line)

    def _restart_clock(self) -> None:
        self.clock, self.timed = time.perf_counter(), 0

    @contextlib.contextmanager
    def _untimed(self, skip: bool) -> Iterator[None]:
        """Leaves steps with statistics, and what they compile, out of the timing of ordinary ones."""
        before = time.perf_counter()
        yield
        if skip:
            self.clock += time.perf_counter() - before
        else:
            self.timed += 1


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _restore_or_init(program: TrainProgram, checkpoints: Checkpoints, recalibrate: bool) -> tuple[TrainState, bool]:
    """The newest checkpoint, or a fresh state; and whether its scales are still unknown."""
    latest = checkpoints.latest_step()
    if latest is None:
        return program.init(), True
    items = program.abstract_state.items()
    if not recalibrate:
        return TrainState.from_items(checkpoints.restore(latest, items)[0]), False
    empty = program.init().scaling
    found, _ = checkpoints.restore(latest, {name: item for name, item in items.items() if name != "scaling"}, partial=True)
    return TrainState.from_items(found | {"scaling": empty}), True


def _check_continues(config: Config, workdir: pathlib.Path) -> bool:
    """Whether the FP8 settings differ from those of the run in this directory; refuses changes that make another run."""
    if not (workdir / "config.json").exists():
        return False
    old = load_config(workdir)
    for section, names in _FIXED.items():
        for field in dataclasses.fields(getattr(config, section)):
            before, now = (getattr(getattr(c, section), field.name) for c in (old, config))
            if (names is None or field.name in names) and before != now:
                raise ConfigError(f"config.{section}.{field.name}: {now!r}, but the run in {workdir} has {before!r}; "
                                  "keep it, or choose another --workdir")
    return dataclasses.replace(old.fp8, backend=config.fp8.backend) != config.fp8


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are appended; the loop stops at the end of the step. A second SIGINT interrupts."""
    caught: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
