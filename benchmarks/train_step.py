"""Times the real training step (training/step.py), architectures x recipes, taking turns in one process.

    python benchmarks/train_step.py --size=tiny
    python benchmarks/train_step.py --size=8b --layers=2 --models=llama3:bf16,fog_flash:fp8_dpa

Layers are cut to fit a device; layer shapes stay the size's own. MFU is model FLOPs (causal attention, no recomputation)
over the peak of BF16, whatever the recipe; the FP8 peak's share stands beside it.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from configs import common as configs
from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.flops import model_flops
from fp8jax.parallel.mesh import make_mesh
from fp8jax.training.step import TrainProgram

MODELS = "llama3:bf16,llama3:fp8,fog_flash:bf16,fog_flash:fp8,fog_flash:fp8_dpa,fog_max:fp8_dpa"
VOCABULARY = 512  # of `tiny`, whose config leaves it to the tokenizer


def make_program(model: str, size: str, layers: int | None, batch: int, length: int | None) -> TrainProgram:
    """The step of 'architecture:recipe' on one device."""
    architecture, recipe = model.split(":")
    values = configs.make(size, architecture=architecture, recipe=recipe)
    values.training.batch_size = batch
    values.training.microbatches = 1
    if layers:
        values.model.layers = layers
    if length:
        values.data.sequence_length = length
    config = config_lib.from_dict(values)
    return TrainProgram(config, define(config.model, config.model.vocab_size or VOCABULARY), make_mesh(config, jax.devices()[:1]))


class Run:
    """A program with its state and one batch; a call is one step."""

    def __init__(self, program: TrainProgram):
        self.program = program
        random = np.random.default_rng(0)
        shape = program.config.training.batch_size, program.config.data.sequence_length
        vocabulary = program.config.model.vocab_size or VOCABULARY
        tokens = random.integers(0, vocabulary, size=shape, dtype=np.int32)
        self.batch = program.put({"inputs": tokens, "targets": np.roll(tokens, -1, 1), "mask": np.ones(shape, np.float32)})
        self.state = program.calibrate(program.init(), self.batch)

    def __call__(self) -> Any:
        """One step; returns its loss."""
        self.state, metrics, _ = self.program.step(self.state, self.batch)
        return metrics["loss"]


def row(model: str, run: Run, seconds: float, slowest: float) -> dict[str, Any]:
    """One line of the table; `speed` is against the first model."""
    program = run.program
    config, memory = program.config, program.compiled_step().memory_analysis()
    sequences, length = config.training.batch_size, config.data.sequence_length
    flops = model_flops(program.definition.config, config.model.vocab_size or VOCABULARY, sequences=sequences, sequence_length=length).total
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    out = {"model": model, "layers": config.model.layers, "tokens": sequences * length, "ms": seconds * 1e3,
           "tokens_per_second": sequences * length / seconds, "speed": slowest / seconds, "model_tflops_per_second": flops / seconds / 1e12,
           "planned_gib": planned / 2**30, "loss": float(jax.device_get(jnp.asarray(run())))}
    device = common.peak()
    if device:
        out |= {"mfu_bf16": flops / seconds / device.bf16, "mfu_fp8": flops / seconds / device.fp8, "peaks": device.source}
    return out


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Prints the table and writes the results; returns their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES)
    parser.add_argument("--models", default=MODELS, help="architecture:recipe, the first is what the others are compared with")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    make = functools.partial(make_program, size=args.size, layers=args.layers, batch=args.batch, length=args.length)
    runs = {model: Run(make(model)) for model in args.models.split(",")}
    seconds = common.interleaved(runs, args.rounds)
    first = next(iter(seconds.values()))
    rows = [row(model, run, seconds[model], first) for model, run in runs.items()]
    return common.save(f"train_step-{args.size}", rows, args.results)


if __name__ == "__main__":
    main()
