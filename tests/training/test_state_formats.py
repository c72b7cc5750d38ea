"""Optimizers and the formats of their state: resumed bit for bit, restored across choices, the same on any mesh, and training."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.data import pipeline
from fp8jax.numerics import low_bit_state
from fp8jax.plan import make_plan
from fp8jax.training import loop, scaling_state, state_formats
from fp8jax.training.calibration import calibrate
from fp8jax.training.checkpoint import Checkpoints, save_config
from fp8jax.training.evaluation import load_run
from fp8jax.training.gradients import GradientSums
from fp8jax.training.resume import check_continues, resume
from fp8jax.training.step import TrainProgram

FP8_FP16 = {
    "gradient_dtype": "bfloat16",
    "master_dtype": "float16",
    "first_moment": "fp8",
    "second_moment": "float16",
}
FP8_FP8 = FP8_FP16 | {"second_moment": "fp8"}
COMPENSATED = {
    "master_dtype": "bfloat16",
    "master_rounding": "compensated",
    "first_moment": "bfloat16",
    "second_moment": "bfloat16",
}
FLOAT32 = {"gradient_dtype": "float32"}
KINDS = {
    "fp8 and fp16": FP8_FP16,
    "fp8": FP8_FP8,
    "compensated": COMPENSATED,
    "float32 gradients": FLOAT32,
    "ademamix": FP8_FP16 | {"name": "ademamix"},
    "muon": FP8_FP16 | {"name": "muon"},
}
SOME_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "fp8 and fp16"]


def micro(optimizer, devices=1, **training):
    return config_lib.from_dict(
        {
            "model": {
                "layers": 2,
                "width": 32,
                "ffn_width": 32,
                "heads": 2,
                "kv_heads": 1,
                "vocab_size": 384,
            },
            "data": {"sequence_length": 32},
            "training": {"steps": 8, "batch_size": 16, "microbatches": 2} | training,
            "optimizer": {"warmup_steps": 2} | optimizer,
            "evaluation": {"every": 0, "batches": 1},
            "monitor": {"every": 0},
            "log": {"every": 1, "report_minutes": 0},
            "mesh": {"fsdp": devices},
        }
    )


@functools.cache
def program_of(config):
    return TrainProgram(make_plan(config, jax.devices()[: config.mesh.fsdp], vocab_size=384))


def advance(program, state, first, last):
    """State and losses after the steps first + 1 to last."""
    losses, batches = [], pipeline.train_batches(program.config)
    for i in range(first, last):
        state, metrics, _ = program.step(state, program.put(batches[i]))
        assert int(metrics["bad_step"]) == 0
        losses.append(float(metrics["loss"]))
    return state, losses


def start(program):
    return calibrate(
        program, program.init(), program.put(pipeline.train_batches(program.config)[0])
    )


def arrays(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bits(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("kind", ["fp8 and fp16", *SOME_SLOW])
def test_a_restored_state_goes_on_bit_for_bit(kind, tmp_path):
    """Four steps, or two, a checkpoint and two more; what is on disk has the formats that were asked for."""
    program = program_of(micro(KINDS[kind]))
    whole, losses = advance(program, start(program), 0, 4)
    assert losses[-1] < losses[0]
    half, _ = advance(program, start(program), 0, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, half.items(), {"step": 2})
        checkpoints.wait()
        resumed = resume(program, checkpoints, pytest.fail)
        dtypes = checkpoints.dtypes(2)
    assert state_formats.saved_as(config_lib.OptimizerConfig(), dtypes) == dataclasses.replace(
        config_lib.OptimizerConfig(),
        **{name: value for name, value in KINDS[kind].items() if name != "gradient_dtype"},
    )
    assert_same_bits(advance(program, resumed.state, 2, 4)[0], whole)


def test_a_run_goes_on_with_states_in_other_formats(tmp_path):
    """float32 to FP8 to BF16 with remainders: told, and weights and moments are what they were, up to the coarser format's rounding."""
    said, before = [], None
    for step, optimizer in ((1, {}), (2, FP8_FP16), (3, COMPENSATED), (4, {})):
        program = program_of(micro(optimizer))
        with Checkpoints(tmp_path) as checkpoints:
            state = resume(program, checkpoints, said.append).state
            if before is None:
                state = advance(program, start(program), 0, 1)[0]
            params, moments = state_formats.unpack(state.params, state.opt_state)
            if before is not None:
                assert_close(before, (params, moments), coarsest=2.0**-3)
            before = params, moments
            checkpoints.save(step, state.items(), {"step": step})
    assert (
        len(said) == 3
        and "weights float32, moments float32 and float32 in the checkpoint, as weights float16 (stochastic)"
        in said[0]
    )
    assert load_run_dtypes(tmp_path, micro({})) == {"float32"}


def test_another_optimizer_starts_its_moments_anew(tmp_path):
    program, other = program_of(micro(FP8_FP16)), program_of(micro({"name": "muon"}))
    said = []
    with Checkpoints(tmp_path) as checkpoints:
        state = program.init()
        data = {"step": 3, "scaling": scaling_state.record(program.recipes)}
        checkpoints.save(3, dataclasses.replace(state, step=jnp.int32(3)).items(), data)
        checkpoints.wait()
        found = resume(other, checkpoints, said.append).state
    assert (
        said == ["optimizer adamw in the checkpoint, muon from here on: its moments start anew"]
        and int(found.step) == 3
    )
    for name, array in arrays(found.params).items():
        np.testing.assert_array_equal(array, arrays(state.params)[name].astype(np.float32))
    with pytest.raises(
        config_lib.ConfigError, match="config.optimizer.name: 'muon', but the run in .* has 'adamw'"
    ):
        save_config(tmp_path, program.config)
        check_continues(other.config, tmp_path)


def assert_close(before, after, coarsest):
    for (name, a), b in zip(arrays(before).items(), arrays(after).values(), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == np.float32:
            np.testing.assert_allclose(
                b, a, rtol=2.5 * coarsest, atol=1e-3 * np.abs(a).max(initial=0), err_msg=name
            )


def load_run_dtypes(workdir, config):
    save_config(workdir, config)
    return {
        leaf.dtype.name
        for leaf in jax.tree.leaves(load_run(workdir, devices=jax.devices()[:1])[0].params)
    }


def test_every_array_is_rounded_with_bits_of_its_own(monkeypatch):
    """Weights and moments that share bits would be rounded alike, and their errors would add up."""
    program = program_of(micro(FP8_FP16))
    state, numbers, original = program.abstract_state, [], low_bit_state.seed_of
    monkeypatch.setattr(
        low_bit_state,
        "seed_of",
        lambda step, number: numbers.append(number) or original(step, number),
    )
    jax.eval_shape(
        lambda p, o: state_formats.pack(
            program.config.optimizer, *state_formats.unpack(p, o), jnp.int32(0)
        ),
        state.params,
        state.opt_state,
    )
    assert len(numbers) > 10 and len(numbers) == len(set(numbers))


def test_float32_is_left_alone():
    """Packing and unpacking are not even in the program."""
    program = program_of(micro({}))
    state = program.abstract_state
    jaxpr = jax.make_jaxpr(
        lambda p, o: state_formats.pack(
            program.config.optimizer, *state_formats.unpack(p, o), jnp.int32(0)
        )
    )(state.params, state.opt_state)
    assert {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns} <= {"convert_element_type"}
    assert not jax.tree.leaves((state.opt_state.scales, state.opt_state.remainder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8 and fp16", "muon", "ademamix"])
def test_eight_devices_agree_with_one(kind):
    """Rounding draws the same bits on any mesh: after one step states agree but for what another order of sums moves."""
    losses, states = {}, {}
    for devices in (1, 8):
        program = program_of(micro(KINDS[kind], devices))
        state, losses[devices] = advance(program, start(program), 0, 4)
        states[devices] = state_formats.unpack(state.params, state.opt_state)[0]
    np.testing.assert_allclose(losses[1], losses[8], rtol=2e-3)
    for name, a in arrays(states[1]).items():
        b = arrays(states[8])[name]
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a) + 1e-6, name


def test_sums_in_bfloat16_do_not_stand_still():
    """Of 1024 equal gradients the last ones are far below the sum's last place."""
    sums = GradientSums(config_lib.OptimizerConfig(gradient_dtype="bfloat16"), jnp.int32(3))
    grads = {"w": jnp.full((64, 64), 1e-3, jnp.bfloat16), "gain": jnp.full((8,), 1e-3)}
    total, _ = jax.lax.scan(
        lambda t, i: (sums.add(t, grads, i), None), sums.zeros(grads), jnp.arange(1024)
    )
    assert total["w"].dtype == jnp.bfloat16 and total["gain"].dtype == jnp.float32
    exact = 1024 * float(grads["w"][0, 0])
    assert float(total["w"].astype(jnp.float32).mean()) == pytest.approx(exact, rel=0.01)
    np.testing.assert_allclose(total["w"].astype(jnp.float32), exact, rtol=0.25)


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit_in_other_formats(tmp_path):
    """Through the loop: eight steps at once, and with a stop after five."""
    short = dataclasses.replace(
        micro(FP8_FP8), checkpoint=config_lib.CheckpointConfig(every=5, keep=3)
    )
    devices = jax.devices()[:1]
    assert loop.train(short, tmp_path / "whole", devices) == 0
    (tmp_path / "parts").mkdir()
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / "5", tmp_path / "parts" / "checkpoints" / "5"
    )
    assert loop.train(short, tmp_path / "parts", devices) == 0
    ends = []
    for name in ("whole", "parts"):
        with Checkpoints(tmp_path / name) as checkpoints:
            ends.append(checkpoints.restore(8, program_of(short).abstract_state.items())[0])
    assert_same_bits(*ends)
