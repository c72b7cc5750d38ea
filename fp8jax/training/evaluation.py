"""Compute held-out loss, perplexity and bits per byte, in BF16 as in the paper.

    evaluator = Evaluator(plan)
    evaluator.describe()   # "held-out 192 of 1,824 sequences, every 200 steps and at the end: about 2.0% of the time; ..."
    evaluator(params)      # {"loss": ..., "perplexity": ..., "bits_per_byte": ..., "tokens": ..., "bytes": ...}

While a run trains, an evaluation reads a part of the held-out split by default, in proportion to
the steps between evaluations: 2% of their model FLOPs, counted and not timed, so that a continued
run reads the same sequences. They are the same at every evaluation of a run. `eval.py` reads the
whole split.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax import files
from fp8jax.config import Config, ConfigError, settled
from fp8jax.data import pipeline, run_tokenizer
from fp8jax.models.definition import Params
from fp8jax.monitor.stages import Stages
from fp8jax.numerics.compiling import compiler_options
from fp8jax.parallel import distributed
from fp8jax.parallel.rows import Rows
from fp8jax.parallel.sharding import RULES
from fp8jax.plan import LoadedModel, Plan, make_plan
from fp8jax.training import manifest, state_formats
from fp8jax.training.checkpoint import CheckpointError, Checkpoints, load_config
from fp8jax.training.losses import sum_of_rows, token_losses
from fp8jax.training.step import TrainProgram

# An evaluation takes one in ONE_IN of the model FLOPs of the steps between; a step has three times
# those of its forward pass.
ONE_IN, FORWARDS_A_STEP = 50, 3


class Evaluator:
    """An evaluator of parameters on the held-out split; it compiles once.

    Attributes:
        sequences: how many of the held-out text an evaluation reads; 0 if there is none, and then
            do not call it.
        all_sequences: how many the text has.
    """

    def __init__(self, plan: Plan):
        config, definition, mesh = plan.config, plan.definition, plan.mesh
        self.plan, self.config = plan, config
        self.texts = pipeline.held_out_streams(config)
        self.parts = _parts(
            config,
            {name: pipeline.held_out_sequences(config, text) for name, text in self.texts.items()},
        )
        self.all_sequences = sum(there for _, there in self.parts.values())
        self.sequences = sum(read for read, _ in self.parts.values())
        self.sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))
        self.abstract_batch = self._abstract_batch()
        recipes = plan.bf16_recipes

        def total_loss(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                model = definition.bind(as_float32(params))
                prepared, chunk = (
                    model.prepare(recipes),
                    settled(config).training.loss_chunk,
                )
                if chunk:
                    losses = model.chunked_losses(batch, prepared, chunk)[0]
                else:
                    losses = token_losses(model(batch, prepared)[0], batch["targets"])
                return sum_of_rows(losses * batch["mask"]), jnp.sum(batch["mask"])

        self.total_loss = jax.jit(
            total_loss,
            out_shardings=NamedSharding(mesh, PartitionSpec()),
            compiler_options=compiler_options(plan.device.platform),
        )

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        training, data = self.config.training, self.config.data
        # In a run that has not been fitted yet, such as a converted model, one row per device fits
        # with any model.
        parts = training.microbatches or training.batch_size // self.plan.replicas
        shape = training.batch_size // parts, data.sequence_length
        dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
        if data.document_masks:
            dtypes |= {"segment_ids": jnp.int32, "positions": jnp.int32}
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)
            for name, dtype in dtypes.items()
        }

    def part(self) -> str:
        """Return what an evaluation reads, such as '192 of 1,820 sequences'."""
        if self.sequences == self.all_sequences:
            return f"all {self.all_sequences:,} sequences"
        return f"{self.sequences:,} of {self.all_sequences:,} sequences"

    def describe(self) -> str:
        """Return a line for the start of a run: when an evaluation is due and what it reads."""
        if not self.sequences:
            return (
                "held-out none: the loss of text that is not trained on is never taken; "
                "data.held_out sets some"
            )
        every, steps = self.config.evaluation.every, _interval(self.config)
        when = f"every {every:,} steps and at the end" if every else "at the end"
        share = self.sequences / (FORWARDS_A_STEP * steps * self.config.training.batch_size)
        spread = "; eval.py reads the whole split" if self.sequences < self.all_sequences else ""
        of = f" of {', '.join(self.parts)}" if len(self.parts) > 1 else ""
        return f"held-out {self.part()}{of}, {when}: about {share:.1%} of the time{spread}"

    def __call__(
        self, params: Params, progress: Callable[[int, int], object] = lambda done, of: None
    ) -> dict[str, Any]:
        """Compute metrics over `sequences` of the held-out text.

        Args:
            params: the model's parameters, in 16 or 32 bits.
            progress: called before each batch with the number of batches done and that of all of
                them.

        Returns:
            `loss` in nats per token, `perplexity`, `bits_per_byte` of text, `tokens` and `bytes`
            scored, `sequences` of `all_sequences` read. With several texts also `texts`: name →
            loss, perplexity, bits per byte, tokens, bytes.
        """
        size = self.abstract_batch["inputs"].shape[0]
        count, done = sum(-(-read // size) for read, _ in self.parts.values()), 0
        sums = {}
        for name, (read, _) in self.parts.items():
            sums[name] = self._sums(
                name, params, lambda number, before=done: progress(before + number, count)
            )
            done += -(-read // size)
        whole = _metrics(sum(sums.values(), np.zeros(3)))
        whole |= {"sequences": self.sequences, "all_sequences": self.all_sequences}
        return whole | (
            {"texts": {name: _metrics(found) for name, found in sums.items()}}
            if len(sums) > 1
            else {}
        )

    def _sums(self, name: str, params: Params, progress: Callable[[int], object]) -> np.ndarray:
        """Return nats, tokens and bytes of a text's part, float64 [3]."""
        shape = self.abstract_batch["inputs"].shape
        rows, sums, waiting = Rows(shape, self.sharding), np.zeros(3), None
        batches = pipeline.held_out_batches(
            self.config,
            shape[0],
            rows.numbers,
            sequences=self.parts[name][0],
            stream=self.texts[name],
        )
        for number, (batch, read) in enumerate(batches):
            progress(number)
            found = self.total_loss(
                params, {field: rows.put(batch[field]) for field in self.abstract_batch}
            )
            if waiting is not None:  # the devices have the next batch already
                sums[:2] += np.asarray(jax.device_get(waiting), np.float64)
            sums[2], waiting = sums[2] + read, found
        sums[:2] += np.asarray(jax.device_get(waiting), np.float64)
        return sums


def _parts(config: Config, there: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return for each text how many of its sequences are read, in proportion, at least a batch; and
    its total.
    """
    asked = batches_by_share(config) if config.evaluation.batches < 0 else config.evaluation.batches
    batch_size, total = config.training.batch_size, sum(there.values())
    parts = {}
    for name, count in there.items():
        share = max(round(asked * count / total), 1) if asked else 0
        parts[name] = min(share * batch_size or count, count), count
    return parts


def _metrics(sums: np.ndarray) -> dict[str, Any]:
    nats, tokens, text_bytes = sums.tolist()
    loss = nats / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "tokens": int(tokens),
        "bytes": int(text_bytes),
    }


def batches_by_share(config: Config) -> int:
    """Return the batches of `training.batch_size` sequences that have one in ONE_IN of the steps'
    FLOPs; at least 1.
    """
    return max(1, FORWARDS_A_STEP * _interval(config) // ONE_IN)


def _interval(config: Config) -> int:
    """Return the steps between evaluations."""
    return min(config.evaluation.every or config.training.steps, config.training.steps)


def evaluate_run(
    workdir: pathlib.Path,
    step: int | None = None,
    progress: Callable[[int, int], object] = lambda done, of: None,
    *,
    stage: Stages = Stages(False),
    held_out: str | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run on the whole held-out text, and write WORKDIR/eval.json.

    Args:
        workdir: directory of the run.
        step: step of the checkpoint; None for the newest.
        progress: as in `Evaluator`.
        stage: announces slow parts.
        held_out: other text than that of the run, as `config.data.held_out`.

    Raises:
        CheckpointError: there is no run, or no such checkpoint.
        ConfigError: there is no held-out text, or it cannot be read.
    """
    model, step = load_run(workdir, step, stage=stage)
    return evaluate_model(model, workdir, step, progress, stage=stage, held_out=held_out)


def evaluate_model(
    model: LoadedModel,
    workdir: pathlib.Path,
    step: int,
    progress: Callable[[int, int], object] = lambda done, of: None,
    *,
    stage: Stages = Stages(False),
    held_out: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run's loaded model as `evaluate_run` does."""
    config = model.plan.config
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, batches=0)
    )
    if held_out is not None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, held_out=held_out)
        )
    with stage(f"evaluating step {step}") as note:

        def show(done: int, of: int) -> None:
            progress(done, of)
            note(f"batch {done + 1} of {of}")

        evaluator = Evaluator(model.plan.change(config))
        if not evaluator.sequences:
            raise ConfigError(
                f"config.data.held_out: the run in {workdir} has no held-out text; give some "
                f"with eval.py --held_out=DIR"
            )
        found = {"step": step, **evaluator(model.params, show)}
    write_json(workdir / "eval.json", found)
    return found


def load_run(
    workdir: str | pathlib.Path,
    step: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    stage: Stages = Stages(False),
) -> tuple[LoadedModel, int]:
    """Load the model of a run from a checkpoint, and return it with the checkpoint's step.

    Args:
        workdir: directory of the run.
        step: step of the checkpoint; None for the newest.
        devices: devices for the parameters; None for all. They may differ from those that trained:
            the run's mesh is used if it fits, otherwise the nearest that does, over as many devices
            as it can have.
        stage: announces slow parts.

    Raises:
        CheckpointError: there is no run, or no such checkpoint.
        ConfigError: there are several processes, and no mesh of all their devices divides the model
            and a microbatch.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").exists():
        raise CheckpointError(f"{workdir}: no config.json there; give the --workdir of a run")
    config = _elsewhere(settled(run_config(workdir)))
    plan = make_plan(config, devices, other_mesh=True)
    with (
        Checkpoints(workdir) as checkpoints,
        stage(f"restoring the checkpoint of step {(step := checkpoints.chosen(step))}"),
    ):
        saved = state_formats.saved_as(config.optimizer, checkpoints.dtypes(step))
        program = TrainProgram(plan.change(dataclasses.replace(config, optimizer=saved)))
        state, _ = checkpoints.restore(
            step, {"params": program.abstract_state.params}, partial=True
        )
    params = jax.jit(as_float32, donate_argnums=0, out_shardings=program.state_shardings.params)(
        state["params"]
    )
    return LoadedModel(plan, params), step


def run_config(workdir: pathlib.Path) -> Config:
    """Return the configuration of a run with its own tokenizer, because its data may be missing.

    Raises:
        CheckpointError: there is no run.
    """
    checkpoints = Checkpoints(workdir)
    fingerprint = manifest.fact(checkpoints.directory / str(checkpoints.latest_step()), "tokenizer")
    return run_tokenizer.own(load_config(workdir), workdir, fingerprint)


def _elsewhere(config: Config) -> Config:
    """Return a run's configuration for evaluation on other devices, without what only its training
    devices may have.
    """
    attention = config.fp8.attention_backend
    fp8 = dataclasses.replace(
        config.fp8, attention_backend="auto" if attention in ("pallas", "cudnn") else attention
    )
    return dataclasses.replace(
        config, fp8=fp8, training=dataclasses.replace(config.training, remat="none")
    )


def as_float32(params: Params) -> Params:
    """Return parameters, which may be kept in 16 bits, in float32 to compute with."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Write a file of strict JSON atomically, on process 0 alone."""
    if not distributed.is_first():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(files.strict(values), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
