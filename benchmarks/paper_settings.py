"""Measure what the paper's settings change against our defaults: gradients of a trained state, held-out loss over seeds.

    python benchmarks/paper_settings.py                    # 3 seeds of each at tiny, then gradients; an hour on 2 idle cores
    python benchmarks/paper_settings.py --steps=100        # cut short: schedules follow
    python benchmarks/paper_settings.py --steps=100 --set=data.sequence_length=128 --set=training.batch_size=8

`default` is configs/fp8_base.py, `paper` configs/fog_paper.py; the variants between change one
setting of the first. Losses come from whole runs. Gradients are all of one state, that of `paper`
and the first seed, and of one batch, whose BF16 gradients are the reference; scales come from that
run's histories. `ends_in_fp8` casts what our attention keeps in BF16, as some libraries do: O to
e4m3 and dQ, dK, dV to e5m2, at scales of their own amaxes.

Runs that are in benchmarks/results/paper_settings.json already, with the same options, are not
repeated.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import common
import fp8_vs_bf16
import jax
import jax.numpy as jnp
import numpy as np

from configs import fog_paper, fp8_base
from fp8jax import config as config_lib
from fp8jax.data import pipeline
from fp8jax.models import attention as attention_module
from fp8jax.models import gemms
from fp8jax.numerics import formats
from fp8jax.numerics.compiling import compiler_options
from fp8jax.plan import make_plan
from fp8jax.training import state_formats
from fp8jax.training.calibration import calibrate
from fp8jax.training.evaluation import Evaluator
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram, gradients

PATH = common.RESULTS / "paper_settings.json"
LOSSES = {"paper": fog_paper, "default": fp8_base}
UNROUNDED, DELAYED = {"fp8.power_of_two": False}, {"fp8.weight_scaling": "delayed"}
GRADIENTS = {
    "default": {},
    "unrounded": UNROUNDED,
    "delayed_weights": DELAYED,
    "unrounded, delayed_weights": UNROUNDED | DELAYED,
    "ends_in_fp8": {},
}


def config_of(preset: Any, changes: dict[str, Any]) -> config_lib.Config:
    """Return a preset at tiny with changes, 'section.field' → value."""
    values = preset.get_config("tiny")
    values.evaluation.batches = 0
    for path, value in changes.items():
        section, field = path.split(".")
        values[section][field] = value
    return config_lib.from_dict(values)


def program_of(config: config_lib.Config) -> TrainProgram:
    """Return the programs of a run on one device."""
    return TrainProgram(make_plan(config, jax.devices()[:1]))


def train(config: config_lib.Config) -> tuple[float, TrainState]:
    """Train a run, and return its held-out loss, of the whole split, and its final state."""
    program = program_of(config)
    batches = pipeline.train_batches(config)
    state = calibrate(program, program.init(), program.put(batches[0]))
    for step in range(config.training.steps):
        state, metrics, _ = program.step(state, program.put(batches[step]))
        if step % 10 == 9:
            print(f"step {step + 1}: {float(metrics['loss']):.4f}", flush=True)
    return Evaluator(program.plan.change(config))(state.params)["loss"], state


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return values after a cast at the scale of their own amax."""
    scale = formats.scale_of(formats.amax(x), dtype, power_of_two=False)
    return formats.dequantise(formats.quantise(x, scale, dtype, emulated=True)).astype(x.dtype)


@jax.custom_vjp
def rounded_backward(x: jax.Array) -> jax.Array:
    """Return x itself; its gradient is cast to e5m2."""
    return x


rounded_backward.defvjp(lambda x: (x, None), lambda _, g: (rounded(g, formats.E5M2),))


@jax.custom_vjp
def rounded_forward(x: jax.Array) -> jax.Array:
    """Return x cast to e4m3; its gradient is left unchanged."""
    return rounded(x, formats.E4M3)


rounded_forward.defvjp(lambda x: (rounded_forward(x), None), lambda _, g: (g,))


@contextlib.contextmanager
def ends_in_fp8() -> Iterator[None]:
    """Make the results of attention FP8 tensors, forward and backward, inside this context."""
    original = attention_module.attention

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, *args: Any, **options: Any
    ) -> jax.Array:
        q, k, v = (rounded_backward(x) for x in (q, k, v))
        return rounded_forward(original(q, k, v, *args, **options))

    with unittest.mock.patch.object(attention_module, "attention", attention):
        yield


def block_gradients(config: config_lib.Config, trained: TrainState) -> dict[str, np.ndarray]:
    """Return gradients of the blocks' matrices, float64 [layers, ...], at a trained state, from its histories."""
    program = program_of(config)
    entries = program.abstract_state.scaling
    scaling = {entry: trained.scaling[entry] for entry in entries}
    newest = {entry: state["history"][..., 0] for entry, state in scaling.items()}
    scaling = gemms.update_scaling(
        scaling, newest, program.recipes
    )  # scales as this recipe rounds them
    state = dataclasses.replace(trained, scaling=scaling)
    batch = program.put(pipeline.train_batches(config)[config.training.steps + 3])

    def run(state: TrainState, batch: dict[str, jax.Array]) -> Any:
        return gradients(state, batch, config, program.definition, program.recipes)[1]["blocks"]

    found = jax.jit(run, compiler_options=compiler_options("cpu"))(state, batch)
    attention, ffn = found["attention"], found["feed_forward"]
    heads = config.model.heads // config.model.kv_heads
    qkv = np.asarray(
        attention["qkv"]["w"], np.float64
    )  # [layers, d, KV heads, queries of one and its key and value, h]
    matrices = {"q": qkv[:, :, :, :heads], "k": qkv[:, :, :, heads], "v": qkv[:, :, :, heads + 1]}
    named = {"attention_out": attention["out"], "mlp_up": ffn["up"], "mlp_down": ffn["down"]}
    return matrices | {name: np.asarray(leaf["w"], np.float64) for name, leaf in named.items()}


def errors(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Return relative errors over all layers, by matrix, and of all together."""
    squares = {
        name: (np.sum((found[name] - reference[name]) ** 2), np.sum(reference[name] ** 2))
        for name in reference
    }
    squares["all"] = tuple(np.sum(list(squares.values()), axis=0))
    return {name: float(np.sqrt(wrong / right)) for name, (wrong, right) in squares.items()}


def compare_gradients(trained: TrainState, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return errors against BF16, setting by setting."""
    scaled = options | {
        "model.rope_scaling_factor": fog_paper.get_config("tiny").model.rope_scaling_factor
    }
    reference = block_gradients(config_of(fp8_base, scaled | {"fp8.recipe": "bf16"}), trained)
    found = {}
    for name, changes in GRADIENTS.items():
        with ends_in_fp8() if name == "ends_in_fp8" else contextlib.nullcontext():
            found[name] = errors(
                block_gradients(config_of(fp8_base, scaled | changes), trained), reference
            )
        print(name, found[name], flush=True)
    return found


def save(record: dict[str, Any], path: pathlib.Path) -> None:
    """Write the results so far."""
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--results", type=pathlib.Path, default=PATH)
    parser.add_argument(
        "--set", action="append", default=[], help="another field, as in training.batch_size=8"
    )
    args = parser.parse_args(argv)
    options = {"training.steps": args.steps} | {
        path: int(value) for path, value in (item.split("=") for item in args.set)
    }
    fresh = {
        "options": options,
        "device": jax.devices()[0].device_kind,
        "versions": common.versions(),
        "held_out_loss": {},
    }
    record = json.loads(args.results.read_text()) if args.results.exists() else fresh
    record = record if record["options"] == options else fresh
    for seed in range(args.seeds):
        for name, preset in LOSSES.items():
            wanted = name == "paper" and seed == 0 and "gradients" not in record
            if f"{name} {seed}" in record["held_out_loss"] and not wanted:
                continue
            loss, state = train(config_of(preset, options | {"training.seed": seed}))
            record["held_out_loss"][f"{name} {seed}"] = loss
            print(name, seed, loss, flush=True)
            save(record, args.results)
            if wanted:
                params, _ = state_formats.unpack(state.params, state.opt_state)
                record["gradients"] = compare_gradients(
                    dataclasses.replace(state, params=params), options
                )
                save(record, args.results)
    losses = {
        name: [record["held_out_loss"][f"{name} {seed}"] for seed in range(args.seeds)]
        for name in LOSSES
    }
    record["paper over default"] = fp8_vs_bf16.gap(losses["paper"], losses["default"])
    save(record, args.results)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
