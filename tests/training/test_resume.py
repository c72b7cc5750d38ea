"""A run that goes on with other FP8 settings than its checkpoint was made with: what fits is kept, the rest is calibrated anew."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.config import DataError
from fp8jax.models import gemms
from fp8jax.monitor.run_log import RunLog
from fp8jax.monitor.stages import Stages
from fp8jax.monitor.writers import Silent
from fp8jax.numerics.scaling import role_of
from fp8jax.training import scaling_state, starting
from fp8jax.training.calibration import calibrate, fresh_scaling
from fp8jax.training.checkpoint import Checkpoints
from fp8jax.training.resume import Position, resume
from fp8jax.training.run import Run
from tests.helpers.runs import logged, micro, program_of

LINEAR = {"qkv", "attention_out", "mlp_up", "mlp_down"}
ATTENTION = {"attention_scores", "attention_values"}
ALL = LINEAR | ATTENTION

WEIGHTS_TOO = {"weight_scaling": "delayed"}

# Before, after, roles that are calibrated anew, why.
CHANGES = {
    "nothing": ({}, {}, set(), ""),
    "fp8 on": ({"recipe": "bf16"}, {}, ALL, "not in the checkpoint"),
    "fp8 off": ({}, {"recipe": "bf16"}, set(), ""),
    "attention too": ({"recipe": "fp8"}, {}, ATTENTION, "not in the checkpoint"),
    "history": ({"history_length": 16}, {"history_length": 8}, ALL, "history_length was 16, is 8"),
    "format": ({}, {"gradient_format": "e4m3"}, ALL, "was float8_e5m2, is float8_e4m3fn"),
    "margin": ({"margin": 1}, {}, ALL, "margin was 1, is 0"),
    "rounding": ({}, {"power_of_two": False}, ALL, "power_of_two was True, is False"),
    "role": ({"overrides": "mlp_down=bf16"}, {}, {"mlp_down"}, "not in the checkpoint"),
    "layer": ({"overrides": "mlp_down@1=bf16"}, {}, {"mlp_down"}, "was bf16 in layer 1"),
    "layer out": ({}, {"overrides": "mlp_down@1=bf16,qkv@0=current"}, set(), ""),
    "scaling": ({"overrides": "qkv=current"}, {}, {"qkv"}, "not in the checkpoint"),
    "weights too": ({}, WEIGHTS_TOO, {f"{role}.w" for role in LINEAR}, "not in the checkpoint"),
    "weights no more": (WEIGHTS_TOO, {}, set(), ""),
    "layer and its weight": (
        WEIGHTS_TOO | {"overrides": "mlp_down@1=bf16"},
        WEIGHTS_TOO,
        {"mlp_down", "mlp_down.w"},
        "was bf16 in layer 1",
    ),
    "reduction": ({}, {"history_reduction": "most_recent"}, set(), ""),
}


@functools.cache
def program(**fp8):
    return program_of(micro(fp8={"history_length": 8} | fp8))


def trained(run):
    """A state of step 3 with scales as two steps of delayed scaling leave them: zeros where a layer is not cast."""
    state, recipes = run.init(), run.recipes
    scaling, random = state.scaling, np.random.default_rng(0)
    for _ in range(2):
        amaxes = {
            role: jnp.asarray(random.uniform(1, 3, entry["scale"].shape), jnp.float32)
            for role, entry in scaling.items()
        }
        for role in amaxes:
            in_fp8 = [layer[role_of(role)].fp8 for layer in recipes.blocks]
            amaxes[role] = amaxes[role] * jnp.asarray(in_fp8, jnp.float32)[:, None]
        scaling = gemms.update_scaling(scaling, amaxes, recipes)
    return dataclasses.replace(state, step=jnp.int32(3), scaling=scaling)


def resumed(tmp_path, before, after, *, recorded):
    """State saved by one program, and what another makes of it; `recorded`: as checkpoints are now."""
    state = trained(program(**before))
    data = {"step": 3} | (
        {"scaling": scaling_state.record(program(**before).recipes)} if recorded else {}
    )
    said = []
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state.items(), json.loads(json.dumps(data)))
        checkpoints.wait()
        return state, resume(program(**after), checkpoints, said.append), said


# An older checkpoint tells by its scales alone, so another reduction looks like other settings: calibrated anew, which is safe.
@pytest.mark.parametrize(
    ("change", "recorded"),
    [(change, True) for change in CHANGES] + [(c, False) for c in CHANGES if c != "reduction"],
)
def test_what_fits_is_kept_by_role(change, recorded, tmp_path):
    before, after, anew, why = CHANGES[change]
    state, found, said = resumed(tmp_path, before, after, recorded=recorded)
    assert set(found.calibrate) == anew and found.step == 3
    assert found.state.scaling.keys() == program(**after).abstract_state.scaling.keys()
    assert len(said) == bool(anew) and all(
        "calibrated anew" in line and "\n" not in line for line in said
    )
    if recorded:
        assert all(why in line for line in said)
    for role, entry in found.state.scaling.items():
        if role in anew:
            assert not np.any(entry["history"]) and np.all(np.asarray(entry["scale"]) == 1)
        else:
            jax.tree.map(np.testing.assert_array_equal, entry, state.scaling[role])
    jax.tree.map(np.testing.assert_array_equal, found.state.params, state.params)


def test_calibration_leaves_the_other_roles_as_they_are():
    run = program()
    state, random = trained(run), np.random.default_rng(0)
    tokens = random.integers(0, 200, (16, 32))
    batch = run.put(
        {
            "inputs": tokens.astype(np.int32),
            "targets": tokens.astype(np.int32),
            "mask": np.ones((16, 32), np.float32),
        }
    )
    before = jax.device_get(state.scaling)
    after = calibrate(
        run,
        dataclasses.replace(state, scaling=state.scaling | {"qkv": fresh_scaling(run)["qkv"]}),
        batch,
        ["qkv"],
    ).scaling
    assert np.all(np.asarray(after["qkv"]["history"])[..., 0] > 0) and not np.any(
        np.asarray(after["qkv"]["history"])[..., 1:]
    )
    for role in ALL - {"qkv"}:
        jax.tree.map(np.testing.assert_array_equal, after[role], before[role])


def calibrating(monkeypatch, masked):
    """A run about to calibrate, whose first batches are masked as a whole; its messages."""
    run, said = program(), []

    def batches(config, rows):
        tokens = np.random.default_rng(0).integers(0, 200, (16, 32)).astype(np.int32)
        whole = {"inputs": tokens, "targets": tokens, "mask": np.ones((16, 32), np.float32)}
        return [whole | {"mask": np.zeros((16, 32), np.float32)}] * masked + [whole] * 4

    monkeypatch.setattr(starting.pipeline, "train_batches", batches)
    log = RunLog(Silent(), types.SimpleNamespace(message=said.append))
    return Run(run, run.init(), 0, Position(), warning=None), log, said


def test_scales_are_found_on_the_first_batch_that_has_targets(monkeypatch):
    """On a batch without, gradients are zero and their scales would stay at 1."""
    run, log, said = calibrating(monkeypatch, masked=2)
    starting.find_scales(run, tuple(ALL), log, Stages(False))
    assert all(
        np.all(np.asarray(entry["history"])[..., 0] > 0) for entry in run.state.scaling.values()
    )
    assert said == ["fp8      scales calibrated on the batch of step 3"]


def test_data_without_any_target_is_refused(monkeypatch):
    run, log, _ = calibrating(monkeypatch, masked=3)
    monkeypatch.setattr(starting, "CALIBRATION_BATCHES", 3)
    with pytest.raises(
        DataError, match="the first 3 batches from step 1 on have no token to predict"
    ):
        starting.find_scales(run, tuple(ALL), log, Stages(False))


@pytest.mark.slow
def test_a_command_killed_right_after_fp8_is_switched_on_continues(tmp_path):
    """The real one: BF16, then FP8 and SIGKILL after its first step, then FP8 again."""

    def command(*flags):
        fields = (
            "model.layers=2",
            "model.width=64",
            "data.sequence_length=64",
            "training.batch_size=4",
            "evaluation.every=0",
            "evaluation.batches=1",
            "checkpoint.every=0",
            "monitor.every=0",
            "log.every=1",
            "log.report_minutes=0",
        )
        return [
            sys.executable,
            "train.py",
            "--config=configs/fp8_base.py:tiny",
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{field}" for field in (*fields, *flags)),
        ]

    subprocess.run(command("fp8.recipe=bf16", "training.steps=3"), check=True, capture_output=True)
    second = subprocess.Popen(
        command("training.steps=100000"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 600
    while (
        len(log.read_text().splitlines()) < 4 and second.poll() is None and time.monotonic() < end
    ):
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    third = subprocess.run(command("training.steps=6"), capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert (
        "fp8 scales are calibrated anew" in third.stdout
        and "(not in the checkpoint)" in third.stdout
    )
    assert logged(tmp_path / "run")[-1]["step"] == 6
