"""Time the real training step (training/step.py): architectures x recipes x depths, taking turns in one process.

    python benchmarks/train_step.py --size=tiny
    python benchmarks/train_step.py --size=8b --layers=6,2 --models=llama3:bf16,fog_flash:fp8_dpa --profile

Layers are cut to fit a device; layer shapes stay the size's own. With two depths, the step of the
size's full depth is extrapolated from the two (rows marked so): in few layers head and optimizer
weigh more than in a whole model. Only one candidate's state is in memory at a time. MFU is model
FLOPs (causal attention, no recomputation) over the peak of BF16, for every recipe; the FP8 peak's
share stands beside it. `--profile` adds where the milliseconds go (kernels.py). A candidate that
fails, such as for lack of memory, is a row with its error.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import jax
import kernels
import numpy as np

from configs import common as configs
from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.flops import model_flops
from fp8jax.plan import make_plan
from fp8jax.training.calibration import calibrate
from fp8jax.training.state import initial_state
from fp8jax.training.step import TrainProgram

MODELS = "llama3:bf16,fog_flash:fp8_dpa,fog_flash:fp8,fog_flash:bf16,llama3:fp8,fog_max:fp8_dpa"
VOCABULARY = 512  # vocabulary of `tiny`, whose config leaves it to the tokenizer
TRACED_STEPS = 3


def make_program(
    model: str, layers: int | None, *, size: str, batch: int, length: int | None, remat: str
) -> TrainProgram:
    """Return the step of "architecture:recipe[:option...]" on one device.

    Options: "fast" accumulates fast in all passes, "loop" and "unrolled" set model.scan_layers, others are backends of
    attention.
    """
    architecture, recipe, *more = model.split(":")
    values = configs.make(size, architecture=architecture, recipe=recipe)
    values.training.update(batch_size=batch, microbatches=1, remat=remat)
    values.model.layers = layers or values.model.layers
    values.data.sequence_length = length or values.data.sequence_length
    for option in more:
        if option == "fast":
            values.fp8.fast_accumulation = "all"
        elif option in ("loop", "unrolled"):
            values.model.scan_layers = option == "loop"
        else:
            values.fp8.attention_backend = option
    config = config_lib.from_dict(values)
    return TrainProgram(
        make_plan(config, jax.devices()[:1], vocab_size=config.model.vocab_size or VOCABULARY)
    )


class Run:
    """A program, one batch, and its calibration; the state lives for a turn only."""

    def __init__(self, program: TrainProgram):
        self.program, self.seconds, self.loss = program, [], float("nan")
        start = time.perf_counter()
        self.compiled = program.compiled_step()
        self.compile_seconds = time.perf_counter() - start
        random = np.random.default_rng(0)
        shape = program.config.training.batch_size, program.config.data.sequence_length
        tokens = random.integers(
            0, program.config.model.vocab_size or VOCABULARY, size=shape, dtype=np.int32
        )
        self.batch = program.put(
            {
                "inputs": tokens,
                "targets": np.roll(tokens, -1, 1),
                "mask": np.ones(shape, np.float32),
            }
        )
        self._init = jax.jit(
            lambda: initial_state(program.definition, program.recipes, program.config),
            out_shardings=program.state_shardings,
        )
        self.scaling = jax.device_get(calibrate(program, self._init(), self.batch).scaling)

    def turn(self, steps: int, folder: pathlib.Path | None = None) -> None:
        """Run from fresh weights a step that is not counted, then `steps` timed ones, or as many traced into a folder."""
        state = dataclasses.replace(
            self._init(), scaling=jax.device_put(self.scaling, self.program.state_shardings.scaling)
        )
        state, metrics, _ = self.compiled(state, self.batch)
        jax.block_until_ready(metrics)
        if folder is not None:
            with kernels.traced(folder):
                for _ in range(steps):
                    state, metrics, _ = self.compiled(state, self.batch)
                jax.block_until_ready(metrics)
            return
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics, _ = self.compiled(state, self.batch)
            jax.block_until_ready(metrics)
            self.seconds.append(time.perf_counter() - start)
        self.loss = float(metrics["loss"])

    def profile(self) -> dict[str, Any]:
        """Return milliseconds per step by class of kernel."""
        with tempfile.TemporaryDirectory() as folder:
            self.turn(TRACED_STEPS, pathlib.Path(folder))
            return kernels.milliseconds(pathlib.Path(folder), self.compiled.as_text(), TRACED_STEPS)


def rates(config: config_lib.Config, seconds: float) -> dict[str, Any]:
    """Return the rates that follow from a step's seconds."""
    sequences, length = config.training.batch_size, config.data.sequence_length
    resolved = define(config.model, config.model.vocab_size or VOCABULARY).config
    flops = model_flops(
        resolved, config.model.vocab_size or VOCABULARY, sequences=sequences, sequence_length=length
    ).total
    out = {
        "tokens": sequences * length,
        "ms": seconds * 1e3,
        "tokens_per_second": sequences * length / seconds,
        "model_tflops_per_second": flops / seconds / 1e12,
    }
    device = common.peak()
    return out | (
        {"mfu_bf16": flops / seconds / device.bf16, "mfu_fp8": flops / seconds / device.fp8}
        if device
        else {}
    )


def row(name: str, layers: int, run: Run) -> dict[str, Any]:
    """Return one measured line of the table."""
    config, memory = run.program.config, run.compiled.memory_analysis()
    planned = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "model": name,
        "layers": layers,
        "depth": "measured",
        "attention": run.program.recipes.attention_backend,
        **rates(config, statistics.median(run.seconds)),
        "planned_gib": planned / 2**30,
        "loss": run.loss,
        "compile_seconds": run.compile_seconds,
        "fastest_ms": min(run.seconds) * 1e3,
        "slowest_ms": max(run.seconds) * 1e3,
    }


def extrapolated(
    rows: Sequence[dict[str, Any]], runs: dict[tuple[str, int], Run], size: str
) -> list[dict[str, Any]]:
    """Return the size's full depth, on the line through the two depths that were measured."""
    full, out = configs.SIZES[size]["layers"], []
    for name in dict.fromkeys(row["model"] for row in rows):
        times = {row["layers"]: row["ms"] / 1e3 for row in rows if row["model"] == name}
        few, many = min(times), max(times)
        if times[many] <= times[few]:  # only one depth, or noise
            continue
        seconds = times[few] + (full - few) * (times[many] - times[few]) / (many - few)
        config = runs[name, few].program.config
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=full))
        out.append(
            {"model": name, "layers": full, "depth": "extrapolated", **rates(config, seconds)}
        )
    return out


def with_speed(rows: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """Return the rows with their speed against the first model at the same depth."""
    base = {row["layers"]: row["tokens_per_second"] for row in rows if row["model"] == first}
    return [
        row | {"speed": row["tokens_per_second"] / base[row["layers"]]}
        if row["layers"] in base
        else row
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    args = _arguments(argv)
    make = functools.partial(
        make_program, size=args.size, batch=args.batch, length=args.length, remat=args.remat
    )
    models, depths = args.models.split(","), [int(n) for n in args.layers.split(",")]
    runs: dict[tuple[str, int], Run] = {}
    failed, profiles = [], {}

    def write(*, show: bool = False) -> pathlib.Path:
        rows = [row(name, layers, run) for (name, layers), run in runs.items() if run.seconds]
        rows = with_speed(rows + extrapolated(rows, runs, args.size), models[0])
        device = common.peak()
        return common.save(
            f"{args.name}-{args.size}",
            rows + failed,
            args.results,
            show=show,
            remat=args.remat,
            profiles=profiles,
            peaks=device.source if device else None,
        )

    def attempt(key: tuple[str, int], work: Any) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  a candidate that does not fit is a result
            runs.pop(key, None)
            failed.append({"model": key[0], "layers": key[1], "error": common.one_line(error)})
            print(failed[-1], flush=True)

    def start(key: tuple[str, int]) -> None:
        runs[key] = Run(make(*key))
        runs[key].turn(args.steps)

    def profile(key: tuple[str, int]) -> None:
        profiles[f"{key[0]} x {key[1]}"] = runs[key].profile()

    for layers in depths:
        for name in models:
            attempt((name, layers), functools.partial(start, (name, layers)))
            write()
    for _ in range(args.rounds - 1):
        for key in list(runs):
            attempt(key, functools.partial(runs[key].turn, args.steps))
    write()
    for key in [key for key in runs if args.profile and key[1] == depths[0]]:
        attempt(key, functools.partial(profile, key))
    for name, found in profiles.items():
        print(f"\n{name}, ms a step by class of kernel:")
        common.print_table([{"class": kind, "ms": ms} for kind, ms in found["classes"].items()])
    return write(show=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/train_step.py --size=tiny",
    )
    parser.add_argument(
        "--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES
    )
    parser.add_argument(
        "--models",
        default=MODELS,
        help="architecture:recipe[:attention backend]; the others are compared with the first",
    )
    parser.add_argument(
        "--layers", default="6,2" if common.on_gpu() else "4", help="one depth or two"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int)
    parser.add_argument("--remat", default="none", choices=config_lib.REMAT_POLICIES)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each candidate")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a turn")
    parser.add_argument(
        "--profile", action="store_true", help="trace each model at the first depth"
    )
    parser.add_argument("--name", default="train_step", help="start of the results file's name")
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
