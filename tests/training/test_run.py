"""Whole runs of a micro model: stop and continue bit for bit, sharded against unsharded, what is written, what is refused."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.data import pipeline
from fp8jax.monitor.writers import read_metrics
from fp8jax.training import banner, losses
from fp8jax.training.calibration import calibrate
from fp8jax.training.checkpoint import Checkpoints, save_config
from fp8jax.training.evaluation import evaluate_run
from fp8jax.training.gradients import gradients
from fp8jax.training.step import TrainProgram
from tests.helpers.runs import EIGHT, MICRO, logged, micro, program_of, saved, train

# What configs/fog_paper.py changes, in a micro run whose history is full before it stops.
PAPER = {
    "monitor": {"every": 0},
    "fp8": {"history_length": 3, "power_of_two": False, "weight_scaling": "delayed"},
    "model": MICRO["model"] | {"rope_scaling_factor": 8.0},
    "optimizer": MICRO["optimizer"]
    | {
        "gradient_dtype": "bfloat16",
        "master_dtype": "float16",
        "first_moment": "float16",
        "second_moment": "float16",
    },
}


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, signal.SIGINT),
        pytest.param(
            {"training": {"steps": 8, "microbatches": 2}}, signal.SIGTERM, marks=pytest.mark.slow
        ),
        pytest.param({}, signal.SIGUSR1, marks=pytest.mark.slow),
        (
            {"training": {"steps": 8, "microbatches": 2}, "mesh": EIGHT, "monitor": {"every": 0}},
            signal.SIGTERM,
        ),
        (PAPER, signal.SIGINT),
        pytest.param(
            {"fp8": {"history_length": 3}, "mesh": EIGHT, "training": {"remat": "save_fp8"}},
            signal.SIGINT,
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "one device",
        "microbatches",
        "a scheduler's notice",
        "8 devices, microbatches",
        "the paper's settings",
        "8 devices, remat",
    ],
)
def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(
    tmp_path, stop_at, same_programs, changes, number
):
    """The three runs share their programs; `test_kills.py` continues in processes that compile their own."""
    config = micro(**changes)
    assert train(config, tmp_path / "whole") == 0
    stop_at(4, number)
    assert train(config, tmp_path / "parts") == 4
    assert Checkpoints(tmp_path / "parts", keep=1).latest_step() == 5
    stop_at(-1, number)
    assert train(config, tmp_path / "parts") == 0
    whole, whole_data = saved(config, tmp_path / "whole")
    parts, parts_data = saved(config, tmp_path / "parts")
    assert whole_data == parts_data and whole.keys() == parts.keys()
    assert any("history" in name for name in whole)
    for name, array in whole.items():
        assert array.tobytes() == parts[name].tobytes(), name
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def run_steps(config, count):
    """Losses, and the program's state, after some steps on the training batches."""
    program = program_of(config)
    batches = pipeline.train_batches(config)
    state = calibrate(program, program.init(), program.put(batches[0]))
    losses = []
    for index in range(count):
        state, metrics, _ = program.step(state, program.put(batches[index]))
        losses.append(float(metrics["loss"]))
    return losses, state


def test_eight_devices_agree_with_one_and_with_each_other():
    one, _ = run_steps(micro(), 20)
    eight, state = run_steps(micro(mesh=EIGHT), 20)
    assert abs(one[-1] - eight[-1]) < 1e-3
    for role, entry in state.scaling.items():
        for name, array in entry.items():
            copies = {np.asarray(shard.data).tobytes() for shard in array.addressable_shards}
            assert len(array.addressable_shards) == 8 and len(copies) == 1, (role, name)


def test_microbatches_give_the_gradients_of_the_whole_batch():
    one = program_of(micro(fp8={"recipe": "bf16"}, model=MICRO["model"] | {"dtype": "float32"}))
    two = program_of(
        micro(
            fp8={"recipe": "bf16"},
            model=MICRO["model"] | {"dtype": "float32"},
            training={"microbatches": 4},
        )
    )
    batch = pipeline.train_batches(one.config)[0]
    state = one.init()
    results = [
        gradients(state, p.put(batch), p.config, p.definition, p.recipes) for p in (one, two)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_tokens_of_microbatches_are_combined_by_maximum():
    """A sum would give larger amaxes than any microbatch has; keeping the last one, smaller ones."""
    config = micro(training={"microbatches": 2})
    program = program_of(config)
    current = program.recipes.scaled_by("current")
    batch, state = program.put(pipeline.train_batches(config)[0]), program.init()
    whole = gradients(state, batch, config, program.definition, current)[2]
    # A microbatch alone is given twice, because the loss is divided by the tokens of the whole batch.
    twice = [
        {name: jnp.stack([array[i], array[i]]) for name, array in batch.items()} for i in range(2)
    ]
    parts = [gradients(state, part, config, program.definition, current)[2] for part in twice]
    for role, amax in whole.items():
        np.testing.assert_array_equal(
            amax, np.maximum(parts[0][role], parts[1][role]), err_msg=role
        )
    assert any((np.asarray(parts[0][role]) != np.asarray(parts[1][role])).any() for role in whole)


def test_calibration_makes_the_first_step_see_tiny_gradients(monkeypatch):
    """Gradients near 1e-7 survive the first step's casts; with scales of 1, e5m2 flushes every one of them to zero."""
    original = losses.token_losses
    monkeypatch.setattr(
        losses, "token_losses", lambda logits, targets: 1e-7 * original(logits, targets)
    )
    config = micro()
    program = program_of(config)
    batch, state = program.put(pipeline.train_batches(config)[0]), program.init()
    calibrated = calibrate(program, state, batch)
    assert all(
        (np.asarray(entry["history"])[..., 0] > 0).all() for entry in calibrated.scaling.values()
    )
    seen, blind = (
        gradients(s, batch, config, program.definition, program.recipes)[1]["blocks"]
        for s in (calibrated, state)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen):
        assert (
            0 < float(jnp.abs(leaf.astype(jnp.float32)).max()) < 1e-6
            and float(jnp.mean(leaf != 0)) > 0.9
        ), path
    assert float(jnp.abs(blind["attention"]["qkv"]["w"].astype(jnp.float32)).max()) == 0


@pytest.mark.parametrize("where", ["params", "mask"])
def test_a_bad_step_changes_nothing_but_the_counters(where):
    config = micro()
    program = program_of(config)
    batch = program.put(pipeline.train_batches(config)[0])
    state = calibrate(program, program.init(), batch)
    if where == "params":
        broken = jax.tree.map(lambda leaf: leaf, state.params)
        broken["blocks"]["post_ffn"]["gain"] = (
            broken["blocks"]["post_ffn"]["gain"].at[0, 0].set(jnp.nan)
        )
        state = dataclasses.replace(state, params=broken)
    else:
        batch = batch | {"mask": batch["mask"].at[0, 0, 0].set(jnp.inf)}
    before = jax.tree.map(np.array, state)
    after, metrics, _ = program.step(state, batch)
    assert (
        int(metrics["bad_step"]) == 1 and int(after.health.bad_steps) == 1 and int(after.step) == 1
    )
    for name in ("params", "scaling", "opt_state"):
        for a, b in zip(
            jax.tree.leaves(getattr(before, name)),
            jax.tree.leaves(getattr(after, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("recipe", "overrides", "share"),
    [
        ("fp8_dpa", "", "100%"),
        ("bf16", "", "0%"),
        ("fp8_dpa", "mlp_down=bf16", None),
        ("fp8", "", None),
    ],
)
def test_start_up_counts_the_fp8_share_from_the_program(recipe, overrides, share):
    program = program_of(micro(fp8={"recipe": recipe, "overrides": overrides}))
    lines = banner.describe(program)
    line = next(line for line in lines if line.startswith("fp8"))
    assert any(
        line.startswith("data     the embedded corpus") and "3,558,175 tokens, 0.00 epochs" in line
        for line in lines
    )
    if share is None:
        # Multiply-adds a token, by hand: width 32, ffn 48, 2 heads and 1 KV head of 16, 32 positions; attention runs
        # two GEMMs forward and five backward, a linear layer one and two.
        linear = {
            "qkv": 3 * 32 * 64,
            "attention_out": 3 * 32 * 32,
            "mlp_up": 3 * 32 * 48,
            "mlp_down": 3 * 48 * 32,
        }
        attention = 7 * 2 * 16 * 32
        total = sum(linear.values()) + attention
        fp8 = total - (linear["mlp_down"] if overrides else attention)
        share = f"{fp8 / total:.0%}"
    assert f"recipe {recipe}, {share} of" in line and "emulated" in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run, and for each lowering of its step whether that was with statistics."""
    workdir, lowered, original = tmp_path_factory.mktemp("run"), [], TrainProgram.lower_step

    def counted(self, *, collect=False):
        lowered.append(collect)
        return original(self, collect=collect)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainProgram, "lower_step", counted)
        assert train(micro(), workdir) == 0
    return workdir, lowered


def test_run_writes_what_users_rely_on(finished):
    tmp_path, _ = finished
    entries = logged(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    assert {"loss", "grad_norm", "learning_rate", "tokens"} <= entries[0].keys()
    assert all(
        entry["data_wait_seconds"] >= 0 for entry in read_metrics(tmp_path / "metrics.jsonl")[3:5]
    )
    assert {"kurtosis/qkv_avg", "kurtosis/qkv_layer001", "fp8/saturated_fraction"} <= entries[
        2
    ].keys()
    assert "kurtosis/qkv_avg" not in entries[3] and "held_out/bits_per_byte" in entries[3]
    assert json.loads((tmp_path / "config.json").read_text())["training"]["steps"] == 8
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 8
    assert list((tmp_path / "tensorboard").iterdir())
    assert not (tmp_path / "profile").exists()
    found = evaluate_run(tmp_path)
    assert found["bytes"] == 466_853 and found["step"] == 8


def test_the_step_compiles_once_in_a_run(finished):
    assert sorted(finished[1]) == [False, True]


def test_switching_fp8_on_calibrates_again(tmp_path):
    plain = {"evaluation": {"batches": 1}, "monitor": {"every": 0}, "checkpoint": {"every": 0}}
    bf16 = micro(fp8={"recipe": "bf16"}, training={"steps": 4}, **plain)
    assert train(bf16, tmp_path) == 0
    fp8 = micro(training={"steps": 6}, **plain)
    save_config(tmp_path, fp8)  # by a start that dies before its first save
    assert train(fp8, tmp_path) == 0
    arrays, _ = saved(micro(), tmp_path)
    assert all((array[..., 0] > 0).all() for name, array in arrays.items() if "history" in name)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "calibrated"] == [4]


def test_a_directory_of_another_model_is_refused(finished):
    with pytest.raises(
        config_lib.ConfigError, match=r"config.model.layers: 3, but the run in .* has 2"
    ):
        train(micro(model=MICRO["model"] | {"layers": 3}), finished[0])
