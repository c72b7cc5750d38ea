"""NaN put into a running training: the step is skipped and named, training recovers, and before it nothing differs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.models.feed_forward import FeedForward
from fp8jax.monitor.writers import read_metrics
from fp8jax.numerics import gemm_sharding
from fp8jax.training import step as step_lib
from fp8jax.training.checkpoint import Checkpoints
from fp8jax.training.step import TrainProgram
from tests.helpers.runs import EIGHT, logged, micro, saved, train

pytestmark = pytest.mark.slow
AT = 6
BASE = {
    "training": {"steps": 10, "microbatches": 2, "bad_steps": 3},
    "checkpoint": {"every": 2, "keep": 9},
    "evaluation": {"every": 0, "batches": 1},
    "monitor": {"every": 0},
}


def break_gradient(patch):
    original = step_lib.gradients

    def gradients(*args, **options):
        loss, grads, amaxes, taps = original(*args, **options)
        grads["blocks"]["feed_forward"]["up"]["w"] = (
            grads["blocks"]["feed_forward"]["up"]["w"].at[1, 2, 3].set(jnp.nan)
        )
        return loss, grads, amaxes, taps

    patch.setattr(step_lib, "gradients", gradients)


def break_weight(patch):
    """One that this step reads wrongly; in memory it stays as it is."""
    original = step_lib.gradients

    def gradients(state, *args, **options):
        params = jax.tree.map(lambda leaf: leaf, state.params)
        params["blocks"]["post_attention"]["gain"] = (
            params["blocks"]["post_attention"]["gain"].at[1, 3].set(jnp.nan)
        )
        return original(dataclasses.replace(state, params=params), *args, **options)

    patch.setattr(step_lib, "gradients", gradients)


def break_activation(patch):
    original = FeedForward.__call__
    patch.setattr(
        FeedForward,
        "__call__",
        lambda self, x_btd, gemms: original(self, x_btd.at[3, 5, 7].set(jnp.nan), gemms),
    )


def break_microbatch(patch):
    original = step_lib.gradients
    patch.setattr(
        step_lib,
        "gradients",
        lambda state, batch, *args, **options: original(
            state, batch | {"mask": batch["mask"].at[1, 0, 0].set(jnp.nan)}, *args, **options
        ),
    )


def break_amax_on_one_device(patch):
    """The fifth of eight devices, data 2 x fsdp 4, has another amax of every operand; the tensors themselves stay as they are."""
    original = gemm_sharding.amax_by_device
    patch.setattr(
        gemm_sharding,
        "amax_by_device",
        lambda *args, **options: original(*args, **options).at[1, 0].set(jnp.nan),
    )


def inject(monkeypatch, break_program):
    """Step AT of a run is that of a program made while `break_program` was in force."""
    original = TrainProgram.step

    def step(self, state, batch, *, collect=False):
        if int(jax.device_get(state.step)) + 1 != AT:
            return original(self, state, batch, collect=collect)
        with monkeypatch.context() as patch:
            break_program(patch)
            return original(TrainProgram(self.plan), state, batch, collect=collect)

    monkeypatch.setattr(TrainProgram, "step", step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs without injection, by mesh."""
    made = {}

    def run(name, config):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            assert train(config, made[name]) == 0
        return made[name]

    return run


def arrays_of(config, workdir, step):
    with Checkpoints(workdir) as checkpoints:
        found, _ = checkpoints.restore(
            step,
            {"params": step_program(config).params, "scaling": step_program(config).scaling},
            partial=True,
        )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def step_program(config):
    from tests.helpers.runs import program_of

    return program_of(config).abstract_state


@pytest.mark.parametrize(
    ("name", "damage", "mesh", "first"),
    [
        pytest.param(
            "one",
            break_gradient,
            {"fsdp": 1},
            "gradient of blocks.feed_forward.up.w in layer 1",
            id="gradient",
        ),
        pytest.param("one", break_weight, {"fsdp": 1}, "amax of mlp_up.x in layer 1", id="weight"),
        pytest.param(
            "one", break_activation, {"fsdp": 1}, "amax of mlp_up.x in layer 0", id="activation"
        ),
        pytest.param("one", break_microbatch, {"fsdp": 1}, "loss", id="microbatch"),
        pytest.param(
            "eight",
            break_amax_on_one_device,
            EIGHT,
            "amax of qkv.x in layer 0",
            id="amax of one device",
        ),
    ],
)
def test_a_step_gone_bad_is_skipped_and_named_and_training_goes_on(
    tmp_path, monkeypatch, whole, capsys, name, damage, mesh, first
):
    config = micro(**BASE, mesh=mesh)
    clean = whole(name, config)
    inject(monkeypatch, damage)
    assert train(config, tmp_path) == 0
    bad = [
        event for event in read_metrics(tmp_path / "events.jsonl") if event["kind"] == "bad_step"
    ]
    assert [(event["step"], event["first"]) for event in bad] == [(AT, first)]
    assert f"step {AT} is bad, first in {first}; the update was skipped" in capsys.readouterr().out
    lines, expected = logged(tmp_path), logged(clean)
    assert lines[: AT - 1] == expected[: AT - 1] and lines[AT - 1]["bad_step"] == 1
    assert all(entry["bad_step"] == 0 and math.isfinite(entry["loss"]) for entry in lines[AT:])
    assert lines[-1]["loss"] < lines[AT - 2]["loss"]  # it goes on learning
    # Bit for bit the clean run up to there, in what is saved as well; the bad step itself is not saved (slow storage postpones more).
    steps = Checkpoints(tmp_path).steps()
    assert 2 in steps and 10 in steps and AT not in steps
    for a, b in zip(arrays_of(config, clean, 2), arrays_of(config, tmp_path, 2), strict=True):
        assert a.tobytes() == b.tobytes()
    for name, array in saved(config, tmp_path)[0].items():
        assert np.isfinite(array.astype(np.float32)).all() or "recent" in name, name


def test_a_weight_lost_in_memory_is_gone_back_from(tmp_path, monkeypatch, whole):
    """The state itself holds a NaN, without a bad step before: it never becomes a checkpoint, and the run goes back to the one before."""
    config = micro(**BASE)
    clean, original, broken = whole("one", config), TrainProgram.step, []
    monkeypatch.setattr(
        Checkpoints, "busy", lambda self: False
    )  # or a slow disk would postpone saves

    def step(self, state, batch, *, collect=False):
        state, metrics, taps = original(self, state, batch, collect=collect)
        if int(jax.device_get(state.step)) == AT and not broken:
            broken.append(AT)
            params = jax.tree.map(lambda leaf: leaf, state.params)
            params["embedding"]["w"] = params["embedding"]["w"].at[101, 0].set(jnp.nan)
            state = dataclasses.replace(state, params=params)
        return state, metrics, taps

    monkeypatch.setattr(TrainProgram, "step", step)
    assert train(config, tmp_path) == 0
    events = read_metrics(tmp_path / "events.jsonl")
    unsound = {
        (event["step"], event["first"]) for event in events if event["kind"] == "unsound_state"
    }
    assert unsound == {(AT, "parameter embedding.w")}
    assert [event["step"] for event in events if event["kind"] == "rollback"] == [AT]
    assert logged(tmp_path)[:4] == logged(clean)[:4] and all(
        math.isfinite(entry["loss"]) for entry in logged(tmp_path)
    )
    assert Checkpoints(tmp_path).newest() == (10, {})
