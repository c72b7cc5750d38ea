"""Numbers gone bad: skipped in the step, named, and, if they stay, gone back from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.data import pipeline
from fp8jax.monitor.writers import read_metrics
from fp8jax.training import loop, step
from fp8jax.training.bad_steps import WINDOW, Health
from fp8jax.training.calibration import calibrate
from tests.helpers.runs import micro, program_of, train


def one_step(program, state, batch):
    _, metrics, _ = program.step(state, batch)
    return int(metrics["bad_step"]), program.bad_names[int(metrics["first_bad"])]


@pytest.fixture(scope="module")
def started():
    program = program_of(micro(training={"microbatches": 2}))
    batch = program.put(pipeline.train_batches(program.config)[0])
    return program, jax.device_get(calibrate(program, program.init(), batch)), batch


@pytest.mark.parametrize(
    ("path", "index", "name"),
    [
        (("blocks", "post_ffn", "gain"), (0, 0), "amax of qkv.x in layer 1"),
        (("blocks", "post_attention", "gain"), (1, 3), "amax of mlp_up.x in layer 1"),
        (
            ("blocks", "attention", "qkv", "w"),
            (0, 0, 0, 0, 0),
            "amax of attention_scores.q in layer 0",
        ),
        (("embedding", "w"), (101, 0), "amax of qkv.x in layer 0"),
    ],
)
def test_a_bad_weight_is_named_where_it_first_shows(started, path, index, name):
    program, state, batch = started
    params = jax.tree.map(np.array, state.params)
    leaf = params
    for key in path[:-1]:
        leaf = leaf[key]
    leaf[path[-1]][index] = np.nan
    assert one_step(
        program,
        jax.device_put(dataclasses.replace(state, params=params), program.state_shardings),
        batch,
    ) == (1, name)


def test_one_bad_microbatch(started):
    program, state, batch = started
    mask = batch["mask"].at[1, 0, 0].set(jnp.nan)
    assert one_step(
        program, jax.device_put(state, program.state_shardings), batch | {"mask": mask}
    ) == (1, "loss")


def test_a_good_step_is_good(started):
    program, state, batch = started
    assert one_step(program, jax.device_put(state, program.state_shardings), batch)[0] == 0


def test_a_bad_gradient_is_named(monkeypatch):
    original = step.gradients

    def broken(*args, **options):
        loss, grads, amaxes, taps = original(*args, **options)
        grads["blocks"]["post_ffn"]["gain"] = (
            grads["blocks"]["post_ffn"]["gain"].at[1, 2].set(jnp.inf)
        )
        return loss, grads, amaxes, taps

    monkeypatch.setattr(step, "gradients", broken)
    program = program_of(micro())
    batch = program.put(pipeline.train_batches(program.config)[0])
    state = dataclasses.replace(
        program.init(), scaling=jax.tree.map(jnp.ones_like, program.init().scaling)
    )
    assert one_step(program, state, batch) == (1, "gradient of blocks.post_ffn.gain in layer 1")


@pytest.fixture
def poison(monkeypatch):
    """Makes some batches of the training data impossible to learn from."""
    original = pipeline.train_iterator

    def arm(bad):
        def iterate(config, start_step, rows):
            for index, batch in enumerate(original(config, start_step, rows), start_step):
                yield (
                    batch | {"mask": batch["mask"] * np.float32(np.inf)} if index in bad else batch
                )

        monkeypatch.setattr(pipeline, "train_iterator", iterate)

    return arm


def events(workdir, kind):
    return [event for event in read_metrics(workdir / "events.jsonl") if event["kind"] == kind]


def test_batches_that_cannot_be_digested_are_passed_over(tmp_path, poison, capsys):
    poison({4, 5, 6})
    config = micro(training={"steps": 8, "bad_steps": 3}, checkpoint={"every": 2})
    assert train(config, tmp_path) == 0
    first = events(tmp_path, "bad_step")[0]
    assert first["step"] == 5 and first["in_a_row"] == 1 and first["first"]
    assert [event["step"] for event in events(tmp_path, "rollback")] == [7]
    steps = [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert (
        sum(entry["bad_step"] for entry in read_metrics(tmp_path / "metrics.jsonl")) <= 2
    )  # those before the checkpoint of step 6
    assert "are passed over" in capsys.readouterr().out
    assert train(config, tmp_path) == 0  # finished, whatever the data said


def test_a_run_that_cannot_recover_stops_with_3_and_is_saved(tmp_path, poison):
    poison(set(range(4, 100)))
    config = micro(
        training={"steps": 40, "bad_steps": 2, "rollbacks": 1},
        checkpoint={"every": 3},
        evaluation={"every": 0},
    )
    assert train(config, tmp_path) == loop.BAD_NUMBERS == 3
    assert len(events(tmp_path, "rollback")) == 1 and len(events(tmp_path, "bad_numbers")) == 1
    assert loop.Checkpoints(tmp_path).newest()[0] is not None


def test_spikes():
    health, rng = Health.initial(), np.random.default_rng(0)
    for count in range(WINDOW + 50):
        values = jnp.asarray(rng.normal((2.0, 0.5), (0.05, 0.1)), jnp.float32)
        assert not bool(health.is_spike(jnp.asarray([1e9, 1e9]), 8.0)) or count >= WINDOW
        health = health.after(jnp.asarray(bool(health.is_spike(values, 8.0))), values)
    assert int(health.bad_steps) == 0
    assert bool(health.is_spike(jnp.asarray([2.6, 0.5]), 8.0)) and bool(
        health.is_spike(jnp.asarray([2.0, 1.6]), 8.0)
    )
    assert not bool(health.is_spike(jnp.asarray([2.2, 0.8]), 8.0)) and not bool(
        health.is_spike(jnp.asarray([0.1, 0.0]), 8.0)
    )
    # What is not finite does not enter the window.
    for values in ([jnp.nan, 0.5], [2.0, jnp.inf]):
        assert np.array_equal(
            health.after(jnp.asarray(True), jnp.asarray(values)).recent, health.recent
        )


def test_nothing_is_no_nan():
    """Nor does a window stay NaN that comes from a checkpoint of before."""
    assert np.isfinite(Health.initial().recent).all()
    old = dataclasses.replace(Health.initial(), recent=jnp.full((2, WINDOW), jnp.nan))
    new = old.after(jnp.asarray(False), jnp.asarray([2.0, 0.5]))
    assert (
        np.isfinite(new.recent).all()
        and new.recent[:, -1].tolist() == [2.0, 0.5]
        and not new.is_spike(jnp.asarray([1e9, 1e9]), 8.0)
    )


def test_a_new_level_that_lasts_is_accepted_and_a_lone_spike_is_not():
    rng = np.random.default_rng(0)
    after = jax.jit(
        lambda health, values: (spike := health.is_spike(values, 8.0), health.after(spike, values))
    )
    health, skipped = Health.initial(), []
    for count in range(WINDOW + 300):
        loss = 2.0 + 0.3 * (count >= WINDOW + 100) + 3.0 * (count == WINDOW + 50)
        spike, health = after(
            health, jnp.asarray(rng.normal((loss, 0.5), (0.02, 0.02)), jnp.float32)
        )
        skipped += [count - WINDOW] * bool(spike)
    assert skipped[:21] == [50, *range(100, 120)] and skipped[-1] <= 100 + WINDOW // 2
