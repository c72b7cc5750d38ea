"""A rehearsal finds, before the run, each fault that would end it later; one test a kind of fault."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from configs import common
from fp8jax import config as config_lib
from fp8jax.audit import limits, targets
from fp8jax.audit.limits import Limit
from fp8jax.cli import audit
from fp8jax.config import ARCHITECTURES
from fp8jax.numerics import statistics
from fp8jax.numerics.attention import pallas as attention_pallas
from fp8jax.training import fit_target, rehearsal
from fp8jax.training.rehearsal import Rehearsed, rehearse

VALUES = {
    "model": {"layers": 2, "width": 32, "ffn_width": 32, "heads": 2, "kv_heads": 1},
    "data": {"sequence_length": 32},
    "training": {"steps": 8, "batch_size": 16},
    "optimizer": {"warmup_steps": 2},
}


def config_of(**changes):
    return config_lib.from_dict(
        {name: VALUES.get(name, {}) | changes.get(name, {}) for name in VALUES | changes}
    )


@pytest.fixture(scope="module")
def two():
    """Two devices of this machine, as if they were not here: attention is not checked on them."""
    found = targets.resolve("local")
    return dataclasses.replace(found, devices=found.devices[:2], kind="planned")


def failed(found):
    return {row.name: row.error for row in (*found.programs, *found.checks) if not row.ok}


def test_a_sound_run_passes(two):
    found = rehearse(config_of(), two, compiling=False)
    assert found.ok and failed(found) == {}
    assert {"init", "calibration", "step", "statistics", "evaluation"} <= {
        row.name for row in found.programs
    }
    assert {row.name for row in found.checks} == {"data", "mesh", "fallback"}
    by_name = {row.name: row for row in found.programs}
    assert by_name["step"].fp8_share == by_name["statistics"].fp8_share == 1.0
    assert by_name["evaluation"].fp8_share == 0.0


def test_a_kernel_that_returns_a_list_on_a_mesh(two, monkeypatch):
    """Only steps with statistics call it, and only `shard_map` tells a list from a tuple."""
    original = attention_pallas._scores
    monkeypatch.setattr(attention_pallas, "_scores", lambda *given: list(original(*given)))
    config = config_of(
        fp8={"attention_backend": "pallas"},
        model={"width": 128},
        data={"sequence_length": 128},
        mesh={"fsdp": 2},
    )
    found = rehearse(config, two, compiling=False)
    assert set(failed(found)) == {"statistics"}, failed(found)


def test_a_count_that_does_not_fit_its_type(two, monkeypatch):
    original = statistics.combine

    def counted(parts, *given, **named):
        return original(parts, *given, **named) if not parts else jnp.int32(2**31)

    monkeypatch.setattr(statistics, "combine", counted)
    found = rehearse(config_of(training={"microbatches": 2}), two, compiling=False)
    assert "OverflowError" in failed(found)["statistics"] and set(failed(found)) == {"statistics"}


def test_a_data_directory_that_is_empty(two, tmp_path):
    config = config_of(data={"source": str(tmp_path), "tokenizer": "byte"})
    found = rehearse(config, two, compiling=False)
    assert not found.ok and str(tmp_path) in failed(found)["data"]
    assert {"step", "statistics", "evaluation"} <= {row.name for row in found.programs}


def test_a_mesh_that_does_not_divide(two):
    found = rehearse(config_of(mesh={"fsdp": 3}), two, compiling=False)
    assert list(failed(found)) == ["mesh"]
    assert {"step", "statistics", "evaluation"} <= {row.name for row in found.programs}
    assert "config.mesh" in failed(found)["mesh"]


def test_a_fallback_that_cannot_run(two):
    config = config_of(warning={"action": "fallback", "fallback": "mlp_gate"})
    found = rehearse(config, two, compiling=False)
    assert "mlp_gate" in failed(found)["fallback"]


def test_data_faults_do_not_hide_those_of_programs(two, tmp_path, monkeypatch):
    def broken(*given, **named):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(statistics, "combine", broken)
    config = config_of(
        data={"source": str(tmp_path), "tokenizer": "byte"}, training={"microbatches": 2}
    )
    found = rehearse(config, two, compiling=False)
    assert {"data", "statistics"} <= set(failed(found))


@pytest.fixture(scope="module")
def traced(two):
    """What a rehearsal knows of a run, without the compiler."""
    return rehearsal._traced(config_of(training={"evaluation_limit": 2, "start_limit": 30}), two)


@pytest.mark.parametrize(
    ("seconds", "faults"),
    [
        ({"evaluation": 1.0, "step": 10.0}, []),
        ({"evaluation": 5.0, "step": 10.0}, ["evaluation limit"]),
        ({"evaluation": 1.0, "step": 20.0, "init": 20.0}, ["start limit"]),
        ({"evaluation": 1.0, "step": 1.0, "statistics": 4000.0}, ["step limit"]),
    ],
)
def test_what_would_outlast_its_limit(two, traced, seconds, faults):
    rows = {name: Rehearsed(name, True, seconds=taken) for name, taken in seconds.items()}
    found = [row for row in rehearsal._limits(traced, two, rows) if not row.ok]
    assert [row.name for row in found] == faults
    assert all("config.training." in row.error and "raise it" in row.error for row in found)


def test_a_batch_of_an_evaluation_that_takes_longer_than_its_limit(two, traced, monkeypatch):
    monkeypatch.setattr(rehearsal, "_measured_rate", lambda: 1.0)  # FLOP/s
    found = {row.name: row.ok for row in rehearsal._limits(traced, two, {})}
    assert found == {"start limit": True, "step limit": False, "evaluation limit": False}


def test_memory_that_does_not_fit(monkeypatch, tmp_path, capsys):
    """As the command says it: exit code 1, one line, and the same in JSON."""
    monkeypatch.setattr(
        limits, "of_target", lambda target: Limit(1_100_000, 1_100_000, "for this test")
    )
    monkeypatch.setattr(rehearsal, "programs", lambda *given: {})
    words = [
        f"--config.{name}.{field}={value}"
        for name in VALUES
        for field, value in VALUES[name].items()
    ]
    words += [
        "--config.mesh.data=8",
        "--config.training.batch_size=64",
        f"--json={tmp_path / 'found.json'}",
    ]
    assert (
        audit.main(["--config=configs/fp8_base.py:tiny", "--target=local", "--rehearse", *words])
        == 1
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fits"] is False
    (check,) = (row for row in found["checks"] if row["name"] == "memory")
    assert (
        not check["ok"]
        and "does not fit" in check["error"]
        and "devices would do" in check["error"]
    )
    assert "does not fit" in capsys.readouterr().out


def test_a_program_beside_a_run_needs_its_state_too(two):
    """An evaluation takes parameters alone, and the optimizer's state is in memory all the same."""
    memory = fit_target.program.Memory({"params": 10, "batch": 3}, 13, 100, 1)
    gpu = dataclasses.replace(two, platform="gpu")
    assert rehearsal._peak("evaluation", memory, 30, gpu) == 13 + 100 + 1 + 20
    assert rehearsal._peak("init", memory, 30, gpu) == 114


def test_attention_that_computes_something_else_on_devices_at_hand(two, monkeypatch):
    def disagrees(program):
        raise config_lib.ConfigError("config.fp8.attention_backend: disagrees")

    monkeypatch.setattr(rehearsal, "check_attention", disagrees)
    monkeypatch.setattr(rehearsal, "programs", lambda *given: {})
    found = rehearse(config_of(), dataclasses.replace(two, kind="local"), compiling=False)
    assert failed(found) == {"attention": "config.fp8.attention_backend: disagrees"}


def test_the_largest_size_is_rehearsed(two):
    config = config_lib.from_dict(common.make("70b", architecture="fog_max", recipe="fp8_dpa"))
    found = rehearse(config, two, compiling=False)
    assert failed(found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", list(common.SIZES))
def test_every_preset_is_rehearsed(size, architecture, two):
    config = config_lib.from_dict(common.make(size, architecture=architecture, recipe="fp8_dpa"))
    found = rehearse(config, two, compiling=False)
    assert failed(found) == {}


def test_a_small_run_compiled(tmp_path, capsys):
    """Every program of it; the JSON as documented."""
    words = [
        f"--config.{name}.{field}={value}"
        for name in VALUES
        for field, value in VALUES[name].items()
    ]
    words += [
        "--config.model.layers=1",
        "--config.mesh.data=8",
        f"--json={tmp_path / 'found.json'}",
    ]
    assert (
        audit.main(["--config=configs/fp8_base.py:tiny", "--target=local", "--rehearse", *words])
        == 0
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fits"] is True
    for row in found["programs"]:
        assert {"name", "ok", "peak_bytes_per_device", "error"} <= row.keys()
        assert row["ok"] and row["peak_bytes_per_device"] > 0 and row["error"] == ""
    assert "nothing would fail" in capsys.readouterr().out
    assert jax.devices()[0].platform == "cpu"
